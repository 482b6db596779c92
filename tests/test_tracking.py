"""The mirror: MLflow gets every point once, whatever happens to it or to us, and training never waits."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vitexp import journal, tracking
from vitexp.commands.sync import sync
from vitexp.errors import UserError
from vitexp.journal import Journal
from vitexp.tracking import DataFingerprint, Mirror, NoMirror, session
from vitexp.tracking import mirror as mirroring

PARAMS = {"optim": {"lr": 1e-3, "betas": [0.9, 0.999]}, "model": {"name": "vit", "head": None}}
TAGS = {"stage": "finetune", "model": "vit"}


# ---- a store that exists already (a new one costs seconds), a server, and a proxy before it that can fail


@pytest.fixture
def root(tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An outputs folder with a store; the working directory is elsewhere and stays empty; retries are quick."""
    outputs, elsewhere = tmp_path / "out puts", tmp_path / "elsewhere"
    outputs.mkdir()
    elsewhere.mkdir()
    shutil.copy(mlflow_template, outputs / "mlflow.db")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(mirroring, "POLL_S", 0.05)
    monkeypatch.setattr(mirroring, "SEND_S", 0.1)
    monkeypatch.setattr(mirroring, "FIRST_BACKOFF_S", 0.1)
    monkeypatch.setattr(mirroring, "LONGEST_BACKOFF_S", 0.2)
    return outputs


SERVER = """
import os, sys
folder, port = sys.argv[1:]
os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{folder}/mlflow.db"
os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = "mlflow-artifacts:/"
os.environ["_MLFLOW_SERVER_ARTIFACT_DESTINATION"] = f"{folder}/artifacts"
os.environ["_MLFLOW_SERVER_SERVE_ARTIFACTS"] = "true"
from mlflow.server import app
from werkzeug.serving import run_simple
run_simple("127.0.0.1", int(port), app, threaded=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def server_port(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Iterator[int]:
    """MLflow's own server application, without the process manager around it: up in 2 s instead of 8."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-c", SERVER, str(folder), str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(300):
            assert process.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(10)


class Proxy:
    """Passes requests to the server while `mode` is ok; else answers 500, hangs, or passes on and loses the answer."""

    def __init__(self, server_port: int) -> None:
        self.mode, self.refused = "ok", 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if proxy.mode != "ok":
                    proxy.refused += 1
                if proxy.mode == "500":
                    self.send_error(500)
                elif proxy.mode == "hang":
                    while proxy.mode == "hang":
                        time.sleep(0.05)
                else:
                    upstream = http.client.HTTPConnection("127.0.0.1", server_port, timeout=20)
                    upstream.request(self.command, self.path, body, dict(self.headers))
                    answer = upstream.getresponse()
                    content = answer.read()
                    if proxy.mode == "ok":
                        self.send_response(answer.status)
                        self.send_header("Content-Type", answer.getheader("Content-Type") or "text/plain")
                        self.send_header("Content-Length", str(len(content)))
                        self.end_headers()
                        self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = handle_any

            def log_message(self, *arguments: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: Any) -> None:  # a client that gave up on us is what we are here for
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.mode = "ok"
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def proxy(server_port: int) -> Iterator[Proxy]:
    it = Proxy(server_port)
    yield it
    it.close()


# ---- helpers


def start(run_dir: Path, root: Path, **changes: Any) -> Mirror:
    given = {"run_name": run_dir.name, "params": PARAMS, "tags": TAGS, "notify": lambda text: None, "experiment": "exp"}
    return Mirror(run_dir, root=root, **(given | changes))


def log_rows(run_dir: Path, steps: range) -> None:
    log = Journal(run_dir / "metrics.jsonl")
    for step in steps:
        log.append({"step": step, "epoch": step / 4, "train/loss": 1 / (step + 1), "perf/images_per_s": time.time()})
    log.close()


