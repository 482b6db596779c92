"""`python -m vitexp --multirun optim=adam,adamw seed=0,1,2`: every combination as a run of its own, some at a time.

The sweep's folder holds a folder a job, what each job said (console/), and the ledger. The same command again leaves
alone what has finished, goes on with what was stopped or killed, and tries again what failed.
"""

from __future__ import annotations

import itertools
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitexp.config import compose_and_check, quoted, sweep_axes, sweep_settings
from vitexp.run_folder import RunLock, is_locked, make_folder
from vitexp.signals import StopRequest
from vitexp.sweeps.display import Row, Standing, SweepDisplay, label, of_summary, standing
from vitexp.sweeps.jobs import Job, folder_of, jobs_of, of_the_sweep
from vitexp.sweeps.ledger import Entry, Ledger, read_ledger
from vitexp.sweeps.local import Limits, Process, Share, cores_here, gpus_here, shares

POLL_S = 0.2
LOOK_S = 1.0  # between two looks at the journals of jobs that run
ORPHAN_S = 90.0  # how long a job of a launcher that was killed is waited for: it has been asked to save and end


def main(overrides: list[str], config_dir: str | None) -> int:
    """Runs what is missing of the sweep and returns an exit code: 0, 1 where a job did not finish, 128 + signal."""
    settings = sweep_settings(overrides, config_dir)
    first = check_jobs(overrides, config_dir)
    jobs = jobs_of(overrides, config_dir)
    folder = folder_of(overrides, experiment=first.name)
    with StopRequest() as stop, RunLock(folder):
        ledger = begin(folder, jobs, overrides)
        done = sum(ledger.is_finished(job.name) for job in jobs)
        say(
            f"sweep       {len(jobs)} jobs, {settings['jobs']} at a time"
            + (f", {done} finished already" if done else "")
        )
        say(f"folder      {folder}")
        stop.deferred = True  # looked at between two polls
        ended_by = run_jobs(jobs, ledger, settings, stop=stop, config_dir=config_dir)
        say(closing(jobs, ledger, settings))
        if any(ledger.is_finished(name) for name in ledger.jobs):
            from vitexp.sweeps.report import write_report

            say(write_report(ledger, metric=settings["metric"], maximize=settings["maximize"]))
    if ended_by is not None:
        say(f"vitexp: stopped by {signal.Signals(ended_by).name}; the same command goes on from here")
        return 128 + ended_by
    return 0 if all(ledger.is_finished(job.name) for job in jobs) else 1


def check_jobs(overrides: list[str], config_dir: str | None) -> Any:
    """The settings of the first job. Together those composed here show every value of every axis once: enough to find
    each typo, however large the sweep. Raises UserError."""
    from vitexp.tracking import resolve_uri

    axes = sweep_axes([text for text in overrides if not of_the_sweep(text)], config_dir)
    first = None
    for values in itertools.zip_longest(*axes) if axes else [()]:
        config = compose_and_check([value or axis[0] for value, axis in zip(values, axes, strict=True)], config_dir)
        resolve_uri(config.tracking.get("uri"), Path("outputs"))
        first = first or config
    return first


def begin(folder: Path, jobs: Sequence[Job], overrides: Sequence[str]) -> Ledger:
    """The ledger, with what it knew of these jobs; those of another command in the folder stay in it."""
    ledger = read_ledger(folder) or Ledger(folder, [], [])
    ledger.command = ["python", "-m", "vitexp", "--multirun", *overrides]
    ledger.swept = list(dict.fromkeys([*ledger.swept, *(key for job in jobs for key in job.swept)]))
    for job in jobs:
        entry = ledger.jobs.setdefault(job.name, Entry(list(job.overrides)))
        if not ledger.is_finished(job.name):
            entry.state, entry.reason = "waiting", ""
    ledger.write()
    return ledger


@dataclass
class Slot:
    """A place where one job at a time runs."""

    share: Share
    job: Job | None = None
    process: Process | None = None


