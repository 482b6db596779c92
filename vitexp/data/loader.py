"""From the pictures of a split to batches: kept in memory as uint8, or decoded by workers as they are needed.

Both give the same batches, whatever the number of workers: the pictures of a batch and their random numbers depend on
its position only (sampler.py, seeding.py). Batches are uint8 (b, c, h, w); batch_transforms.normalise makes floats of
them on the device.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vitexp.data.geometry import follow, joined, seen_through
from vitexp.data.images import Images
from vitexp.data.memory import available_memory, cores
from vitexp.data.sampler import Position, eval_positions, train_positions
from vitexp.data.sampler import effective_batch_size as effective_batch_size
from vitexp.data.sampler import micro_batches_per_epoch as micro_batches_per_epoch
from vitexp.data.transforms import Box, TrackedTransform, Transform, apply
from vitexp.errors import UserError
from vitexp.seeding import uniforms
from vitexp.types import Batch, LabelMaps

CACHES = ("auto", "memory", "none")
AUTO_SHARE = 0.25  # of the free memory, which `cache: auto` may take for one split
_PROBED = 32  # pictures looked at before deciding whether all have one size
_CHUNK = 64  # pictures that a decoding thread takes at a time


class MapStore(Protocol):
    """What the loader needs of a label store; see label_store.LabelStore."""

    @property
    def head(self) -> Mapping[str, Any]:
        """`crop` says what of a picture its map covers: whole, or center, the largest square in the middle."""
        ...

    @property
    def values(self) -> np.ndarray:
        """float16 (m, k, h, w), which may lie on disk."""
        ...

    @property
    def numbers(self) -> np.ndarray:
        """int32 (m, k, h, w)"""
        ...


@dataclass(frozen=True, eq=False)
class SplitMaps:
    """The label maps of a split's pictures."""

    store: MapStore
    rows: np.ndarray  # (n,) of each picture in the store

    def of(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and class numbers (b, k, h, w) of these pictures, in memory."""
        rows = self.rows[index]
        return np.asarray(self.store.values[rows]), np.asarray(self.store.numbers[rows])

    def view(self, transform: TrackedTransform, height: int, width: int) -> Box:
        """What the transform's fixed part keeps of a picture of that size, in fractions of what its map covers."""
        top, left, tall, wide = transform.view(height, width)
        if self.store.head["crop"] == "whole":
            return top, left, tall, wide
        side = min(height, width)
        down, across = side / height, side / width
        return (top - (1 - down) / 2) / down, (left - (1 - across) / 2) / across, tall / down, wide / across


Fetched = tuple[np.ndarray, ...]  # pictures, labels, and where there are maps geometry.Followed's four


@dataclass(frozen=True, eq=False)
class CachedSplit:
    """All pictures of a split in memory, after the transform's fixed part."""

    pictures: np.ndarray  # uint8 (n, ...)
    labels: np.ndarray  # (n,) int64
    transform: Transform
    note: str  # a sentence for the person who runs: what was chosen and why
    maps: SplitMaps | None = None
    views: np.ndarray | None = None  # (n, 4) what `pictures` show of what the maps cover

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, position: Position) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (b, c, H, W) and labels (b,)."""
        u = uniforms(position.seed, position.epoch, position.index, self.transform.num_uniforms)
        return self.transform.random(self.pictures[position.index], u), self.labels[position.index]

    def fetch_with_maps(self, position: Position) -> Fetched:
        """As `fetch`, bit for bit, and the label maps brought to the same places: see geometry.follow."""
        assert self.maps is not None and self.views is not None
        transform = cast(TrackedTransform, self.transform)  # open_split has seen it
        u = uniforms(position.seed, position.epoch, position.index, transform.num_uniforms)
        pictures, places = transform.tracked(self.pictures[position.index], u)
        places = seen_through(places, self.views[position.index])
        return pictures, self.labels[position.index], *follow(*self.maps.of(position.index), places)


@dataclass(frozen=True, eq=False)
class StreamedSplit:
    """Pictures decoded when they are asked for."""

    images: Images
    transform: Transform
    note: str
    maps: SplitMaps | None = None

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, position: Position) -> tuple[np.ndarray, np.ndarray]:
        """As CachedSplit's, bit for bit. Raises BadImage."""
        u = uniforms(position.seed, position.epoch, position.index, self.transform.num_uniforms)
        pictures = (self.images.read(i) for i in position.index.tolist())
        return apply(self.transform, pictures, u), self.images.labels[position.index]

    def fetch_with_maps(self, position: Position) -> Fetched:
        """As CachedSplit's, bit for bit. Raises BadImage."""
        assert self.maps is not None
        transform = cast(TrackedTransform, self.transform)
        made, places = [], []
        for i, u in zip(
            position.index.tolist(),
            uniforms(position.seed, position.epoch, position.index, transform.num_uniforms),
            strict=True,
        ):
            image = self.images.read(i)
            pixels, place = transform.tracked(transform.fixed(image)[None], u[None])
            made.append(pixels)
            places.append(seen_through(place, np.array([self.maps.view(transform, *image.shape[:2])])))
        followed = follow(*self.maps.of(position.index), joined(places))
        return np.concatenate(made), self.images.labels[position.index], *followed


