"""A checkpoint is whole or absent, whatever happens while it is written, and is believed only after checking.

Run as a script, this file is the helper that saves in forked children and lets them be killed at exact points.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vitexp import checkpoint
from vitexp.checkpoint import (
    DamagedCheckpoint,
    changed_config,
    check_compatible,
    check_space,
    latest,
    load,
    open_checkpoint,
    remove_leftovers,
    resume_point,
    save,
    state_bytes,
)
from vitexp.errors import UserError


def state_of(step: int, variant: int = 0) -> dict[str, Any]:
    """Everything in it follows from (step, variant), so a loaded state can be checked bit for bit."""
    generator = torch.Generator().manual_seed(1000 * variant + step)
    model = {"head.weight": torch.randn(4, 32, generator=generator), "norm.bias": torch.randn(64, generator=generator)}
    moments = {
        number: {"exp_avg": tensor * 2, "step": torch.tensor(float(step))}
        for number, tensor in enumerate(model.values())
    }
    return {
        "model": model,
        "optimizer": {
            "state": moments,
            "param_groups": [{"lr": 0.1 / (1 + step), "betas": (0.9, 0.999), "params": [0, 1]}],
        },
        "step": step,
        "variant": variant,
        "best": {"val/top1": None, "name": "ä"},
        "classes": ["cat", "dog", "owl", "yak"],
        "world_size": 1,
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def assert_whole(folder: Path) -> checkpoint.Checkpoint:
    found = latest(folder)
    assert found is not None
    state = load(found)
    assert equal(state, state_of(found.step, state["variant"]))
    return found


def steps(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def flip_bit(file: Path, bit: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ (1 << bit % 8)]))


# ---------------------------------------------------------------- kills: the helper process

CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")


def die_at(call_number: int) -> None:
    """This process is killed when it is about to make its n-th file system call, or half way through, if a write."""
    made = 0

    def watch(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made == call_number:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, call)

    for name in CALLS:
        watch(name)


def child(job: dict[str, Any]) -> None:
    folder = Path(job["folder"])
    if job.get("max_file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["max_file_bytes"],) * 2)
    if job.get("die_at"):
        die_at(job["die_at"])
    for step in range(job["first"], job["last"] + 1):
        try:
            save(folder, state_of(step, job.get("variant", 0)), step=step, keep=job["keep"])
            print(f"saved {step}", flush=True)
        except UserError as error:
            print(f"error {error}", flush=True)


def serve() -> None:
    """One forked child for each job read from stdin: torch is imported once, and a fork takes a few ms."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                child(json.loads(line))
                sys.stdout.flush()
                os._exit(0)
            finally:  # only after an exception
                traceback.print_exc()
                os._exit(1)
        print(f"pid {pid}", flush=True)
        print(f"status {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}", flush=True)


