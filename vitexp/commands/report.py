"""`python -m vitexp report <sweep folder | pipeline folder | MLflow experiment>`: makes the report again.

Of a sweep by its ledger, of a pipeline by its stages' folders, into the same folder. Of an experiment, also as
mlflow:<name>, a report as a sweep's of all its runs, into `output` (outputs/<experiment>/report); `tracking.uri` is the
store. `metric` and `maximize` say what runs are judged by; without them a sweep's are those it ran with."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from vitexp.errors import UserError, nearest
from vitexp.locate import store_of_training, truth, words_given
from vitexp.pipeline_report import write_again
from vitexp.run_folder import make_folder
from vitexp.sweeps.experiment import find_in
from vitexp.sweeps.ledger import LEDGER, Ledger, finite, read_ledger, summary_of
from vitexp.sweeps.report import find, write_files
from vitexp.tracking import experiment_runs, metric_points

KEYS = ("metric", "maximize", "output", "uri")
ALLOWED = "the folder of a sweep (it has sweep.json) or of a pipeline (pipeline.json), or an experiment of MLflow"
PIPELINE = "pipeline.json"
SMALLEST = "false means that the smallest is best"
OF_MLFLOW = "mlflow:"
OUTPUTS = Path("outputs")


def main(arguments: list[str], config_dir: str | None) -> int:
    """Writes the report and prints where it is. Raises UserError."""
    if not arguments or arguments[0].partition("=")[0] in (*KEYS, "tracking.uri"):
        raise UserError(f"report: of what? Give {ALLOWED}")
    name, *rest = arguments
    given = words_given(rest, KEYS, command="report")
    metric, maximize = given.get("metric"), truth("maximize", given.get("maximize"), why=SMALLEST)
    folder = Path(name).expanduser().absolute()
    if folder.is_dir() and (ledger := read_ledger(folder)) is not None:
        _refuse(given, ("output", "uri"), f"{name} is the folder of a sweep, where its report lies")
        print(of_sweep(ledger, metric=metric, maximize=maximize))
    elif (folder / PIPELINE).is_file():
        _refuse(given, KEYS, f"{name} is the folder of a pipeline, whose report takes nothing else")
        print(write_again(folder))
    else:
        output = given.get("output")
        print(
            of_experiment(
                name,
                None if output is None else Path(output).expanduser(),
                uri=given.get("uri") or store_of_training(),
                metric=metric,
                maximize=True if maximize is None else maximize,
            )
        )
    return 0


def of_sweep(ledger: Ledger, *, metric: str | None, maximize: bool | None) -> str:
    if metric is not None:
        finished = (name for name in ledger.jobs if ledger.is_finished(name))
        _check_metric(metric, (summary_of(ledger.folder / name) for name in finished))
    maximize = ledger.maximize if maximize is None else maximize
    found = find(ledger, metric=metric or ledger.metric, maximize=maximize)
    return write_files(found, ledger.folder)


def of_experiment(name: str, output: Path | None, *, uri: str | None, metric: str | None, maximize: bool) -> str:
    """`name` may be any text that is no folder of ours."""
    experiment = name.removeprefix(OF_MLFLOW)
    try:
        runs = experiment_runs(experiment, root=OUTPUTS, uri=uri)
    except UserError as error:
        if name.startswith(OF_MLFLOW):
            raise
        raise UserError(f"report {name}: expected {ALLOWED}.{_near_folder(Path(name))}\n{error}") from None
    if not runs:
        raise UserError(f"{OF_MLFLOW}{experiment}: this experiment has no runs")
    if metric is not None:
        _check_metric(metric, (finite(run.metrics) for run in runs))
    found = find_in(
        experiment,
        runs,
        lambda run_ids, of: metric_points(run_ids, of, root=OUTPUTS, uri=uri),
        metric=metric,
        maximize=maximize,
    )
    folder = output or OUTPUTS / re.sub(r"[^\w\-. ]", "_", experiment) / "report"
    return write_files(found, make_folder(folder))


def _check_metric(metric: str, measured: Iterable[dict[str, float]]) -> None:
    known = sorted(set().union(*measured))
    if metric not in known:
        has = nearest(metric, known) or f" They have {', '.join(key for key in known if '/' in key) or 'none'}."
        raise UserError(f"metric={metric}: no finished run has this metric.{has}")


def _near_folder(path: Path) -> str:
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return nearest(path.name, [one.name for one in beside if (one / LEDGER).exists() or (one / PIPELINE).exists()])


def _refuse(given: dict[str, str], keys: tuple[str, ...], why: str) -> None:
    for key in given:
        if key in keys:
            raise UserError(f"{key}={given[key]}: {why}")
