"""A run that was killed, stopped or cut short and started again equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vitexp import journal
from vitexp.config import compose_and_check
from vitexp.errors import UserError

DRIVER = Path(__file__).parent / "drivers" / "killed_runs.py"
# Everything that could break exactness is on: augmentation, dropout, drop path, accumulation with a remainder (5 micro-
# batches in groups of 2), averaged weights, evaluation, logging and saving at different intervals.
RUN = [
    "model=vit_debug",
    "model.dropout=0.1",
    "model.drop_path=0.2",
    "data=fake",
    "data.num_train=40",
    "data.num_val=12",
    "data.flip=0.5",
    "tracking=none",
    "runtime.device=cpu",
    "train.epochs=4",
    "train.batch_size=8",
    "train.accumulate=2",
    "train.ema_decay=0.9",
    "train.log_every=2",
    "train.eval_every=3",
    "train.save_every=2",
]  # 12 updates, 6 saves


def killed_runs(place: Path, plan: dict[str, list[tuple[str, int]]], *extra: str) -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DRIVER), str(place), json.dumps(plan), *RUN, *extra]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}
    assert list(reports) == list(plan), done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    for report in reports.values():
        assert report["last"] == 0, (report, errors)
    return reports


def final_state(folder: Path) -> dict[str, Any]:
    newest = max((folder / "checkpoints").glob("step_*"))
    return torch.load(newest / "state.pt", weights_only=True)


def rows(folder: Path) -> list[dict[str, Any]]:
    """What must repeat: all but what the clock says."""
    return [
        {k: v for k, v in row.items() if not k.startswith("perf/")} for row in journal.read(folder / "metrics.jsonl")
    ]


def assert_same_run(one: Path, other: Path) -> None:
    assert_equal(final_state(one), final_state(other), "state")
    assert rows(one) == rows(other)
    for name in ("model.safetensors", "model_best.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for summary in summaries:
        for key in [key for key in summary if key.startswith("perf/") or key == "git"]:
            del summary[key]
    assert summaries[0] == summaries[1]


def assert_equal(one: Any, other: Any, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}.{number}")
    else:
        assert one == other, where


@pytest.mark.slow
def test_killed_at_many_points_it_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    # Inside saves: the calls that make a checkpoint durable and visible, in the first, a middle and a late save.
    inside = {f"{call}-{n}": [(call, n)] for call in ("rename", "fsync", "mkdir") for n in (1, 2, 4, 7)}
    inside |= {f"write-{n}": [("write", n)] for n in (1, 5, 40)}
    at_steps = {f"step-{n}": [("step", n)] for n in (1, 2, 5, 11, 12)}
    twice = {"twice": [("step", 3), ("fsync", 3)], "thrice": [("step", 5), ("rename", 1), ("step", 2)]}
    plan: dict[str, list[tuple[str, int]]] = {"whole": [], **inside, **at_steps, **twice}
    reports = killed_runs(tmp_path, plan)
    struck = [name for name, report in reports.items() if report["killed"] and all(report["killed"])]
    assert len(struck) >= 20, {name: report["killed"] for name, report in reports.items()}
    for name in struck:
        assert_same_run(tmp_path / "whole", tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_times_it_ends_bit_for_bit_the_same(tmp_path: Path, workers: int) -> None:
    draw = random.Random(workers)
    extra = ["data.cache=none", f"train.workers={workers}", "train.save_every=1"]
    whole = killed_runs(tmp_path, {"whole": []}, *extra)["whole"]["seconds"] * 1000
    moments = {
        f"random-{n}": [("time", draw.randrange(int(0.2 * whole), int(whole))) for _ in range(2)] for n in range(20)
    }
    reports = killed_runs(tmp_path, moments, *extra)
    assert all(any(report["killed"]) for report in reports.values())
    for name in moments:
        assert_same_run(tmp_path / "whole", tmp_path / name)


def test_workers_and_caching_change_nothing(tmp_path: Path) -> None:
    killed_runs(tmp_path, {"here": []}, "data.cache=memory", "train.workers=0")
    killed_runs(tmp_path, {"workers": [("step", 4)]}, "data.cache=none", "train.workers=2")
    assert_equal(final_state(tmp_path / "here"), final_state(tmp_path / "workers"), "state")
    assert rows(tmp_path / "here") == rows(tmp_path / "workers")


def start(folder: Path, *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vitexp", *RUN, f"output_dir={folder}", *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    path = folder / "metrics.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, "no rows yet"
        time.sleep(0.02)


def wait_until_tracked(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until the MLflow run exists: making the store takes longer than these steps, and a signal is not kept waiting."""
    deadline = time.monotonic() + 120
    while not any(kept["run_id"] for kept in tracking_record(folder).values()):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, "no MLflow run yet"
        time.sleep(0.05)