class Helper:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *, kill_after_s: float | None = None, **job: Any) -> tuple[int, list[str]]:
        """Exit status (negative: killed by that signal) and the lines that the child printed.

        `kill_after_s` counts from the child's first line."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        lines: list[str] = []
        pid = None
        for line in self.process.stdout:
            word, _, rest = line.strip().partition(" ")
            if word == "status":
                return int(rest), lines
            if word == "pid":
                pid = int(rest)
            else:
                lines.append(line.strip())
            if kill_after_s is not None and pid and lines:
                time.sleep(kill_after_s)
                os.kill(pid, signal.SIGKILL)
                kill_after_s = None
        raise AssertionError("the helper process has ended")


@pytest.fixture(scope="module")
def helper() -> Iterator[Helper]:
    helper = Helper()
    yield helper
    assert helper.process.stdin is not None
    helper.process.stdin.close()
    helper.process.wait()


# ---------------------------------------------------------------- kills: the claims


@pytest.mark.parametrize(
    ("before", "step", "keep"),
    [((10, 20), 30, 2), ((20,), 20, 1)],
    ids=["a new step, pruning the oldest", "the only step once more"],
)
def test_a_kill_at_any_call_of_a_save_leaves_a_whole_checkpoint(
    helper: Helper, tmp_path: Path, before: tuple[int, ...], step: int, keep: int
) -> None:
    killed_at = 0
    while True:
        folder = tmp_path / str(killed_at + 1)
        for earlier in before:
            save(folder, state_of(earlier), step=earlier, keep=0)
        status, lines = helper.run(
            folder=str(folder), first=step, last=step, keep=keep, variant=1, die_at=killed_at + 1
        )
        found = assert_whole(folder)
        if status == 0:
            assert lines == [f"saved {step}"]
            break
        assert status == -signal.SIGKILL
        killed_at += 1
        for path in folder.glob("step_*"):
            open_checkpoint(path)  # also what was being pruned
        # the next start: same answer, nothing left over, and saving goes on
        resumed = resume_point(folder)
        assert resumed is not None
        assert resumed.step == found.step
        assert equal(load(resumed), load(assert_whole(folder)))
        assert not [name for name in os.listdir(folder) if not name.startswith("step_") or "." in name]
        save(folder, state_of(40), step=40, keep=2)
        assert assert_whole(folder).step == 40
        shutil.rmtree(folder)
    assert killed_at >= 20, "the points must cover the whole save"
    assert found.step == step
    assert load(found)["variant"] == 1
    assert steps(folder) == [f"step_{s:08d}" for s in sorted({*before, step})[-keep:]]


def test_a_kill_at_any_call_of_the_first_save_leaves_nothing_or_all(helper: Helper, tmp_path: Path) -> None:
    outcomes = []
    for point in range(1, 200):
        folder = tmp_path / str(point)
        status, _ = helper.run(folder=str(folder), first=1, last=1, keep=1, die_at=point)
        outcomes.append(latest(folder) is not None)
        if outcomes[-1]:
            assert_whole(folder)
        if status == 0:
            break
    assert outcomes == sorted(outcomes)
    assert not outcomes[-5]
    assert outcomes[-1]


def test_kills_at_random_moments_of_a_run_that_keeps_saving(helper: Helper, tmp_path: Path) -> None:
    moments = random.Random(0)
    reached = 0
    for _ in range(15):
        status, lines = helper.run(
            folder=str(tmp_path), first=reached + 1, last=10**6, keep=2, kill_after_s=moments.uniform(0, 0.05)
        )
        assert status == -signal.SIGKILL
        done = [int(line.split()[1]) for line in lines if line.startswith("saved")]
        found = resume_point(tmp_path)
        assert found is not None
        assert found.step in (max(done), max(done) + 1)
        assert equal(load(found), state_of(found.step))
        reached = found.step
    assert reached >= 15


# ---------------------------------------------------------------- damage


def test_any_flipped_bit_is_found_and_the_one_before_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        save(tmp_path, state_of(step), step=step, keep=0)
    newest = tmp_path / "step_00000002"
    sizes = {file: file.stat().st_size for file in newest.iterdir()}
    places = random.Random(0)
    for number in range(60):
        file = newest / ("manifest.json" if number % 3 == 0 else "state.pt")
        bit = places.randrange(8 * sizes[file])
        flip_bit(file, bit)
        caplog.clear()
        assert assert_whole(tmp_path).step == 1, (file.name, bit)
        assert str(file) in caplog.text
        flip_bit(file, bit)
        assert assert_whole(tmp_path).step == 2


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def lengthen(file: Path) -> None:
    with open(file, "ab") as stream:
        stream.write(b" ")


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [cut, empty, lengthen, Path.unlink])
def test_a_damaged_newest_is_named_and_the_one_before_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    for step in (5, 12):
        save(tmp_path, state_of(step), step=step, keep=0)
    file = tmp_path / "step_00000012" / name
    damage(file)
    assert assert_whole(tmp_path).step == 5
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(file) in record.getMessage()
    with pytest.raises(DamagedCheckpoint, match=name):
        open_checkpoint(tmp_path / "step_00000012")


def test_all_damaged_is_refused_again_and_again(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, state_of(step), step=step, keep=0)
        flip_bit(tmp_path / f"step_{step:08d}" / "state.pt", 4000)
    for find in (latest, resume_point, latest, resume_point):
        with pytest.raises(UserError, match="all 2 are damaged") as refusal:
            find(tmp_path)
        assert str(tmp_path / "step_00000002" / "state.pt") in str(refusal.value)
        assert len(str(refusal.value).splitlines()) <= 3


def test_one_set_aside_as_damaged_still_counts_when_the_good_one_goes_bad(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, state_of(step), step=step, keep=0)
    (tmp_path / "step_00000002" / "state.pt").unlink()
    resume_point(tmp_path)
    shutil.rmtree(tmp_path / "step_00000001")
    with pytest.raises(UserError, match=r"step_00000002\.damaged"):
        latest(tmp_path)


def test_nothing_saved_yet_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "checkpoints") is None
    assert resume_point(tmp_path / "checkpoints") is None
    (tmp_path / ".step_00000001.saving").mkdir()
    assert resume_point(tmp_path) is None
    assert steps(tmp_path) == []


def test_a_missing_checkpoint_named_by_hand_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: there is no checkpoint"):
        open_checkpoint(tmp_path / "nowhere")


def test_another_format_version_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, state_of(1), step=1, keep=0)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save(tmp_path, state_of(2), step=2, keep=0)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"step_00000002.*format 2, vitexp \S+ reads format 1"):
        latest(tmp_path)  # not passed over for the older one: it is not damaged
    manifest = tmp_path / "step_00000001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(UserError, match="format 7"):
        open_checkpoint(tmp_path / "step_00000001")


# ---------------------------------------------------------------- hostile files


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def hostile_contents(marker: Path) -> dict[str, bytes]:
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"model": Hostile(marker)}, zipped)
    torch.save({"model": Hostile(marker)}, legacy, _use_new_zipfile_serialization=False)
    return {"zip": zipped.getvalue(), "legacy": legacy.getvalue(), "pickle": pickle.dumps(Hostile(marker))}


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_hostile_content_never_runs_even_under_a_valid_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"
    content = hostile_contents(marker)[kind]
    path = save(tmp_path / "checkpoints", state_of(1), step=1, keep=0)
    for stray in ("random_states_0.pkl", ".metadata", "model.safetensors"):
        (path / stray).write_bytes(content)
    assert equal(load(open_checkpoint(path)), state_of(1))

    (path / "state.pt").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"state\.pt"):
        open_checkpoint(path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["seal"]
    manifest["files"]["state.pt"] = {"bytes": len(content), "sha256": checkpoint.hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_bytes(checkpoint._sealed(manifest))
    found = latest(tmp_path / "checkpoints")
    assert found is not None
    for mmap in (False, True):
        with pytest.raises(UserError) as refusal:
            load(found, mmap=mmap)
        assert str(path / "state.pt") in str(refusal.value)
        assert "unsafe content" in str(refusal.value)
        assert len(str(refusal.value).splitlines()) == 1

    (path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_checkpoint(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists(), "the marker would have shown"


def test_a_sealed_manifest_of_other_content_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(1), step=1, keep=0)
    good = json.loads((path / "manifest.json").read_text())
    del good["seal"]
    for change in ({"files": {"../../secret": {"bytes": 1, "sha256": ""}}}, {"files": []}, {"step": "x"}):
        (path / "manifest.json").write_bytes(checkpoint._sealed({**good, **change}))
        with pytest.raises(DamagedCheckpoint, match="not a vitexp manifest"):
            open_checkpoint(path)
    for content in (b"[]", b"1", b"[" * 100_000, b"\xff"):
        (path / "manifest.json").write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match="not a manifest"):
            open_checkpoint(path)


# ---------------------------------------------------------------- full and failing disks


def assert_kept(folder: Path, step: int) -> None:
    assert assert_whole(folder).step == step
    assert steps(folder) == [f"step_{step:08d}"]


def test_too_little_room_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, state_of(1), step=1, keep=1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(UserError) as refusal:
        save(folder, state_of(2), step=2, keep=1)
    text = str(refusal.value)
    assert text.startswith(f"cannot save step 2 to {folder}: needs ")
    assert text.endswith(" free; the previous checkpoint (step 1) is kept")
    assert_kept(folder, 1)
    with pytest.raises(UserError, match="there is no earlier checkpoint"):
        save(tmp_path / "other", state_of(1), step=1, keep=1)


def test_a_file_that_cannot_grow_leaves_the_previous_one(helper: Helper, tmp_path: Path) -> None:
    save(tmp_path, state_of(1), step=1, keep=1)
    for limit in (1, 700, 2000):
        _, lines = helper.run(folder=str(tmp_path), first=2, last=2, keep=1, max_file_bytes=limit)
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"error cannot save step 2 to {tmp_path}: File too large; needs ")
        assert_kept(tmp_path, 1)


def test_a_really_full_disk_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True)
        if (shutil.which("mount") and os.geteuid() == 0)
        else None
    )
    if mounted is None or mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        large = {**state_of(2), "more": torch.zeros(70_000)}
        save(disk, state_of(1), step=1, keep=1)
        with pytest.raises(UserError, match=r"needs 0\.\d MB, 0\.2 MB free"):
            save(disk, large, step=2, keep=1)
        monkeypatch.setattr(checkpoint, "_free", lambda _: 10**9)  # as if another job took the room meanwhile
        with pytest.raises(UserError, match=r"cannot save step 2 .*No space left on device; .*step 1\) is kept"):
            save(disk, large, step=2, keep=1)
        assert_kept(disk, 1)
        save(disk, state_of(3), step=3, keep=1)
        assert_kept(disk, 3)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["fsync", "rename", "mkdir", "write"])
@pytest.mark.parametrize(("step", "keep"), [(1, 0), (2, 1)], ids=["replaced", "new"])
def test_an_io_error_at_any_call_is_reported_and_a_whole_one_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int, keep: int
) -> None:
    save(tmp_path, state_of(1), step=1, keep=0)
    real = getattr(os, name)
    reported = 0
    for failing in range(1, 100):
        made = 0

        def call(*args: Any, failing: int = failing, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made == failing:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)
        said = None
        try:
            save(tmp_path, state_of(step, variant=1), step=step, keep=keep)
        except UserError as error:
            said = str(error)
        monkeypatch.setattr(os, name, real)
        if made < failing:
            break
        assert said is None or f"cannot save step {step} to {tmp_path}: Input/output error; needs " in said
        reported += said is not None
        assert_whole(tmp_path)
        assert not list(tmp_path.glob(".step_*.saving"))
        remove_leftovers(tmp_path)
        assert_whole(tmp_path)
    assert reported >= 1
    assert load(assert_whole(tmp_path))["variant"] == 1


def test_everything_is_on_the_disk_before_the_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut would need and no kill shows: files and folder synced, then renamed, then the parent synced."""
    order: list[int | str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        order.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def watched_rename(source: Path, target: Path) -> None:
        order.append(f"rename to {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    path = save(tmp_path, state_of(1), step=1, keep=1)
    named = order.index("rename to step_00000001")
    written = [path / "state.pt", path / "manifest.json", path]
    assert [file.stat().st_ino for file in written] == order[:named]
    assert tmp_path.stat().st_ino in order[named:]


def test_a_disk_that_takes_less_at_a_time_than_offered_gets_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux does for tensors over 2 GiB."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    save(tmp_path, state_of(1), step=1, keep=1)
    assert_whole(tmp_path)


def test_room_for_a_run_is_asked_for_at_its_start(tmp_path: Path) -> None:
    check_space(tmp_path / "checkpoints", 1000, copies=3)
    with pytest.raises(UserError, match=r"needs 3\d{8}\.00 GB \(3 of 1\d{8}\.00 GB\)"):
        check_space(tmp_path / "checkpoints", 10**17 + 10**16, copies=3)


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    for action in (lambda f: save(f, state_of(1), step=1, keep=1), latest, resume_point):
        with pytest.raises(UserError, match=r"checkpoints: .*is a file"):
            action(tmp_path / "checkpoints")


# ---------------------------------------------------------------- order, pruning, replacing


def test_order_is_by_step_and_not_by_file_time(tmp_path: Path) -> None:
    for age, step in enumerate((1, 2, 9, 10)):
        path = save(tmp_path, state_of(step), step=step, keep=0)
        for entry in (path / "state.pt", path / "manifest.json", path):
            os.utime(entry, (10**9 - 10**5 * age, 10**9 - 10**5 * age))
    assert assert_whole(tmp_path).step == 10
    save(tmp_path, state_of(11), step=11, keep=3)
    assert steps(tmp_path) == ["step_00000009", "step_00000010", "step_00000011"]


@pytest.mark.parametrize("keep", [0, None])
def test_keep_nothing_given_keeps_all(tmp_path: Path, keep: int | None) -> None:
    for step in range(1, 6):
        save(tmp_path, state_of(step), step=step, keep=keep)
    assert len(steps(tmp_path)) == 5


def test_a_damaged_one_is_not_counted_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, state_of(step), step=step, keep=0)
    empty(tmp_path / "step_00000003" / "state.pt")
    save(tmp_path, state_of(4), step=4, keep=2)
    assert steps(tmp_path) == ["step_00000002", "step_00000004"]


def test_redoing_a_damaged_step_after_resuming_from_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30):
        save(tmp_path, state_of(step), step=step, keep=0)
    flip_bit(tmp_path / "step_00000030" / "state.pt", 4000)
    found = resume_point(tmp_path)
    assert found is not None
    assert found.step == 20
    caplog.clear()
    assert resume_point(tmp_path) == found
    assert not caplog.records, "said once"
    save(tmp_path, state_of(25), step=25, keep=1)
    assert assert_whole(tmp_path).step == 25
    save(tmp_path, state_of(30), step=30, keep=1)
    assert assert_whole(tmp_path).step == 30
    assert steps(tmp_path) == ["step_00000030"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, state_of(5), step=5, keep=1)
    save(tmp_path, state_of(5, variant=1), step=5, keep=1)
    assert load(assert_whole(tmp_path))["variant"] == 1
    assert steps(tmp_path) == ["step_00000005"]


