"""The thread that follows a run's journal, and what stands in its place with tracking=none."""

from __future__ import annotations

import logging
import math
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vitexp import journal
from vitexp.tracking.facts import DataFingerprint
from vitexp.tracking.record import JOURNAL_NAME, Record, check_register, continued_uri, due_artifacts, make_record
from vitexp.tracking.session import START_ALLOWANCE_S, Session, connect, import_mlflow, open_client
from vitexp.tracking.stores import one_line, ui_line, without_password

# How far MLflow's curves lag behind training. The first rows, and an evaluation's with all before them, go at the next
# look: somebody waits for them. Others wait for company: a batch costs 4 ms of CPU however few there are in it.
POLL_S, SEND_S = 1.0, 5.0
FIRST_ROWS, MANY_ROWS = 10, 500
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 30.0
SLOWEST_UPLOAD = 10e6  # bytes a second: how long a big file may be on its way before it counts as stuck
_log = logging.getLogger("vitexp.tracking")


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
        check_register(register, model=model)
        self.run_dir = Path(run_dir).resolve()
        before = Record.load(self.run_dir)
        self.uri = continued_uri(uri, root, before)
        self._notify = notify
        self._lock = threading.RLock()  # guards the record; re-entrant because a signal may arrive while we hold it
        self._record = make_record(
            self.run_dir, before, uri=self.uri, root=root, experiment=experiment, run_name=run_name, params=params,
            tags=tags, dataset=dataset, model=model, register=register,
        )  # fmt: skip
        self._store = self._record.store(self.uri)
        self._store["rows"] = min(self._store["rows"], journal.count_rows(self.run_dir / JOURNAL_NAME))
        self._started_s = time.time()
        self._session: Session | None = None
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
            files = len(due_artifacts(self.run_dir, self._record, self._store["artifacts"]))
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
            import_mlflow(self.uri)
        except Exception as error:
            self._complain(error)
            return
        finally:
            self._imported.set()
        delay_s, allow = FIRST_BACKOFF_S, self._allow
        while not self._abandoned.is_set():
            try:
                client = open_client(self.uri, allow)
                if self._abandoned.is_set():
                    return
                session = connect(
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

    def _follow(self, session: Session) -> None:
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

    def _send_artifacts(self, session: Session) -> None:
        with self._lock:
            due = due_artifacts(self.run_dir, self._record, self._store["artifacts"])
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
        self._complained = one_line(error)
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
        self._record = make_record(
            self.run_dir, Record.load(self.run_dir), uri=None, root=root, experiment=experiment, run_name=run_name,
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
