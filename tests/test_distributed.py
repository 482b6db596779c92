"""Two processes equal one with the same global batch, and end together whatever happens to one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from vitexp import journal

RUN = [
    "model=vit_debug",
    "data=fake",
    "data.num_train=56",
    "data.num_val=13",  # does not divide: each counted once all the same
    "data.flip=0.5",
    "tracking=none",
    "runtime.device=cpu",
    "runtime.precision=fp32",
    "train.epochs=3",
    "train.accumulate=2",
    "train.log_every=1",
    "train.eval_every=3",
    "train.save_every=2",
    "train.ema_decay=0.9",
]


def command(folder: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "vitexp", *RUN, f"output_dir={folder}", *extra]


def run(folder: Path, *extra: str) -> None:
    done = subprocess.run(command(folder, *extra), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step_*"))
    return torch.load(newest / "state.pt", weights_only=True)["model"]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    run(tmp_path / "one", "train.batch_size=8")
    run(tmp_path / "two", "train.batch_size=4", "runtime.processes=2")
    one, two = (journal.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"perf/time_s", "perf/images_per_s"}:
            assert b[name] == pytest.approx(a[name], rel=2e-4, abs=1e-6), (a["step"], name)
    # The key third of qkv.bias has a gradient of zero but for rounding, which Adam turns into steps of full size.
    for name, value in weights(tmp_path / "one").items():
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-3, atol=2e-5)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["val/top1"] == summaries[1]["val/top1"]
    assert [summary["global_batch"] for summary in summaries] == [16, 16]


@pytest.mark.slow
def test_two_processes_resume_exactly_and_stop_together(tmp_path: Path) -> None:
    extra = ["train.batch_size=4", "runtime.processes=2", "train.epochs=300"]
    process = subprocess.Popen(command(tmp_path / "cut", *extra), stderr=subprocess.PIPE, text=True)
    path = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") > 6):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert err.count("stopped by SIGTERM") == 1, err
    reached = max(int(p.name[5:]) for p in (tmp_path / "cut" / "checkpoints").glob("step_*"))
    goal = f"train.max_steps={reached + 5}"
    run(tmp_path / "cut", *extra, goal)
    run(tmp_path / "whole", *extra, goal)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[name], value), name


@pytest.mark.slow
def test_when_a_rank_dies_all_end_and_the_run_goes_on_later(tmp_path: Path) -> None:
    extra = ["train.batch_size=4", "runtime.processes=2", "train.epochs=300"]
    process = subprocess.Popen(command(tmp_path / "run", *extra), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/step_*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    second = next(p for p in ranks if p.environ()["RANK"] == "1")
    os.kill(second.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode not in (0, None)
    assert "process 1 was killed by signal 9 (SIGKILL)" in err
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)
    reached = max(int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step_*"))
    run(tmp_path / "run", *extra, f"train.max_steps={reached + 2}")


def test_a_mistake_of_one_rank_is_said_once(tmp_path: Path) -> None:
    process = subprocess.run(
        command(tmp_path / "run", "runtime.processes=2", "train.batch_size=4", "resume=must"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert process.stderr.count("resume=must") == 1
    assert "Traceback" not in process.stderr