def test_one_renamed_by_hand_is_not_taken_for_another_step(tmp_path: Path) -> None:
    save(tmp_path, state_of(1), step=1, keep=0)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000009")
    assert assert_whole(tmp_path).path == tmp_path / "step_00000001"


def test_reading_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, state_of(1), step=1, keep=0)
    (tmp_path / ".step_00000002.saving").mkdir()
    os.rename(tmp_path / "step_00000001", tmp_path / ".step_00000001.replaced")
    before = steps(tmp_path)
    assert assert_whole(tmp_path).step == 1
    assert steps(tmp_path) == before


# ---------------------------------------------------------------- content


def test_views_subclasses_and_numpy_numbers_become_plain_and_small(tmp_path: Path) -> None:
    import numpy as np

    buffer = torch.randn(100_000)
    state = {
        **state_of(1),
        "view": buffer[:10],
        "parameter": nn.Parameter(torch.ones(3)),
        "number": np.float64(0.1),
        "count": np.int64(7),
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(3),
    }
    path = save(tmp_path, state, step=1, keep=0)
    assert (path / "state.pt").stat().st_size < 50_000
    loaded = load(open_checkpoint(path))
    assert equal(load(open_checkpoint(path), mmap=True), loaded)
    assert torch.serialization.get_crc32_options(), "switched off for the save alone"
    assert torch.equal(loaded["view"], buffer[:10])
    assert type(loaded["parameter"]) is torch.Tensor
    assert (loaded["number"], loaded["count"]) == (0.1, 7)
    assert equal(loaded["half"], state["half"])
    assert equal(loaded["scalar"], state["scalar"])


