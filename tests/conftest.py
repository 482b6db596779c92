"""What the tests share: one thread, no telemetry, an empty folder, a ready MLflow database, nothing left running."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before torch and mlflow are imported, and inherited by the runs that tests start. One thread: the models here are
# so small that a second one costs more than it brings, and results must not depend on the machine's core count.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
os.environ.pop("MLFLOW_TRACKING_URI", None)
# Every process started from here carries this mark, also one that outlived its parent.
_MARK = "VITEXP_TEST_SESSION"
os.environ[_MARK] = str(os.getpid())

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return REPOSITORY


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one: outputs/ and mlflow.db land in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with all its tables and no run, made once: its migrations take seconds."""
    from mlflow import MlflowClient

    database = tmp_path_factory.mktemp("mlflow") / "template.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture
def mlflow_uri(mlflow_template: Path, tmp_path: Path) -> str:
    """A fresh MLflow database of the test's own, as tracking.uri takes it."""
    database = tmp_path / "mlflow.db"
    shutil.copyfile(mlflow_template, database)
    return f"sqlite:///{database}"


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_running() -> Iterator[None]:
    """Fails the session when a process that a test started is still there at its end, and ends that process."""
    yield
    import psutil

    _, alive = psutil.wait_procs(_started_here(), timeout=5)  # workers and helpers need a moment to see the end
    said = [f"{process.pid}: {' '.join(process.info['cmdline'])[:200]}" for process in alive]
    for process in alive:
        process.kill()
    assert not said, "left running by the tests:\n" + "\n".join(said)


def _started_here() -> list:
    """Processes with our mark, but for Python's own helper of shared memory, which ends with this process."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.pid == os.getpid() or process.environ().get(_MARK) != os.environ[_MARK]:
                continue
            if not any("resource_tracker" in word for word in process.info["cmdline"]):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # ended meanwhile, or another user's
    return found


@pytest.fixture(autouse=True)
def _no_precision_left_over() -> None:
    """Accelerate keeps device and precision a process: a run made in one test must not set them for the next."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
