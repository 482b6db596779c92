"""`python -m vitexp ui`: MLflow's pages on the store that the runs here are tracked in, until Ctrl-C.

`port` (5000), `host` (127.0.0.1: this machine alone), `open=true` for a browser, `tracking.uri` for another store.
Prints the link to the runs of the experiment in which one began last, as a table with charts. Where the store is a
server, its own pages are named and nothing is started."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vitexp.errors import UserError
from vitexp.launch import kill_group
from vitexp.locate import store_of_training, truth, words_given
from vitexp.tracking import folder_of, newest_experiment, resolve_uri, without_password

KEYS = ("port", "host", "open", "uri")
PORT, LAST_PORT = 5000, 65535
OUTPUTS = Path("outputs")
# MLflow opens on its pages for language models; this leads to those for training, with the charts shown.
RUNS = "/#/experiments/{}/runs?workflowType=machine_learning&compareRunsMode=CHART"
START_S = 120.0  # 8 s on a quiet machine
END_S = 5.0  # from the request to end until the server and its helpers are killed
POLL_S = 0.2
QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


def main(arguments: list[str], config_dir: str | None) -> int:
    """Serves until a signal comes; 0 after Ctrl-C. Raises UserError: no store, port taken, server does not start."""
    given = words_given(arguments, KEYS, command="ui")
    host, port = given.get("host", "127.0.0.1"), _port(given.get("port"))
    browser = bool(truth("open", given.get("open"), why="true opens a browser"))
    store = resolve_uri(given.get("uri") or store_of_training(), OUTPUTS)
    is_server = store.startswith(("http://", "https://"))
    if not is_server:
        check_port(host, port)
    experiment = newest_experiment(root=OUTPUTS, uri=store)
    page = RUNS.format(experiment[0]) if experiment else ""
    if is_server:
        _tell(store, without_password(store).rstrip("/") + page, experiment, browser=browser)
        return 0
    asked: list[int] = []
    with _heeding(asked), tempfile.TemporaryFile() as said, server(store, host, port, said) as process:
        address = f"http://{_shown(host)}:{port}"
        if answers(address, process, asked, said):
            _tell(store, address + page, experiment, browser=browser)
            print("            Ctrl-C ends it", flush=True)
        while not asked and process.poll() is None:
            time.sleep(POLL_S)
        if not asked:
            raise _ended(process, said)
    return 0 if asked[0] == signal.SIGINT else 128 + asked[0]


def server_command(host: str, port: int) -> list[str]:
    return [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]


def check_port(host: str, port: int) -> None:
    """Raises UserError where nothing can listen there, with the next port that is free."""
    trouble = _trouble(host, port)
    if trouble is None:
        return
    if trouble.errno != errno.EADDRINUSE:
        reason = trouble.strerror or trouble
        raise UserError(f"host={host} port={port}: nothing can listen there: {reason}; port takes 1024 to {LAST_PORT}")
    free = next((other for other in range(port + 1, LAST_PORT + 1) if _trouble(host, other) is None), None)
    near = "" if free is None else f"; port={free} is free"
    raise UserError(f"port={port}: something listens there already, perhaps this very page{near}")


def _trouble(host: str, port: int) -> OSError | None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            probe.bind(address)
    except OSError as error:
        return error
    return None


@contextlib.contextmanager
def server(store: str, host: str, port: int, said: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's server in a session of its own, which ends with all that it started."""
    # The store by the environment: a command line is for everyone to read, its password with it.
    environment = {**os.environ, **QUIET, "MLFLOW_BACKEND_STORE_URI": store}
    process = subprocess.Popen(
        server_command(host, port),
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
        env=environment,
        cwd=folder_of(store) or Path.cwd(),  # what is made in its pages lies beside what runs make
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        kill_group(process)


@contextlib.contextmanager
def _heeding(asked: list[int]) -> Iterator[None]:
    """Notes the signals that ask to end. None of them interrupts anything: the server must be ended in any case."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), lambda signum, frame: asked.append(signum)) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def answers(address: str, process: subprocess.Popen[bytes], asked: list[int], said: IO[bytes]) -> bool:
    """Waits until the server does; False when asked to end before. Raises UserError when it does not start."""
    print(f"starting    MLflow at {address}, which takes a few seconds", file=sys.stderr, flush=True)
    given_up = time.monotonic() + START_S
    while not asked:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/health", timeout=2):
                return True
        except urllib.error.HTTPError as error:
            raise UserError(f"{address}: something else than MLflow answers there ({error})") from None
        except OSError:
            if process.poll() is not None:
                raise _ended(process, said) from None
            if time.monotonic() > given_up:
                raise UserError(f"{address}: MLflow's server did not answer within {START_S:.0f} s") from None
        time.sleep(POLL_S)
    return False


def _ended(process: subprocess.Popen[bytes], said: IO[bytes]) -> UserError:
    said.seek(0)
    lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    return UserError(f"MLflow's server ended with exit code {process.returncode}: {lines[-1] if lines else 'no word'}")


def _tell(store: str, link: str, experiment: tuple[str, str] | None, *, browser: bool) -> None:
    print(f"store       {without_password(store)}")
    print(f"experiment  {'none with a run yet' if experiment is None else experiment[1]}")
    print(f"link        {link}", flush=True)
    if browser:
        webbrowser.open(link)


def _shown(host: str) -> str:
    """The host as this machine's browser reaches it."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _port(text: str | None) -> int:
    if text is None:
        return PORT
    if not text.isdecimal() or not 0 < int(text) <= LAST_PORT:
        raise UserError(f"port={text}: expected a number from 1024 to {LAST_PORT}, such as {PORT}")
    return int(text)