def test_what_could_not_be_loaded_is_refused_at_the_save_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['optimizer'\]\['hook'\]\[1\] is \w*Path"):
        save(tmp_path, {**state_of(1), "optimizer": {"hook": [1, tmp_path]}}, step=1, keep=0)
    assert steps(tmp_path) == []


def test_estimated_size_is_never_less_than_the_file_and_close_to_it(tmp_path: Path) -> None:
    shared = torch.randn(200, 1000)
    for number, state in enumerate(
        (state_of(1), {**state_of(1), "a": shared, "b": shared.t()}, {**state_of(1), "many": [torch.ones(1)] * 5000})
    ):
        actual = (save(tmp_path, state, step=number, keep=0) / "state.pt").stat().st_size
        assert actual <= state_bytes(state) <= actual * 1.1 + 2e5 + 600 * len(state.get("many", ()))


def test_a_real_optimizer_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, span: range) -> None:
        for step in span:
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    straight, straight_optimizer = make()
    train(straight, straight_optimizer, range(6))
    model, optimizer = make()
    train(model, optimizer, range(3))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "classes": None, "world_size": 1}
    save(tmp_path, state, step=3, keep=1)
    found = resume_point(tmp_path)
    assert found is not None
    loaded = load(found)
    model, optimizer = make()
    check_compatible(found, model.state_dict(), classes=None, world_size=1)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    train(model, optimizer, range(3, 6))
    assert equal(dict(model.state_dict()), dict(straight.state_dict()))
    assert equal(optimizer.state_dict(), straight_optimizer.state_dict())


