"""Where the jobs of a sweep run: what every launcher offers, and processes on this machine with shares of its cores and
GPUs.

Here a job is `python -m vitexp <overrides>` in a session of its own. It is ended with what it started when it takes too
long, falls silent, or when whoever started it has died: then the kernel asks it to stop, it saves, and the same command
finds it whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vitexp.launch import kill_group
from vitexp.sweeps.ledger import State

GRACE_S = 30.0  # from the request to stop until a job is killed: a step, a checkpoint
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Limits:
    """Seconds after which a job is stopped; None: never."""

    time_s: float | None = None
    silence_s: float | None = None


@dataclass(frozen=True)
class Share:
    """What one of the jobs that run side by side may use."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] | None  # None: there are none to divide


def shares(jobs: int, *, cores: list[int], gpus: list[str]) -> list[Share]:
    """One for each of `jobs` at a time. Where there are fewer cores or GPUs than jobs, some have the same one."""
    return [Share(tuple(_part(cores, jobs, i)), tuple(_part(gpus, jobs, i)) if gpus else None) for i in range(jobs)]


def _part(things: list[Any], parts: int, number: int) -> list[Any]:
    if len(things) < parts:
        return [things[number % len(things)]]
    return things[number * len(things) // parts : (number + 1) * len(things) // parts]


def cores_here() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def gpus_here() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; found without starting CUDA, which a process keeps memory for."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip() not in ("", "-1")]
    return [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]


class Running(Protocol):
    """A job that was started."""

    @property
    def minutes(self) -> float:
        """Since it began to run."""

    def poll(self) -> tuple[State, str] | None:
        """What became of it and why, None while it runs or waits for a machine."""

    def stop(self, state: State, reason: str) -> None:
        """Asks it to save and end; `poll` then gives this state and reason."""


class Launcher(Protocol):
    """What starts jobs: here, or through an engine that has more machines."""

    @property
    def survives(self) -> bool:
        """Jobs go on when this process dies, and `start` finds them again."""

    def start(
        self, arguments: list[str], *, slot: int, console: Path, heard: Callable[[], float], limits: Limits
    ) -> Running:
        """`python -m vitexp <arguments>` in place `slot` of those side by side; what it says is added to `console`.

        `heard` is the time (as time.time()) of the last thing that the job wrote elsewhere than to the console."""


class Watched(ABC):
    """What all jobs that run have in common: a console, limits, and what they were asked to stop for."""

    grace_s = GRACE_S

    def __init__(self, *, console: Path, heard: Callable[[], float], limits: Limits) -> None:
        self.console, self.limits, self._heard = console, limits, heard
        self._asked: tuple[State, str, float] | None = None  # what it was asked to stop for, and when
        self._said_before = console.stat().st_size if console.exists() else 0
        self._began_at: float | None = None  # time.time(); None: it waits for a machine
        self._was_killed = False

    @property
    def minutes(self) -> float:
        return 0.0 if self._began_at is None else (time.time() - self._began_at) / 60

    def stop(self, state: State, reason: str) -> None:
        """Asks it to save and end; `poll` kills it if it does not."""
        if self._asked is None:
            self._asked = state, reason, time.monotonic()
            self._ask()

    @abstractmethod
    def _ask(self) -> None:
        """To save and end."""

    @abstractmethod
    def _kill(self) -> None:
        """Without asking."""

    def _watch(self) -> None:
        """Stops it where it is over its limits, kills it where it was asked and did not."""
        if self._asked is not None:
            if time.monotonic() - self._asked[2] > self.grace_s and not self._was_killed:
                self._was_killed = True
                self._kill()
            return
        if self._began_at is None:
            return
        limit = self.limits.time_s
        if limit is not None and time.time() - self._began_at > limit:
            self.stop("timed out", f"took longer than {limit / 60:g} minutes (sweep.time_limit)")
        limit = self.limits.silence_s
        if limit is not None and time.time() - max(self._began_at, self._spoke(), self._heard()) > limit:
            self.stop("hung", f"said nothing for {limit / 60:g} minutes (sweep.silence_limit)")

    def _became(self, code: int) -> tuple[State, str]:
        """What an exit code (of a process: negative for a signal) and the console say of it."""
        if code == 0:
            return "finished", ""  # also where the wish to stop it came too late
        if self._asked is not None:
            return self._asked[0], self._asked[1]
        if code < 0:
            name = signal.Signals(-code).name
            return "killed", f"killed by {name}" + (", likely for memory" if -code == signal.SIGKILL else "")
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            return "stopped", f"stopped by {signal.Signals(code - 128).name}"
        return "failed", self._complaint() or f"ended with exit code {code}"

    def _complaint(self) -> str:
        """The last error that the job said, in one line."""
        try:
            with self.console.open("rb") as file:
                file.seek(self._said_before)
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        said = [line for line in lines if line.startswith("vitexp: ")]
        return said[-1].removeprefix("vitexp: ") if said else ""

    def _spoke(self) -> float:
        try:
            return self.console.stat().st_mtime
        except OSError:
            return 0.0


class Local:
    """Processes on this machine."""

    survives = False

    def __init__(self, jobs: int) -> None:
        """`jobs` at a time."""
        self._shares = shares(jobs, cores=cores_here(), gpus=gpus_here())

    def start(
        self, arguments: list[str], *, slot: int, console: Path, heard: Callable[[], float], limits: Limits
    ) -> Process:
        return Process(arguments, console=console, heard=heard, share=self._shares[slot], limits=limits)


class Process(Watched):
    """A job that runs. `poll` says what became of it once it is over."""

    def __init__(
        self, arguments: list[str], *, console: Path, heard: Callable[[], float], share: Share, limits: Limits
    ) -> None:
        super().__init__(console=console, heard=heard, limits=limits)
        self._began_at = time.time()
        prepare = dies_with(os.getpid(), cores=share.cores)
        self._process = run_here(arguments, console, env=_environment(share), start_new_session=True, prepare=prepare)

    def poll(self) -> tuple[State, str] | None:
        """What became of it and why, None while it runs; a job over its limits is stopped."""
        code = self._process.poll()
        if code is None:
            self._watch()
            return None
        kill_group(self._process)  # what it left behind
        return self._became(code)

    def _ask(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def _kill(self) -> None:
        kill_group(self._process)


def run_here(
    arguments: list[str],
    console: Path,
    *,
    cwd: str | None = None,
    env: dict[str, str] | None = None,
    start_new_session: bool = False,
    prepare: Callable[[], None] | None = None,
) -> subprocess.Popen[bytes]:
    """`python -m vitexp <arguments>` as a process; what it says is added to `console`."""
    with console.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "vitexp", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            cwd=cwd,
            env=env,
            start_new_session=start_new_session,
            preexec_fn=prepare,
        )


def _environment(share: Share) -> dict[str, str]:
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(len(share.cores))}
    devices = {} if share.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(share.gpus)}
    return {**os.environ, **threads, **devices}


def dies_with(parent: int, *, cores: Sequence[int] = ()) -> Callable[[], None] | None:
    """What a child does before it becomes another program: SIGTERM when its parent dies, and these cores alone."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)  # loaded before the fork: after it only calls are safe

    def prepare() -> None:
        if cores:
            os.sched_setaffinity(0, cores)
        library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os._exit(128 + signal.SIGTERM)

    return prepare
