"""metrics.jsonl: whole rows, exact truncation, no doubt about what a kill leaves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vitexp import journal
from vitexp.errors import UserError
from vitexp.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, steps: range) -> None:
    log = Journal(path)
    for step in steps:
        log.append({"step": step, "epoch": step / 4, "train/loss": 1 / (step + 1)})
    log.close()


def test_a_row_reads_back_as_plain_numbers_with_step_and_epoch_first(path: Path) -> None:
    written = Journal(path).append(
        {"train/loss": np.float32(0.5), "val/top1": np.array(0.25), "step": np.int64(3), "n": np.int32(7), "epoch": 1}
    )
    (row,) = journal.read(path)
    assert row == written
    assert list(row)[:2] == ["step", "epoch"]
    assert (row["step"], row["epoch"], row["train/loss"], row["val/top1"], row["n"]) == (3, 1.0, 0.5, 0.25, 7)
    assert abs(row["perf/time_s"] - time.time()) < 60
    assert path.read_bytes().count(b"\n") == 1


def test_torch_scalars_of_any_kind_are_written_as_numbers(path: Path) -> None:
    torch = pytest.importorskip("torch")
    Journal(path).append({"step": 1, "epoch": 0.0, "a": torch.tensor(0.5, dtype=torch.bfloat16), "b": torch.tensor(2)})
    assert [journal.read(path)[0][key] for key in "ab"] == [0.5, 2.0]


def test_a_time_given_is_kept(path: Path) -> None:
    Journal(path).append({"step": 1, "epoch": 0.0, "perf/time_s": 12.5})
    assert journal.read(path)[0]["perf/time_s"] == 12.5


def test_nan_and_infinity_survive(path: Path) -> None:
    Journal(path).append({"step": 1, "epoch": 0.0, "a": math.nan, "b": -math.inf})
    (row,) = journal.read(path)
    assert math.isnan(row["a"])
    assert row["b"] == -math.inf


@pytest.mark.parametrize("value", ["0.5", None, [1.0]])
def test_what_is_no_number_is_refused_by_its_name(path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="val/top1"):
        Journal(path).append({"step": 1, "epoch": 0.0, "val/top1": value})
    assert journal.count_rows(path) == 0


def test_truncation_drops_exactly_the_rows_beyond_the_step(path: Path) -> None:
    write(path, range(1, 11))
    before = path.read_bytes().splitlines(keepends=True)
    assert Journal(path).truncate_after(6) == 4
    assert path.read_bytes() == b"".join(before[:6])


def test_truncation_drops_also_what_it_is_told_to(path: Path) -> None:
    write(path, range(1, 5))
    assert Journal(path).truncate_after(3, also=lambda row: row["step"] == 2) == 2
    assert [row["step"] for row in journal.read(path)] == [1, 3]


def test_truncation_that_drops_nothing_leaves_the_file_alone(path: Path) -> None:
    write(path, range(5))
    inode = path.stat().st_ino
    assert Journal(path).truncate_after(100) == 0
    assert path.stat().st_ino == inode
    assert Journal(path.with_name("absent.jsonl")).truncate_after(0) == 0


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_half_written_last_line_goes_wherever_it_was_cut(path: Path, cut: int) -> None:
    write(path, range(4))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = journal.read(path)
    assert [row["step"] for row in kept] == ([0, 1, 2, 3] if cut == 1 else [0, 1, 2])
    Journal(path).truncate_after(100)
    assert path.read_bytes().endswith(b"}\n")
    assert journal.read(path) == kept


def test_bytes_that_a_loss_of_power_leaves_count_as_half_written(path: Path) -> None:
    write(path, range(3))
    with path.open("ab") as file:
        file.write(b"\0" * 50)
    assert len(journal.read(path)) == 3
    Journal(path).truncate_after(100)
    assert b"\0" not in path.read_bytes()


def test_appending_after_a_half_written_line_does_not_glue_to_it(path: Path) -> None:
    write(path, range(3))
    path.write_bytes(path.read_bytes()[:-5])
    write(path, range(2, 4))
    assert [row["step"] for row in journal.read(path)] == [0, 1, 2, 3]


def test_a_spoiled_line_in_the_middle_is_named(path: Path) -> None:
    write(path, range(3))
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"what", lines[2], b""]))
    with pytest.raises(UserError, match="line 2"):
        journal.read(path)


def test_following_never_returns_half_a_row_and_misses_none(path: Path) -> None:
    write(path, range(50))
    whole = path.read_bytes()
    path.write_bytes(b"")
    seen, offset = [], 0
    for end in [*range(0, len(whole), 37), len(whole)]:
        path.write_bytes(whole[:end])
        while True:
            rows, offset = journal.read_from(path, offset, at_most_bytes=100)
            if not rows:
                break
            seen += rows
    assert [row["step"] for row in seen] == list(range(50))


def test_rows_of_a_process_that_was_killed_are_there(path: Path) -> None:
    script = (
        "import os, signal, sys; from vitexp.journal import Journal; j = Journal(sys.argv[1])\n"
        "for step in range(100): j.append({'step': step, 'epoch': 0.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -9
    assert [row["step"] for row in journal.read(path)] == list(range(100))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_said_with_the_path() -> None:
    log = Journal(Path("/dev/full"))
    with pytest.raises(UserError, match=r"/dev/full.*No space left"):
        log.append({"step": 1, "epoch": 0.0})
    log.close()


def test_appending_costs_microseconds(path: Path) -> None:
    log = Journal(path)
    row = {"step": 1, "epoch": 0.5, "train/loss": 1.25, "train/lr": 1e-3, "perf/images_per_s": 900.0}
    rounds = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(200):
            log.append(row)
        rounds.append((time.perf_counter() - start) / 200)
    assert min(rounds) < 50e-6  # 5 us on a quiet machine
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 1
