"""MLflow as a mirror of the journal: a background thread follows `metrics.jsonl` and delivers it, each point once.

`metrics.jsonl` is the truth and is written first, by vitexp.journal. Nothing here is on the way of training: a server
that is away, hangs or answers 500 costs one notice, and what it missed is delivered when it is back, at the next
resume, or by `python -m vitexp sync run=<run folder>`. All three do the same: reach the run, ask what it holds, send
the rest.

Used by rank 0 alone. Imports no torch, and MLflow only in the background thread (1.2 s; 3 s more for a new store).
"""

from vitexp.tracking.delivery import Delivery, deliver
from vitexp.tracking.facts import DataFingerprint, flatten, git_state, run_tags
from vitexp.tracking.mirror import Mirror, NoMirror
from vitexp.tracking.reading import (
    TrackedRun,
    experiment_runs,
    fetch,
    metric_points,
    newest_experiment,
    register,
    run_id_of,
)
from vitexp.tracking.record import JOURNAL_NAME, RECORD_NAME, check_model_name, forget
from vitexp.tracking.stores import default_uri, folder_of, resolve_uri, ui_line, without_password

__all__ = [
    "JOURNAL_NAME",
    "RECORD_NAME",
    "DataFingerprint",
    "Delivery",
    "Mirror",
    "NoMirror",
    "TrackedRun",
    "check_model_name",
    "default_uri",
    "deliver",
    "experiment_runs",
    "fetch",
    "flatten",
    "folder_of",
    "forget",
    "git_state",
    "metric_points",
    "newest_experiment",
    "register",
    "resolve_uri",
    "run_id_of",
    "run_tags",
    "ui_line",
    "without_password",
]
