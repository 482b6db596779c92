"""One writer a folder, whole files, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitexp import run_folder
from vitexp.errors import UserError
from vitexp.run_folder import RunLock, archive_previous, atomic_file, is_used, write_atomic

HOLD = r"""
import os, sys, time
from pathlib import Path
from vitexp.run_folder import RunLock
with RunLock(Path(sys.argv[1])):
    worker = "fork" in sys.argv and os.fork() == 0  # as a loader's worker: outlives the holder
    if worker or "fork" not in sys.argv:
        os.write(1, f"held {os.getpid()}\n".encode())
    time.sleep(30)
"""


def hold(run_dir: Path, *extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir), *extra], stdout=subprocess.PIPE, text=True)


def wait_until_held(process: subprocess.Popen[str]) -> int:
    """The pid of the holder or, if it forked one, of its worker."""
    assert process.stdout is not None
    word, worker = process.stdout.readline().split()
    assert word == "held"
    return int(worker)


def test_second_process_is_refused_at_once_with_pid_and_host_and_gets_in_after_kill_9(tmp_path: Path) -> None:
    with hold(tmp_path / "run") as holder:
        wait_until_held(holder)
        start = time.monotonic()
        with pytest.raises(UserError) as refusal:
            RunLock(tmp_path / "run").acquire()
        assert time.monotonic() - start < 1
        assert f"process {holder.pid} on {os.uname().nodename}" in str(refusal.value)
        assert str(tmp_path / "run") in str(refusal.value)
        assert len(str(refusal.value).splitlines()) <= 3
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with RunLock(tmp_path / "run") as lock:
            assert json.loads(lock.path.read_text())["pid"] == os.getpid()


def test_lock_is_free_when_the_holder_is_killed_but_its_forked_worker_lives(tmp_path: Path) -> None:
    with hold(tmp_path, "fork") as holder:
        worker = wait_until_held(holder)
        try:
            holder.send_signal(signal.SIGKILL)
            os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
            os.kill(worker, 0)  # still there
            RunLock(tmp_path).acquire()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_lock_that_a_child_of_a_killed_holder_still_has_is_waited_for(tmp_path: Path) -> None:
    # As a child just being forked when the holder was killed, which holds the lock until it gets to die.
    code = "import subprocess, sys, time; from pathlib import Path; from vitexp.run_folder import RunLock\n"
    code += "lock = RunLock(Path(sys.argv[1])); lock.acquire()\n"
    code += "subprocess.Popen(['sleep', '1'], pass_fds=[lock._descriptor]); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        RunLock(tmp_path).acquire()
    holder.kill()
    holder.wait()
    RunLock(tmp_path).acquire()


def test_lock_is_given_back_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broke"), RunLock(tmp_path):
            raise RuntimeError("broke")


def test_two_locks_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"):
        RunLock(tmp_path).acquire()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    for run_dir in (tmp_path / "out", tmp_path / "out" / "run"):
        with pytest.raises(UserError) as refusal:
            RunLock(run_dir).acquire()
        assert str(refusal.value) == f"cannot write in {run_dir}: {tmp_path / 'out'} is a file, not a folder"


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    code = "import os, sys; from pathlib import Path; from vitexp.run_folder import RunLock\n"
    if os.geteuid() == 0:  # modes do not bind root
        tmp_path.chmod(0o755)
        code += "os.setuid(65534)\n"
    code += "RunLock(Path(sys.argv[1])).acquire()"
    for run_dir in (closed, closed / "run"):
        ended = subprocess.run([sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True)
        assert f"UserError: cannot write in {run_dir}: Permission denied" in ended.stderr


def test_where_files_cannot_be_locked_it_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    with RunLock(tmp_path):
        assert "cannot be locked" in caplog.text


def test_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, "first é")
    assert path.read_bytes() == "first é".encode()
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"

    def failing_fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(UserError, match=r"cannot write .*summary\.json: No space left on device"):
        write_atomic(path, b"third")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_writer_of_its_own_gets_a_name_with_the_right_suffix_and_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "curve.png") as beside:
        assert beside.suffix == ".png"
        assert beside.parent == tmp_path
        beside.write_bytes(b"picture")
    assert (tmp_path / "curve.png").read_bytes() == b"picture"

    def fail_half_way() -> None:
        with atomic_file(tmp_path / "curve.png") as beside:
            beside.write_bytes(b"half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert (tmp_path / "curve.png").read_bytes() == b"picture"
    assert os.listdir(tmp_path) == ["curve.png"]


def test_half_written_files_of_killed_writers_go_at_the_next_start(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from vitexp.run_folder import atomic_file\n"
        "with atomic_file(Path(sys.argv[1]) / 'model.safetensors') as beside:\n"
        "    beside.write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    (leftover,) = os.listdir(tmp_path)
    assert leftover.startswith(".model.")
    with RunLock(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]


def test_a_former_run_is_moved_aside_whole_and_numbered(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert archive_previous(run_dir) is None
    for round_ in (1, 2, 3):
        with RunLock(run_dir):
            (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
            (run_dir / "checkpoints" / "step_00000001" / "state.pt").write_text(f"state {round_}")
            (run_dir / "metrics.jsonl").write_text(f"rows {round_}")
            (run_dir / "train.log").write_text("of the new run")
            assert is_used(run_dir, spare=["train.log"])
            assert archive_previous(run_dir, spare=["train.log"]) == run_dir / "previous" / str(round_)
            assert not is_used(run_dir, spare=["train.log"])
            assert sorted(os.listdir(run_dir)) == [".lock", "previous", "train.log"]
    for round_ in (1, 2, 3):
        kept = run_dir / "previous" / str(round_)
        assert (kept / "metrics.jsonl").read_text() == f"rows {round_}"
        assert (kept / "checkpoints" / "step_00000001" / "state.pt").read_text() == f"state {round_}"


def test_checkpoints_are_moved_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill half way must not leave old checkpoints to resume from beside a run half put away."""
    for name in ("a.txt", "checkpoints", "config.yaml"):
        (tmp_path / name).mkdir()
    moved: list[str] = []
    monkeypatch.setattr(run_folder.shutil, "move", lambda source, _: moved.append(source.name))
    archive_previous(tmp_path)
    assert moved == ["checkpoints", "a.txt", "config.yaml"]