def mlflow_run(uri: str, run_id: str) -> tuple[Any, dict[str, list[int]], Any]:
    """The run, the steps of each metric in order of arrival, and the client."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(run_id)
    return run, {key: [p.step for p in client.get_metric_history(run_id, key)] for key in run.data.metrics}, client


def assert_each_point_once(uri: str, run_id: str | None, steps: range, status: str = "FINISHED") -> Any:
    assert run_id is not None
    run, points, client = mlflow_run(uri, run_id)
    assert set(points) == {"epoch", "train/loss", "perf/images_per_s"}
    for key, found in points.items():
        assert sorted(found) == list(steps), key
    assert run.info.status == status
    assert all(p.value == 1 / (p.step + 1) for p in client.get_metric_history(run_id, "train/loss"))
    return run


def wait_for(what: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# ---- an ordinary run


def test_a_run_lands_whole_and_nothing_appears_in_the_working_directory(root: Path) -> None:
    run_dir, notices = root / "r", []
    fingerprint = DataFingerprint("digits", "abc123", "/data/digits", {"train": 1437})
    mirror = start(run_dir, root, dataset=fingerprint, notify=notices.append)
    log_rows(run_dir, range(1, 501))
    (run_dir / "plots" / "deep").mkdir(parents=True)
    (run_dir / "plots" / "deep" / "curve.png").write_bytes(b"png")
    (run_dir / "config.yaml").write_text("a: 1\n")
    mirror.artifacts(["config.yaml", run_dir / "plots", "summary.json"])
    (run_dir / "summary.json").write_text("{}")
    assert mirror.close()

    run = assert_each_point_once(mirror.uri, mirror.run_id, range(1, 501))
    assert notices == []
    assert list(Path.cwd().iterdir()) == []
    assert mirror.uri == f"sqlite:///{root}/mlflow.db"
    assert run.info.run_name == "r"
    wanted = {"optim.lr": "0.001", "optim.betas": "[0.9, 0.999]", "model.name": "vit", "model.head": "null"}
    assert run.data.params == wanted
    assert run.data.tags.items() >= TAGS.items()
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest, json.loads(dataset.profile)) == ("digits", "abc123", {"train": 1437})
    kept = root / "mlartifacts" / "exp" / run.info.run_id / "artifacts"
    files = sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file())
    assert files == ["config.yaml", "plots/deep/curve.png", "summary.json"]


def test_rows_are_seen_while_the_run_goes_and_names_are_made_fit(root: Path) -> None:
    run_dir = root / "r"
    mirror = start(run_dir, root, params={"a[0]": "x" * 7000, "b=c": {}})
    Journal(run_dir / "metrics.jsonl").append({"step": 1, "epoch": 0.0, "val/acc@1": float("nan"), "/x": 1.0})

    def arrived() -> bool:
        return mirror.run_id is not None and len(mlflow_run(mirror.uri, mirror.run_id)[1]) == 3

    wait_for(arrived)
    run, points, _ = mlflow_run(mirror.uri, str(mirror.run_id))
    assert run.info.status == "RUNNING"
    assert set(points) == {"epoch", "val/acc_1", "x"}
    assert run.data.params == {"a_0_": "x" * 6000, "b_c": "{}"}
    assert mirror.close("FAILED")
    assert mlflow_run(mirror.uri, str(mirror.run_id))[0].info.status == "FAILED"


def test_training_rows_go_together_and_what_a_person_waits_for_goes_at_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirroring, "SEND_S", 60.0)
    run_dir, sent = root / "r", []
    real = session.Session.send
    monkeypatch.setattr(session.Session, "send", lambda self, rows: (sent.append(len(rows)), real(self, rows)))
    mirror = start(run_dir, root)
    log_rows(run_dir, range(1))
    wait_for(lambda: sum(sent) == 1)
    log_rows(run_dir, range(1, 30))
    wait_for(lambda: mirror._store["rows"] == 30)
    time.sleep(0.5)  # it looks once more, and has caught up
    before = len(sent)
    for step in range(30, 50):
        log_rows(run_dir, range(step, step + 1))
        time.sleep(0.02)
    time.sleep(0.2)
    assert len(sent) <= before + 2, "of twenty; some are looked at before it has caught up"
    assert sum(sent) < 50
    with_evaluation = Journal(run_dir / "metrics.jsonl")
    with_evaluation.append({"step": 49, "epoch": 12.25, "val/top1": 0.5})
    wait_for(lambda: sum(sent) == 51)
    log_rows(run_dir, range(50, 55))
    assert mirror.close()
    assert sum(sent) == 56


def test_history_and_latest_values_are_what_mlflow_itself_would_keep(root: Path) -> None:
    from mlflow.entities import Metric

    run_dir = root / "r"
    mirror = start(run_dir, root)
    values = [0.5, float("nan"), float("inf"), -float("inf"), 1e-300, 0.25, float("nan")]
    log = Journal(run_dir / "metrics.jsonl")
    for step, value in enumerate(values):
        log.append({"step": step, "epoch": 0.5 * step, "train/loss": value, "perf/time_s": 1000.0 + step})
    log.append({"step": 6, "epoch": 3.0, "val/top1": 0.75, "perf/time_s": 1007.0})
    assert mirror.close()
    _, _, client = mlflow_run(mirror.uri, str(mirror.run_id))

    theirs = client.create_run(client.get_run(mirror.run_id).info.experiment_id).info.run_id
    for step, value in enumerate(values):
        point = [("epoch", 0.5 * step), ("train/loss", value)]
        client.log_batch(theirs, [Metric(key, number, 1000_000 + 1000 * step, step) for key, number in point])
    client.log_batch(theirs, [Metric("epoch", 3.0, 1007_000, 6), Metric("val/top1", 0.75, 1007_000, 6)])

    def kept(run_id: str) -> dict[str, list[str]]:
        run = client.get_run(run_id)
        histories = {
            key: sorted(str((p.step, p.timestamp, p.value)) for p in client.get_metric_history(run_id, key))
            for key in run.data.metrics
        }
        return histories | {f"latest {key}": [str(value)] for key, value in run.data.metrics.items()}

    assert kept(str(mirror.run_id)) == kept(theirs)


def test_an_artifact_is_sent_again_only_when_it_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, sent = root / "r", []
    real = session.Session.send_artifact
    monkeypatch.setattr(
        session.Session, "send_artifact", lambda self, folder, name: (sent.append(name), real(self, folder, name))
    )
    mirror = start(run_dir, root)
    for name in "ab":
        (run_dir / name).write_text("1")
    mirror.artifacts("ab")
    wait_for(lambda: len(sent) == 2)
    (run_dir / "a").write_text("22")
    mirror.artifacts(["a"])
    wait_for(lambda: len(sent) == 3)
    assert mirror.close()
    assert sent == ["a", "b", "a"]
    assert next(root.glob("mlartifacts/exp/*/artifacts/a")).read_text() == "22"


# ---- outages


@pytest.mark.parametrize("mode", ["500", "lost", "hang"])
def test_an_outage_neither_slows_training_nor_loses_or_doubles_a_point(root: Path, proxy: Proxy, mode: str) -> None:
    run_dir, notices = root / "r", []
    mirror = start(run_dir, root, uri=proxy.uri, notify=notices.append)
    log_rows(run_dir, range(20))
    wait_for(lambda: mirror._store["rows"] == 20)

    proxy.mode = mode
    slowest = 0.0
    for step in range(20, 60):
        before = time.perf_counter()
        log_rows(run_dir, range(step, step + 1))
        slowest = max(slowest, time.perf_counter() - before)
        time.sleep(0.02)
    wait_for(lambda: proxy.refused > 2 and notices)
    proxy.mode = "ok"

    log_rows(run_dir, range(60, 80))
    assert mirror.close(timeout_s=20)
    assert slowest < 0.5  # one answer of the failing server takes longer than that only when it hangs, for 2 s
    assert_each_point_once(proxy.uri, mirror.run_id, range(80))
    assert len(notices) == 1
    assert "Training goes on" in notices[0]


def test_a_batch_that_a_server_works_off_twice_is_kept_once(root: Path, proxy: Proxy) -> None:
    run_dir = root / "r"
    mirror = start(run_dir, root, uri=proxy.uri)
    log_rows(run_dir, range(10))
    wait_for(lambda: mirror._store["rows"] == 10)
    assert mirror._session is not None
    # As a request does that hung, was sent again, and was answered both times after all.
    mirror._session.send(journal.read(run_dir / "metrics.jsonl"))
    assert mirror.close()
    assert_each_point_once(proxy.uri, mirror.run_id, range(10))


def test_a_server_that_comes_up_after_the_start_gets_everything(root: Path, server_port: int) -> None:
    run_dir, late, notices = root / "r", free_port(), []
    mirror = start(run_dir, root, uri=f"http://127.0.0.1:{late}", notify=notices.append)
    log_rows(run_dir, range(30))
    wait_for(lambda: notices)
    proxy = Proxy(server_port)
    relay = socket.create_server(("127.0.0.1", late))

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = relay.accept()
                far = socket.create_connection(("127.0.0.1", server_port))
                threading.Thread(target=pump, args=(near, far), daemon=True).start()
                threading.Thread(target=pump, args=(far, near), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    assert mirror.close(timeout_s=20)
    relay.close()
    proxy.close()
    assert_each_point_once(f"http://127.0.0.1:{server_port}", mirror.run_id, range(30))
    assert len(notices) == 1


@pytest.mark.parametrize("mode", ["hang", "500"])
def test_closing_gives_up_on_a_dead_server_says_so_and_sync_delivers_later(root: Path, proxy: Proxy, mode: str) -> None:
    run_dir, notices = root / "r", []
    mirror = start(run_dir, root, uri=proxy.uri, notify=notices.append)
    log_rows(run_dir, range(10))
    wait_for(lambda: mirror._store["rows"] == 10)
    proxy.mode = mode
    log_rows(run_dir, range(10, 34))
    (run_dir / "summary.json").write_text("{}")
    mirror.artifacts(["summary.json"])

    before = time.monotonic()
    assert not mirror.close(timeout_s=1.5)
    assert time.monotonic() - before < 4
    assert "24 of 34 metric rows, 1 files, the status FINISHED" in notices[-1]
    assert f"python -m vitexp sync run='{run_dir}'" in notices[-1]
    assert not mirror.close()  # a second call says nothing more and does not wait again
    assert time.monotonic() - before < 5

    with pytest.raises(UserError, match="did not take the run"):
        sync(run_dir)
    proxy.mode = "ok"
    for _ in range(2):
        said = sync(run_dir)
    assert "34 metric rows" in said
    assert "status FINISHED" in said
    assert_each_point_once(proxy.uri, mirror.run_id, range(34))


def test_a_kill_returns_in_two_seconds_from_a_hanging_server(root: Path, proxy: Proxy) -> None:
    proxy.mode = "hang"
    run_dir = root / "r"
    mirror = start(run_dir, root, uri=proxy.uri)
    log_rows(run_dir, range(3))
    wait_for(lambda: proxy.refused)
    before = time.monotonic()
    assert not mirror.kill()
    assert time.monotonic() - before < 3
    assert json.loads((run_dir / "tracking.json").read_text())["status"] == "KILLED"


def test_a_kill_sets_its_status_although_a_large_upload_is_on_its_way(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, uploading, go_on = root / "r", threading.Event(), threading.Event()
    monkeypatch.setattr(session.Session, "send_artifact", lambda *_: (uploading.set(), go_on.wait(20)))
    mirror = start(run_dir, root)
    log_rows(run_dir, range(3))
    (run_dir / "model.safetensors").write_bytes(bytes(1000))
    mirror.artifacts(["model.safetensors"])
    assert uploading.wait(20)
    before = time.monotonic()
    mirror.kill()
    assert time.monotonic() - before < 3
    go_on.set()
    assert_each_point_once(mirror.uri, mirror.run_id, range(3), "KILLED")


def test_closing_waits_for_a_large_upload_that_takes_longer_than_an_answer(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = root / "r"
    monkeypatch.setattr(session.Session, "send_artifact", lambda *_: time.sleep(2.0))
    mirror = start(run_dir, root)
    log_rows(run_dir, range(3))
    with (run_dir / "model.safetensors").open("wb") as file:
        file.truncate(100_000_000)
    wait_for(lambda: mirror.run_id)
    mirror.artifacts(["model.safetensors"])
    assert mirror.close(timeout_s=1.0)


def test_where_a_run_lies_is_a_tag_and_no_param_to_compare(root: Path) -> None:
    mirror = start(root / "r", root, params={**PARAMS, "output_dir": str(root / "r")})
    assert mirror.close(timeout_s=20)
    assert mirror.run_id is not None
    run, _, _ = mlflow_run(mirror.uri, mirror.run_id)
    assert "optim.lr" in run.data.params
    assert "output_dir" not in run.data.params


def test_closing_gives_up_on_a_store_that_answers_but_refuses_files(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the bucket is full")

    run_dir, notices = root / "r", []
    monkeypatch.setattr(session.Session, "send_artifact", refuse)
    mirror = start(run_dir, root, notify=notices.append)
    log_rows(run_dir, range(3))
    (run_dir / "summary.json").write_text("{}")
    mirror.artifacts(["summary.json"])
    wait_for(lambda: mirror.run_id)
    before = time.monotonic()
    assert not mirror.close(timeout_s=1.5)
    assert time.monotonic() - before < 6
    assert "did not take 1 files" in notices[-1]
    assert "the bucket is full" in notices[-1]
    assert_each_point_once(mirror.uri, mirror.run_id, range(3))


def test_a_server_keeps_a_classifiers_weights_as_a_registered_model_and_gives_them_back(
    root: Path, proxy: Proxy
) -> None:
    run_dir = root / "r"
    mirror = start(run_dir, root, uri=proxy.uri, register="of a server")
    log_rows(run_dir, range(3))
    (run_dir / "model.safetensors").write_bytes(b"weights")
    (run_dir / "model.json").write_text('{"classes": ["cat", "dog"], "metrics": {"train/loss": 0.5}}')
    mirror.artifacts(["model.safetensors", "model.json"])
    assert mirror.close(timeout_s=20)
    assert mirror.run_id is not None
    run, _, client = mlflow_run(proxy.uri, mirror.run_id)
    (version,) = client.search_model_versions("name = 'of a server'")
    (model,) = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{mirror.run_id}'")
    assert (version.run_id, version.source) == (mirror.run_id, model.artifact_location)
    assert [(point.key, point.value, point.step) for point in model.metrics] == [("train/loss", 0.5, 1)]
    assert_each_point_once(proxy.uri, mirror.run_id, range(3))
    folder, weights = tracking.fetch(mirror.run_id, root=root, uri=proxy.uri)
    assert (folder / weights).read_bytes() == b"weights"


def test_a_locked_database_delays_rows_and_nothing_else(root: Path) -> None:
    run_dir = root / "r"
    mirror = start(run_dir, root)
    log_rows(run_dir, range(10))
    wait_for(lambda: mirror._store["rows"] == 10)
    lock = sqlite3.connect(root / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    before = time.monotonic()
    log_rows(run_dir, range(10, 20))
    assert time.monotonic() - before < 0.5
    time.sleep(0.5)
    assert mirror._store["rows"] == 10
    lock.execute("ROLLBACK")
    assert mirror.close(timeout_s=20)
    assert_each_point_once(mirror.uri, mirror.run_id, range(20))


# ---- resume


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_without_doubled_points(root: Path) -> None:
    run_dir, notices = root / "r", []
    first = start(run_dir, root)
    log_rows(run_dir, range(1, 41))
    assert first.close("KILLED")

    Journal(run_dir / "metrics.jsonl").truncate_after(25)
    params = {"optim": {"lr": 2e-3, "betas": [0.9, 0.999]}, "new": 1}
    second = start(run_dir, root, params=params, notify=notices.append)
    wait_for(lambda: second._session)
    assert mlflow_run(second.uri, str(second.run_id))[0].info.status == "RUNNING"
    log_rows(run_dir, range(26, 61))
    assert second.close()

    assert second.run_id == first.run_id
    run = assert_each_point_once(second.uri, second.run_id, range(1, 61))
    assert run.data.params["optim.lr"] == "0.001"
    assert run.data.tags["changed.optim.lr"] == "0.002"
    assert run.data.params["new"] == "1"
    assert not any(tag.startswith("changed.optim.betas") for tag in run.data.tags)
    assert notices == []


def test_redone_rows_with_other_values_are_said(root: Path) -> None:
    run_dir, notices = root / "r", []
    first = start(run_dir, root)
    Journal(run_dir / "metrics.jsonl").append({"step": 1, "epoch": 0.5, "train/loss": 1.0})
    assert first.close("KILLED")
    Journal(run_dir / "metrics.jsonl").truncate_after(0)
    second = start(run_dir, root, notify=notices.append)
    Journal(run_dir / "metrics.jsonl").append({"step": 1, "epoch": 0.5, "train/loss": 2.0})
    assert second.close()
    assert "1 points" in notices[0]


CHILD = """
import sys, time
from pathlib import Path
from vitexp import journal, tracking
from vitexp.tracking import mirror as mirroring
mirroring.POLL_S = mirroring.SEND_S = 0.02
run_dir, root = Path(sys.argv[1]), Path(sys.argv[2])
log = journal.Journal(run_dir / "metrics.jsonl")
rows = journal.read(log.path) if log.path.exists() else []
done = (rows[-1]["step"] if rows else 0) // 10 * 10   # as if a checkpoint were written every ten updates
log.truncate_after(done)
mirror = tracking.Mirror(run_dir, root=root, experiment="exp", run_name="r", params={}, tags={})
step = done
while True:
    step += 1
    log.append({"step": step, "epoch": step / 4, "train/loss": 1 / (step + 1), "perf/images_per_s": time.time()})
    if step == done + 25:
        print("going", flush=True)
    time.sleep(0.003)