# ---------------------------------------------------------------- fit


def refusal(tmp_path: Path, model: dict[str, torch.Tensor] | None = None, **given: Any) -> str:
    path = save(tmp_path, state_of(1), step=1, keep=0)
    fitting = {"classes": ["cat", "dog", "owl", "yak"], "world_size": 1}
    with pytest.raises(UserError) as refused:
        check_compatible(open_checkpoint(path), model or state_of(1)["model"], **{**fitting, **given})
    text = str(refused.value)
    assert str(path) in text
    assert len(text.splitlines()) <= 3
    return text


def test_what_fits_is_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path, state_of(1), step=1, keep=0)
    check_compatible(open_checkpoint(path), state_of(9)["model"], classes=("cat", "dog", "owl", "yak"), world_size=1)
    assert not caplog.records


def test_another_number_of_classes_is_said_with_the_weights_it_changes(tmp_path: Path) -> None:
    model = {**state_of(1)["model"], "head.weight": torch.zeros(2, 32)}
    text = refusal(tmp_path, model, classes=["cat", "dog"])
    assert "checkpoint has 4 classes, config 2" in text
    assert "head.weight (4, 32) -> (2, 32)" in text


def test_another_model_is_said_with_its_first_three_differing_weights(tmp_path: Path) -> None:
    model = {f"blocks.{n}.weight": torch.zeros(n) for n in range(5)}
    text = refusal(tmp_path, model)
    assert "first of 7: head.weight (4, 32) -> absent, norm.bias (64) -> absent, blocks.0.weight absent -> (0)" in text


