"""Label maps on disk: of every picture of a split the k best classes at each place, as a teacher scored them.

A folder of four files. `values.f16` (n, k, h, w) and `classes.i32` (n, k, h, w) are raw, little-endian and memory-
mapped, so a batch costs the rows it reads. `pictures.txt` names the picture of each row, with its class number and
stored size, which tell a changed picture from an unchanged one. `head.json` says how the maps were made and how many
rows there are.

Rows are appended and never changed. `unfinished.json` stands beside while there are rows to come and says how many are
whole; whatever lies behind those is written again. head.json is replaced last, so a store that was finished once can
be read at every moment, and a writer killed at any point goes on at its last whole row.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vitexp.data.images import Images, printable
from vitexp.errors import UserError, nearest
from vitexp.run_folder import LOCK_NAME, RunLock, cannot, write_atomic

FORMAT = 1
HEAD, UNFINISHED, PICTURES, VALUES, CLASSES = (
    "head.json", "unfinished.json", "pictures.txt", "values.f16", "classes.i32",
)  # fmt: skip
SPEED = "speed.json"  # how many pictures the last writer added, in how many seconds; no part of the store
COMMIT_S = 2.0  # between two points at which a killed writer goes on
_VALUE, _CLASS = np.dtype("<f2"), np.dtype("<i4")
# What the maps depend on, in the order in which a difference is told.
_MADE_BY = ("teacher", "classes", "crop", "k", "image_size", "preprocessing", "grid", "missing")


@dataclass(frozen=True, eq=False)
class LabelStore:
    """A finished store. Row i of every array belongs to picture names[i]."""

    head: dict[str, Any]
    values: np.ndarray  # float16 (n, k, h, w), memory-mapped
    numbers: np.ndarray  # int32 (n, k, h, w), memory-mapped: the class of each value
    names: list[str]
    labels: np.ndarray  # (n,) int64 class numbers, -1 = no label
    sizes: np.ndarray  # (n,) int64 bytes as stored

    def rows_for(self, images: Images, *, classes: Sequence[str]) -> np.ndarray:
        """(len(images),) int64 row of each picture.

        Raises UserError where the classes are others, or naming the first picture without a map or changed since."""
        if list(classes) != self.head["classes"]:
            raise UserError(
                f"the label store was made for other classes than the data has: "
                f"{class_difference(self.head['classes'], classes)}\nmake one for these: python -m vitexp label"
            )
        rows = _find(_lines(self.names, self.labels, self.sizes), identities(images))
        if (without := np.flatnonzero(rows < 0)).size:
            name = first = images.names[without[0]]
            if name in self.names:
                at = len(self.names) - 1 - self.names[::-1].index(name)  # the last one added is the newest
                was = f"class {self.labels[at]}, {self.sizes[at]:,} bytes"
                now = f"class {images.labels[without[0]]}, {images.sizes[without[0]]:,} bytes"
                first = f"{name}, which was {was} and is {now}"
            raise UserError(
                f"{without.size:,} of {len(images):,} pictures have no label map in the store (first: {first})\n"
                "python -m vitexp label with the store as output= adds them"
            )
        return rows

    def fingerprint(self) -> str:
        """12 hex digits of the head and the pictures, not of the values, nor of where the teacher lay."""
        teacher = {key: value for key, value in self.head["teacher"].items() if key != "name"}
        digest = hashlib.sha256(json.dumps(self.head | {"teacher": teacher}, sort_keys=True).encode())
        digest.update("\n".join(_lines(self.names, self.labels, self.sizes)).encode())
        return digest.hexdigest()[:12]


def open_store(folder: Path) -> LabelStore:
    """The finished store in `folder`. Raises UserError where there is none, or it is unfinished or damaged."""
    folder = Path(folder)
    if not (folder / HEAD).is_file():
        raise UserError(_no_store(folder))
    head = _read_json(folder / HEAD)
    rows, (kept, height, width) = head["pictures"], _shape(head)
    shape = (rows, kept, height, width)
    arrays = []
    for name, dtype in ((VALUES, _VALUE), (CLASSES, _CLASS)):
        path, wanted = folder / name, int(np.prod(shape)) * dtype.itemsize
        try:
            found = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: the label store is damaged, {error.strerror}") from error
        # Behind the rows that the head counts may lie those of a writer that is adding some.
        if found < wanted or (found > wanted and not (folder / UNFINISHED).exists()):
            raise UserError(f"{path}: the label store is damaged, {found:,} bytes instead of {wanted:,}")
        arrays.append(np.memmap(path, dtype, "r", shape=shape))
    labels, sizes, names = _read_pictures(folder / PICTURES, rows)
    return LabelStore(head, arrays[0], arrays[1], names, labels, sizes)


def identities(images: Images) -> list[str]:
    """A line for each picture that tells it from every other, and from itself changed: `size class name`."""
    return _lines(images.names, images.labels, images.sizes)


def class_difference(stored: Sequence[str], given: Sequence[str]) -> str:
    """What tells two lists of classes apart, in a few words."""
    without, extra = [c for c in given if c not in set(stored)], [c for c in stored if c not in set(given)]
    said = [
        f"{words} {', '.join(map(printable, names[:3]))}{' and more' if len(names) > 3 else ''}"
        for words, names in (("it lacks", without), ("it also has", extra))
        if names
    ]
    return "; ".join(said) or "the same in another order"


class LabelWriter:
    """Makes a store, goes on with one, or adds to one: `with LabelWriter(folder, head) as writer`.

    `head` holds all of a store's but format and pictures. Entering takes the folder's lock and raises UserError where
    its store was made otherwise, naming what differs, or where it holds other things. Leaving commits what is whole,
    also after an error."""

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.head = json.loads(_json({"format": FORMAT, **head}))  # as it is read again: a pair is a list
        assert set(_MADE_BY) <= set(head), sorted(head)
        self.rows = 0  # whole ones
        self.finished = 0  # those that a reader is shown
        self._lines: list[str] = []  # of the pictures of all rows, those not yet committed included
        self._files: dict[str, Any] = {}

    # ---- entering --------------------------------------------------------------------------------------------------
    def __enter__(self) -> LabelWriter:
        self._lock = RunLock(self.folder, key="output")
        self._lock.acquire()
        try:
            self._look()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _look(self) -> None:
        unfinished = self.folder / UNFINISHED
        states = [_read_json(path) for path in (self.folder / HEAD, unfinished) if path.is_file()]
        if not states:
            others = sorted(entry.name for entry in self.folder.iterdir() if entry.name != LOCK_NAME)
            if others:
                raise UserError(f"output={self.folder}: holds {others[0]} and no label store; give a folder of its own")
            return
        _refuse_another(self.folder, states[0], self.head)
        self.head["teacher"] = states[0]["teacher"]  # found again elsewhere it is the same one
        if (self.folder / HEAD).is_file():
            self.finished = open_store(self.folder).head["pictures"]
        self.rows = max(state["pictures"] for state in states)
        if self.rows:
            labels, sizes, names = _read_pictures(self.folder / PICTURES, self.rows)
            self._lines = _lines(names, labels, sizes)
        for name, length in self._lengths().items() if self.rows else ():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size < length:
                raise UserError(f"{path}: the label store is damaged, shorter than the {self.rows:,} pictures it had")

    def lacking(self, pictures: Sequence[str]) -> np.ndarray:
        """int64 positions of those among `identities` that have no row, in their order."""
        return np.flatnonzero(_find(self._lines, pictures) < 0)

    # ---- writing ---------------------------------------------------------------------------------------------------
    def append(self, pictures: Sequence[str], values: np.ndarray, numbers: np.ndarray) -> None:
        """Rows of the pictures of these `identities`, float16 and int32 (b, k, h, w)."""
        shape = (len(pictures), *_shape(self.head))
        assert values.shape == numbers.shape == shape, (values.shape, numbers.shape, shape)
        assert values.dtype == np.float16, values.dtype
        assert numbers.dtype == np.int32, numbers.dtype
        try:
            if not self._files:
                self._begin()
            self._files[VALUES].write(np.ascontiguousarray(values, _VALUE))
            self._files[CLASSES].write(np.ascontiguousarray(numbers, _CLASS))
            self._files[PICTURES].write("".join(f"{line}\n" for line in pictures).encode())
        except OSError as error:
            raise cannot("write in", self.folder, error) from error
        self._lines += pictures
        if time.monotonic() - self._committed > COMMIT_S:
            self.commit()

    def commit(self) -> None:
        """What was appended is there after a power cut, too."""
        if not self._files or self.rows == len(self._lines):
            return
        try:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot("write in", self.folder, error) from error
        self.rows = len(self._lines)
        write_atomic(self.folder / UNFINISHED, _json(self.head | {"pictures": self.rows}))
        self._committed = time.monotonic()

    def finish(self) -> None:
        """The store is whole: from now on readers see all of its rows."""
        assert self._lines
        self.commit()
        if self.finished != self.rows:
            write_atomic(self.folder / HEAD, _json(self.head | {"pictures": self.rows}))
            self.finished = self.rows
        (self.folder / UNFINISHED).unlink(missing_ok=True)

    def _begin(self) -> None:
        # Said before the first byte is written: rows behind the finished ones are then no damage.
        write_atomic(self.folder / UNFINISHED, _json(self.head | {"pictures": self.rows}))
        for name, length in self._lengths().items():
            file = open(self.folder / name, "ab")  # noqa: SIM115
            self._files[name] = file
            file.truncate(length)
        self._committed = time.monotonic()

    def _lengths(self) -> dict[str, int]:
        """Bytes of the whole rows in each file."""
        cells = int(np.prod(_shape(self.head))) * self.rows
        listed = sum(len(line.encode()) + 1 for line in self._lines[: self.rows])
        return {VALUES: cells * _VALUE.itemsize, CLASSES: cells * _CLASS.itemsize, PICTURES: listed}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.commit()
        finally:
            for file in self._files.values():
                with contextlib.suppress(OSError):  # a full disk has been told by then
                    file.close()
            self._lock.release()


# ---- files -----------------------------------------------------------------------------------------------------------


def _shape(head: Mapping[str, Any]) -> tuple[int, int, int]:
    height, width = head["grid"]
    return head["k"], height, width


def _lines(names: Sequence[str], labels: np.ndarray, sizes: np.ndarray) -> list[str]:
    return [f"{size} {k} {name}" for name, k, size in zip(names, labels.tolist(), sizes.tolist(), strict=True)]


def _find(lines: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """int64 row of each picture wanted, -1 where it has none."""
    row_of = {line: row for row, line in enumerate(lines)}
    return np.array([row_of.get(line, -1) for line in wanted], np.int64)


def _read_pictures(path: Path, rows: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Class numbers, sizes and names of the first `rows` pictures."""
    try:
        # Not splitlines(), which also ends lines within a name.
        found = path.read_bytes().split(b"\n")[:rows]
        parts = [line.decode().split(" ", 2) for line in found]
        sizes, labels, names = zip(*parts, strict=True)
        if len(names) != rows:
            raise ValueError("lines are missing")
        return np.array(labels, np.int64), np.array(sizes, np.int64), list(names)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the label store is damaged, no list of {rows:,} pictures ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: the label store is damaged, this file cannot be read ({error})") from None
    known = {"format": int, "pictures": int, "k": int, "grid": list, "classes": list, "teacher": dict, "crop": str}
    for key, kind in known.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise UserError(f"{path}: no head of a label store, {key!r} is missing or not a {kind.__name__}")
    if found["format"] != FORMAT:
        raise UserError(f"{path} has format {found['format']}, this version of vitexp reads {FORMAT}: make it anew")
    sides = [found["k"], *found["grid"]]
    if len(sides) != 3 or not all(isinstance(side, int) and side > 0 for side in sides) or found["pictures"] < 0:
        raise UserError(f"{path}: no head of a label store, k={found['k']} on a grid of {found['grid']}")
    return found


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _no_store(folder: Path) -> str:
    if (folder / UNFINISHED).is_file():
        rows = _read_json(folder / UNFINISHED)["pictures"]
        return f"{folder}: the label store is unfinished, {rows:,} pictures done; give its label command again"
    if not folder.is_dir():
        beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        return f"{folder}: there is no such label store.{nearest(folder.name, beside)}"
    below = sorted(path.parent.name for path in folder.glob(f"*/{HEAD}"))
    hint = f"; there are {', '.join(below)} in it" if below else "; python -m vitexp label makes one"
    return f"{folder}: is no label store, it has no {HEAD}{hint}"


def _refuse_another(folder: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    def facts(head: Mapping[str, Any], key: str) -> Any:
        return head.get(key) if key != "teacher" else {k: v for k, v in head[key].items() if k != "name"}

    for key in _MADE_BY:
        if facts(stored, key) == facts(given, key):
            continue
        if key == "teacher":
            said = f"by the teacher {stored[key].get('name')}, not by {given[key].get('name')}"
        elif key == "classes":
            said = f"for other classes: {class_difference(stored[key], given[key])}"
        else:
            said = f"with {key}={stored.get(key)}, not {given[key]}"
        raise UserError(
            f"output={folder}: this label store was made {said}\ngive another output=, or ask for what it was made with"
        )
