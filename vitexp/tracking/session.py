"""One MLflow run, reached: what it holds already is not sent again."""

from __future__ import annotations

import getpass
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vitexp import journal, serving
from vitexp.errors import UserError
from vitexp.tracking.facts import CHANGED, entity_name
from vitexp.tracking.record import Record, is_model
from vitexp.tracking.stores import sqlite_path, without_password

START_ALLOWANCE_S = 120.0  # importing MLflow and making a new store, on a busy machine, in turn with other first runs


class Session:
    """One MLflow run, reached. It knows what the run already holds, so that nothing is sent twice."""

    def __init__(self, client: Any, run: Any, seen: dict[str, dict[int, float]], *, uri: str) -> None:
        self.client, self.run_id, self._run = client, run.info.run_id, run
        self._insert_history = _history_inserter(client, uri)
        self.differing = 0  # points the run holds with another value, from beyond the checkpoint a resume went back to
        self._seen = seen
        self._last_seen = max((step for steps in seen.values() for step in steps), default=-1)

    def send(self, rows: list[dict[str, Any]]) -> None:
        metrics = [metric for row in rows for metric in self._points(row)]
        if self._insert_history is not None:
            newest = {metric.key: metric for metric in metrics}
            self.client.log_batch(self.run_id, metrics=list(newest.values()))  # checks the run and the names, too
            self._insert_history(self.run_id, [metric for metric in metrics if newest[metric.key] is not metric])
            return
        for start in range(0, len(metrics), 1000):  # MLflow's limit for one batch
            self.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def _points(self, row: Mapping[str, Any]) -> Iterable[Any]:
        from mlflow.entities import Metric

        step = int(row["step"])
        # The row's own time: a batch that arrived although its answer did not is seen to be the same when sent again.
        timestamp_ms = round(row.get(journal.TIME_KEY, 0.0) * 1000)
        for key, value in row.items():
            if key in ("step", journal.TIME_KEY) or not isinstance(value, int | float):
                continue
            name = entity_name(key)
            if step <= self._last_seen and step in self._seen.get(name, ()):
                if not key.startswith("perf/") and not _same_point(self._seen[name][step], value):
                    self.differing += 1
                continue
            yield Metric(name, float(value), timestamp_ms, step)

    def send_file(self, run_dir: Path, record: Record, relative: str) -> None:
        """A file of the run folder, in the way that the run wants it kept."""
        if is_model(run_dir, record, relative):
            weights = run_dir / relative
            pair = [weights, weights.with_suffix(".json")]
            serving.log_model(self.client, self._run, pair, register=record.register)
        else:
            self.send_artifact(run_dir, relative)

    def send_artifact(self, run_dir: Path, relative: str) -> None:
        parent = Path(relative).parent.as_posix()
        self.client.log_artifact(self.run_id, str(run_dir / relative), None if parent == "." else parent)

    def finish(self, status: str, ended_s: float) -> None:
        self.client.set_terminated(self.run_id, status, end_time=round(ended_s * 1000))


def _history_inserter(client: Any, uri: str) -> Callable[[str, list[Any]], None] | None:
    """Puts points into a sqlite store's table of metrics in one statement; None where MLflow alone can write: to a
    server, another database, or with an MLflow whose insides are not those known here.

    For older points of metrics whose newest went through log_batch, which keeps the table of latest values. MLflow
    makes an object and a search of every point: 55 us each against 4, and a run of short steps logs hundreds a second.
    A point that is there already stays as it is."""
    if sqlite_path(uri) is None:
        return None
    from mlflow.store.tracking.dbmodels.models import SqlMetric
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    table: Any = SqlMetric.__table__
    store: Any = getattr(getattr(client, "_tracking_client", None), "store", None)
    known = set(table.columns.keys()) == {"run_uuid", "key", "value", "timestamp", "step", "is_nan"}
    if not known or not isinstance(store, SqlAlchemyStore):
        return None
    statement = table.insert().prefix_with("OR IGNORE")

    def insert_history(run_id: str, metrics: list[Any]) -> None:
        points = []
        for metric in metrics:
            is_nan, value = store.sanitize_metric_value(metric.value)
            point = {"key": metric.key, "value": value, "timestamp": metric.timestamp, "step": metric.step}
            points.append({**point, "is_nan": is_nan, "run_uuid": run_id})
        if points:
            with store.engine.begin() as connection:
                connection.execute(statement, points)

    return insert_history