"""


def test_killed_at_any_moment_the_next_start_goes_on_and_sync_calls_it_killed(root: Path) -> None:
    run_dir = root / "r"
    for delay_s in (0.0, 1.2, 2.4):
        with subprocess.Popen([sys.executable, "-c", CHILD, str(run_dir), str(root)], stdout=subprocess.PIPE) as child:
            try:
                assert child.stdout is not None
                assert child.stdout.readline() == b"going\n"
                time.sleep(delay_s)
            finally:
                child.send_signal(signal.SIGKILL)
    (run_dir / "config.yaml").write_text("a: 1\n")
    steps = range(1, journal.read(run_dir / "metrics.jsonl")[-1]["step"] + 1)
    assert "status KILLED" in sync(run_dir)
    run_id = json.loads((run_dir / "tracking.json").read_text())["stores"][f"sqlite:///{root}/mlflow.db"]["run_id"]
    run, points, client = mlflow_run(f"sqlite:///{root}/mlflow.db", run_id)
    for key, found in points.items():
        assert sorted(set(found)) == sorted(found), key
        assert set(found) >= set(steps), key  # beyond them: rows delivered, then lost to a kill before they were redone
    assert run.info.status == "KILLED"
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert [file.path for file in client.list_artifacts(run_id)] == ["config.yaml"]


def test_a_run_whose_creation_was_never_written_down_is_found_again(root: Path) -> None:
    run_dir = root / "r"
    first = start(run_dir, root)
    log_rows(run_dir, range(5))
    assert first.close("KILLED")
    record = json.loads((run_dir / "tracking.json").read_text())
    record["stores"] = {}
    (run_dir / "tracking.json").write_text(json.dumps(record))
    second = start(run_dir, root)
    assert second.close()
    assert second.run_id == first.run_id
    assert_each_point_once(second.uri, second.run_id, range(5))


@pytest.mark.parametrize("how", ["deleted", "unknown"])
def test_a_run_the_store_no_longer_has_is_made_anew_with_all_rows(root: Path, how: str) -> None:
    run_dir, notices = root / "r", []
    first = start(run_dir, root)
    log_rows(run_dir, range(5))
    assert first.close()
    if how == "deleted":
        mlflow_run(first.uri, str(first.run_id))[2].delete_run(first.run_id)
    else:
        record = json.loads((run_dir / "tracking.json").read_text())
        record["key"] = "other"
        record["stores"][first.uri]["run_id"] = "0" * 32
        (run_dir / "tracking.json").write_text(json.dumps(record))
    second = start(run_dir, root, notify=notices.append)
    assert second.close()
    assert second.run_id != first.run_id
    assert_each_point_once(second.uri, second.run_id, range(5))
    assert "a new one was made" in notices[0]


def test_starting_over_in_a_folder_makes_a_new_run(root: Path) -> None:
    run_dir = root / "r"
    first = start(run_dir, root)
    assert first.close()
    tracking.forget(run_dir)
    second = start(run_dir, root)
    assert second.close()
    assert second.run_id != first.run_id


# ---- first use


@pytest.mark.slow
def test_six_first_runs_at_once_all_land_in_a_new_store_although_one_was_killed_making_it(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from vitexp.journal import Journal
from vitexp.tracking import Mirror
run_dir, root = Path(sys.argv[1]), Path(sys.argv[2])
mirror = Mirror(run_dir, root=root, experiment="exp", run_name=run_dir.name, params={}, tags={})
Journal(run_dir / "metrics.jsonl").append({"step": 1, "epoch": 0.5, "train/loss": 0.5})
sys.exit(0 if mirror.close() else 1)
"""
    (tmp_path / "mlflow.db.new").write_bytes(b"half a database")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / f"r{i}"), str(tmp_path)],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for i in range(6)
    ]  # fmt: skip
    said = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0] * 6, said
    assert said == [("", "")] * 6  # neither MLflow nor its migrations spill onto the terminal
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("exp")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == [f"r{i}" for i in range(6)]
    assert all(run.info.status == "FINISHED" and run.data.metrics["train/loss"] == 0.5 for run in runs)


