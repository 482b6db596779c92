"""Jobs through submitit: the script that Slurm gets, what its words mean, and jobs that outlive the sweep's process.

Slurm itself is made up: programs of its names that run the script here. submitit's local executor is real."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from vitexp.errors import UserError
from vitexp.sweeps import slurm as module
from vitexp.sweeps.ledger import read_ledger
from vitexp.sweeps.local import Limits
from vitexp.sweeps.slurm import Here, Slurm, SlurmJob

pytest.importorskip("submitit", reason="needs pip install 'vitexp[slurm]'")

NUMBERS = itertools.count(1000, 100)  # submitit remembers the end of a number as long as the process lives
RUN = ["data=fake", "data.num_train=64", "data.num_val=16", "model=vit_debug", "tracking=none", "train.workers=0"]

SBATCH = """#!/bin/bash
number=$(( $(cat $PLACE/number) + 1 )); echo $number > $PLACE/number
cp "$1" $PLACE/script-$number.sh; echo PENDING > $PLACE/state-$number
if [ -n "$REALLY" ]; then begin $number; fi
echo "Submitted batch job $number"
"""
# No program of Slurm's: a machine has come free for a job that waits.
BEGIN = """#!/bin/bash
export SLURM_JOB_ID=$1 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
export SLURM_JOB_NODELIST=here
setsid bash -c "echo RUNNING > $PLACE/state-$1
  bash $PLACE/script-$1.sh && echo COMPLETED > $PLACE/state-$1 || echo FAILED > $PLACE/state-$1" \\
  > /dev/null 2>&1 < /dev/null &
echo $! > $PLACE/group-$1
"""
SACCT = """#!/bin/bash
echo "JobID|State|NodeList"
for file in $PLACE/state-*; do echo "${file##*-}|$(cat $file)|here"; done
"""
# --unbuffered --output o --error e --cpus-per-task=8
SRUN = '#!/bin/bash\nshift 6\necho $$ > $PLACE/step-$SLURM_JOB_ID\nexec "$@"\n'
# A signal is for the step's processes, without one all ends.
SCANCEL = """#!/bin/bash
if [ "$1" = --signal=TERM ]; then
  step=$(cat $PLACE/step-$2)
  kill -TERM $step $(cat /proc/$step/task/$step/children)
elif [ -e $PLACE/group-$1 ]; then
  echo CANCELLED > $PLACE/state-$1
  kill -TERM -- -$(cat $PLACE/group-$1)
