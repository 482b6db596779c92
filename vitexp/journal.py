"""The journal: `metrics.jsonl`, one JSON object a line, the truth about a run's metrics. Knows no MLflow, no torch.

Order that keeps a resumed run's journal equal to an uninterrupted one's: log every row of update N,
`flush(fsync=True)`, then save the checkpoint of N; on resume, `truncate_after(N)` before anything is appended.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vitexp.errors import UserError

TIME_KEY = "perf/time_s"
JUDGED_BY = ("val/top1", "val/probe_top1", "val/knn_top1")  # by the first of these that it has a run is judged
_encode = json.JSONEncoder().encode  # writes NaN and Infinity, which json.loads of Python reads back


class Journal:
    """Appends rows to a `metrics.jsonl`; a row is with the operating system at once, on disk at `flush(fsync=True)`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None

    def append(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as written: step and epoch first, plain numbers only, `perf/time_s` (unix seconds) added if absent.

        A row survives the death of the process from here on, but a loss of power only from the next fsync."""
        plain: dict[str, Any] = {"step": int(row["step"]), "epoch": float(row["epoch"])}
        for key, value in row.items():
            if key != "step" and key != "epoch":
                plain[key] = value if type(value) is float or type(value) is int else _plain_number(key, value)
        plain.setdefault(TIME_KEY, time.time())
        try:
            file = self._file or self._open()
            file.write(_encode(plain).encode() + b"\n")
            file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot write a metrics row: {error.strerror}") from error
        return plain

    def flush(self, *, fsync: bool = False) -> None:
        """Every row appended so far is with the operating system, and on the disk with `fsync`."""
        if self._file is None:
            return
        try:
            self._file.flush()
            if fsync:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot write metrics rows: {error.strerror}") from error

    def truncate_after(self, step: int, *, also: Callable[[dict[str, Any]], bool] = lambda row: False) -> int:
        """Drops rows whose step is beyond `step`, those that `also` names, and a half-written last line; returns how
        many rows went.

        All or nothing: a kill in here leaves the old journal or the new one."""
        self.close()
        if not self.path.exists():
            return 0
        lines, torn = _lines(self.path)
        kept = [line for line, row in lines if row["step"] <= step and not also(row)]
        if torn or len(kept) < len(lines):
            replace_file(self.path, b"".join(line + b"\n" for line in kept))
        return len(lines) - len(kept)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a row that could not be written was reported by append
                self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        new = not self.path.exists()
        if not new and not _ends_in_newline(self.path):  # or the next row would be glued to a half-written one
            lines, _ = _lines(self.path)
            replace_file(self.path, b"".join(line + b"\n" for line, _ in lines))
        self._file = self.path.open("ab")
        if new:
            _fsync_folder(self.path.parent)
        return self._file


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a journal in order, less a half-written last line. UserError names any other line that is no row."""
    return [row for _, row in _lines(Path(path))[0]]


def read_having(path: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """The whole rows that have one of these metrics; the others are not even parsed. For many looks at a long journal
    that grows. Raises UserError for such a row that is none."""
    names = list(names)
    marks = [json.dumps(name).encode() for name in names]
    *lines, _ = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if any(mark in line for mark in marks):
            row = _parse(line)
            if row is None:
                raise UserError(f"{path}: line {number} is not a metrics row; remove this line to go on")
            rows.append(row)
    return [row for row in rows if any(name in row for name in names)]


def read_from(path: Path, offset: int, *, at_most_bytes: int = 1 << 15) -> tuple[list[dict[str, Any]], int]:
    """Whole rows from byte `offset` on, about `at_most_bytes`, and the offset after them: to follow a live journal."""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            assert size >= offset, "the journal was truncated while it was being followed"
            file.seek(offset)
            block = file.read(at_most_bytes)
            if b"\n" not in block:
                block += file.readline()
    except FileNotFoundError:
        return [], offset
    block = block[: block.rfind(b"\n") + 1]
    return [json.loads(line) for line in block.splitlines()], offset + len(block)


def count_rows(path: Path) -> int:
    """Whole lines in a journal, 0 when there is none."""
    try:
        return Path(path).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _plain_number(key: str, value: Any) -> float | int:
    """A float of a NumPy or torch scalar; TypeError for what is no number, text that looks like one included."""
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"metric {key!r} is a {type(value).__name__}, not a number")
    return float(value)


def _lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], bool]:
    """Each whole row with its bytes, and whether the last line lacks its newline (which alone does not spoil it)."""
    content = path.read_bytes()
    *lines, tail = content.split(b"\n")
    torn = tail != b""
    rows = []
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is None:
            raise UserError(f"{path}: line {number} is not a metrics row; remove this line to go on")
        rows.append((line, row))
    last = _parse(tail) if torn else None
    if last is not None:
        rows.append((tail, last))
    return rows, torn


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # includes bytes that are no text
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def replace_file(path: Path, content: bytes) -> None:
    """Writes beside, makes it durable, renames over: the path always holds the old content or the new."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
