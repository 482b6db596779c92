"""What other commands ask of MLflow: a run's files, an experiment's runs, a version of a registered model."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitexp import serving
from vitexp.errors import UserError, nearest
from vitexp.tracking.facts import CHANGED
from vitexp.tracking.record import Record
from vitexp.tracking.session import find_run, import_mlflow, open_client
from vitexp.tracking.stores import one_line, resolve_uri, sqlite_path, without_password


def run_id_of(name: str) -> str | None:
    """The id in `mlflow:<run id>` or `runs:/<run id>`; None for anything else, such as a folder."""
    found = re.fullmatch(r"(?:mlflow:|runs:/)([^/]+)/?", name)
    return found[1] if found else None


def fetch(
    run_id: str, *, root: Path, uri: str | None = None, weights: str | None = None, needed: Iterable[str] = ()
) -> tuple[Path, str]:
    """`<root>/from_mlflow/<run id>` with the run's settings and weights from its artifacts, and the weights' file name.

    Taken are `weights`, or else the best ones the run has, with their description, and what of config.yaml,
    config.interpolated.yaml and summary.json there is. UserError when the store does not answer, knows no such run, or
    the run lacks the weights or what is `needed`."""
    store, what = resolve_uri(uri, root), f"run=mlflow:{run_id}"
    folder = Path(root) / "from_mlflow" / run_id
    with _reading(store, what) as client:
        run = find_run(client, run_id)
        if run is None:
            shown = without_password(store)
            raise UserError(f"{what}: MLflow at {shown} has no such run; give uri= if it is in another")
        model = serving.model_of(client, run)
        there = {entry.path for entry in client.list_artifacts(run_id)} | model.keys()
        logged = ("model_best.safetensors", "model_ema.safetensors")  # the better one of a run that has both
        weights = next((name for name in logged if name in there), "model.safetensors") if weights is None else weights
        for name in (weights, str(Path(weights).with_suffix(".json")), *needed):
            if name not in there:
                has = ", ".join(sorted(there)) or "no artifacts"
                raise UserError(f"{what}: the run has no artifact {name}; it has {has}")
        wanted = {weights, str(Path(weights).with_suffix(".json")), "config.yaml", "config.interpolated.yaml"}
        wanted = (wanted | {"summary.json"}) & there
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetched.") as beside:
            for name in sorted(wanted):
                if name in model:
                    fetched = serving.download(model[name], beside, store=store)
                else:
                    fetched = client.download_artifacts(run_id, name, beside)
                os.replace(fetched, folder / name)
    return folder, weights


def register(folder: Path, name: str, *, run_dir: Path, run_id: str | None, root: Path, uri: str | None = None) -> str:
    """Logs an export of format=mlflow as a model of its run, and a new version of the registered model `name`; says so.

    The run is `run_id` in the store `uri`, or else the one that the run folder's own record names. Raises UserError."""
    what = f"register={name}"
    if run_id is not None:
        store = resolve_uri(uri, root)
    else:
        record = Record.load(run_dir)
        run_id = None if record is None or record.uri is None else record.store(record.uri)["run_id"]
        if record is None or record.uri is None or run_id is None or "***" in record.uri:
            raise UserError(
                f"{what}: {run_dir} does not say which run in MLflow it is; the export is written.\n"
                "Deliver it first (python -m vitexp sync), and give run=mlflow:<run id> uri=<tracking store>"
            )
        store = record.uri
    with _reading(store, what) as client:
        run = find_run(client, run_id)
        if run is None:
            raise UserError(f"{what}: MLflow at {without_password(store)} has no run {run_id}; the export is written")
        files = [path for path in sorted(folder.iterdir()) if path.name not in serving.FILES]
        model_id, version = serving.log_model(client, run, files, register=name)
    return f"models:/{name}/{version} in {without_password(store)} (models:/{model_id})"


@contextlib.contextmanager
def _reading(store: str, what: str) -> Iterator[Any]:
    """A client of a store that is there. Raises UserError, which `what` begins, for all that goes wrong meanwhile."""
    path, shown = sqlite_path(store), without_password(store)
    if path is not None and not path.exists():  # opening would make an empty one
        raise UserError(f"{what}: there is no MLflow store {path}; give uri=<tracking store>")
    try:
        import_mlflow(store)
        yield open_client(store)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: cannot be fetched from MLflow at {shown}: {one_line(error)}") from error


@dataclass(frozen=True)
class TrackedRun:
    """A run as its store tells of it."""

    run_id: str
    name: str
    status: str  # RUNNING, FINISHED, FAILED, KILLED or SCHEDULED
    params: dict[str, str]  # where a resume changed some, the newer value
    metrics: dict[str, float]  # the last value of each
    tags: dict[str, str]
    minutes: float  # from its first start to its end, 0 before that

    @classmethod
    def of(cls, run: Any) -> TrackedRun:
        tags, ended = dict(run.data.tags), run.info.end_time
        changed = {key.removeprefix(CHANGED): value for key, value in tags.items() if key.startswith(CHANGED)}
        return cls(
            run_id=run.info.run_id,
            name=run.info.run_name or run.info.run_id,
            status=run.info.status,
            params={**run.data.params, **changed},
            metrics=dict(run.data.metrics),
            tags=tags,
            minutes=(ended - run.info.start_time) / 60_000 if ended else 0.0,
        )


def experiment_runs(experiment: str, *, root: Path, uri: str | None = None) -> list[TrackedRun]:
    """The runs of the experiment of this name, the first one first. Raises UserError where there is none."""
    store, what = resolve_uri(uri, root), f"mlflow:{experiment}"
    with _reading(store, what) as client:
        found = client.get_experiment_by_name(experiment)
        if found is None or found.lifecycle_stage == "deleted":
            names = [one.name for one in client.search_experiments()]
            near = nearest(experiment, names) or f" It has {', '.join(sorted(names))}."
            raise UserError(f"{what}: MLflow at {without_password(store)} has no such experiment.{near}")
        runs, page = [], None
        while page != "":
            answer = client.search_runs(
                [found.experiment_id], order_by=["attributes.start_time ASC"], max_results=1000, page_token=page
            )
            runs += [TrackedRun.of(run) for run in answer]
            page = answer.token or ""
    return runs


def metric_points(
    run_ids: Iterable[str], metric: str, *, root: Path, uri: str | None = None
) -> dict[str, list[tuple[float, float]]]:
    """(epoch, value) of each logged value of a metric, by run. Raises UserError when the store does not answer."""
    points = {}
    with _reading(resolve_uri(uri, root), metric) as client:
        for run_id in run_ids:
            epochs = {one.step: one.value for one in client.get_metric_history(run_id, "epoch")}
            values = {one.step: one.value for one in client.get_metric_history(run_id, metric)}
            points[run_id] = [(epochs[step], value) for step, value in sorted(values.items()) if step in epochs]
    return points


def newest_experiment(*, root: Path, uri: str | None = None) -> tuple[str, str] | None:
    """(id, name) of the experiment in which a run began last, None where there are no runs. Raises UserError."""
    with _reading(resolve_uri(uri, root), "ui") as client:
        names = {one.experiment_id: one.name for one in client.search_experiments()}
        last = client.search_runs(list(names), order_by=["attributes.start_time DESC"], max_results=1)
        return (last[0].info.experiment_id, names[last[0].info.experiment_id]) if last else None
