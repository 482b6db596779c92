"""Jobs of a sweep on a Slurm cluster, through submitit.

What travels with a job is what was typed, the folder it was typed in, the environment and this Python; the machines
share the file system where these, the pictures and the sweep's folder lie. A job that is preempted, or reaches
Slurm's time limit, saves, is queued again by Slurm and goes on.

Jobs go on when the sweep's process dies. Their numbers lie beside what they say, in `console/<job>.slurm`: the same
command finds those that still wait or run, and starts none of them twice.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from vitexp.errors import UserError
from vitexp.run_folder import write_atomic
from vitexp.sweeps.ledger import State
from vitexp.sweeps.local import GRACE_S, Limits, Watched, dies_with, run_here

LOOK_S = 15.0  # between two questions to Slurm
PREEMPTED_S = 300.0  # how long a preempted job may take to be queued again
FORGOTTEN_S = 600.0  # after which a number that Slurm does not know is no new one
POLL_S = 0.1
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)  # exit codes
RESULT_S = 10.0  # how much later than a job's end its result may come, over a network's file system
# Slurm's words for an end that was not the job's own, and ours.
ENDED: dict[str, tuple[State, str]] = {
    "TIMEOUT": ("timed out", "took longer than Slurm let it (sweep.launcher.timeout_min)"),
    "OUT_OF_MEMORY": ("killed", "out of memory, says Slurm (sweep.launcher.memory_gb)"),
    "NODE_FAIL": ("killed", "its machine failed, says Slurm"),
    "BOOT_FAIL": ("killed", "its machine did not start, says Slurm"),
    "PREEMPTED": ("killed", "preempted and not queued again, says Slurm; the same command goes on"),
    "DEADLINE": ("killed", "past Slurm's deadline"),
    "CANCELLED": ("killed", "cancelled, says Slurm"),
}


class Slurm:
    """See conf/sweep/launcher/slurm.yaml."""

    def __init__(
        self,
        jobs: int,
        *,
        partition: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        cpus: int = 8,
        gpus: int = 1,
        memory_gb: float | None = None,
        timeout_min: int = 1440,
        setup: list[str] | None = None,
        additional: dict[str, Any] | None = None,
        cluster: Literal["slurm", "local"] = "slurm",
    ) -> None:
        """Raises UserError without submitit, and where there is no Slurm."""
        try:
            self._submitit: Any = importlib.import_module("submitit")
        except ImportError:
            raise UserError("sweep=slurm: needs submitit: pip install 'vitexp[slurm]'") from None
        if cluster not in ("slurm", "local"):
            raise UserError(f"sweep.launcher.cluster={cluster}: expected slurm or local")
        for program in ("sbatch", "srun", "sacct") if cluster == "slurm" else ():
            if shutil.which(program) is None:
                raise UserError(
                    f"sweep=slurm: no {program} on this machine; start the sweep where jobs are submitted, or try it "
                    "with sweep.launcher.cluster=local"
                )
        logging.getLogger("submitit").setLevel(logging.ERROR)  # its lines would go through the table
        self.cluster, self.survives = cluster, cluster == "slurm"
        asked = {
            # Said to srun, too: since Slurm 22.05 it does not take this from its job, and would give one core.
            "slurm_srun_args": [f"--cpus-per-task={cpus}"],
            "cpus_per_task": cpus, "gpus_per_node": gpus or None, "mem_gb": memory_gb, "timeout_min": timeout_min,
            "slurm_partition": partition, "slurm_account": account, "slurm_qos": qos, "slurm_setup": setup or None,
            "slurm_additional_parameters": dict(additional) if additional else None,
        }  # fmt: skip
        self._asked = {key: value for key, value in asked.items() if value is not None}

    def start(
        self, arguments: list[str], *, slot: int, console: Path, heard: Callable[[], float], limits: Limits
    ) -> SlurmJob:
        record = Record(console.with_suffix(".slurm"))
        job = self._still_there(record)
        if job is None:
            executor = self.executor(console.parent / "submitit", name=console.stem)
            with self._from_outside():
                job = executor.submit(Here(arguments, console, cwd=os.getcwd(), in_slurm=self.survives))
            record.write({"id": job.job_id, "folder": str(executor.folder), "submitted": time.time()})
        if self.survives:
            job.watcher._delay_s = LOOK_S  # submitit's own is up to ten minutes
        return SlurmJob(job, record, in_slurm=self.survives, console=console, heard=heard, limits=limits)

    def executor(self, folder: Path, *, name: str) -> Any:
        """submitit's, which writes and submits the script."""
        executor = self._submitit.AutoExecutor(folder=folder, cluster=self.cluster)
        executor.update_parameters(name=f"vitexp-{name}"[:60], **self._asked)
        return executor

    def _from_outside(self) -> contextlib.AbstractContextManager[None]:
        """Inside a job of Slurm's: without what it set there, which sbatch would take as asked for."""
        return self._submitit.helpers.clean_env() if "SLURM_JOB_ID" in os.environ else contextlib.nullcontext()

    def _still_there(self, record: Record) -> Any | None:
        """The job of a former start that waits or runs."""
        known = record.read()
        if not self.survives or not {"id", "folder", "submitted"} <= known.keys():
            return None
        job = self._submitit.SlurmJob(folder=known["folder"], job_id=known["id"])
        if job.done(force_check=True):
            return None
        forgotten = job.state == "UNKNOWN" and time.time() - known["submitted"] > FORGOTTEN_S
        return None if forgotten else job


