"""The benchmark scripts run and print their tables; what the figures are is no test's business."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TABLES = {
    "train_step.py": ("| ViT-Ti/4 32 px, batch 128: vitexp ", "| ViT-S/16 224 px, batch 16: timm as shipped "),
    "input.py": ("| 32 px in memory, crop and flip: vitexp ", " JPEGs to 224 px: vitexp to the exact resizer "),
    "loop_overhead.py": ("| bare loop: ", " over the bare loop", " logging, a row every 10 steps"),
    "mae_step.py": ("| fp32, batch 1: vitexp MAE ", "| bf16, batch 4: vitexp supervised "),
    "sweep.py": ("2 runs, 2 at a time", "turn 0   shell loop ", "(goal: at most 1.1)"),
    "token_labels.py": ("| store of 128 pictures", "| targets from maps of CIFAR"),
}


def test_every_script_is_known_here(repository: Path) -> None:
    assert {path.name for path in (repository / "benchmarks").glob("*.py")} == set(TABLES)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(TABLES))
def test_a_quick_run_prints_its_table(script: str, repository: Path, workdir: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(repository / "benchmarks" / script), "--quick"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torch " in done.stdout, "the machine is described"
    for row in TABLES[script]:
        assert row in done.stdout, done.stdout
    assert not list(workdir.iterdir()), "nothing is left in the current folder"