def test_other_classes_of_the_same_number_are_said(tmp_path: Path) -> None:
    assert "class 2 is 'owl' in the checkpoint, 'emu' in the data" in refusal(
        tmp_path, classes=["cat", "dog", "emu", "yak"]
    )


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    assert "saved by 1 processes, this run has 2" in refusal(tmp_path, world_size=2)


def test_another_torch_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, state_of(1), step=1, keep=0)
    found = open_checkpoint(path)
    found.manifest["torch"] = "1.0"
    check_compatible(found, state_of(1)["model"], classes=["cat", "dog", "owl", "yak"], world_size=1)
    assert "saved with torch 1.0" in caplog.text


CONFIG: dict[str, Any] = {
    "seed": 1,
    "output_dir": "a",
    "resume": "auto",
    "optim": {"lr": 0.001, "betas": [0.9, 0.999], "base_lr": None},
    "train": {"epochs": 3, "max_steps": None, "batch_size": 8, "save_every": 10, "workers": 2},
    "tracking": {"uri": "sqlite:///a"},
    "runtime": {"device": "cpu", "precision": "fp32"},
}


def test_changed_config_names_what_can_change_results() -> None:
    new = json.loads(json.dumps(CONFIG))
    new["optim"] |= {"lr": 0.01, "betas": [0.9, 0.95], "base_lr": "x", "momentum": 0.9}
    new["train"]["batch_size"] = 16
    new["runtime"]["precision"] = "bf16"
    del new["seed"]
    assert changed_config(CONFIG, new) == [
        'optim.base_lr: null -> "x"',
        "optim.betas: [0.9, 0.999] -> [0.9, 0.95]",
        "optim.lr: 0.001 -> 0.01",
        "optim.momentum: absent -> 0.9",
        'runtime.precision: "fp32" -> "bf16"',
        "seed: 1 -> absent",
        "train.batch_size: 8 -> 16",
    ]


def test_changed_config_is_silent_about_what_cannot() -> None:
    new = json.loads(json.dumps(CONFIG))
    new |= {"output_dir": "b", "resume": "must", "tracking": {"uri": "http://x", "tags": {}}, "allow_changes": True}
    new["train"] |= {"max_steps": 5, "save_every": 1, "workers": 0, "keep": 3}
    new["optim"]["betas"] = (0.9, 0.999)
    assert changed_config(CONFIG, new) == []
    assert changed_config(CONFIG, {**CONFIG, "resume_from": 1}) == ["resume_from: absent -> 1"]


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        serve()