class Record:
    """What is known of a job, beside what it says."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def write(self, known: dict[str, Any]) -> None:
        write_atomic(self.path, json.dumps(known) + "\n")


class SlurmJob(Watched):
    """A job of submitit's."""

    grace_s = 90.0  # Slurm has a grace of its own, 30 s unless its owners say otherwise

    def __init__(
        self, job: Any, record: Record, *, in_slurm: bool, console: Path, heard: Callable[[], float], limits: Limits
    ) -> None:
        super().__init__(console=console, heard=heard, limits=limits)
        self._job, self._record, self._in_slurm = job, record, in_slurm
        self._gone_at: float | None = None
        self._preempted_at: float | None = None
        self._began_at = record.read().get("began")  # by a former start

    def poll(self) -> tuple[State, str] | None:
        """None while it waits for a machine, and while it runs."""
        state = "" if self._job.done() else str(self._job.state)
        if state and not self._is_lost(state):
            if self._began_at is None and state == "RUNNING":
                self._began_at = time.time()
                self._record.write({**self._record.read(), "began": self._began_at})
            self._watch()
            return None
        if not self._job.paths.result_pickle.exists():
            self._gone_at = self._gone_at or time.monotonic()
            # Slurm calls a job cancelled when it has asked it to end; then it saves.
            if time.monotonic() - self._gone_at < RESULT_S + (0 if self._asked is None else GRACE_S):
                return None
        self._record.path.unlink(missing_ok=True)
        return self._ended()

    def _is_lost(self, state: str) -> bool:
        """Whether it was preempted for good; mostly Slurm queues such a job again."""
        if state != "PREEMPTED":
            self._preempted_at = None
            return False
        self._preempted_at = self._preempted_at or time.monotonic()
        return time.monotonic() - self._preempted_at > PREEMPTED_S

    def _ended(self) -> tuple[State, str]:
        if self._job.paths.result_pickle.exists():
            failure = self._job.exception()
            if failure is None:
                return self._became(self._job.result())
            said = (str(failure).strip().splitlines() or [type(failure).__name__])[-1]
        else:
            said = "left no result"
        if self._asked is not None:
            return self._asked[0], self._asked[1]
        state, complaint = str(self._job.state).split()[0].rstrip("+"), self._complaint()  # `CANCELLED by 1000`
        if state not in ENDED and complaint.startswith("stopped by "):
            return "stopped", complaint
        return ENDED.get(state) or ("failed", complaint or f"{state.lower()}: {said}")

    def _ask(self) -> None:
        if self._in_slurm and self._began_at is not None:
            # Cancelled, it would be killed after Slurm's own grace, mostly 30 s.
            subprocess.call(["scancel", "--signal=TERM", str(self._job.job_id)])
        else:
            self._job.cancel(check=False)

    def _kill(self) -> None:
        self._job.cancel(check=False)


class Here:
    """What runs on the machine that Slurm chose: the job as a process, whose exit code is the result.

    In Slurm a process that was asked to stop leaves none: the job may have been cancelled, or preempted and about to be
    queued again, which Slurm alone can say."""

    def __init__(self, arguments: list[str], console: Path, *, cwd: str, in_slurm: bool) -> None:
        self.arguments, self.console, self.cwd, self.in_slurm = arguments, console, cwd, in_slurm
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        prepare = _deaf_to_slurm(dies_with(os.getpid()))
        self._process = run_here(self.arguments, self.console, cwd=self.cwd, prepare=prepare)
        try:
            code = self._process.wait()
        finally:
            self._end()
        if self.in_slurm and code in STOPPED:
            raise SystemExit(code)
        return code

    def checkpoint(self) -> Any:
        """Called by submitit when Slurm preempts the job or its time is over: it saves, and is queued again."""
        self._end()
        submission = importlib.import_module("submitit").helpers.DelayedSubmission
        return submission(Here(self.arguments, self.console, cwd=self.cwd, in_slurm=self.in_slurm))

    def _end(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        until = time.monotonic() + GRACE_S
        while not _has_ended(process.pid) and time.monotonic() < until:
            time.sleep(POLL_S)
        process.kill()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}


def _has_ended(pid: int) -> bool:
    """Asked of the kernel: in a signal's handler Popen cannot say, whose lock the interrupted wait() holds."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _deaf_to_slurm(prepare: Callable[[], None] | None) -> Callable[[], None]:
    """Slurm's warning goes to every process of the job, and would end one that does not know it; submitit heeds it."""

    def both() -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if prepare is not None:
            prepare()

    return both
