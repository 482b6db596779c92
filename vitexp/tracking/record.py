"""The run folder's part: tracking.json, which run in which store this is, and what that store holds of it."""

from __future__ import annotations

import json
import os
import re
import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vitexp import journal, serving
from vitexp.errors import UserError
from vitexp.tracking.facts import DataFingerprint, entity_name, flatten
from vitexp.tracking.stores import resolve_uri, sqlite_path, without_password

RECORD_NAME = "tracking.json"
JOURNAL_NAME = "metrics.jsonl"
PLACE = "output_dir"  # differs in every run: as a param it takes an axis of every comparison, the tag run_dir does not


@dataclass
class Record:
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
    def load(cls, run_dir: Path) -> Record | None:
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


def make_record(
    run_dir: Path, before: Record | None, *, uri: str | None, root: Path, experiment: str, run_name: str,
    params: Mapping[str, Any], tags: Mapping[str, Any], dataset: DataFingerprint | None, model: bool,
    register: str | None,
) -> Record:  # fmt: skip
    """The record of a run that starts now, going on from the one its folder has."""
    record = Record(
        uri=None if uri is None else without_password(uri),
        experiment=experiment,
        run_name=run_name,
        key=before.key if before else uuid.uuid4().hex,
        params=flatten({key: value for key, value in params.items() if key != PLACE}),
        tags={entity_name(key): str(value)[:8000] for key, value in tags.items()},
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


def continued_uri(uri: str | None, root: Path, before: Record | None) -> str:
    """The URI given, else the sqlite file this run already has (wherever it is resumed from), else the default."""
    if uri is None and before is not None and before.uri is not None:
        path = sqlite_path(before.uri)
        if path is not None and path.exists():
            return before.uri
    return resolve_uri(uri, root)


def due_artifacts(run_dir: Path, record: Record, delivered: Mapping[str, Any]) -> list[tuple[str, list[int]]]:
    """Files asked for that the store lacks or has in an older version, each with the size and time that tell."""
    due = []
    described = [str(Path(name).with_suffix(".json")) for name in record.artifacts if is_model(run_dir, record, name)]
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


def check_register(name: str | None, *, model: bool) -> None:
    if name is None:
        return
    if not model:
        raise UserError(f"tracking.register={name}: needs tracking.model=true, without which there is no model")
    check_model_name(name, key="tracking.register")


def check_model_name(name: str, *, key: str) -> None:
    """UserError for what MLflow takes as no registered model's name."""
    if not name.strip() or re.search(r"[/:.%\"']", name):
        raise UserError(f"{key}={name}: a registered model's name is a word or words, without / : . % and quotes")


def is_model(run_dir: Path, record: Record, name: str) -> bool:
    """Whether it is the weights of a classifier that MLflow shall have as a model."""
    description = (run_dir / name).with_suffix(".json")
    return record.model and name.endswith(".safetensors") and description.exists() and serving.can_serve(description)
