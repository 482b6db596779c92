"""A sweep: its jobs, what becomes of them, and what the same command does after everything that can go wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vitexp import sweep
from vitexp.config import sweep_settings
from vitexp.errors import UserError
from vitexp.sweeps.display import Row, Standing, SweepDisplay, of_summary, standing
from vitexp.sweeps.jobs import folder_of, jobs_of
from vitexp.sweeps.ledger import Entry, Ledger, read_ledger
from vitexp.sweeps.local import shares

RUN = ["data=fake", "data.num_train=64", "data.num_val=16", "model=vit_debug", "tracking=none", "train.workers=0"]


# ---- which jobs ------------------------------------------------------------------------------------------------------


def test_jobs_are_every_combination_once_the_last_key_fastest() -> None:
    jobs = jobs_of(["optim=adam,sgd", "seed=range(0,3)", "train.epochs=2", "sweep.jobs=4", "output_dir=here"], None)
    assert [tuple(job.swept.values()) for job in jobs] == [
        (optim, seed) for optim in ("adam", "sgd") for seed in ("0", "1", "2")
    ]
    assert jobs[0].overrides == ("optim=adam", "seed=0", "train.epochs=2")
    assert len({job.name for job in jobs}) == 6
    assert all("optim-" in job.name and "seed-" in job.name for job in jobs)
    assert len(jobs_of(["seed=0,1,0"], None)) == 2, "the same job is not run twice"
    assert [job.name for job in jobs_of(["seed=0,1", "optim=adam"], None)] == [
        job.name for job in jobs_of(["optim=adam", "seed=0,1"], None)
    ]


def test_a_glob_takes_the_options_that_match() -> None:
    found = [job.swept["model"] for job in jobs_of(["model=glob(vit_*_8)"], None)]
    assert found == ["vit_base_8", "vit_small_8"]
    for wrong, said in (
        ("model=glob(nothing*)", "no option of model matches"),
        ("seed=range(5,1)", "holds no value to try"),
        ("optim.lr=glob(1*)", "glob chooses options of a group"),
        ("optim.lr=interval(0,1)", "has no steps"),
    ):
        with pytest.raises(UserError, match=said):
            jobs_of([wrong], None)


def test_the_same_overrides_find_the_same_folder() -> None:
    one = folder_of(["seed=0,1", "optim=adam", "sweep.jobs=2"], experiment="mine")
    assert one == folder_of(["optim=adam", "sweep.jobs=1", "seed=0,1"], experiment="mine")
    assert one.parent == Path("outputs", "mine").absolute()
    assert one != folder_of(["seed=0,1,2", "optim=adam"], experiment="mine")
    assert folder_of(["seed=0,1", "output_dir=/x/y"], experiment="mine") == Path("/x/y")


def test_settings_of_the_sweep_are_checked() -> None:
    assert sweep_settings(["seed=0,1", "sweep.jobs=3"])["jobs"] == 3
    for wrong, said in (
        ("sweep.job=2", "Did you mean 'jobs'"),
        ("sweep.jobs=0", "sweep.jobs=0: expected"),
        ("sweep=slrum", "slrum"),
        ("sweep.metric=5", "sweep.metric=5: expected text or null"),
        ("sweep.launcher=null", "sweep.launcher=null: expected a component"),
        ("sweep.launcher=5", "sweep.launcher=5: expected a component"),
    ):
        with pytest.raises(UserError, match=said):
            sweep_settings([wrong])


def test_a_mistake_in_any_value_is_said_before_a_job_starts(tmp_path: Path) -> None:
    for wrong in ("model.depth=2,two", "optim=adam,adma", "nonsense=1,2"):
        with pytest.raises(UserError):
            sweep.main([*RUN, wrong, f"output_dir={tmp_path / 'sweep'}"], None)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["seed=range(0,5,0)"], "has no end"),
        (["seed=range(0,1000000000)"], "holds 1,000,000,000 values"),
        (["seed=range(0,200)", "train.epochs=range(1,200)"], "are 39,800 jobs"),
        (["seed=0,1", "output_dir=a,b"], "expected one folder"),
        (["seed=0,1", "output_dir=null"], "expected one folder"),
    ],
)
def test_a_sweep_without_end_or_place_is_refused(wrong: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        print(folder_of(wrong, experiment="mine"), jobs_of(wrong, None))


# ---- what each has, and what becomes of it ---------------------------------------------------------------------------


def test_cores_and_devices_are_divided() -> None:
    two = shares(2, cores=[0, 1, 2, 3, 4], gpus=["0", "1", "2"])
    assert [share.cores for share in two] == [(0, 1), (2, 3, 4)]
    assert [share.gpus for share in two] == [("0",), ("1", "2")]
    many = shares(3, cores=[0, 1], gpus=[])
    assert [share.cores for share in many] == [(0,), (1,), (0,)]
    assert many[0].gpus is None


def finished_job(folder: Path, name: str, **metrics: object) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "summary.json").write_text(json.dumps(metrics))


def test_the_best_is_a_finished_job_with_a_number(tmp_path: Path) -> None:
    jobs = jobs_of(["seed=0,1,2,3,4"], None)
    ledger = Ledger(tmp_path, [], ["seed"], {job.name: Entry([], "finished") for job in jobs})
    for job, value in zip(jobs, (0.5, float("nan"), None, 0.7, 0.9), strict=True):
        finished_job(tmp_path, job.name, **{"val/top1": value, "val/loss": value})
    ledger.jobs[jobs[4].name].state = "failed"  # its folder holds the results of a former attempt
    best = sweep.best_of(jobs, ledger)
    assert best == (jobs[3], ("val/top1", 0.7))
    ledger.metric, ledger.maximize = "val/loss", False
    smallest = sweep.best_of(jobs, ledger)
    assert smallest == (jobs[0], ("val/loss", 0.5))
    ledger.metric = "val/f1"
    assert sweep.best_of(jobs, ledger) is None


def test_how_far_a_job_is_stands_in_its_journal(tmp_path: Path) -> None:
    assert standing(tmp_path, metric=None) == Standing()
    rows = [{"step": 1, "epoch": 0.5, "train/loss": 2.0}, {"step": 2, "epoch": 1.0, "val/top1": 0.25}]
    text = "\n".join(json.dumps(row) for row in rows) + '\n{"step": 3, "epo'
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "config.yaml").write_text("train: {epochs: 4}")
    found = standing(tmp_path, metric=None)
    assert (found.epoch, found.epochs, found.loss, found.metric) == (1.0, 4, 2.0, ("val/top1", 0.25))
    assert found.share == 0.25
    assert of_summary(tmp_path, metric=None) is None


def test_where_no_table_can_be_drawn_a_line_says_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    (job,) = jobs_of(["seed=3"], None)
    entry = Entry([], "running")
    display = SweepDisplay("a sweep")
    for state, reason in (("running", ""), ("running", ""), ("failed", "broken picture")):
        entry.state, entry.reason = state, reason  # pyrefly: ignore[bad-assignment]
        display.show([Row(job, entry, Standing(epoch=1.0))])
    display.close()
    assert capsys.readouterr().err.splitlines() == [f"running   {job.name}", f"failed    {job.name}  broken picture"]


def test_a_ledger_that_is_none_is_named(tmp_path: Path) -> None:
    assert read_ledger(tmp_path) is None
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json cannot be read"):
        read_ledger(tmp_path)


# ---- real jobs -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The sweep as a person starts it. Whatever it leaves is ended."""
    command = [sys.executable, "-m", "vitexp", "--multirun", *RUN, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        for left in [*jobs_running(arguments[-1].partition("=")[2]), process]:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                left.kill()
        process.wait()


def jobs_running(folder: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.startswith("output_dir=") and f"{folder}/" in word for word in words):
            found.append(process)
    return found


def wait_for(condition, *, seconds: float = 90.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def states(folder: Path) -> dict[str, str]:
    ledger = read_ledger(folder)
    return {} if ledger is None else {entry.overrides[-1]: entry.state for entry in ledger.jobs.values()}


@pytest.mark.slow
def test_killed_hung_failed_and_its_launcher_killed_the_same_command_leaves_every_job_once(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    rates = "optim.lr=1e-3,1e30,2e-3,3e-3"  # the second diverges
    slow = ["train.epochs=120", "train.save_every=20", "schedule=constant", "optim=adam"]
    command = [*slow, "sweep.jobs=2", rates, f"output_dir={folder}"]

    def journal(rate: str) -> Path | None:
        return next(
            (path for path in folder.glob("*/metrics.jsonl") if path.parent.name.startswith(f"lr-{rate}")), None
        )

    with started(*command) as launcher:  # the launcher itself is killed
        wait_for(lambda: journal("0.001"))
        launcher.send_signal(signal.SIGKILL)
        wait_for(lambda: not jobs_running(str(folder)), seconds=60)
    with started(*command) as launcher:  # one job is killed
        victim = wait_for(lambda: [p for p in jobs_running(str(folder)) if "optim.lr=0.001" in p.cmdline()])[0]
        victim.send_signal(signal.SIGKILL)
        _, said = launcher.communicate(timeout=240)
    assert launcher.returncode == 1
    became = {"0.001": "killed", "1e+30": "failed", "0.002": "finished", "0.003": "finished"}
    assert states(folder) == {f"optim.lr={rate}": state for rate, state in became.items()}
    assert "killed by SIGKILL" in said
    before = {rate: journal(rate).read_bytes() for rate in ("0.002", "0.003")}
    with started(*command[:-1], "sweep.silence_limit=0.1", command[-1]) as launcher:  # one hangs
        victim = wait_for(lambda: [p for p in jobs_running(str(folder)) if "optim.lr=0.001" in p.cmdline()])[0]
        wait_for(lambda: journal("0.001"))
        os.kill(victim.pid, signal.SIGSTOP)
        ended = wait_for(lambda: states(folder)["optim.lr=0.001"] == "hung", seconds=120)
        assert ended
        _, said = launcher.communicate(timeout=120)
    assert "said nothing for 0.1 minutes" in said
    with started(*command) as launcher:
        launcher.communicate(timeout=240)
    assert launcher.returncode == 1, "the one that diverges is left"
    assert states(folder)["optim.lr=0.001"] == "finished"
    assert states(folder)["optim.lr=1e+30"] == "failed"
    assert {rate: journal(rate).read_bytes() for rate in before} == before, "what had finished was run again"
    steps = [json.loads(line)["step"] for line in journal("0.001").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 120


def test_a_signal_stops_the_jobs_and_the_same_command_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = ["train.epochs=2000", "train.save_every=50", "seed=0,1", f"output_dir={folder}"]
    with started(*command) as launcher:
        wait_for(lambda: list(folder.glob("*/metrics.jsonl")))
        launcher.send_signal(signal.SIGTERM)
        _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "the same command goes on from here" in said
    assert states(folder) == {"seed=0": "stopped", "seed=1": "waiting"}
    assert not jobs_running(str(folder))
    assert list(folder.glob("*/checkpoints/step_*")), "it saved before it ended"