def run_jobs(
    jobs: Sequence[Job], ledger: Ledger, settings: dict[str, Any], *, stop: StopRequest, config_dir: str | None
) -> int | None:
    """Runs every job that has not finished. Returns the signal that ended it before the last one, or None."""
    minutes = {key: settings[key] for key in ("time_limit", "silence_limit")}
    limits = Limits(*(None if value is None else 60.0 * value for value in minutes.values()))
    slots = [Slot(share) for share in shares(settings["jobs"], cores=cores_here(), gpus=gpus_here())]
    queue = [job for job in jobs if not ledger.is_finished(job.name)]
    console = make_folder(ledger.folder / "console")
    standings = {job.name: standing(ledger.folder / job.name, metric=settings["metric"]) for job in jobs}
    display = SweepDisplay(f"sweep {ledger.folder.name}")
    looked = 0.0
    try:
        while queue or any(slot.process for slot in slots):
            asked = stop.signum
            for slot in slots:
                if slot.process is None and queue and asked is None:
                    slot.job = queue.pop(0)
                    slot.process = start(slot.job, ledger, slot.share, limits, console, config_dir)
                elif slot.process is not None and asked is not None:
                    slot.process.stop("stopped", f"stopped by {signal.Signals(asked).name}")
            for slot in slots:
                if slot.process is not None and slot.job is not None and (became := slot.process.poll()) is not None:
                    finish(slot.job, slot.process, became, ledger)
                    standings[slot.job.name] = standing(ledger.folder / slot.job.name, metric=settings["metric"])
                    slot.job = slot.process = None
            if asked is not None and not any(slot.process for slot in slots):
                return asked
            if time.monotonic() - looked >= LOOK_S:
                looked = time.monotonic()
                display.show(rows_of(jobs, ledger, slots, standings, metric=settings["metric"]))
            time.sleep(POLL_S)
        display.show(rows_of(jobs, ledger, slots, standings, metric=settings["metric"]))
    finally:
        display.close()
    return None


def start(job: Job, ledger: Ledger, share: Share, limits: Limits, console: Path, config_dir: str | None) -> Process:
    """Begins or goes on with a job. One that a killed launcher left behind is on its way out, and is waited for."""
    folder = ledger.folder / job.name
    given_up = time.monotonic() + ORPHAN_S
    while is_locked(folder) and time.monotonic() < given_up:
        time.sleep(POLL_S)
    entry = ledger.jobs[job.name]
    entry.state, entry.reason, entry.attempts = "running", "", entry.attempts + 1
    ledger.write()
    where = [] if config_dir is None else ["--config-dir", config_dir]
    return Process(
        [*job.overrides, f"output_dir={quoted(str(folder))}", f"group={quoted(ledger.folder.name)}", *where],
        console=console / f"{job.name}.log",
        heard=lambda: standing(folder, metric=None).heard,
        share=share,
        limits=limits,
    )


def finish(job: Job, process: Process, became: tuple[Any, str], ledger: Ledger) -> None:
    entry = ledger.jobs[job.name]
    entry.state, entry.reason = became
    entry.minutes += process.minutes
    ledger.write()


def rows_of(
    jobs: Sequence[Job],
    ledger: Ledger,
    slots: Sequence[Slot],
    standings: dict[str, Standing],
    *,
    metric: str | None,
) -> list[Row]:
    running = {
        slot.job.name: slot.process.minutes for slot in slots if slot.job is not None and slot.process is not None
    }
    for name in running:
        standings[name] = standing(ledger.folder / name, metric=metric)
    return [Row(job, ledger.jobs[job.name], standings[job.name], running.get(job.name, 0.0)) for job in jobs]


def closing(jobs: Sequence[Job], ledger: Ledger, settings: dict[str, Any]) -> str:
    """What came of it: counts, failures with their reasons, and the best job as a command to paste."""
    states = [ledger.jobs[job.name].state for job in jobs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = [f"result      {counts}"]
    for job in jobs:
        entry = ledger.jobs[job.name]
        if entry.reason:
            lines.append(f"{entry.state:<11} {label(job)}: {entry.reason} ({ledger.folder / 'console' / job.name}.log)")
    best = best_of(jobs, ledger, metric=settings["metric"], maximize=settings["maximize"])
    if best is not None:
        job, (name, value) = best
        lines.append(f"best        {label(job)}: {name} {value:.4g}")
        lines.append(f"            python -m vitexp {shlex.join(job.overrides)}")
    return "\n".join(lines)


def best_of(
    jobs: Sequence[Job], ledger: Ledger, *, metric: str | None, maximize: bool
) -> tuple[Job, tuple[str, float]] | None:
    """The finished job with the best finite metric of its summary; None where there is none."""
    judged = [
        (job, found)
        for job in jobs
        if ledger.is_finished(job.name) and (found := of_summary(ledger.folder / job.name, metric=metric)) is not None
    ]
    if not judged:
        return None
    return (max if maximize else min)(judged, key=lambda pair: pair[1][1])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