def test_a_deleted_experiment_is_named_with_the_way_out(root: Path) -> None:
    first = start(root / "r", root)
    assert first.close()
    run, _, client = mlflow_run(first.uri, str(first.run_id))
    client.delete_experiment(run.info.experiment_id)
    notices: list[str] = []
    assert not start(root / "s", root, notify=notices.append).close(timeout_s=1.0)
    assert f"mlflow experiments restore --experiment-id {run.info.experiment_id}" in notices[0]


# ---- sync


def test_a_run_made_without_tracking_can_be_delivered_later(root: Path) -> None:
    run_dir = root / "r"
    mirror = NoMirror(run_dir, root=root, run_name="r", params=PARAMS, tags=TAGS, experiment="exp")
    log_rows(run_dir, range(5))
    (run_dir / "summary.json").write_text("{}")
    mirror.artifacts(["summary.json"])
    assert mirror.close()
    with pytest.raises(UserError, match="tracking=none"):
        sync(run_dir)
    uri = f"sqlite:///{root}/mlflow.db"
    said = sync(run_dir, uri)
    run_id = said.split()[2]
    run = assert_each_point_once(uri, run_id, range(5))
    assert run.data.params["optim.lr"] == "0.001"
    assert "1 files sent now" in said
    assert "0 files sent now" in sync(run_dir, uri)
    assert_each_point_once(uri, run_id, range(5))


