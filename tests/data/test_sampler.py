"""Repeated augmentation: the official sampler's order, and what a run needs of it beside."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from vitexp.data.sampler import (
    Position,
    effective_batch_size,
    micro_batches_per_epoch,
    repeated_order,
    samples_per_epoch,
    train_positions,
)
from vitexp.errors import UserError
from vitexp.seeding import epoch_order, uniforms

with np.load(Path(__file__).parents[1] / "golden" / "deit_rasampler.npz") as arrays:
    GOLDEN = dict(arrays)
SEQUENCES = [name for name in GOLDEN if "rank" in name]


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_official_sequence_is_reproduced_from_its_order(name: str) -> None:
    found = re.fullmatch(r"n(\d+)_w(\d+)_rep(\d+)_(?:epoch(\d+)|noshuffle)_rank(\d+)", name)
    assert found
    count, world, repeats, rank = (int(found[i]) for i in (1, 2, 3, 5))
    shuffled = found[4] is not None  # the official seed is the epoch's number
    generator = torch.Generator().manual_seed(int(found[4] or 0))
    order = torch.randperm(count, generator=generator).numpy() if shuffled else np.arange(count)
    index, copy = repeated_order(order, repeats=repeats, rank=rank, world=world)
    assert np.array_equal(index, GOLDEN[name])
    assert copy.shape == index.shape


def test_few_pictures_are_shown_where_the_official_code_shows_none() -> None:
    assert GOLDEN["n200_w2_len"] == 0
    assert samples_per_epoch(200, repeats=3) == 200
    assert samples_per_epoch(255, repeats=3) == 255
    assert samples_per_epoch(600, repeats=3) == 512
    assert samples_per_epoch(600) == 600
    index, _ = repeated_order(np.arange(200), repeats=3, rank=1, world=2)
    assert index.tolist() == [place // 3 for place in range(1, 200, 2)]


def run_of(count: int, **options: int) -> list[Position]:
    per_epoch = micro_batches_per_epoch(
        count, options["batch_size"], options.get("world", 1), repeats=options["repeats"]
    )
    return list(itertools.islice(train_positions(count, seed=5, **options), 2 * per_epoch))


def test_an_epoch_shows_a_third_of_the_pictures_three_times_with_views_of_their_own() -> None:
    positions = run_of(600, batch_size=60, repeats=3)
    assert len(positions) == 2 * (512 // 60)
    first = np.concatenate([position.index for position in positions[:8]])
    assert np.array_equal(first, np.repeat(epoch_order(5, 0, 600), 3)[:480])
    views = [(i, v) for p in positions for i, v in zip(p.index.tolist(), np.asarray(p.epoch).tolist(), strict=True)]
    assert len(set(views)) == len(views)  # also of pictures that both epochs show
    position = positions[0]
    drawn = uniforms(position.seed, position.epoch, position.index, 4)
    assert len(np.unique(drawn, axis=0)) == 60
    assert np.array_equal(drawn[4], uniforms(5, 1, position.index[4:5], 4)[0])  # the second copy is view 1 of epoch 0


def test_ranks_share_each_batch_and_any_micro_batch_is_a_start() -> None:
    alone = run_of(600, batch_size=64, repeats=3)
    ranks = [run_of(600, batch_size=32, repeats=3, world=2, rank=rank) for rank in (0, 1)]
    for whole, halves in zip(alone, zip(*ranks, strict=True), strict=True):
        for part in ("index", "epoch"):
            dealt = np.stack([getattr(half, part) for half in halves], axis=1).ravel()
            assert np.array_equal(getattr(whole, part), dealt)
    for start in (3, 8, 11):
        later = next(train_positions(600, batch_size=64, seed=5, start=start, repeats=3))
        assert np.array_equal(later.index, alone[start].index)
        assert np.array_equal(later.epoch, alone[start].epoch)


def test_batches_fit_what_an_epoch_shows() -> None:
    assert effective_batch_size(300, 1000, 2, repeats=3) == 128
    assert micro_batches_per_epoch(300, 1000, 2, repeats=3) == 1
    assert micro_batches_per_epoch(300, 1000, 2) == 1
    assert effective_batch_size(300, 1000, 2) == 150
    with pytest.raises(UserError, match="0 views"):
        micro_batches_per_epoch(300, 10, 1, repeats=0)
