"""Batches as a function of position: whoever makes them, however many, from wherever."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.pictures import library, picture, write_folder, write_parquet
from vitexp.data.images import Images, Source
from vitexp.data.loader import (
    CachedSplit,
    Split,
    StreamedSplit,
    auto_workers,
    effective_batch_size,
    eval_batches,
    micro_batches_per_epoch,
    open_split,
    train_batches,
)
from vitexp.data.sources.digits import digits
from vitexp.data.sources.fake import FakeImages, fake
from vitexp.data.sources.folder import folder
from vitexp.data.sources.parquet import parquet
from vitexp.data.transforms import PadCropFlip, ResizeCenterCrop, ResizedCropFlip, Transform
from vitexp.errors import BadImage, UserError
from vitexp.seeding import epoch_order
from vitexp.types import Batch

TRANSFORMS = [PadCropFlip(16), ResizedCropFlip(16), ResizeCenterCrop(16)]


def made_up(count: int = 37, size: tuple[int, int] = (8, 8)) -> FakeImages:
    return FakeImages(first=0, count=count, num_classes=5, image_size=size, channels=3, seed=0)


def some(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.targets, y.targets) and torch.equal(x.index, y.index)
        for x, y in zip(a, b, strict=True)
    )


def joined(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(part, key) for part in parts]) for key in ("images", "targets", "index")))


@pytest.fixture(params=TRANSFORMS, ids=lambda transform: type(transform).__name__)
def transform(request: pytest.FixtureRequest) -> Transform:
    return request.param


def both(images: Images, transform: Transform) -> tuple[Split, Split]:
    return tuple(open_split(images, transform, cache=cache) for cache in ("memory", "none"))


def test_cached_and_streamed_batches_are_equal(transform: Transform) -> None:
    cached, streamed = both(made_up(), transform)
    assert isinstance(cached, CachedSplit)
    assert isinstance(streamed, StreamedSplit)
    options = {"batch_size": 8, "seed": 3}
    first = some(train_batches(cached, **options), 10)
    assert first[0].images.dtype == torch.uint8
    assert first[0].images.shape == (8, 3, 16, 16)
    assert equal(first, some(train_batches(streamed, workers=0, **options), 10))


def test_the_number_of_workers_changes_nothing() -> None:
    split = open_split(made_up(), ResizedCropFlip(16), cache="none")
    options = {"batch_size": 8, "seed": 3, "start": 2}
    alone = some(train_batches(split, workers=0, **options), 9)
    for workers in (1, 2):
        assert equal(alone, some(train_batches(split, workers=workers, **options), 9))


def test_a_run_goes_on_from_any_micro_batch(transform: Transform) -> None:
    split = open_split(made_up(), transform)
    whole = some(train_batches(split, batch_size=8, seed=0), 14)  # 4 an epoch
    for start in range(14):
        assert equal(whole[start:], some(train_batches(split, batch_size=8, seed=0, start=start), 14 - start))


def test_an_epoch_is_its_order_cut_up_and_the_rest_is_dropped() -> None:
    split = open_split(made_up(), PadCropFlip(16))
    batches = some(train_batches(split, batch_size=8, seed=5), 8)
    for epoch in range(2):
        seen = joined(batches[4 * epoch : 4 * epoch + 4])
        assert seen.index.tolist() == epoch_order(5, epoch, 37)[:32].tolist()
        assert torch.equal(seen.targets, seen.index % 5)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_a_share_of_the_batch_see_what_one_sees(transform: Transform, world: int) -> None:
    split = open_split(made_up(), transform)
    alone = some(train_batches(split, batch_size=12, seed=0, start=1), 7)
    shares = [
        some(train_batches(split, batch_size=12 // world, seed=0, start=1, rank=rank, world=world), 7)
        for rank in range(world)
    ]
    assert equal(alone, [joined(list(parts)) for parts in zip(*shares, strict=True)])


def test_augmentation_depends_on_seed_epoch_and_picture_alone() -> None:
    split = open_split(made_up(), PadCropFlip(16))

    def of_picture(number: int, epoch: int, batch_size: int, seed: int) -> torch.Tensor:
        per_epoch = micro_batches_per_epoch(37, batch_size, 1)
        batches = some(train_batches(split, batch_size=batch_size, seed=seed, start=epoch * per_epoch), per_epoch)
        seen = joined(batches)
        return seen.images[seen.index == number]

    number = int(epoch_order(1, 4, 37)[0])
    here = of_picture(number, 4, 8, 1)
    assert torch.equal(here, of_picture(number, 4, 5, 1))
    others = [of_picture(number, epoch, 37, seed) for epoch, seed in ((5, 1), (6, 1), (4, 2), (4, 3))]
    assert not all(torch.equal(here, other) for other in others)


def test_making_batches_leaves_the_global_random_numbers_alone() -> None:
    split = open_split(made_up(), ResizedCropFlip(16), cache="none")
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global one is what must stay untouched
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for workers in (0, 2):
        some(train_batches(split, batch_size=8, seed=0, workers=workers), 3)
        list(eval_batches(split, batch_size=8, workers=workers))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_evaluation_counts_every_picture_once(world: int, batch_size: int) -> None:
    split = open_split(made_up(23), ResizeCenterCrop(16))
    seen = [list(eval_batches(split, batch_size=batch_size, rank=rank, world=world)) for rank in range(world)]
    index = torch.cat([batch.index for batches in seen for batch in batches])
    assert index.tolist() == list(range(23))
    assert max(len(batch.index) for batches in seen for batch in batches) <= batch_size
    sizes = [sum(len(batch.index) for batch in batches) for batches in seen]
    assert max(sizes) - min(sizes) <= 1
    for batch in itertools.chain(*seen):
        assert torch.equal(batch.targets, batch.index % 5)


def test_evaluation_of_fewer_pictures_than_ranks_gives_some_ranks_none() -> None:
    split = open_split(made_up(2), ResizeCenterCrop(16))
    sizes = [len(list(eval_batches(split, batch_size=4, rank=rank, world=3))) for rank in range(3)]
    assert sizes == [1, 1, 0]


def test_evaluation_by_workers_is_the_same() -> None:
    split = open_split(made_up(23), ResizeCenterCrop(16), cache="none")
    alone = list(eval_batches(split, batch_size=5, workers=0))
    assert equal(alone, list(eval_batches(split, batch_size=5, workers=2)))


def test_a_batch_larger_than_the_data_shrinks() -> None:
    assert effective_batch_size(10, 64, 1) == 10
    assert effective_batch_size(10, 64, 3) == 3
    assert micro_batches_per_epoch(10, 64, 3) == 1
    split = open_split(made_up(10), PadCropFlip(16))
    for batch in some(train_batches(split, batch_size=64, seed=0), 3):
        assert sorted(batch.index.tolist()) == list(range(10))
    with pytest.raises(UserError, match=r"2 training pictures for runtime\.processes=3"):
        effective_batch_size(2, 1, 3)
    with pytest.raises(UserError, match=r"train\.batch_size=0"):
        effective_batch_size(2, 0, 1)
    with pytest.raises(UserError, match=r"train\.workers=-1"):
        next(train_batches(split, batch_size=2, seed=0, workers=-1))


def test_parquet_and_folder_of_the_same_pictures_give_identical_batches(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", library(9))
    write_parquet(tmp_path / "a.parquet", library(9))
    sources: list[Source] = [folder(str(tmp_path / "f")), parquet(str(tmp_path / "a.parquet"))]
    runs = [
        some(train_batches(open_split(source.train, PadCropFlip(16), cache=cache), batch_size=4, seed=0, workers=0), 9)
        for source in sources
        for cache in ("memory", "none")
    ]
    assert all(equal(runs[0], run) for run in runs[1:])


# ---- What is kept in memory ------------------------------------------------------------------------------------------


def test_auto_keeps_small_pictures_of_one_size_and_says_so() -> None:
    split = open_split(digits().train, PadCropFlip(32))
    assert isinstance(split, CachedSplit)
    assert split.note.startswith("train: 1,438 pictures in memory (")
    assert auto_workers(split) == 0


def test_auto_streams_pictures_of_different_sizes_and_says_so(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"cat/{n}.jpg": picture(n, 10 + n, 12) for n in range(5)})
    split = open_split(folder(str(tmp_path), val_fraction=0).train, PadCropFlip(16), name="train")
    assert isinstance(split, StreamedSplit)
    assert split.note == "train: 5 pictures, decoded as needed (their sizes differ)"
    assert 1 <= auto_workers(split) <= 8


class OneOdd:
    """97 pictures of one size, and one of another where the probe does not look."""

    def __init__(self) -> None:
        self.images = made_up(98)
        self.labels, self.names, self.sizes = self.images.labels, self.images.names, self.images.sizes

    def __len__(self) -> int:
        return 98

    def read(self, i: int) -> np.ndarray:
        return self.images.read(i)[:5] if i == 50 else self.images.read(i)


def test_one_picture_of_another_size_late_in_the_set_is_noticed() -> None:
    split = open_split(OneOdd(), PadCropFlip(16))
    assert isinstance(split, StreamedSplit)
    assert "their sizes differ" in split.note
    with pytest.raises(UserError) as caught:
        open_split(OneOdd(), PadCropFlip(16), cache="memory")
    assert "00000050" in str(caught.value)
    assert "data.cache=none" in str(caught.value)
    assert isinstance(open_split(OneOdd(), ResizeCenterCrop(16), cache="memory"), CachedSplit)  # one size afterwards


def test_what_does_not_fit_is_streamed_by_auto_and_refused_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitexp.data.loader.available_memory", lambda: 40_000)
    split = open_split(made_up(37), PadCropFlip(16), name="val")  # 37 x 3 x 20 x 20 = 44 kB
    assert isinstance(split, StreamedSplit)
    assert "would be more than a quarter of" in split.note
    with pytest.raises(UserError, match=r"data\.cache=memory: val needs 0.0 MB"):
        open_split(made_up(37), PadCropFlip(16), name="val", cache="memory")
    with pytest.raises(UserError, match=r"data\.cache=disk is not one of auto, memory, none"):
        open_split(made_up(37), PadCropFlip(16), cache="disk")


# ---- Bad pictures and dying workers ----------------------------------------------------------------------------------


def broken_folder(root: Path) -> Images:
    write_folder(root, library(6) | {"cat/3.jpg": b"<html>404</html>"})
    return folder(str(root), val_fraction=0).train


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_bad_picture_stops_training_with_its_own_name(tmp_path: Path, workers: int) -> None:
    images = broken_folder(tmp_path)
    split = StreamedSplit(images, PadCropFlip(16), "")
    batches = train_batches(split, batch_size=3, seed=0, workers=workers)
    bad = list(images.names).index("cat/3.jpg")
    good = epoch_order(0, 0, 18).tolist().index(bad) // 3
    before = some(batches, good)
    with pytest.raises(BadImage) as caught:
        next(batches)
    assert str(caught.value) == f"{tmp_path}/cat/3.jpg: holds HTML or XML, not a picture (a failed download?)"
    assert equal(before, some(train_batches(split, batch_size=3, seed=0, workers=0), good))


@pytest.mark.parametrize("cache", ["auto", "memory"])
def test_a_bad_picture_stops_the_filling_of_the_cache_with_its_own_name(tmp_path: Path, cache: str) -> None:
    with pytest.raises(BadImage, match=r"cat/3\.jpg: holds HTML"):
        open_split(broken_folder(tmp_path), PadCropFlip(16), cache=cache)


class Deadly:
    """Pictures of which one kills the process that reads it."""

    labels, sizes, names = np.zeros(12, np.int64), np.zeros(12, np.int64), [str(n) for n in range(12)]

    def __len__(self) -> int:
        return 12

    def read(self, i: int) -> np.ndarray:
        if i == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros((4, 4, 3), np.uint8)


def test_a_killed_worker_is_one_clear_error_and_no_hang() -> None:
    split = StreamedSplit(Deadly(), ResizeCenterCrop(4), "")
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(UserError, match=r"a data worker died \(signal 9 SIGKILL, most likely for lack of memory\)"):
        list(eval_batches(split, batch_size=3, workers=2))
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_workers_survive_the_signals_that_a_whole_group_gets() -> None:
    split = open_split(made_up(), ResizedCropFlip(16), cache="none")
    batches = train_batches(split, batch_size=4, seed=0, workers=2)
    first = some(batches, 2)
    for pid in children():
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
    alone = some(train_batches(split, batch_size=4, seed=0, workers=0), 12)
    assert equal(alone, first + some(batches, 10))
    batches.close()
    assert not children()


def children() -> list[int]:
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children()]


def test_a_picture_array_is_not_changed_by_its_batches() -> None:
    split = open_split(made_up(), PadCropFlip(16))
    before = split.pictures.copy()
    for batch in some(train_batches(split, batch_size=8, seed=0), 6):
        batch.images.zero_()
    evaluated = open_split(made_up(), ResizeCenterCrop(16))
    kept = evaluated.pictures.copy()
    for batch in eval_batches(evaluated, batch_size=8):
        batch.images.zero_()
    assert np.array_equal(split.pictures, before)
    assert np.array_equal(evaluated.pictures, kept)


def test_fake_data_of_any_size_is_ready_at_once() -> None:
    source = fake(num_train=10**6, image_size=224)
    batch = next(
        train_batches(open_split(source.train, PadCropFlip(224), cache="none"), batch_size=2, seed=0, workers=0)
    )
    assert batch.images.shape == (2, 3, 224, 224)


@pytest.mark.parametrize("workers", [0, 2])
def test_repeated_pictures_come_with_views_of_their_own(workers: int) -> None:
    split = open_split(made_up(size=(16, 16)), PadCropFlip(16), cache="memory")
    first = some(train_batches(split, batch_size=9, seed=0, repeats=3, workers=workers), 1)[0]
    assert first.index.tolist() == first.index[::3].repeat_interleave(3).tolist()
    for begin in range(0, 9, 3):
        views = first.images[begin : begin + 3]
        assert not torch.equal(views[0], views[1])
        assert not torch.equal(views[1], views[2])
