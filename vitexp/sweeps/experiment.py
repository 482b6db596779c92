"""The runs of an MLflow experiment, read as a sweep's: what differs between them, and what came of each."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vitexp.sweeps.ledger import Entry, State, finite, read_ledger
from vitexp.sweeps.report import SEED, Findings, Outcome, findings, judged_by, number
from vitexp.tracking import TrackedRun

# Params that are no settings of what is learned: places, names, and what follows from others.
ASIDE = ("output_dir", "resume", "allow_changes", "group", "name", "tracking", "derived")
ASIDE += ("train.save_every", "train.keep", "train.workers", "train.log_every", "train.log_weights", "runtime.threads")
ASIDE += ("choices.sweep", "choices.pipeline", "choices.tracking")
CHOICES = "choices."  # of a group: which option
STATES: dict[str, State] = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "killed", "RUNNING": "running"}
ENDED = "the run ended here"  # in train.log, before a traceback
ERROR = re.compile(r"^(?:[a-z_][\w.]*\.)?([A-Z]\w*: .+)$", re.MULTILINE)  # its last line
NOT_OF_THE_RUN = ("output_dir=", "group=")  # of a command that shall be typed again

Points = dict[str, list[tuple[float, float]]]  # (epoch, value) by run id


def find_in(
    experiment: str,
    runs: Sequence[TrackedRun],
    points: Callable[[list[str], str], Points],
    *,
    metric: str | None,
    maximize: bool,
) -> Findings:
    """What the runs found. `points` fetches the curves of runs; `metric` None: what they are judged by."""
    measured = {run.run_id: finite(run.metrics) if run.status == "FINISHED" else {} for run in runs}
    metric = metric or judged_by(measured.values())
    judged = [run.run_id for run in runs if metric in measured[run.run_id]]
    curves = points(judged, metric) if metric is not None and judged else {}
    settings = {run.run_id: _settings(run.params) for run in runs}
    # Of other kinds of runs, such as those that pretrain, it does not matter in what they differ.
    alike = [run.run_id for run in runs if run.status != "FINISHED" or run.run_id in judged]
    swept = differing([settings[run_id] for run_id in alike])
    outcomes = [
        Outcome(
            run.name,
            _entry(run),
            {_said(key): number(settings[run.run_id][key]) for key in swept if key in settings[run.run_id]},
            measured[run.run_id].get(metric or ""),
            curves.get(run.run_id, []),
        )
        for run in runs
    ]
    keys = [_said(key) for key in swept]
    return findings("experiment", experiment, outcomes, keys, metric=metric, maximize=maximize)


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys whose values differ, without those that only say once more what another says: copies of it, and what
    follows from the option of its own group, the experiment or the stage. What merely came along with another setting
    stays: a reader should see that two things differ."""
    columns = {
        key: tuple(one.get(key, "") for one in settings) for key in sorted(set().union(*settings), key=_importance)
    }
    columns = {key: values for key, values in columns.items() if len(set(values)) > 1}
    kept: dict[str, tuple[str, ...]] = {}
    for key, values in columns.items():
        group = f"{CHOICES}{key.partition('.')[0]}"
        deciding = (group, f"{CHOICES}experiment", f"{CHOICES}stage")
        options = [columns[one] for one in deciding if one in columns and one != key]
        if values not in kept.values() and not any(_follows(values, chosen) for chosen in options):
            kept[key] = values
    return list(kept)


def _follows(values: Sequence[str], chosen: Sequence[str]) -> bool:
    """Whether each option has always the same value."""
    return len(set(zip(chosen, values, strict=True))) == len(set(chosen))


def _importance(key: str) -> tuple[bool, bool, int, str]:
    """The seed and options of groups first; short keys before the long ones that interpolate them."""
    return key != SEED, not key.startswith(CHOICES), key.count("."), key


def _settings(params: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in params.items() if not any(key == a or key.startswith(f"{a}.") for a in ASIDE)}


def _said(key: str) -> str:
    return key.removeprefix(CHOICES)


def _entry(run: TrackedRun) -> Entry:
    state = STATES.get(run.status, "waiting")
    reason = "" if state == "finished" else _reason(Path(run.tags.get("run_dir", "")))
    return Entry(_overrides(run.tags.get("command", "")), state, reason, attempts=1, minutes=run.minutes)


def _overrides(command: str) -> list[str]:
    """Settings that a person typed for the run; none where it was started with a file of them."""
    typed = shlex.split(command)[1:]
    overrides = [text for text in typed if not text.startswith(NOT_OF_THE_RUN)]
    return overrides if all("=" in text and not text.startswith("--") for text in overrides) else []


def _reason(run_dir: Path) -> str:
    """Why it did not finish, where its folder is on this machine: as the ledger of its sweep or its log says."""
    if not run_dir.is_absolute() or not run_dir.is_dir():
        return ""
    ledger = read_ledger(run_dir.parent)
    if ledger is not None and run_dir.name in ledger.jobs:
        return ledger.jobs[run_dir.name].reason
    try:
        said = (run_dir / "train.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    errors = ERROR.findall(said.rpartition(ENDED)[2]) if ENDED in said else []
    return errors[-1] if errors else ""
