"""`python -m vitexp --multirun optim=adam,adamw seed=0,1,2`: every combination as a run of its own, some at a time.

The sweep's folder holds a folder a job, what each job said (console/), and the ledger. The same command again leaves
alone what has finished, goes on with what was stopped or killed, and tries again what failed.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitexp.config import build, compose_and_check, covering, quoted, sweep_axes, sweep_settings
from vitexp.run_folder import RunLock, is_locked, make_folder
from vitexp.signals import StopRequest
from vitexp.sweeps.display import Row, Standing, SweepDisplay, label, last_row_at, of_summary, standing
from vitexp.sweeps.jobs import Grid, Job, Source, folder_of, jobs_of, without_the_sweeps
from vitexp.sweeps.ledger import Entry, Ledger, State, read_ledger
from vitexp.sweeps.local import Launcher, Limits, Running
from vitexp.sweeps.search import Search, Trials, with_space

POLL_S = 0.2
LOOK_S = 1.0  # between two looks at the journals of jobs that run
ORPHAN_S = 90.0  # how long a job of a launcher that was killed is waited for: it has been asked to save and end


def main(overrides: list[str], config_dir: str | None) -> int:
    """Runs what is missing of the sweep and returns an exit code: 0, 1 where a job did not finish, 128 + signal."""
    settings = sweep_settings(overrides, config_dir)
    search: Search | None = build(settings["search"]) if settings.get("search") else None
    command = ["python", "-m", "vitexp", "--multirun", *overrides]
    overrides = with_space(overrides, settings.get("space"))
    first = check_jobs(overrides, config_dir, search=search is not None)
    folder = folder_of(overrides, experiment=first.name)
    with StopRequest() as stop, RunLock(folder):
        ledger = read_ledger(folder) or Ledger(folder, [], [])
        ledger.command, ledger.metric, ledger.maximize = command, settings["metric"], settings["maximize"]
        source, jobs, wanted = open_source(search, overrides, config_dir, ledger)
        done = sum(ledger.is_finished(job.name) for job in jobs)
        say(f"sweep       {wanted}, {settings['jobs']} at a time" + (f", {done} finished already" if done else ""))
        say(f"folder      {folder}")
        stop.deferred = True  # looked at between two polls
        ended_by = run_jobs(source, jobs, ledger, settings, stop=stop, config_dir=config_dir)
        say(closing(jobs, ledger))
        if any(ledger.is_finished(name) for name in ledger.jobs):
            from vitexp.sweeps.report import write_report

            say(write_report(ledger, metric=ledger.metric, maximize=ledger.maximize))
    if ended_by is not None:
        say(f"vitexp: stopped by {signal.Signals(ended_by).name}; the same command goes on from here")
        return 128 + ended_by
    if isinstance(source, Trials):  # those that failed were replaced
        return 0 if source.is_complete else 1
    return 0 if all(ledger.is_finished(job.name) for job in jobs) else 1


def check_jobs(overrides: list[str], config_dir: str | None, *, search: bool = False) -> Any:
    """The settings of the first job. Together those composed here show every value of every axis, and both ends of
    what a search takes between them: enough to find each typo, however large the sweep. Raises UserError."""
    from vitexp.tracking import resolve_uri

    axes = sweep_axes(without_the_sweeps(overrides), config_dir, ends=search)
    first = None
    for job in covering(axes):
        config = compose_and_check(job, config_dir)
        resolve_uri(config.tracking.get("uri"), Path("outputs"))
        first = first or config
    return first


def open_source(
    search: Search | None, overrides: list[str], config_dir: str | None, ledger: Ledger
) -> tuple[Source, list[Job], str]:
    """Where jobs come from, those that are known by now, and what is wanted in a few words.

    What the ledger knew of them stays; those of another command in the folder stay in it."""
    if search is None:
        jobs = jobs_of(overrides, config_dir)
        for job in jobs:
            enter(job, ledger)
        ledger.write()
        return Grid(jobs, ledger), jobs, f"{len(jobs)} jobs"
    trials = search.open(without_the_sweeps(overrides), config_dir, ledger, say=say)
    return trials, trials.known, f"{search.trials} trials, {trials.counted} done"


def enter(job: Job, ledger: Ledger) -> Entry:
    """Its entry, made where there is none; it waits, unless it has finished."""
    ledger.swept = list(dict.fromkeys([*ledger.swept, *job.swept]))
    entry = ledger.jobs.setdefault(job.name, Entry(list(job.overrides)))
    if not ledger.is_finished(job.name):
        entry.state, entry.reason = "waiting", ""
    return entry


@dataclass
class Slot:
    """A place where one job at a time runs."""

    job: Job
    running: Running


def run_jobs(
    source: Source,
    jobs: list[Job],
    ledger: Ledger,
    settings: Mapping[str, Any],
    *,
    stop: StopRequest,
    config_dir: str | None,
) -> int | None:
    """Runs what the source gives, adding to `jobs` those that it made up. Returns the signal that ended it, or None."""
    minutes = {key: settings[key] for key in ("time_limit", "silence_limit")}
    limits = Limits(*(None if value is None else 60.0 * value for value in minutes.values()))
    launcher: Launcher = build(settings["launcher"], jobs=settings["jobs"])
    slots: list[Slot | None] = [None] * settings["jobs"]
    standings = {job.name: standing(ledger.folder / job.name, metric=ledger.metric) for job in jobs}
    display = SweepDisplay(f"sweep {ledger.folder.name}")
    looked = 0.0
    try:
        while not source.is_over or any(slots):
            for place, slot in enumerate(slots):
                if slot is not None and (became := slot.running.poll()) is not None:
                    finish(slot, became, ledger)
                    standings[slot.job.name] = standing(ledger.folder / slot.job.name, metric=ledger.metric)
                    source.tell(slot.job)
                    slots[place] = None
            asked = stop.signum
            for place, slot in enumerate(slots):
                if slot is not None and asked is not None:
                    slot.running.stop("stopped", f"stopped by {signal.Signals(asked).name}")
                elif slot is None and asked is None and (job := source.next()) is not None:
                    if job not in jobs:
                        jobs.append(job)
                    slots[place] = Slot(job, start(job, ledger, launcher, place, limits, config_dir))
            if asked is not None and not any(slots):
                return asked
            if time.monotonic() - looked >= LOOK_S:
                looked = time.monotonic()
                for slot in filter(None, slots):
                    if (reason := source.verdict(slot.job)) is not None:
                        slot.running.stop("pruned", reason)
                display.show(rows_of(jobs, ledger, slots, standings))
            time.sleep(POLL_S)
        display.show(rows_of(jobs, ledger, slots, standings))
    finally:
        display.close()
    return None


def start(job: Job, ledger: Ledger, launcher: Launcher, place: int, limits: Limits, config_dir: str | None) -> Running:
    """Begins or goes on with a job. One that a killed launcher left behind is on its way out, and is waited for."""
    folder = ledger.folder / job.name
    given_up = time.monotonic() + (0 if launcher.survives else ORPHAN_S)
    while is_locked(folder) and time.monotonic() < given_up:
        time.sleep(POLL_S)
    entry = enter(job, ledger)
    entry.state, entry.reason, entry.attempts = "running", "", entry.attempts + 1
    ledger.write()
    where = [] if config_dir is None else ["--config-dir", config_dir]
    return launcher.start(
        [*job.overrides, f"output_dir={quoted(str(folder))}", f"group={quoted(ledger.folder.name)}", *where],
        slot=place,
        console=make_folder(ledger.folder / "console") / f"{job.name}.log",
        heard=lambda: last_row_at(folder),
        limits=limits,
    )


def finish(slot: Slot, became: tuple[State, str], ledger: Ledger) -> None:
    entry = ledger.jobs[slot.job.name]
    entry.state, entry.reason = became
    entry.minutes += slot.running.minutes
    ledger.write()


def rows_of(
    jobs: Sequence[Job], ledger: Ledger, slots: Sequence[Slot | None], standings: dict[str, Standing]
) -> list[Row]:
    running = {slot.job.name: slot.running.minutes for slot in slots if slot is not None}
    for name in running:
        standings[name] = standing(ledger.folder / name, metric=ledger.metric)
    return [
        Row(job, ledger.jobs[job.name], standings.get(job.name, Standing()), running.get(job.name, 0.0)) for job in jobs
    ]


def closing(jobs: Sequence[Job], ledger: Ledger) -> str:
    """What came of it: counts, failures with their reasons, and the best job as a command to paste."""
    states = [ledger.jobs[job.name].state for job in jobs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = [f"result      {counts}"]
    for job in jobs:
        entry = ledger.jobs[job.name]
        if entry.reason:
            lines.append(f"{entry.state:<11} {label(job)}: {entry.reason} ({ledger.folder / 'console' / job.name}.log)")
    best = best_of(jobs, ledger)
    if best is not None:
        job, (name, value) = best
        lines.append(f"best        {label(job)}: {name} {value:.4g}")
        lines.append(f"            python -m vitexp {shlex.join(job.overrides)}")
    return "\n".join(lines)


def best_of(jobs: Sequence[Job], ledger: Ledger) -> tuple[Job, tuple[str, float]] | None:
    """The finished job with the best finite metric of its summary; None where there is none."""
    judged = [
        (job, found)
        for job in jobs
        if ledger.is_finished(job.name)
        and (found := of_summary(ledger.folder / job.name, metric=ledger.metric)) is not None
    ]
    if not judged:
        return None
    return (max if ledger.maximize else min)(judged, key=lambda pair: pair[1][1])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