fi
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster of this machine; the folder has its scripts and the state of each job."""
    place = tmp_path / "cluster"
    place.mkdir()
    for name, text in (("begin", BEGIN), ("sbatch", SBATCH), ("sacct", SACCT), ("srun", SRUN), ("scancel", SCANCEL)):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("PLACE", str(place))
    (place / "number").write_text(str(next(NUMBERS)))
    return place


def begun(folder: Path, launcher: Slurm, name: str = "lr-1", overrides: Sequence[str] = ("seed=0",)) -> SlurmJob:
    (folder / "console").mkdir(exist_ok=True)
    console = folder / "console" / f"{name}.log"
    return launcher.start(list(overrides), slot=0, console=console, heard=lambda: 0.0, limits=Limits())


def test_the_script_asks_for_what_was_typed(slurm: Path, tmp_path: Path) -> None:
    launcher = Slurm(
        2, partition="gpu", account="lab", cpus=6, gpus=2, memory_gb=48, timeout_min=90, setup=["module load cuda"],
        additional={"constraint": "a100"},
    )  # fmt: skip
    begun(tmp_path, launcher)
    script = next(slurm.glob("script-*.sh")).read_text()
    for line in (
        "--partition=gpu", "--account=lab", "--cpus-per-task=6", "--gpus-per-node=2", "--mem=48GB", "--time=90",
        "--constraint=a100", "--job-name=vitexp-lr-1",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "--signal=USR2@90" in script, "no warning before the end, so nothing is saved"
    assert script.index("\nmodule load cuda\n") < script.index("\nsrun ")
    assert " --cpus-per-task=6 " in script[script.index("\nsrun ") :], "newer Slurms would give each job one core"
    assert f"{sys.executable} -u -m submitit.core._submit {tmp_path}/console/submitit" in script


@pytest.mark.parametrize(
    ("word", "became"),
    [
        ("PENDING", None),
        ("RUNNING", None),
        ("TIMEOUT", ("timed out", "timeout_min")),
        ("OUT_OF_MEMORY", ("killed", "memory_gb")),
        ("NODE_FAIL", ("killed", "machine failed")),
        ("CANCELLED by 1000", ("killed", "cancelled")),
        ("PREEMPTED", ("killed", "not queued again")),
    ],
)
def test_slurms_words_are_understood(slurm: Path, tmp_path: Path, word: str, became, monkeypatch) -> None:
    monkeypatch.setattr("vitexp.sweeps.slurm.RESULT_S", 0.0)
    monkeypatch.setattr("vitexp.sweeps.slurm.PREEMPTED_S", -1.0)
    job = begun(tmp_path, Slurm(1))
    (slurm / f"state-{job._job.job_id}").write_text(word)
    job._job.watcher.update()
    found = job.poll()
    if became is None:
        assert found is None
        assert (job.minutes > 0) == (word == "RUNNING")
    else:
        assert found is not None
        assert found[0] == became[0]
        assert became[1] in found[1]


def test_a_job_that_waits_or_runs_is_found_again_and_not_submitted_twice(slurm: Path, tmp_path: Path) -> None:
    first = begun(tmp_path, Slurm(1))
    number = first._job.job_id
    assert begun(tmp_path, Slurm(1))._job.job_id == number
    (slurm / f"state-{number}").write_text("FAILED")
    assert begun(tmp_path, Slurm(1))._job.job_id == str(int(number) + 1)


def test_inside_a_job_of_slurms_its_settings_are_not_handed_on(slurm: Path, tmp_path: Path, monkeypatch) -> None:
    (slurm / "sbatch").write_text(SBATCH + "env > $PLACE/environment\n")
    for name, value in {"SLURM_JOB_ID": "77", "SLURM_MEM_PER_NODE": "1000", "SBATCH_ACCOUNT": "lab"}.items():
        monkeypatch.setenv(name, value)
    begun(tmp_path, Slurm(1))
    assert "SLURM_" not in (slurm / "environment").read_text()
    assert os.environ["SLURM_JOB_ID"] == "77"
    monkeypatch.delenv("SLURM_JOB_ID")
    begun(tmp_path, Slurm(1), name="other")
    assert "SBATCH_ACCOUNT=lab" in (slurm / "environment").read_text(), "a person's own default is theirs"


@pytest.mark.parametrize(("state", "asked"), [("RUNNING", "--signal=TERM {}"), ("PENDING", "{}")])
def test_a_running_job_is_asked_to_save_and_a_waiting_one_cancelled(
    slurm: Path, tmp_path: Path, state: str, asked: str
) -> None:
    (slurm / "scancel").write_text('#!/bin/bash\necho "$@" >> $PLACE/cancelled\n')
    job = begun(tmp_path, Slurm(1))
    (slurm / f"state-{job._job.job_id}").write_text(state)
    job._job.watcher.update()
    assert job.poll() is None
    job.stop("stopped", "stopped by SIGINT")
    assert (slurm / "cancelled").read_text().split("\n") == [asked.format(job._job.job_id), ""]
    job.grace_s = -1.0
    job._job.watcher.update()
    assert job.poll() is None
    assert (slurm / "cancelled").read_text().split("\n")[1:] == [job._job.job_id, ""], "it did not end in time"


def test_slurms_warning_is_answered_as_soon_as_the_job_has_saved(tmp_path: Path, monkeypatch) -> None:
    """submitit calls checkpoint() in a signal's handler, while the job is waited for."""
    monkeypatch.setattr(module, "run_here", lambda *_, **__: subprocess.Popen(["sleep", "60"]))
    here, took = Here([], tmp_path / "log", cwd=".", in_slurm=True), []

    def warned(*_: object) -> None:
        before = time.monotonic()
        here.checkpoint()
        took.append(time.monotonic() - before)

    former = signal.signal(signal.SIGUSR2, warned)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        with pytest.raises(SystemExit):  # no result: Slurm says what becomes of a job that was asked to stop
            here()
    finally:
        signal.signal(signal.SIGUSR2, former)
    assert took[0] < 5


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch on this machine"):
        Slurm(1)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=re.escape("pip install 'vitexp[slurm]'")):
        Slurm(1, cluster="local")


