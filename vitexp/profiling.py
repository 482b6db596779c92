"""Where the time of an update goes: some updates of a run under torch.profiler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from vitexp.run_folder import atomic_file, make_folder

log = logging.getLogger("vitexp")

TRACE = "trace.json"
WARMUP = 2  # updates before: the first ones take memory and choose kernels
SHOWN = 15  # operators in the table
PYTHON = "(between operators: Python, waiting for pictures)"


class NoProfiler:
    """Of a run that is not profiled, and of every rank but the first: nothing."""

    def step(self) -> None: ...

    def stop(self) -> None: ...


class Profiler(NoProfiler):
    """Looks at `updates` updates after WARMUP others, then logs a table of the operators that took longest and leaves
    trace.json in the folder, for chrome://tracing or ui.perfetto.dev.

    `step` is called after every update, `stop` at the end, where a run was too short a word says so."""

    def __init__(self, folder: Path, *, updates: int) -> None:
        self.folder, self.updates, self.done = folder, updates, False
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *cuda],
            schedule=schedule(wait=0, warmup=WARMUP, active=updates, repeat=1),
            on_trace_ready=self._leave,
        )
        self._profile.start()
        self._running = True

    def step(self) -> None:
        if self._running:
            self._profile.step()
            if self.done:
                self.stop()

    def stop(self) -> None:
        if not self._running:
            return
        self._running = False
        self._profile.stop()
        if not self.done:
            log.warning("profile: the run ended before %d updates had been looked at", WARMUP + self.updates)

    def _leave(self, found: profile) -> None:
        if found.step_num < WARMUP + self.updates:  # stopped in the midst of them
            return
        self.done = True
        path = self.folder / TRACE
        make_folder(self.folder)
        with atomic_file(path) as unfinished:
            found.export_chrome_trace(str(unfinished))
        for line in operator_table(found.key_averages(), updates=self.updates):
            log.info("%s", line)
        log.info("trace       %s: open it in chrome://tracing or ui.perfetto.dev", path)


def make_profiler(folder: Path, *, updates: int | None) -> NoProfiler:
    """The profiler of a run, one that does nothing where no updates are to be looked at."""
    return NoProfiler() if updates is None else Profiler(folder, updates=updates)


def operator_table(averages: Any, *, updates: int) -> list[str]:
    """Lines of the operators that took longest by themselves, per update: on the device where there is one."""
    on_device = any(event.self_device_time_total for event in averages)
    rows = [(e.self_device_time_total if on_device else e.self_cpu_time_total, e.count, e.key) for e in averages]
    total = sum(time for time, *_ in rows) or 1.0
    place = "device" if on_device else "CPU"
    lines = [f"profile     {total / updates / 1e3:.2f} ms of {place} time an update; ms, share and calls an update"]
    for time, count, key in sorted(rows, reverse=True)[:SHOWN]:
        name = PYTHON if key.startswith("ProfilerStep") else key[:70]
        lines.append(f"{time / updates / 1e3:>12.2f} {100 * time / total:>5.1f} % {count / updates:>7.4g}  {name}")
    return lines