Split = CachedSplit | StreamedSplit


def open_split(
    images: Images,
    transform: Transform,
    *,
    cache: str = "auto",
    name: str = "train",
    processes: int = 1,
    progress: bool = True,
    maps: tuple[MapStore, np.ndarray] | None = None,
) -> Split:
    """The split with its transform, in memory or not, as data.cache says; `.note` tells what `auto` chose.

    `memory` needs every picture to have one size after the transform's fixed part. `auto` takes memory where the
    pictures themselves have one size and fit into a quarter of the free memory (shared by `processes` on this
    machine). `maps`, a store of label maps and the row of each picture in it, makes the batches carry them along.
    Raises UserError, and BadImage for a picture that cannot be read."""
    if cache not in CACHES:
        raise UserError(f"data.cache={cache} is not one of {', '.join(CACHES)}")
    if maps is not None and not hasattr(transform, "tracked"):
        raise UserError(
            f"augment.train: {type(transform).__name__} does not tell where its crops come from (no method `tracked`), "
            "so label maps cannot follow it"
        )
    stored = None if maps is None else SplitMaps(*maps)
    count, free = len(images), available_memory() // processes
    if cache == "none":
        note = f"{name}: {count:,} pictures, decoded as needed (data.cache=none)"
        return StreamedSplit(images, transform, note, stored)
    first = transform.fixed(images.read(0))
    need = first.nbytes * count
    if cache == "memory":
        if need > free:
            raise UserError(
                f"data.cache=memory: {name} needs {_gigabytes(need)}, but {_gigabytes(free)} are free; "
                "use data.cache=none"
            )
        try:
            return _cached(images, transform, like=first, name=name, progress=progress, maps=stored)
        except _OtherShape as other:
            raise UserError(
                f"data.cache=memory: the pictures of {name} have different sizes "
                f"({images.names[0]}: {_shape(first)}, {images.names[other.i]}: {_shape(other.found)}); "
                "use data.cache=none, or an augment option that brings them to one size"
            ) from None
    streamed = "decoded as needed"
    if need > AUTO_SHARE * free:
        why = f"{_gigabytes(need)} would be more than a quarter of the {_gigabytes(free)} of free memory"
        return StreamedSplit(images, transform, f"{name}: {count:,} pictures, {streamed} ({why})", stored)
    probed = {images.read(int(i)).shape for i in np.linspace(0, count - 1, _PROBED).astype(np.int64)}
    if len(probed) == 1:
        with contextlib.suppress(_OtherShape):
            return _cached(images, transform, like=first, name=name, progress=progress, maps=stored)
    return StreamedSplit(images, transform, f"{name}: {count:,} pictures, {streamed} (their sizes differ)", stored)