def swept(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "vitexp", "--multirun", *RUN, *arguments, f"output_dir={folder}"]


@pytest.mark.slow
def test_submitits_local_executor_runs_a_sweep_to_its_end(tmp_path: Path) -> None:
    command = swept(
        tmp_path / "sweep", "sweep=slurm", "sweep.launcher.cluster=local", "sweep.launcher.gpus=0", "sweep.jobs=2",
        "train.epochs=5", "schedule=constant", "optim=adam", "optim.lr=1e-3,2e-3,1e30",
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 1, "one diverges"
    ledger = read_ledger(tmp_path / "sweep")
    assert ledger is not None
    states = {entry.overrides[-1]: entry.state for entry in ledger.jobs.values()}
    assert states == {"optim.lr=0.001": "finished", "optim.lr=0.002": "finished", "optim.lr=1e+30": "failed"}
    (reason,) = [entry.reason for entry in ledger.jobs.values() if entry.reason]
    assert "not finite" in reason or "nan" in reason.lower()
    again = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert "2 finished already" in again.stderr


def until(happened: Callable[[], object], seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_preempted_by_sigterm_is_waited_for_until_slurm_runs_it_again(
    slurm: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("REALLY", "1")
    monkeypatch.setattr(module, "LOOK_S", 0.2)
    run = tmp_path / "run"
    overrides = [*RUN, "train.epochs=4000", "train.save_every=20", "schedule=constant", f"output_dir={run}"]
    job = begun(tmp_path, Slurm(1, gpus=0), overrides=overrides)
    number, journal, console = job._job.job_id, run / "metrics.jsonl", tmp_path / "console" / "lr-1.log"
    until(lambda: job.poll() is None and journal.exists() and journal.stat().st_size > 0)
    group, state = int((slurm / f"group-{number}").read_text()), slurm / f"state-{number}"
    os.killpg(group, signal.SIGTERM)  # ends the script, too, which would say that the job is complete
    until(lambda: "stopped by SIGTERM" in console.read_text())
    state.write_text("PENDING")
    size = journal.stat().st_size
    patience = time.monotonic() + 3
    until(lambda: job.poll() is not None or time.monotonic() > patience)
    assert job.poll() is None, "taken as stopped for good"
    assert begun(tmp_path, Slurm(1, gpus=0), overrides=overrides)._job.job_id == number, "submitted a second time"
    subprocess.run([slurm / "begin", number], check=True)
    until(lambda: journal.stat().st_size > size)
    os.killpg(int((slurm / f"group-{number}").read_text()), signal.SIGTERM)
    until(lambda: console.read_text().count("stopped by SIGTERM") == 2)
    state.write_text("CANCELLED by 1000")
    monkeypatch.setattr(module, "RESULT_S", 0.0)
    found: list[object] = []
    until(lambda: found.append(job.poll()) or found[-1])
    assert found[-1] == ("killed", "cancelled, says Slurm")


@pytest.mark.slow
def test_jobs_outlive_the_launcher_and_are_stopped_with_it(slurm: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("REALLY", "1")
    folder = tmp_path / "sweep"
    command = swept(
        folder, "sweep=slurm", "sweep.launcher.gpus=0", "sweep.jobs=1", "train.epochs=4000", "train.save_every=20",
        "schedule=constant",
    )  # fmt: skip

    def written() -> int:
        return sum(path.stat().st_size for path in folder.glob("*/metrics.jsonl"))

    def journal_grows(beyond: int) -> int:
        until(lambda: written() > beyond)
        return written()

    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as first:
        size = journal_grows(0)
        first.kill()
    size = journal_grows(size + 200)  # goes on alone
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as second:
        assert second.stderr is not None
        next(line for line in second.stderr if line.startswith("running"))
        journal_grows(size + 200)
        second.send_signal(signal.SIGTERM)
        second.communicate(timeout=120)
    assert second.returncode == 128 + signal.SIGTERM
    assert len(list(slurm.glob("script-*"))) == 1, "submitted twice"
    ledger = read_ledger(folder)
    assert ledger is not None
    assert [entry.state for entry in ledger.jobs.values()] == ["stopped"]
    assert list(folder.glob("*/checkpoints/step_*")), "it saved before it ended"