def _same_point(stored: float, ours: float) -> bool:
    # MLflow keeps infinity as the largest float; some databases keep single precision.
    return not (math.isfinite(ours) and math.isfinite(stored)) or math.isclose(stored, ours, rel_tol=1e-6)


def import_mlflow(uri: str) -> None:
    """Brings MLflow in, quiet and with short time-outs; a person's own settings win."""
    serving.quiet_mlflow()
    import mlflow.tracking

    if sqlite_path(uri):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  imported lazily by MLflow, in the middle of things


def open_client(uri: str, allow: Callable[[float], None] = lambda seconds: None) -> Any:
    """A client of the store; a new sqlite store is made beside and renamed into place, one process at a time.

    MLflow's constructor migrates. Without the lock, first runs started together crash in it; without the rename, one
    killed in it leaves a database that no one can open."""
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    if path is None:
        return MlflowClient(uri)
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    allow(START_ALLOWANCE_S)
    with FileLock(f"{path}.lock", timeout=START_ALLOWANCE_S):
        if not path.exists() or path.stat().st_size == 0:
            beside = path.with_name(path.name + ".new")
            beside.unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{beside}")
            os.replace(beside, path)
        allow(0.0)  # from here on only a lock that someone holds on the database can keep us waiting
        return MlflowClient(uri)


def _experiment_id(client: Any, name: str, uri: str, root: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        path, location = sqlite_path(uri), None
        if not uri.startswith(("http", "databricks")):  # a server knows where; MLflow's own default is ./mlruns
            folder = path.parent if path else Path(root)
            location = (folder / "mlartifacts" / re.sub(r"[^\w\-. ]", "_", name)).as_uri()
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another first run made it in between
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"the MLflow experiment {name!r} is deleted; set another tracking.experiment or restore it: "
            f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        )
    return experiment.experiment_id


def find_run(client: Any, run_id: str | None) -> Any | None:
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def connect(
    client: Any, record: Record, uri: str, *, started_s: float, save: Callable[[], None], notify: Callable[[str], None]
) -> Session:
    """The MLflow run of this record, made if need be, with its params, tags and data set brought up to date."""
    store = record.store(uri)
    run = find_run(client, store["run_id"])
    if run is None:
        experiment_id = _experiment_id(client, record.experiment, uri, record.root)
        same_key = client.search_runs([experiment_id], f"tags.`vitexp.key` = '{record.key}'", max_results=1)
        if same_key:  # made by us, but we died, or the answer was lost, before its id was written down
            run = same_key[0]
        else:
            tags = {"vitexp.key": record.key, "mlflow.user": _user()}
            start_ms = round(started_s * 1000)
            run = client.create_run(experiment_id, start_time=start_ms, run_name=record.run_name, tags=tags)
            if store["run_id"] is not None:
                notify(f"MLflow at {without_password(uri)} no longer knows run {store['run_id']}; a new one was made")
        store.update(run_id=run.info.run_id, rows=0, artifacts={})
        save()
    _describe(client, run, record)
    seen = {
        key: {point.step: point.value for point in client.get_metric_history(run.info.run_id, key)}
        for key in run.data.metrics
    }
    return Session(client, run, seen, uri=uri)


def _describe(client: Any, run: Any, record: Record) -> None:
    """Sends what the run lacks. Params cannot change in MLflow: another value becomes a tag `changed.<param>`."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

    run_id, known = run.info.run_id, run.data.params
    params = [Param(key, value) for key, value in record.params.items() if key not in known]
    changed = {
        entity_name(f"{CHANGED}{key}"): value
        for key, value in record.params.items()
        if key in known and known[key] != value
    }
    tags = [RunTag(k, v) for k, v in (record.tags | changed).items() if run.data.tags.get(k) != v]
    for start in range(0, max(len(params), len(tags)), 100):  # MLflow's limit for one batch
        client.log_batch(run_id, params=params[start : start + 100], tags=tags[start : start + 100])
    if record.dataset:
        name, digest = record.dataset["name"][:500], record.dataset["digest"][:36]
        inputs = run.inputs.dataset_inputs if run.inputs else []
        if not any((i.dataset.name, i.dataset.digest) == (name, digest) for i in inputs):
            source = json.dumps({"uri": record.dataset["source"]})
            profile = json.dumps(record.dataset["profile"], default=str)
            dataset = Dataset(name, digest, source_type="local", source=source, profile=profile)
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container user without a name
        return "unknown"
