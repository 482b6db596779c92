"""MLflow as a mirror of the journal: a background thread follows `metrics.jsonl` and delivers it, each point once.

`metrics.jsonl` is the truth and is written first, by vitexp.journal. Nothing here is on the way of training: a server
that is away, hangs or answers 500 costs one notice, and what it missed is delivered when it is back, at the next
resume, or by `python -m vitexp sync run=<run folder>`. All three do the same: reach the run, ask what it holds, send
the rest.

Used by rank 0 alone. Imports no torch, and MLflow only in the background thread (1.2 s; 3 s more for a new store).
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vitexp import journal, serving
from vitexp.errors import UserError, nearest
from vitexp.run_folder import process_exists

RECORD_NAME = "tracking.json"
JOURNAL_NAME = "metrics.jsonl"
PLACE = "output_dir"  # differs in every run: as a param it takes an axis of every comparison, the tag run_dir does not
CHANGED = "changed."  # begins the tag of a param that a resume has changed: in MLflow params cannot
# What `sync` sends of a run that was killed before it could name its files itself.
USUAL_ARTIFACTS = (
    "config.yaml", "config.interpolated.yaml", "summary.json", "model.json", "model.safetensors", "plots",
)  # fmt: skip

# How far MLflow's curves lag behind training. The first rows, and an evaluation's with all before them, go at the next
# look: somebody waits for them. Others wait for company: a batch costs 4 ms of CPU however few there are in it.
POLL_S, SEND_S = 1.0, 5.0
FIRST_ROWS, MANY_ROWS = 10, 500
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 30.0
SLOWEST_UPLOAD = 10e6  # bytes a second: how long a big file may be on its way before it counts as stuck
START_ALLOWANCE_S = 120.0  # importing MLflow and making a new store, on a busy machine, in turn with other first runs

_log = logging.getLogger("vitexp.tracking")

# ---- where


def default_uri(root: Path) -> str:
    """The store beside the runs: `sqlite:///<absolute root>/mlflow.db`."""
    return f"sqlite:///{Path(root).expanduser().resolve() / 'mlflow.db'}"


def resolve_uri(uri: str | None, root: Path) -> str:
    """A tracking URI that means the same from any working directory; `default_uri(root)` for None.

    UserError for a folder of files, which MLflow has stopped supporting, and for anything else that is no store."""
    if uri is None:
        return default_uri(root)
    wanted = "a database such as sqlite:///outputs/mlflow.db, or the http(s):// address of a server"
    scheme = uri.partition("://")[0] if "://" in uri else uri.partition(":")[0]
    if scheme == "sqlite":
        path, _, query = uri.removeprefix("sqlite://").removeprefix("/").partition("?")
        if not uri.startswith("sqlite:///") or path in ("", ":memory:"):
            raise UserError(f"tracking.uri={uri} names no file; wanted: {wanted}")
        absolute = Path(path).expanduser().resolve()
        return f"sqlite:///{absolute}" + (f"?{query}" if query else "")
    if scheme in ("http", "https") and urlsplit(uri).hostname:
        return uri
    database = scheme.partition("+")[0] in ("postgresql", "mysql", "mssql") and "://" in uri
    if database or scheme in ("databricks", "databricks-uc"):
        return uri
    hint = " (MLflow 3 no longer writes to a folder of files)" if scheme in ("file", uri) else ""
    raise UserError(f"tracking.uri={uri} is not a store MLflow can write to{hint}; wanted: {wanted}")


def ui_line(uri: str) -> str:
    """What a person types to see the runs; for a server, its address."""
    if urlsplit(uri).scheme in ("http", "https"):
        return without_password(uri)
    return f"mlflow ui --backend-store-uri {shlex.quote(without_password(uri))}"


def without_password(uri: str) -> str:
    """The URI with `***` for a password: what may be printed and kept in a run folder that people pass on."""
    return re.sub(r"(://[^/@:]*:)[^/@]+@", r"\1***@", uri)


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def folder_of(uri: str) -> Path | None:
    """Where the store's file lies; None for a server and for a database that is no file."""
    path = _sqlite_path(uri)
    return None if path is None else path.parent


# ---- facts on the run


