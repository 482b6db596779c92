"""Which pictures a micro-batch holds: a function of (seed, its number) alone, so a run goes on from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vitexp.errors import UserError
from vitexp.seeding import epoch_order


@dataclass(frozen=True)
class Position:
    """One micro-batch of one rank."""

    seed: int
    epoch: int
    index: np.ndarray  # (b,) positions in the split


def effective_batch_size(num_pictures: int, batch_size: int, world: int) -> int:
    """Pictures of each rank's batch: `batch_size`, or fewer where the data set does not fill one batch."""
    if batch_size < 1:
        raise UserError(f"train.batch_size={batch_size} is not at least 1")
    if num_pictures < world:
        raise UserError(f"{num_pictures} training pictures for runtime.processes={world}: each needs at least one")
    return min(batch_size, num_pictures // world)


def micro_batches_per_epoch(num_pictures: int, batch_size: int, world: int) -> int:
    """Whole batches of all ranks together; what is left over waits for another epoch's order."""
    return num_pictures // (effective_batch_size(num_pictures, batch_size, world) * world)


def train_positions(
    num_pictures: int, *, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Position]:
    """Endless, from micro-batch number `start` of the run, at no cost for those before it.

    Micro-batch m of an epoch is the m-th stretch of that epoch's order; the ranks share each stretch, so two ranks
    with half the batch see what one sees."""
    size = effective_batch_size(num_pictures, batch_size, world)
    per_epoch = micro_batches_per_epoch(num_pictures, batch_size, world)
    epoch, m = divmod(start, per_epoch)
    while True:
        order = epoch_order(seed, epoch, num_pictures)
        for share in range(m * world + rank, per_epoch * world, world):
            yield Position(seed, epoch, order[share * size : (share + 1) * size])
        epoch, m = epoch + 1, 0


def eval_positions(num_pictures: int, *, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Position]:
    """Every picture once over all ranks, in order; the last batch may be short, and ranks may differ by one picture."""
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} for evaluation is not at least 1")
    share = np.array_split(np.arange(num_pictures), world)[rank]
    for begin in range(0, len(share), batch_size):
        yield Position(0, 0, share[begin : begin + batch_size])
