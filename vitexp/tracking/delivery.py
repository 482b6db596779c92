"""A run's folder sent later, when it has ended: `python -m vitexp sync`."""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from vitexp import journal
from vitexp.errors import UserError
from vitexp.run_folder import process_exists
from vitexp.tracking.record import JOURNAL_NAME, RECORD_NAME, Record, due_artifacts
from vitexp.tracking.session import connect, import_mlflow, open_client
from vitexp.tracking.stores import one_line, resolve_uri, without_password

_log = logging.getLogger("vitexp.tracking")

# What `sync` sends of a run that was killed before it could name its files itself.
USUAL_ARTIFACTS = (
    "config.yaml", "config.interpolated.yaml", "summary.json", "model.json", "model.safetensors", "plots",
)  # fmt: skip


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
    found = Record.load(run_dir)
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
        import_mlflow(target)
        client = open_client(target)
        session = connect(client, record, target, started_s=started_s, save=save, notify=_log.warning)
        store, offset, position, last_s = record.store(target), 0, 0, started_s
        while True:
            rows, offset = journal.read_from(path, offset)
            if not rows:
                break
            session.send(rows)
            position, last_s = position + len(rows), rows[-1].get(journal.TIME_KEY, last_s)
        due = due_artifacts(run_dir, record, store["artifacts"])
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
            f"MLflow at {without_password(target)} did not take the run: {one_line(error)}\n"
            f"Nothing is lost; try again when it answers."
        ) from error
    return Delivery(without_password(target), session.run_id, position, len(due), record.status)