@dataclass(frozen=True)
class DataFingerprint:
    """Which data a run saw, shown by MLflow as its data set input. Two runs on equal data have equal digests."""

    name: str
    digest: str  # cut to 36 characters, MLflow's limit
    source: str  # a path or an address
    profile: Mapping[str, Any] = field(default_factory=dict)  # counts worth showing: pictures, classes


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """Leaves of a resolved config as MLflow params: dotted keys, text as it is, everything else (lists too) as JSON.

    Values are cut at 6000 characters and keys at 250, MLflow's limits."""
    flat: dict[str, str] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping) and node:
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            text = node if isinstance(node, str) else json.dumps(node, default=str)
            flat[_entity_name(prefix)] = text[:6000]

    if config:
        walk("", config)
    return flat


def git_state(cwd: Path | str) -> dict[str, str]:
    """`git.sha`, `git.branch`, `git.dirty` (true or false) of the checkout that `cwd` is in; empty outside one."""

    def git(*arguments: str) -> str:
        # No optional locks: looking must not collide with a git command of the person at the keyboard.
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=cwd, capture_output=True, text=True, errors="replace", timeout=10, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.stdout.strip()

    state: dict[str, str] = {}
    try:
        state["git.sha"] = git("rev-parse", "HEAD")
        state["git.branch"] = git("rev-parse", "--abbrev-ref", "HEAD")
        state["git.dirty"] = "true" if git("status", "--porcelain") else "false"
    except (OSError, subprocess.SubprocessError):
        pass  # what was found out before stands: a huge tree may time out on status alone
    return state


def run_tags(run_dir: Path, *, stage: str, model: str, data: str, group: str | None = None) -> dict[str, str]:
    """Tags by which runs are found and grouped: stage, model, data, git state, run folder, host, command."""
    git = git_state(Path.cwd())
    tags = {
        "stage": stage, "model": model, "data": data, **git,
        "run_dir": str(Path(run_dir).resolve()), "host": socket.gethostname(), "command": shlex.join(sys.argv),
        "mlflow.source.name": "vitexp", "mlflow.source.type": "LOCAL",
    }  # fmt: skip
    if group is not None:
        tags["vitexp.group"] = group  # a tag and not a parent run: nested runs leave MLflow's table and charts empty
    if "git.sha" in git:
        tags["mlflow.source.git.commit"] = git["git.sha"]
    return tags


def _entity_name(key: str) -> str:
    """A key MLflow takes: letters, digits and `_-./: `, no empty or dotted path parts, at most 250 characters."""
    clean = re.sub(r"[^\w\-./: ]", "_", key)
    parts = [part for part in clean.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:250].rstrip("/") or "_"


# ---- the run folder's part


@dataclass
class _Record:
    """`tracking.json`: all that delivering a run later needs, so that it can be done from the run folder alone."""

    uri: str | None  # without its password; None after tracking=none
    experiment: str
    run_name: str
    key: str  # ours, made before the MLflow run and a tag of it: finds a run whose creation was never answered
    params: dict[str, str]
    tags: dict[str, str]
    dataset: dict[str, Any] | None
    status: str  # RUNNING, FINISHED, FAILED or KILLED
    host: str
    pid: int
    root: str  # the outputs folder; artifacts go under it where neither a server nor a sqlite file says otherwise
    ended_s: float | None = None  # unix seconds
    artifacts: list[str] = field(default_factory=list)  # paths in the run folder
    model: bool = False  # a classifier's weights go as a model that MLflow can load, not as plain artifacts
    register: str | None = None  # the registered model that it becomes a version of
    stores: dict[str, dict[str, Any]] = field(default_factory=dict)  # by URI: run_id, rows, artifacts delivered there

    @classmethod
    def load(cls, run_dir: Path) -> _Record | None:
        path = run_dir / RECORD_NAME
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({error}).\nRemove it to have a new MLflow run made for this folder."
            ) from error

    def save(self, run_dir: Path) -> None:
        journal.replace_file(run_dir / RECORD_NAME, (json.dumps(asdict(self), indent=1) + "\n").encode())

    def store(self, uri: str) -> dict[str, Any]:
        return self.stores.setdefault(without_password(uri), {"run_id": None, "rows": 0, "artifacts": {}})


