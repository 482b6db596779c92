"""MLflow's pages: the right store, port and link, and nothing that lives on."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vitexp.commands import ui
from vitexp.errors import UserError

# Answers as MLflow's server does, and has a helper that does not hear SIGTERM.
STAND_IN = """
import http.server, os, signal, subprocess, sys
helper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", helper], stdout=subprocess.PIPE)
child.stdout.readline()
open("pids", "w").write(f"{os.getpid()} {child.pid} {os.environ['MLFLOW_BACKEND_STORE_URI']}")
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *said): pass
http.server.HTTPServer((sys.argv[1], int(sys.argv[2])), Answer).serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def outputs(workdir: Path, mlflow_template: Path) -> Path:
    """The folder of runs, its store with two experiments, in the first of which a run began last."""
    from mlflow import MlflowClient

    folder = workdir / "outputs"
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    first, second = client.create_experiment("first"), client.create_experiment("second")
    client.create_run(second, start_time=1000)
    client.create_run(first, start_time=2000)
    return folder


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", STAND_IN]
    monkeypatch.setattr(ui, "server_command", lambda host, port: [*command, host, str(port)])
    monkeypatch.setattr(ui, "END_S", 1.0)


def end_when_told(signum: int, pids: Path) -> threading.Thread:
    """Sends the signal to this process once the stand-in has been there for a moment."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not pids.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.0)
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def is_gone(pid: int) -> bool:
    """Within a moment: a killed process takes one to go, and one without a parent may stay as a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process, deadline = psutil.Process(pid), time.monotonic() + 10
        while process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    return True


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 0), (signal.SIGHUP, 129)])
def test_it_serves_the_store_beside_the_runs_and_ends_with_all_it_started(
    outputs: Path, port: int, signum: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before, thread = signal.getsignal(signum), end_when_told(signum, outputs / "pids")
    assert ui.main([f"port={port}"], None) == code
    thread.join()
    leader, helper, store = (outputs / "pids").read_text().split()
    assert not psutil.pid_exists(int(leader))
    assert is_gone(int(helper))
    assert store == f"sqlite:///{outputs}/mlflow.db"
    link = f"http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART"
    assert link in capsys.readouterr().out.splitlines()[2]
    assert signal.getsignal(signum) == before


def test_a_taken_port_is_said_with_the_next_free_one(workdir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port={port}: something listens there already.*; port=(\d+) is free"
        ) as said:
            ui.main([f"port={port}"], None)
        (free,) = re.findall(r"port=(\d+) is free", str(said.value))
        assert int(free) > port
        ui.check_port("127.0.0.1", int(free))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["port=80000"], "port=80000: expected a number from 1024 to 65535"),
        (["prot=1"], r"ui: no such key 'prot'. Did you mean 'port'\?"),
        (["open=1"], "open=1: expected true or false"),
        (["host=203.0.113.1", "port=5999"], r"host=203.0.113.1 port=5999: nothing can listen there: "),
        (["uri=files"], "tracking.uri=files is not a store"),
    ],
)
def test_a_bad_word_is_one_clear_error(workdir: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ui.main(arguments, None)
    assert list(workdir.iterdir()) == []


def test_without_a_store_nothing_is_started_nor_made(workdir: Path, port: int) -> None:
    with pytest.raises(UserError, match=r"there is no MLflow store .*outputs/mlflow.db"):
        ui.main([f"port={port}"], None)
    assert list(workdir.iterdir()) == []


def test_a_server_that_dies_says_why(outputs: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dies = [sys.executable, "-c", "import sys; sys.exit('no such table')"]
    monkeypatch.setattr(ui, "server_command", lambda host, port: dies)
    with pytest.raises(UserError, match="ended with exit code 1: no such table"):
        ui.main([f"port={port}"], None)


@pytest.fixture
def served(outputs: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`python -m vitexp ui` and the lines it has printed once it answers."""
    command = [sys.executable, "-m", "vitexp", "ui", f"port={port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, [process.stdout.readline() for _ in range(3)]
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.slow
def test_mlflows_own_server_answers_and_ends(served: tuple[subprocess.Popen[str], list[str]], outputs: Path) -> None:
    process, lines = served
    assert lines[0].strip().endswith(f"sqlite:///{outputs}/mlflow.db")
    link = lines[2].split()[1]
    address, _, place = link.partition("/#/")
    with urllib.request.urlopen(f"{address}/", timeout=30) as page:
        assert b"<title>MLflow" in page.read()
    assert place.startswith("experiments/1/runs?")
    started = psutil.Process(process.pid).children(recursive=True)
    assert started
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    _, alive = psutil.wait_procs(started, timeout=3)
    assert not alive
    assert {path.name for path in outputs.iterdir()} <= {"mlflow.db", "mlflow.db.lock"}
