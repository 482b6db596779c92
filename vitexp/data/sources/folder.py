"""Pictures in folders: one folder a class, or one flat folder without labels."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from vitexp.data.checks import existing_folder, same_classes
from vitexp.data.images import Source, check_channels, decode, listed, printable, split_source
from vitexp.errors import UserError

SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif",
))  # fmt: skip
VAL = ("val", "valid", "validation", "test")  # the first that exists is taken


class FileImages:
    """Picture files below a folder, by relative path."""

    def __init__(
        self, root: str, paths: Sequence[str], *, labels: np.ndarray, sizes: np.ndarray, channels: int
    ) -> None:
        self.root, self.labels, self.sizes, self.channels = root, labels, sizes, channels
        # One Arrow buffer and no million Python strings: loader workers share it, since nothing counts references.
        self._paths = pa.array([os.fsencode(path) for path in paths], pa.large_binary())

    @property
    def names(self) -> Sequence[str]:
        return [printable(os.fsdecode(path)) for path in self._paths.to_pylist()]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> np.ndarray:
        path = self.stored(i)
        return decode(path, printable(path), self.channels)

    def stored(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._paths[i].as_py()))


def folder(root: str, *, val_fraction: float = 0.1, split_seed: int = 0, channels: int = 3) -> Source:
    """The pictures below `root`, in the order of their paths `<class>/<file>`.

    Either `train/` and `val/` (or valid, validation, test) with class folders in each, or class folders alone, of
    which `val_fraction` is held out. A picture anywhere below a class folder counts for it; without class folders
    pictures have no label. Both splits hold the same classes, none empty. Raises UserError naming folder or file."""
    check_channels(channels)
    notices: list[str] = []
    train_root, val_root = _split_roots(existing_folder(root, key="data.root"), notices)
    classes, train = _read_split(train_root, channels=channels, notices=notices)
    if val_root is None:
        source = Source("folder", train, None, classes, str(root), tuple(notices))
        return split_source(source, val_fraction=val_fraction, split_seed=split_seed)
    val_classes, val = _read_split(val_root, channels=channels, notices=notices)
    same_classes(classes, val_classes, train_name=printable(str(train_root)), val_name=printable(str(val_root)))
    return Source("folder", train, val, classes, str(root), tuple(notices))


def _split_roots(root: Path, notices: list[str]) -> tuple[Path, Path | None]:
    found = {entry.name.lower(): entry for entry in _folders(root)}
    vals = [name for name in VAL if name in found]
    if vals and found.keys() <= set(VAL):
        raise UserError(f"data.root={printable(str(root))} has {vals[0]}/ but no train/")
    if "train" not in found:
        return root, None
    if found.keys() - {"train", *VAL} and not _folders(Path(found["train"])):
        return root, None  # a class that is called train, among others
    notices += [f"{printable(str(root))}: {name}/ is not used, {vals[0]}/ is" for name in vals[1:]]
    return Path(found["train"]), Path(found[vals[0]]) if vals else None


def _read_split(root: Path, *, channels: int, notices: list[str]) -> tuple[list[str], FileImages]:
    left_out: Counter[str] = Counter()
    top_files: list[tuple[str, int]] = []
    found: list[tuple[str, int, int]] = []  # path, size, label
    classes = sorted(entry.name for entry in _folders(root))
    for label, name in enumerate(classes):
        before = len(found)
        found += [(path, size, label) for path, size in _walk(os.path.join(root, name), name + "/", left_out)]
        if len(found) == before:
            raise UserError(f"{printable(os.path.join(root, name))}: a class folder without a picture{_said(left_out)}")
    top_files = list(_walk(str(root), "", left_out, nested=False))
    if classes and top_files:
        notices.append(
            f"{printable(str(root))}: {len(top_files):,} pictures are in no class folder and left out "
            f"({listed(path for path, _ in top_files)})"
        )
    elif top_files:
        found = [(path, size, -1) for path, size in top_files]
    if not found:
        raise UserError(f"{printable(str(root))} holds no pictures{_said(left_out)}")
    if left_out:
        notices.append(f"{printable(str(root))}: {left_out.total():,} files left out{_said(left_out)}")
    found.sort()
    paths, sizes, labels = zip(*found, strict=True)
    images = FileImages(
        str(root), paths, labels=np.array(labels, np.int64), sizes=np.array(sizes, np.int64), channels=channels
    )
    return [printable(name) for name in classes], images


def _folders(root: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in _entries(str(root)) if not _hidden(entry.name) and _is_folder(entry)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return (info := _stat(entry)) is not None and stat.S_ISDIR(info.st_mode)


def _walk(
    folder: str, prefix: str, left_out: Counter[str], *, nested: bool = True, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[str, int]]:
    """(path, size) of the pictures below a folder, links followed. What is no picture by its name is counted."""
    if nested:
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in above:
            raise UserError(f"{printable(folder)}: a symbolic link to a folder that it lies in")
        above += ((here.st_dev, here.st_ino),)
    for entry in _entries(folder):
        suffix = os.path.splitext(entry.name)[1].lower()
        if _hidden(entry.name):
            left_out["hidden"] += 1
        elif (info := _stat(entry)) is None:
            left_out["broken links"] += 1
        elif stat.S_ISDIR(info.st_mode):
            if nested:
                yield from _walk(entry.path, f"{prefix}{entry.name}/", left_out, above=above)
        elif suffix in SUFFIXES and stat.S_ISREG(info.st_mode):
            yield prefix + entry.name, info.st_size
        else:
            left_out[printable(suffix) or "no suffix"] += 1


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{printable(folder)}: the folder cannot be listed: {error.strerror}") from error


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Of the file that a link leads to. None for a broken link that can be neither a picture nor a class folder."""
    try:
        return entry.stat()
    except OSError as error:
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix and suffix not in SUFFIXES:
            return None
        what = "a broken symbolic link" if entry.is_symlink() else "cannot be opened"
        raise UserError(f"{printable(entry.path)}: {what} ({error.strerror})") from error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _said(left_out: Counter[str]) -> str:
    return f" ({', '.join(f'{what} {count:,}' for what, count in left_out.most_common(5))})" if left_out else ""