def _make_record(
    run_dir: Path, before: _Record | None, *, uri: str | None, root: Path, experiment: str, run_name: str,
    params: Mapping[str, Any], tags: Mapping[str, Any], dataset: DataFingerprint | None, model: bool,
    register: str | None,
) -> _Record:  # fmt: skip
    """The record of a run that starts now, going on from the one its folder has."""
    record = _Record(
        uri=None if uri is None else without_password(uri),
        experiment=experiment,
        run_name=run_name,
        key=before.key if before else uuid.uuid4().hex,
        params=flatten({key: value for key, value in params.items() if key != PLACE}),
        tags={_entity_name(key): str(value)[:8000] for key, value in tags.items()},
        dataset=asdict(dataset) if dataset else None,
        status="RUNNING",
        host=socket.gethostname(),
        pid=os.getpid(),
        root=str(Path(root).expanduser().resolve()),
        artifacts=before.artifacts if before else [],
        model=model,
        register=register,
        stores=before.stores if before else {},
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    record.save(run_dir)
    return record


def forget(run_dir: Path) -> None:
    """The next Mirror of this folder makes a new MLflow run: for starting over in a folder that held another run."""
    (Path(run_dir) / RECORD_NAME).unlink(missing_ok=True)


def _continued_uri(uri: str | None, root: Path, before: _Record | None) -> str:
    """The URI given, else the sqlite file this run already has (wherever it is resumed from), else the default."""
    if uri is None and before is not None and before.uri is not None:
        path = _sqlite_path(before.uri)
        if path is not None and path.exists():
            return before.uri
    return resolve_uri(uri, root)


# ---- one MLflow run


class _Session:
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
            name = _entity_name(key)
            if step <= self._last_seen and step in self._seen.get(name, ()):
                if not key.startswith("perf/") and not _same_point(self._seen[name][step], value):
                    self.differing += 1
                continue
            yield Metric(name, float(value), timestamp_ms, step)

    def send_file(self, run_dir: Path, record: _Record, relative: str) -> None:
        """A file of the run folder, in the way that the run wants it kept."""
        if _is_model(run_dir, record, relative):
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
    if _sqlite_path(uri) is None:
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


def _import_mlflow(uri: str) -> None:
    """Brings MLflow in, quiet and with short time-outs; a person's own settings win."""
    serving.quiet_mlflow()
    import mlflow.tracking

    if _sqlite_path(uri):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  imported lazily by MLflow, in the middle of things


def _open_client(uri: str, allow: Callable[[float], None] = lambda seconds: None) -> Any:
    """A client of the store; a new sqlite store is made beside and renamed into place, one process at a time.

    MLflow's constructor migrates. Without the lock, first runs started together crash in it; without the rename, one
    killed in it leaves a database that no one can open."""
    from mlflow import MlflowClient

    path = _sqlite_path(uri)
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
        path, location = _sqlite_path(uri), None
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


def _find_run(client: Any, run_id: str | None) -> Any | None:
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


def _connect(
    client: Any, record: _Record, uri: str, *, started_s: float, save: Callable[[], None], notify: Callable[[str], None]
) -> _Session:
    """The MLflow run of this record, made if need be, with its params, tags and data set brought up to date."""
    store = record.store(uri)
    run = _find_run(client, store["run_id"])
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
    return _Session(client, run, seen, uri=uri)


def _describe(client: Any, run: Any, record: _Record) -> None:
    """Sends what the run lacks. Params cannot change in MLflow: another value becomes a tag `changed.<param>`."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

    run_id, known = run.info.run_id, run.data.params
    params = [Param(key, value) for key, value in record.params.items() if key not in known]
    changed = {
        _entity_name(f"{CHANGED}{key}"): value
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


def _due_artifacts(run_dir: Path, record: _Record, delivered: Mapping[str, Any]) -> list[tuple[str, list[int]]]:
    """Files asked for that the store lacks or has in an older version, each with the size and time that tell."""
    due = []
    described = [str(Path(name).with_suffix(".json")) for name in record.artifacts if _is_model(run_dir, record, name)]
    for name in record.artifacts:
        if name in described:  # goes with its weights
            continue
        path = run_dir / name
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            try:
                stat = file.stat()
            except FileNotFoundError:  # replaced or removed since it was asked for
                continue
            relative, stamp = file.relative_to(run_dir).as_posix(), [stat.st_size, stat.st_mtime_ns]
            if delivered.get(relative) != stamp:
                due.append((relative, stamp))
    return due


def _check_register(name: str | None, *, model: bool) -> None:
    if name is None:
        return
    if not model:
        raise UserError(f"tracking.register={name}: needs tracking.model=true, without which there is no model")
    check_model_name(name, key="tracking.register")


def check_model_name(name: str, *, key: str) -> None:
    """UserError for what MLflow takes as no registered model's name."""
    if not name.strip() or re.search(r"[/:.%\"']", name):
        raise UserError(f"{key}={name}: a registered model's name is a word or words, without / : . % and quotes")


def _is_model(run_dir: Path, record: _Record, name: str) -> bool:
    """Whether it is the weights of a classifier that MLflow shall have as a model."""
    description = (run_dir / name).with_suffix(".json")
    return record.model and name.endswith(".safetensors") and description.exists() and serving.can_serve(description)


# ---- the mirrors


class Mirror:
    """Shows a run in MLflow while it goes: follows the run folder's `metrics.jsonl` from a daemon thread.

    Made after `Journal.truncate_after`, before the first row. In a folder that has a `tracking.json` the same MLflow
    run goes on. `uri` None means `default_uri(root)`. `model`: a classifier's weights become a model that MLflow loads,
    and with `register` a new version of the registered model of that name. UserError for a URI that is no store or a
    name that cannot be registered; never for a server."""

    def __init__(
        self,
        run_dir: Path,
        *,
        root: Path,
        uri: str | None = None,
        experiment: str = "vitexp",
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        dataset: DataFingerprint | None = None,
        model: bool = True,
        register: str | None = None,
        notify: Callable[[str], None] = _log.warning,
    ) -> None:
        _check_register(register, model=model)
        self.run_dir = Path(run_dir).resolve()
        before = _Record.load(self.run_dir)
        self.uri = _continued_uri(uri, root, before)
        self._notify = notify
        self._lock = threading.RLock()  # guards the record; re-entrant because a signal may arrive while we hold it
        self._record = _make_record(
            self.run_dir, before, uri=self.uri, root=root, experiment=experiment, run_name=run_name, params=params,
            tags=tags, dataset=dataset, model=model, register=register,
        )  # fmt: skip
        self._store = self._record.store(self.uri)
        self._store["rows"] = min(self._store["rows"], journal.count_rows(self.run_dir / JOURNAL_NAME))
        self._started_s = time.time()
        self._session: _Session | None = None
        self._complained = ""
        self._wake, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._delivered = threading.Event()
        self._artifacts_due = True
        self._tried: set[str] = set()
        self._progress_at, self._allowance_s = time.monotonic(), START_ALLOWANCE_S
        self._imported = threading.Event()
        self._thread = threading.Thread(target=self._work, name="vitexp-mlflow", daemon=True)
        self._thread.start()

    # ---- for the training thread: nothing here waits for MLflow, except close

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run; None until the store has been reached for the first time."""
        return self._store["run_id"]

    @property
    def ui_line(self) -> str:
        return ui_line(self.uri)

    def wait_imported(self, timeout_s: float = 60.0) -> None:
        """Returns when MLflow is imported. Call it before loader workers fork: they would inherit half-made modules."""
        self._imported.wait(timeout_s)

    def artifacts(self, paths: Iterable[Path | str]) -> None:
        """Has files or folders of the run folder delivered now; what changed or came into being since, at close."""
        with self._lock:
            for path in paths:
                relative = (self.run_dir / path).resolve().relative_to(self.run_dir).as_posix()
                if relative not in self._record.artifacts:
                    self._record.artifacts.append(relative)
            self._record.save(self.run_dir)
        self._artifacts_due = True
        self._wake.set()

    def close(self, status: str = "FINISHED", *, timeout_s: float = 5.0) -> bool:
        """Delivers the rest and the final status (FINISHED, FAILED or KILLED); True when MLflow has everything.

        Gives up after `timeout_s` without an answer, longer only while something really arrives, and then says what is
        missing and how to deliver it later."""
        return self._close(status, timeout_s=timeout_s, at_most_s=math.inf)

    def kill(self, *, timeout_s: float = 2.0) -> bool:
        """close("KILLED") for a signal: returns within `timeout_s`; the status does not queue behind a large upload."""
        return self._close("KILLED", timeout_s=timeout_s, at_most_s=timeout_s)

    def _close(self, status: str, *, timeout_s: float, at_most_s: float) -> bool:
        assert status in ("FINISHED", "FAILED", "KILLED"), status
        start = time.monotonic()
        if not self._closing.is_set():
            with self._lock:
                self._record.status, self._record.ended_s = status, time.time()
                self._record.save(self.run_dir)
            self._closing.set()
            self._wake.set()
            if at_most_s < math.inf:
                threading.Thread(target=self._finish_at_once, name="vitexp-mlflow-status", daemon=True).start()
        while self._thread.is_alive() and not self._abandoned.is_set():
            silence_s = time.monotonic() - max(start, self._progress_at) - self._allowance_s
            if silence_s > timeout_s or time.monotonic() - start > at_most_s:
                break
            self._thread.join(0.05)
        if not self._delivered.is_set() and not self._abandoned.is_set():
            self._abandoned.set()
            self._wake.set()
            self._say_what_is_missing()
        return self._delivered.is_set()

    def _say_what_is_missing(self) -> None:
        total = journal.count_rows(self.run_dir / JOURNAL_NAME)
        with self._lock:
            self._record.save(self.run_dir)
            missing = max(0, total - self._store["rows"])
            files = len(_due_artifacts(self.run_dir, self._record, self._store["artifacts"]))
        what = [f"{missing} of {total} metric rows"] if missing else []
        what += [f"{files} files"] if files else []
        what += [f"the status {self._record.status}"]
        reason = f" ({self._complained})" if self._complained else ""
        self._notify(
            f"MLflow at {without_password(self.uri)} did not take {', '.join(what)}{reason}.\n"
            f"Nothing is lost: all rows are in {self.run_dir / JOURNAL_NAME}. To deliver them later:\n"
            f"python -m vitexp sync run={shlex.quote(str(self.run_dir))}"
        )

    # ---- the thread

    def _work(self) -> None:
        try:
            _import_mlflow(self.uri)
        except Exception as error:
            self._complain(error)
            return
        finally:
            self._imported.set()
        delay_s, allow = FIRST_BACKOFF_S, self._allow
        while not self._abandoned.is_set():
            try:
                client = _open_client(self.uri, allow)
                if self._abandoned.is_set():
                    return
                session = _connect(
                    client, self._record, self.uri, started_s=self._started_s, save=self._save, notify=self._notify
                )
                if not self._closing.is_set():
                    session.client.update_run(session.run_id, status="RUNNING")
                if self._first_try("connect"):
                    self._arrived()
                self._session = session
                delay_s = FIRST_BACKOFF_S
                self._follow(session)
                return
            except Exception as error:  # whatever MLflow raises: training goes on, and so do we
                self._session = None
                self._complain(error)
            finally:
                self._allowance_s = 0.0
                allow = lambda seconds: None  # noqa: E731  a second try is no progress: close must not wait for it
            if self._closing.is_set():
                self._abandoned.wait(0.5)
            else:
                self._closing.wait(delay_s)
                delay_s = min(2 * delay_s, LONGEST_BACKOFF_S)

    def _follow(self, session: _Session) -> None:
        """Sends what the journal has and gets, and the artifacts; returns once closed and everything is delivered."""
        path = self.run_dir / JOURNAL_NAME
        offset = position = 0
        waiting: list[dict[str, Any]] = []
        send_at = 0.0
        caught_up = False
        retry_artifacts_at = 0.0
        self._artifacts_due = True
        while not self._abandoned.is_set():
            closing = self._closing.is_set()  # asked before the last look at the journal
            rows, offset = journal.read_from(path, offset)
            if rows and not waiting:
                send_at = time.monotonic() + (SEND_S if caught_up and position >= FIRST_ROWS else 0.0)
            waiting += rows
            awaited = closing or len(waiting) >= MANY_ROWS or any("train/loss" not in row for row in rows)
            if waiting and (awaited or time.monotonic() >= send_at):
                session.send(waiting)
                position += len(waiting)
                waiting = []
                if position > self._store["rows"]:  # others are read again after each new connection
                    self._store["rows"] = position
                    self._arrived()
                continue
            if rows:
                continue
            if not caught_up and session.differing:
                self._notify(
                    f"MLflow keeps {session.differing} points from before the resume that differ from {path}: "
                    "it has no way to replace them"
                )
            caught_up = True
            if closing:
                session.finish(self._record.status, self._record.ended_s or time.time())
                if self._first_try("finish"):
                    self._arrived()
                self._send_artifacts(session)
                if not self._abandoned.is_set():
                    self._save()
                    self._delivered.set()
                return
            if self._artifacts_due and time.monotonic() >= retry_artifacts_at:
                self._artifacts_due = False
                try:
                    self._send_artifacts(session)
                except Exception as error:  # the rows still get through: a bucket may refuse us for hours
                    self._complain(error)
                    self._artifacts_due = True
                    retry_artifacts_at = time.monotonic() + LONGEST_BACKOFF_S
            self._wake.wait(POLL_S)
            self._wake.clear()

    def _send_artifacts(self, session: _Session) -> None:
        with self._lock:
            due = _due_artifacts(self.run_dir, self._record, self._store["artifacts"])
        for relative, stamp in due:
            if self._abandoned.is_set():
                return
            if self._first_try(relative):
                self._allow(stamp[0] / SLOWEST_UPLOAD)
            session.send_file(self.run_dir, self._record, relative)
            self._arrived()
            with self._lock:
                self._store["artifacts"][relative] = stamp
        if due:
            self._save()

    def _finish_at_once(self) -> None:
        session = self._session
        if session is not None:
            try:
                session.finish(self._record.status, self._record.ended_s or time.time())
            except Exception as error:
                self._complain(error)

    def _first_try(self, what: str) -> bool:
        """Always while the run goes, once while it closes: a store that answers and then refuses makes no progress."""
        first = what not in self._tried
        if self._closing.is_set():
            self._tried.add(what)
        return first

    def _arrived(self) -> None:
        self._progress_at, self._allowance_s = time.monotonic(), 0.0

    def _allow(self, seconds: float) -> None:
        """Something slow but local begins (or, with 0, is over): for this long close does not give up on it."""
        self._progress_at, self._allowance_s = time.monotonic(), seconds

    def _save(self) -> None:
        with self._lock:
            self._record.save(self.run_dir)

    def _complain(self, error: Exception) -> None:
        first = not self._complained
        self._complained = _one_line(error)
        if first and not self._closing.is_set():
            self._notify(
                f"MLflow at {without_password(self.uri)} does not take metrics ({self._complained}). "
                f"Training goes on; rows are kept in {self.run_dir / JOURNAL_NAME} and delivered when it is back."
            )


class NoMirror:
    """tracking=none: the journal alone. Leaves a `tracking.json`, with which `sync run=… uri=…` delivers it later."""

    run_id: str | None = None
    ui_line = ""

    def __init__(
        self,
        run_dir: Path,
        *,
        root: Path,
        experiment: str = "vitexp",
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        dataset: DataFingerprint | None = None,
    ) -> None:
        self.run_dir = Path(run_dir).resolve()
        self._record = _make_record(
            self.run_dir, _Record.load(self.run_dir), uri=None, root=root, experiment=experiment, run_name=run_name,
            params=params, tags=tags, dataset=dataset, model=True, register=None,
        )  # fmt: skip

    def wait_imported(self, timeout_s: float = 60.0) -> None:
        pass

    def artifacts(self, paths: Iterable[Path | str]) -> None:
        for path in paths:
            relative = (self.run_dir / path).resolve().relative_to(self.run_dir).as_posix()
            if relative not in self._record.artifacts:
                self._record.artifacts.append(relative)

    def close(self, status: str = "FINISHED", *, timeout_s: float = 5.0) -> bool:
        assert status in ("FINISHED", "FAILED", "KILLED"), status
        self._record.status, self._record.ended_s = status, time.time()
        self._record.save(self.run_dir)
        return True

    def kill(self, *, timeout_s: float = 2.0) -> bool:
        return self.close("KILLED")


def _one_line(error: Exception) -> str:
    """The beginning of an error that may be pages of SQL or HTML, without passwords."""
    text = without_password(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


# ---- later


@dataclass(frozen=True)
class Delivery:
    """What delivering a run folder came to."""

    uri: str
    run_id: str
    rows: int  # in the journal, all of them in MLflow now
    artifacts: int  # sent this time
    status: str  # RUNNING when the run is still going, here or on another machine


def deliver(run_dir: Path, *, uri: str | None = None) -> Delivery:
    """Brings MLflow up to date with a run folder, from the folder alone: rows, params, artifacts, final status.

    Doing it twice changes nothing. `uri` names another store than the run's own. A run that died without saying so
    becomes KILLED; one still going keeps its status. UserError when there is no run or the store does not answer."""
    run_dir = Path(run_dir).expanduser().resolve()
    found = _Record.load(run_dir)
    if found is None:
        raise UserError(f"run={run_dir} holds no {RECORD_NAME}: it is not the folder of a run")
    record = found
    if uri is None and (record.uri is None or "***" in record.uri):
        why = "made with tracking=none" if record.uri is None else f"whose store's password is not kept ({record.uri})"
        raise UserError(f"run={run_dir} is a run {why}; give uri=sqlite:///outputs/mlflow.db or a server's address")
    target = resolve_uri(uri, run_dir) if uri is not None else str(record.uri)
    if record.status == "RUNNING" and record.host == socket.gethostname() and not process_exists(record.pid):
        record.status = "KILLED"
    record.artifacts += [n for n in USUAL_ARTIFACTS if n not in record.artifacts and (run_dir / n).exists()]

    path = run_dir / JOURNAL_NAME
    first, _ = journal.read_from(path, 0, at_most_bytes=1)
    started_s = first[0].get(journal.TIME_KEY, time.time()) if first else time.time()

    def save() -> None:
        if record.status != "RUNNING":  # a run that is still going writes its record itself
            record.save(run_dir)

    try:
        _import_mlflow(target)
        client = _open_client(target)
        session = _connect(client, record, target, started_s=started_s, save=save, notify=_log.warning)
        store, offset, position, last_s = record.store(target), 0, 0, started_s
        while True:
            rows, offset = journal.read_from(path, offset)
            if not rows:
                break
            session.send(rows)
            position, last_s = position + len(rows), rows[-1].get(journal.TIME_KEY, last_s)
        due = _due_artifacts(run_dir, record, store["artifacts"])
        for relative, stamp in due:
            session.send_file(run_dir, record, relative)
            store["artifacts"][relative] = stamp
        if record.status != "RUNNING":
            session.finish(record.status, record.ended_s or last_s)
        store["rows"] = position
        save()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow at {without_password(target)} did not take the run: {_one_line(error)}\n"
            f"Nothing is lost; try again when it answers."
        ) from error
    return Delivery(without_password(target), session.run_id, position, len(due), record.status)


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
        run = _find_run(client, run_id)
        if run is None:
            shown = without_password(store)
            raise UserError(f"{what}: MLflow at {shown} has no such run; give uri= if it is in another")
        model = serving.model_of(client, run)
        there = {entry.path for entry in client.list_artifacts(run_id)} | model.keys()
        best = "model_best.safetensors" if "model_best.safetensors" in there else "model.safetensors"
        weights = best if weights is None else weights
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
        record = _Record.load(run_dir)
        run_id = None if record is None or record.uri is None else record.store(record.uri)["run_id"]
        if record is None or record.uri is None or run_id is None or "***" in record.uri:
            raise UserError(
                f"{what}: {run_dir} does not say which run in MLflow it is; the export is written.\n"
                "Deliver it first (python -m vitexp sync), and give run=mlflow:<run id> uri=<tracking store>"
            )
        store = record.uri
    with _reading(store, what) as client:
        run = _find_run(client, run_id)
        if run is None:
            raise UserError(f"{what}: MLflow at {without_password(store)} has no run {run_id}; the export is written")
        files = [path for path in sorted(folder.iterdir()) if path.name not in serving.FILES]
        model_id, version = serving.log_model(client, run, files, register=name)
    return f"models:/{name}/{version} in {without_password(store)} (models:/{model_id})"


@contextlib.contextmanager
def _reading(store: str, what: str) -> Iterator[Any]:
    """A client of a store that is there. Raises UserError, which `what` begins, for all that goes wrong meanwhile."""
    path, shown = _sqlite_path(store), without_password(store)
    if path is not None and not path.exists():  # opening would make an empty one
        raise UserError(f"{what}: there is no MLflow store {path}; give uri=<tracking store>")
    try:
        _import_mlflow(store)
        yield _open_client(store)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: cannot be fetched from MLflow at {shown}: {_one_line(error)}") from error


# ---- all runs of an experiment


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
