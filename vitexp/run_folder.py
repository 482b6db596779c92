"""The folder of a run: one process at a time writes in it, every file in it appears whole, and nothing in it gets lost.

Knows nothing of training. Whoever writes a file that a person or a later run reads (config, summary, weights, plots)
writes it through `write_atomic` or `atomic_file`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from vitexp.errors import UserError

log = logging.getLogger(__name__)

LOCK_NAME = ".lock"
PREVIOUS_NAME = "previous"

_DYING_S = 5.0  # how long the lock of a process that has ended is waited for
# What flock answers where the file system has no locks at all (some Lustre, some FUSE mounts).
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


def cannot(what: str, path: Path, error: OSError) -> UserError:
    """The error a person sees for a failed system call: `cannot WHAT PATH: REASON`."""
    # os.path and not pathlib: below a folder that may not be entered, pathlib's questions raise themselves.
    blocker = next((p for p in (path, *path.parents) if os.path.exists(p) and not os.path.isdir(p)), None)
    if isinstance(error, (FileExistsError, NotADirectoryError)) and blocker is not None:
        return UserError(f"cannot {what} {path}: {blocker} is a file, not a folder")
    return UserError(f"cannot {what} {path}: {error.strerror or error}")


def make_folder(path: Path, *, what: str = "write in") -> Path:
    """The folder, made with its parents where missing. UserError naming the path when that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot(what, path, error) from error
    return path


def sync_folder(folder: Path) -> None:
    """Makes names created, renamed or removed in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what file systems without folder sync answer
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; synced and renamed to `path` when the block ends, removed when it raises.

    For writers that want a name of their own (safetensors, matplotlib); the suffix is kept, as they choose the format
    by it. An OSError becomes a UserError that names `path`."""
    beside = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield beside
        descriptor = os.open(beside, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot("write", path, error) from error
    finally:
        beside.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes the whole file or leaves the one before untouched; text as UTF-8."""
    with atomic_file(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


_HALF_WRITTEN = re.compile(r"\..+\.\d+\.tmp(\..+)?")  # what atomic_file writes to


class RunLock:
    """Held while a process writes in a run folder, which is made where missing: `with RunLock(run_dir): ...`.

    A second process is refused at once with the pid and host of the first. The kernel gives the lock back when the
    holder ends in whatever way, kill -9 included, so a lock is never stale and never needs removing by hand."""

    def __init__(self, run_dir: Path, *, key: str = "output_dir") -> None:
        self.path = run_dir / LOCK_NAME
        self.key = key  # by which a person gave the folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the lock and removes half-written files of killed holders. UserError when held or not writable."""
        assert self._descriptor is None, "the lock is already held by this object"
        make_folder(self.path.parent)
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise cannot("write in", self.path.parent, error) from error
        try:
            self._take(descriptor)
            os.ftruncate(descriptor, 0)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            for leftover in self.path.parent.glob(".*.tmp*"):
                if _HALF_WRITTEN.fullmatch(leftover.name):  # not a person's own
                    leftover.unlink(missing_ok=True)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                raise cannot("write in", self.path.parent, error) from error
            raise
        self._descriptor = descriptor
        _held.add(self)

    def _take(self, descriptor: int) -> None:
        given_up = time.monotonic() + _DYING_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                holder = _holder(descriptor)
                # Of a killed run a child that it was just forking may hold the lock until it gets to die.
                if not _has_ended(holder) or time.monotonic() > given_up:
                    raise UserError(
                        f"{self.key}={self.path.parent} is in use by {_named(holder)}\n"
                        f"wait for it, stop it, or give another {self.key}"
                    ) from None
                time.sleep(0.02)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                log.warning(
                    "%s cannot be locked here (%s): see that no second run writes in it", self.path, error.strerror
                )
                return

    def release(self) -> None:
        """Gives the lock back. The file stays: removing it would let two processes lock two files of one name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_locked(run_dir: Path) -> bool:
    """Whether a process writes in the folder now. False where there is no folder."""
    try:
        descriptor = os.open(run_dir / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    else:
        return False
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> dict[str, Any]:
    """Who wrote the lock file, waiting a moment for one that has locked it and is about to write; {} if unknown."""
    for _ in range(20):
        with contextlib.suppress(ValueError):
            holder = json.loads(os.pread(descriptor, 4096, 0))
            if isinstance(holder, dict) and {"pid", "host", "since"} <= holder.keys():
                return holder
        time.sleep(0.02)
    return {}


def _named(holder: dict[str, Any]) -> str:
    return "process {pid} on {host}, started {since}".format(**holder) if holder else "another process"


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether it is certain that no such process is here any more."""
    return bool(holder) and holder["host"] == socket.gethostname() and not process_exists(holder["pid"])


def process_exists(pid: int) -> bool:
    """Whether this machine has such a process, be it another user's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    # A forked loader worker shares the lock and would hold it on for seconds after the run was killed.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_child)


def _former_files(run_dir: Path, spare: Collection[str]) -> list[Path]:
    """What archive_previous would move, checkpoints first so that a kill in between never leaves them as resumable."""
    staying = {LOCK_NAME, PREVIOUS_NAME, *spare}
    found = [p for p in run_dir.iterdir() if p.name not in staying] if run_dir.is_dir() else []
    return sorted(found, key=lambda p: (p.name != "checkpoints", p.name))


def is_used(run_dir: Path, *, spare: Collection[str] = ()) -> bool:
    """Whether the folder holds files of a former run, other than the names in `spare`."""
    return bool(_former_files(run_dir, spare))


def archive_previous(run_dir: Path, *, spare: Collection[str] = ()) -> Path | None:
    """Moves a former run's files to `run_dir/previous/<n>` and returns that folder, or None where there were none.

    Call it, holding the lock, whenever a run starts from step 0. `spare` names what this run has already written.
    Renames within a file system: nothing is copied or lost, and a kill in between leaves the rest for the next call."""
    former = _former_files(run_dir, spare)
    if not former:
        return None
    previous = run_dir / PREVIOUS_NAME
    try:
        previous.mkdir(exist_ok=True)
        numbers = [int(p.name) for p in previous.iterdir() if p.name.isdecimal()]
        target = previous / str(max(numbers, default=0) + 1)
        target.mkdir()
        for path in former:
            shutil.move(path, target / path.name)
        sync_folder(run_dir)
    except OSError as error:
        raise cannot("move the former run in", run_dir, error) from error
    return target