def test_syncing_a_run_that_is_still_going_leaves_its_status_and_record_alone(root: Path) -> None:
    run_dir = root / "r"
    mirror = start(run_dir, root)
    log_rows(run_dir, range(5))
    wait_for(lambda: mirror._store["rows"] == 5)
    record = (run_dir / "tracking.json").read_text()
    assert "still going" in sync(run_dir)
    assert (run_dir / "tracking.json").read_text() == record
    assert mlflow_run(mirror.uri, str(mirror.run_id))[0].info.status == "RUNNING"
    assert mirror.close()
    assert_each_point_once(mirror.uri, mirror.run_id, range(5))


def test_syncing_what_is_no_run_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        sync(tmp_path)
    (tmp_path / "tracking.json").write_text('{"uri": ')
    with pytest.raises(UserError, match=r"tracking\.json cannot be read"):
        sync(tmp_path)


# ---- where, and facts on the run


def test_uris_mean_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.resolve_uri(None, Path("out")) == f"sqlite:///{tmp_path}/out/mlflow.db"
    assert tracking.resolve_uri("sqlite:///x.db", Path()) == f"sqlite:///{tmp_path}/x.db"
    assert tracking.resolve_uri("sqlite:///a/../x.db?timeout=3", Path()) == f"sqlite:///{tmp_path}/x.db?timeout=3"
    for uri in ("sqlite:////abs/x.db", "http://host:5000", "https://host/mlflow", "postgresql+psycopg2://u:p@h/db"):
        assert tracking.resolve_uri(uri, Path()) == uri


