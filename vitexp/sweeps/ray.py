"""Jobs of a sweep on the machines of a Ray cluster, or on this one through Ray.

A job is an actor that has its share of cores and GPUs and starts `python -m vitexp` as a process, so that it can be
ended. What travels with it is what was typed, the folder it was typed in and the variables of the environment that
begin as TRAVELS says; vitexp is installed on the machines, and they share the file system where pictures and outputs
lie. Jobs end, after saving, when the sweep's process dies.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitexp.errors import UserError
from vitexp.launch import kill_group
from vitexp.sweeps.ledger import State
from vitexp.sweeps.local import GRACE_S, Limits, Watched, dies_with, run_here

OBJECTS = 128 * 2**20  # bytes that a Ray of this machine alone keeps in memory for results: exit codes
TRAVELS = ("VITEXP_", "MLFLOW_", "HF_", "OMP_", "PYTHONPATH")


class Ray:
    """See conf/sweep/launcher/ray.yaml."""

    survives = False

    def __init__(
        self,
        jobs: int,
        *,
        address: str | None = None,
        cpus: float = 1,
        gpus: float = 0,
        memory_gb: float | None = None,
        resources: dict[str, float] | None = None,
    ) -> None:
        """Raises UserError without Ray, and where no cluster answers at the address."""
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise UserError("sweep=ray: needs Ray: pip install 'vitexp[ray]'") from None
        here = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECTS}
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            where = here if address is None else {"address": address}
            self._ray.init(log_to_driver=False, logging_level="error", **where)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"sweep.launcher.address={address}: no Ray cluster answers ({error})") from None
        finally:  # Ray puts its own in their place, which end this process at once
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        memory = None if memory_gb is None else int(memory_gb * 2**30)
        self._share = {"num_cpus": cpus, "num_gpus": gpus, "memory": memory, "resources": resources}

    def start(
        self, arguments: list[str], *, slot: int, console: Path, heard: Callable[[], float], limits: Limits
    ) -> RayJob:
        # One call waits for the job, another may stop it meanwhile.
        actor = self._ray.remote(Here).options(max_concurrency=2, **self._share).remote()
        variables = {key: value for key, value in os.environ.items() if key.startswith(TRAVELS)}
        began = actor.begin.remote(arguments, str(console), os.getcwd(), variables)
        return RayJob(self._ray, actor, began, console=console, heard=heard, limits=limits)


class RayJob(Watched):
    """An actor that runs a job."""

    grace_s = GRACE_S + 15  # the actor has the usual one, and kills what the job started, too

    def __init__(
        self, ray: Any, actor: Any, began: Any, *, console: Path, heard: Callable[[], float], limits: Limits
    ) -> None:
        super().__init__(console=console, heard=heard, limits=limits)
        self._ray, self._actor, self._began = ray, actor, began
        self._code = actor.wait.remote(began)

    def poll(self) -> tuple[State, str] | None:
        """None while it waits for a machine, and while it runs."""
        if not self._ray.wait([self._code], timeout=0)[0]:
            if self._began_at is None and self._ray.wait([self._began], timeout=0)[0]:
                self._began_at = time.time()
            self._watch()
            return None
        try:
            became = self._became(self._ray.get(self._code))
        except self._ray.exceptions.RayError as error:
            lost = f"lost by Ray: {str(error).strip().splitlines()[0]}"
            became = (self._asked[0], self._asked[1]) if self._asked is not None else ("killed", lost)
        self._ray.kill(self._actor)  # gives its share back
        return became

    def _ask(self) -> None:
        self._actor.stop.remote()

    def _kill(self) -> None:
        self._ray.kill(self._actor)


class Here:
    """What runs on the machine that Ray chose: the job as a process. It is asked to stop when this one dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def begin(self, arguments: list[str], console: str, cwd: str, variables: dict[str, str]) -> None:
        """Starts it, unless it was stopped before."""
        if self._stopped:
            return
        self._process = run_here(
            arguments,
            Path(console),
            cwd=cwd,
            env={**os.environ, **variables},
            start_new_session=True,
            prepare=dies_with(os.getpid()),
        )

    def wait(self, began: None) -> int:
        """The exit code. `began` is what `begin` returned: Ray waits for it."""
        return 128 + signal.SIGTERM if self._process is None else self._process.wait()

    def stop(self) -> None:
        self._stopped = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
            kill_group(self._process)
