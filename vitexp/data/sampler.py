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
    epoch: int | np.ndarray  # (b,) where pictures are repeated: then of each one's view, no two of which are the same
    index: np.ndarray  # (b,) positions in the split


def effective_batch_size(num_pictures: int, batch_size: int, world: int, *, repeats: int = 1) -> int:
    """Pictures of each rank's batch: `batch_size`, or fewer where the data set does not fill one batch."""
    if batch_size < 1:
        raise UserError(f"train.batch_size={batch_size} is not at least 1")
    if num_pictures < world:
        raise UserError(f"{num_pictures} training pictures for runtime.processes={world}: each needs at least one")
    return min(batch_size, samples_per_epoch(num_pictures, repeats=repeats) // world)


def micro_batches_per_epoch(num_pictures: int, batch_size: int, world: int, *, repeats: int = 1) -> int:
    """Whole batches of all ranks together; what is left over waits for another epoch's order."""
    size = effective_batch_size(num_pictures, batch_size, world, repeats=repeats)
    return samples_per_epoch(num_pictures, repeats=repeats) // (size * world)


def samples_per_epoch(num_pictures: int, *, repeats: int = 1) -> int:
    """Views that an epoch shows: as many as there are pictures. With repeats whole 256s of them, as DeiT's official
    code takes; that code shows nothing of fewer than 256 pictures, this one all that many views."""
    if repeats < 1:
        raise UserError(f"{repeats} views of each picture in a batch: at least 1 is needed")
    return num_pictures if repeats == 1 or num_pictures < 256 else num_pictures // 256 * 256


def train_positions(
    num_pictures: int,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    repeats: int = 1,
) -> Iterator[Position]:
    """Endless, from micro-batch number `start` of the run, at no cost for those before it.

    Micro-batch m of an epoch is the m-th stretch of that epoch's order; the ranks share each stretch, so two ranks
    with half the batch see what one sees. With `repeats` above 1 see repeated_order."""
    size = effective_batch_size(num_pictures, batch_size, world, repeats=repeats)
    per_epoch = micro_batches_per_epoch(num_pictures, batch_size, world, repeats=repeats)
    epoch, m = divmod(start, per_epoch)
    while True:
        order = epoch_order(seed, epoch, num_pictures)
        if repeats == 1:
            for share in range(m * world + rank, per_epoch * world, world):
                yield Position(seed, epoch, order[share * size : (share + 1) * size])
        else:
            index, copy = repeated_order(order, repeats=repeats, rank=rank, world=world)
            for begin in range(m * size, per_epoch * size, size):
                batch = slice(begin, begin + size)
                yield Position(seed, epoch * repeats + copy[batch], index[batch])
        epoch, m = epoch + 1, 0


def repeated_order(order: np.ndarray, *, repeats: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
    """(index, copy) of one rank's share of an epoch with repeated augmentation (Hoffer et al. 2020, arXiv:1901.09335).

    Every picture of `order` comes `repeats` times in a row, the views dealt out to the ranks in turn, until as many
    were shown as there are pictures: an epoch sees about one in `repeats` of them. DeiT's official sampler."""
    total = samples_per_epoch(len(order), repeats=repeats)
    places = np.arange(rank, total, world)[: total // world]
    return order[places // repeats], places % repeats


def eval_positions(num_pictures: int, *, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Position]:
    """Every picture once over all ranks, in order; the last batch may be short, and ranks may differ by one picture."""
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} for evaluation is not at least 1")
    share = np.array_split(np.arange(num_pictures), world)[rank]
    for begin in range(0, len(share), batch_size):
        yield Position(0, 0, share[begin : begin + batch_size])