def auto_workers(split: Split, *, processes: int = 1) -> int:
    """Loader processes where train.workers is null: none for pictures in memory, else one a core, at most 8."""
    return 0 if isinstance(split, CachedSplit) else max(1, min(cores() // processes, 8))


def train_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    pin_memory: bool = False,
    repeats: int = 1,
) -> Iterator[Batch]:
    """Endless micro-batches of this rank from number `start` on; see sampler.train_positions.

    Raises BadImage naming a picture that cannot be read, UserError when a loader process dies."""
    how = {"batch_size": batch_size, "seed": seed, "start": start, "rank": rank, "world": world, "repeats": repeats}
    positions = train_positions(len(split), **how)
    workers = auto_workers(split, processes=world) if workers is None else workers
    return _batches(split, positions, workers=workers, pin_memory=pin_memory)


def eval_batches(
    split: Split,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Every picture once over all ranks, in order, `index` saying which; the last batch may be short."""
    positions = eval_positions(len(split), batch_size=batch_size, rank=rank, world=world)
    workers = auto_workers(split, processes=world) if workers is None else workers
    return _batches(split, positions, workers=workers, pin_memory=pin_memory)


def _batches(split: Split, positions: Iterable[Position], *, workers: int, pin_memory: bool) -> Iterator[Batch]:
    if workers < 0:
        raise UserError(f"train.workers={workers} is negative")
    fetched = (
        _fetch_here(split, positions) if workers == 0 else _fetch_in_workers(split, positions, workers, pin_memory)
    )
    for tensors in fetched:
        yield _batch_of([t.pin_memory() if pin_memory and not t.is_pinned() else t for t in tensors])


def batch_at(split: Split, position: Position) -> Batch:
    """The one batch that a position names, read here. Raises BadImage."""
    return _batch_of(_tensors(split, position))


def _batch_of(tensors: Sequence[torch.Tensor]) -> Batch:
    images, targets, index, *maps = tensors
    return Batch(images, targets, index, LabelMaps(maps[0], maps[1], maps[2], maps[3]) if maps else None)


Tensors = tuple[torch.Tensor, ...]  # pictures, labels, positions, and where there are maps LabelMaps' four


def _tensors(split: Split, position: Position) -> Tensors:
    images, labels, *maps = split.fetch(position) if split.maps is None else split.fetch_with_maps(position)
    return tuple(torch.from_numpy(part) for part in (images, labels, position.index, *maps))


def _fetch_here(split: Split, positions: Iterable[Position]) -> Iterator[Tensors]:
    for position in positions:
        yield _tensors(split, position)


class _InWorker(Dataset):
    """What a loader process runs: a whole batch a call. A UserError is handed over as a value, because the loader
    would turn it into a RuntimeError with a traceback for text."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, index: Position) -> Tensors | UserError:
        try:
            return _tensors(self.split, index)
        except UserError as error:
            return error


def _fetch_in_workers(split: Split, positions: Iterable[Position], workers: int, pin_memory: bool) -> Iterator[Tensors]:
    loader = DataLoader(
        _InWorker(split),
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_parent,
        # Forked workers share the pictures and names; under joblib no other way works. Elsewhere the system's own way.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        generator=torch.Generator().manual_seed(0),  # else iter() draws from the global one, and resuming differs
    )
    iterator = _without_handler(lambda: iter(loader))
    try:
        while True:
            try:
                got = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if (death := _death(iterator._workers, workers)) is not None:
                    raise death from error
                raise
            if isinstance(got, UserError):
                raise got
            yield got
    finally:
        iterator._shutdown_workers()  # now, and not when the traceback that still holds the iterator is forgotten
        for process in iterator._workers:
            process.kill()  # one that hangs on a dead disk; they ignore the SIGTERM that torch sends


def _as_it_is(fetched: Any) -> Any:
    return fetched


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole group; the parent still needs batches to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _without_handler(make: Callable[[], Any]) -> Any:
    """Torch's SIGCHLD handler raises in the midst of whatever the main thread does; next() finds a dead worker too."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return make()
    before = signal.getsignal(signal.SIGCHLD)
    made = make()
    signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
    return made


def _death(processes: list, workers: int) -> UserError | None:
    for process in processes:
        process.join(timeout=0.5)  # the pipe breaks a moment before the process is reaped
        if process.exitcode is None:
            continue
        if process.exitcode >= 0:
            how = f"exit code {process.exitcode}"
        else:
            killer = signal.Signals(-process.exitcode)
            likely = {
                signal.SIGKILL: ", most likely for lack of memory",
                signal.SIGBUS: ", most likely /dev/shm is full",
            }
            how = f"signal {killer.value} {killer.name}{likely.get(killer, '')}"
        return UserError(
            f"a data worker died ({how}); train.workers={workers}: try fewer, or a smaller train.batch_size"
        )
    return None


class _OtherShape(Exception):
    def __init__(self, i: int, found: np.ndarray) -> None:
        self.i, self.found = i, found


def _cached(
    images: Images, transform: Transform, *, like: np.ndarray, name: str, progress: bool, maps: SplitMaps | None
) -> CachedSplit:
    """The split decoded, with what its pictures show of the whole ones where there are maps. Raises _OtherShape."""
    pictures, sizes = _decode_all(images, transform, like=like, name=name, progress=progress)
    note = f"{name}: {len(images):,} pictures in memory ({_gigabytes(pictures.nbytes)})"
    views = None if maps is None else _views(maps, cast(TrackedTransform, transform), sizes)
    return CachedSplit(pictures, images.labels, transform, note, maps, views)


def _views(maps: SplitMaps, transform: TrackedTransform, sizes: np.ndarray) -> np.ndarray:
    """(n, 4) boxes, of sizes (n, 2) that are mostly the same."""
    different, which = np.unique(sizes, axis=0, return_inverse=True)
    return np.array([maps.view(transform, *size) for size in different.tolist()])[which.ravel()]


def _decode_all(
    images: Images, transform: Transform, *, like: np.ndarray, name: str, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, *like.shape), decoded by threads, which the decoders let run beside each other, and the (n, 2) heights
    and widths of the pictures themselves."""
    pictures, sizes = np.empty((len(images), *like.shape), np.uint8), np.empty((len(images), 2), np.int64)

    def decode_chunk(begin: int) -> int:
        end = min(begin + _CHUNK, len(images))
        for i in range(begin, end):
            image = images.read(i)
            found = transform.fixed(image)
            if found.shape != like.shape:
                raise _OtherShape(i, found)
            pictures[i], sizes[i] = found, image.shape[:2]
        return end - begin

    pool = ThreadPoolExecutor(max_workers=cores())
    try:
        with tqdm(
            total=len(images), desc=f"decoding {name}", unit=" pictures", delay=2, leave=False, disable=not progress,
            mininterval=0.2 if sys.stderr.isatty() else 20,
        ) as bar:  # fmt: skip
            for done in pool.map(decode_chunk, range(0, len(images), _CHUNK)):
                bar.update(done)
    finally:
        pool.shutdown(cancel_futures=True)
    return pictures, sizes


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _shape(array: np.ndarray) -> str:
    return "x".join(str(side) for side in array.shape)