@pytest.mark.parametrize(
    "uri", ["./mlruns", "mlruns", "/data/mlruns", "file:///data/mlruns", "file:mlruns", "", "sqlite:///", "sqlite://x.db",
            "sqlite:///:memory:", "http://", "ftp://host"],
)  # fmt: skip
def test_what_is_no_store_is_refused_with_what_is_wanted(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking\.uri=.*sqlite:///outputs/mlflow\.db"):
        tracking.resolve_uri(uri, tmp_path)
    with pytest.raises(UserError):
        start(tmp_path / "r", tmp_path, uri=uri)
    assert not (tmp_path / "r").exists()


def test_the_ui_line_can_be_pasted(tmp_path: Path) -> None:
    uri = tracking.default_uri(tmp_path)
    assert tracking.ui_line(uri) == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
    assert tracking.ui_line("sqlite:////a b/m.db").endswith("'sqlite:////a b/m.db'")
    assert tracking.ui_line("http://host:5000") == "http://host:5000"


def test_a_password_in_the_uri_is_neither_kept_nor_printed(tmp_path: Path) -> None:
    notices: list[str] = []
    uri = f"http://me:secret@127.0.0.1:{free_port()}"
    mirror = start(tmp_path, tmp_path, uri=uri, notify=notices.append)
    assert not mirror.close(timeout_s=0.3)
    assert "secret" not in (tmp_path / "tracking.json").read_text() + str(notices) + mirror.ui_line
    assert notices
    with pytest.raises(UserError, match="password"):
        sync(tmp_path)


def test_git_state_of_a_checkout_and_of_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.git_state(tmp_path) == {}
    assert tracking.git_state(tmp_path / "absent") == {}
    if shutil.which("git") is None:
        pytest.skip("no git here")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q", "-b", "main"], [*author, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    state = tracking.git_state(tmp_path)
    assert (len(state["git.sha"]), state["git.branch"], state["git.dirty"]) == (40, "main", "false")
    (tmp_path / "new.py").write_text("")
    assert tracking.git_state(tmp_path)["git.dirty"] == "true"
    monkeypatch.setenv("PATH", "")
    assert tracking.git_state(tmp_path) == {}


def test_tags_tell_where_a_run_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tags = tracking.run_tags(Path("r"), stage="finetune", model="vit_tiny", data="digits")
    assert tags.items() >= {"stage": "finetune", "model": "vit_tiny", "data": "digits"}.items()
    assert tags["run_dir"] == str(tmp_path / "r")
    assert tags["host"]
    assert tags["command"]


def test_importing_tracking_brings_in_neither_mlflow_nor_torch() -> None:
    code = "import sys, vitexp.tracking, vitexp.commands.sync; print({'mlflow', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["mlflow", "none"])
def test_the_shipped_tracking_options_build_a_mirror(root: Path, name: str, repository: Path) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    node = OmegaConf.load(repository / "conf" / "tracking" / f"{name}.yaml")
    make = instantiate(OmegaConf.create({"name": "exp", "tracking": node}).tracking, _convert_="all")
    mirror = make(root / "r", root=root, run_name="r", params=PARAMS, tags=TAGS, dataset=None)
    mirror.wait_imported()
    mirror.artifacts([])
    assert mirror.close()
    assert os.path.exists(root / "r" / "tracking.json")