def tracking_record(folder: Path) -> dict[str, Any]:
    path = folder / "tracking.json"
    return json.loads(path.read_text())["stores"] if path.exists() else {}


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_so(tmp_path: Path, signum: signal.Signals, code: int) -> None:
    long = ["train.epochs=4000", "train.save_every=100000", "train.eval_every=7", "tracking=mlflow"]
    long.append(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    process = start(tmp_path / "run", *long)
    wait_for_rows(tmp_path / "run", 30, process)
    wait_until_tracked(tmp_path / "run", process)
    asked = time.monotonic()
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert time.monotonic() - asked < 10
    assert f"stopped by {signum.name}" in err.splitlines()[-1]
    assert "Traceback" not in out + err
    state = final_state(tmp_path / "run")
    logged = rows(tmp_path / "run")
    assert state["step"] >= logged[-1]["step"] >= state["step"] - 2, "the step is finished and saved"

    from mlflow import MlflowClient

    store = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = [store.get_run(kept["run_id"]) for kept in tracking_record(tmp_path / "run").values()]
    assert found.info.status == "KILLED"


def test_resume_must_and_never_and_changed_settings(tmp_path: Path) -> None:
    from vitexp.train import train

    folder = tmp_path / "run"
    short = [*RUN, f"output_dir={folder}", "train.max_steps=4", "train.workers=0"]
    with pytest.raises(UserError, match="resume=must"):
        train(compose_and_check([*short, "resume=must"]))
    train(compose_and_check(short))
    with pytest.raises(UserError, match=r"optim\.base_lr: 0\.001 -> 0\.002") as error:
        train(compose_and_check([*short, "optim.base_lr=0.002"]))
    assert "allow_changes=true" in str(error.value)
    assert train(compose_and_check([*short, "train.max_steps=6"]))["step"] == 6
    changed = train(compose_and_check([*short, "train.max_steps=8", "optim.base_lr=0.002", "allow_changes=true"]))
    assert changed["step"] == 8
    other = tmp_path / "other"  # never got as far as a checkpoint: starts again in its place, or is set aside
    other.mkdir()
    (other / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    (other / "metrics.jsonl").write_text('{"step": 2, "epoch": 0.1, "train/loss": 1.0}\n')
    again = [*short, "optim.base_lr=0.002", f"output_dir={other}"]
    train(compose_and_check(again))
    assert not (other / "previous").exists()
    assert journal.read(other / "metrics.jsonl")[0]["step"] == 2
    assert journal.read(other / "metrics.jsonl")[0]["train/loss"] != 1.0
    before = (folder / "metrics.jsonl").read_bytes()
    assert train(compose_and_check([*short, "resume=never"]))["step"] == 4
    assert (folder / "previous" / "1" / "metrics.jsonl").read_bytes() == before, "nothing is lost"


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    first = start(tmp_path / "run", "train.epochs=4000")
    try:
        wait_for_rows(tmp_path / "run", 2, first)
        second = start(tmp_path / "run", "train.epochs=4000")
        _, err = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"process {first.pid}" in err
    finally:
        first.kill()
        first.communicate()


def test_a_loss_that_is_not_finite_stops_before_the_weights(tmp_path: Path) -> None:
    from vitexp.train import train

    settings = [*RUN, f"output_dir={tmp_path / 'run'}", "train.workers=0", "train.clip_norm=null", "optim=sgd"]
    with pytest.raises(UserError, match="weights are not finite after step 2: not saved"):
        train(compose_and_check([*settings, "optim.lr=1e30", "schedule=constant"]))
    settings += ["train.save_every=100", "resume=never", "schedule=constant"]
    with pytest.raises(UserError, match=r"train/loss is (nan|inf) at step \d+: stopped before the weights") as error:
        train(compose_and_check([*settings, "optim.lr=1e30"]))
    assert "pictures of this step: " in str(error.value)
    kept = [torch.load(p / "state.pt", weights_only=True) for p in (tmp_path / "run" / "checkpoints").glob("step_*")]
    for state in kept:
        assert all(bool(torch.isfinite(t).all()) for t in state["model"].values())


@pytest.mark.slow
def test_compiled_it_learns_the_same_and_its_files_fit(tmp_path: Path) -> None:
    from vitexp.train import train

    plain = [
        *RUN,
        "train.workers=0",
        "runtime.precision=fp32",
        "train.max_steps=6",
        "model.dropout=0",
        "model.drop_path=0",
    ]
    eager = train(compose_and_check([*plain, f"output_dir={tmp_path / 'eager'}"]))
    compiled = train(compose_and_check([*plain, f"output_dir={tmp_path / 'compiled'}", "runtime.compile=true"]))
    assert compiled["val/loss"] == pytest.approx(eager["val/loss"], rel=1e-3)
    assert final_state(tmp_path / "compiled")["model"].keys() == final_state(tmp_path / "eager")["model"].keys()
