"""A run in processes of its own: one for a sweep's job, N ranks for runtime.processes=N.

Started here and not through torchrun: its agent answers a signal with a traceback and exit code 1, and a run has to
finish its step, save, and leave with 143 or 130. On a cluster whose scheduler starts the ranks (RANK and WORLD_SIZE
are set), nothing is started here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from vitexp.errors import UserError
from vitexp.signals import Interrupted

GRACE_S = 10.0  # a rank that outlives its siblings by this long is killed
COMPLAINT_VARIABLE = "VITEXP_COMPLAINT_FILE"  # where a rank leaves its error text
TRACEBACK_VARIABLES = ("VITEXP_DEBUG", "HYDRA_FULL_ERROR")


def exit_code_of(work: Callable[[], object]) -> int:
    """Runs work and turns its end into an exit code and, on failure, a few lines on stderr without a traceback."""
    wanted = any(os.environ.get(name) for name in TRACEBACK_VARIABLES)
    try:
        result = work()
        sys.stdout.flush()  # here, where a reader that has left can be told from an error
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    except Interrupted as stopped:
        complain(f"stopped by {stopped}")
        return stopped.exit_code
    except KeyboardInterrupt:
        complain("stopped by SIGINT")
        return 130
    except BrokenPipeError:  # whoever read our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        return 128 + signal.SIGPIPE
    except UserError as error:
        if wanted:
            traceback.print_exc()
        complain(str(error))
        return 2
    except Exception as error:
        if wanted:
            traceback.print_exc()
        first = (str(error).strip().splitlines() or ["no message"])[0]
        if isinstance(error, MemoryError) or "allocate memory" in first or "out of memory" in first:
            complain(
                f"this does not fit into memory: {first}\n"
                "a smaller train.batch_size, model.image_size or model takes less; python -m vitexp plan says how much"
            )
            return 1
        complain(f"{type(error).__name__}: {first}\nthis is a bug or a broken part; set VITEXP_DEBUG=1 to see where")
        return 1


def complain(text: str) -> None:
    """Error text for a person on stderr; a rank leaves it to its parent, which says the first one's."""
    with contextlib.suppress(OSError, ValueError):
        if COMPLAINT_VARIABLE in os.environ:
            Path(os.environ[COMPLAINT_VARIABLE]).write_text(f"vitexp: {text}\n", encoding="utf-8")
        else:
            print(f"vitexp: {text}", file=sys.stderr, flush=True)


def ranks_given() -> bool:
    """Whether a launcher outside has started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def run_in_processes(request_yaml: str, *, processes: int) -> int:
    """Starts the ranks of one run on a checked request, passes signals on to them, and returns their exit code.

    When one rank fails, the others are ended within GRACE_S, and what it said is said once."""
    with tempfile.TemporaryDirectory(prefix="vitexp-") as scratch:
        request = Path(scratch) / "config.yaml"
        request.write_text(request_yaml, encoding="utf-8")
        port = str(_free_port())
        ranks = []
        for rank in range(processes):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            complaint = {COMPLAINT_VARIABLE: str(Path(scratch) / f"complaint-{rank}")}
            environment = {**os.environ, **complaint, **(place if processes > 1 else {})}
            # A session of its own: Ctrl-C reaches the ranks once, through here, and not their loader workers.
            command = [sys.executable, "-m", "vitexp.worker", str(request)]
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
        code = _watch(ranks)
        said = sorted(Path(scratch).glob("complaint-*"), key=lambda path: path.stat().st_mtime_ns)
        if said:
            print(said[0].read_text(encoding="utf-8"), file=sys.stderr, end="", flush=True)
        return code


def run_command(arguments: list[str], *, config_dir: str | None) -> int:
    """Runs `python -m vitexp <arguments>` in a process of its own in the same way."""
    where = [] if config_dir is None else ["--config-dir", config_dir]
    command = [sys.executable, "-m", "vitexp", *arguments, *where]
    return _watch([subprocess.Popen(command, start_new_session=True)])


def _watch(ranks: list[subprocess.Popen[bytes]]) -> int:
    received: list[int] = []

    def pass_on(signum: int, frame: object) -> None:
        received.append(signum)
        for rank in ranks:
            if rank.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    rank.send_signal(signum)

    previous = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
    failed_at: float | None = None
    try:
        while any(rank.poll() is None for rank in ranks):
            time.sleep(0.05)
            if failed_at is None and any(rank.poll() not in (None, 0) for rank in ranks):
                failed_at = time.monotonic()
                if not received:
                    for rank in ranks:
                        if rank.poll() is None:
                            rank.terminate()
            if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
                for rank in ranks:
                    kill_group(rank)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        for rank in ranks:
            kill_group(rank)
    codes = [rank.returncode for rank in ranks]
    killed = [(number, -code) for number, code in enumerate(codes) if code < 0]
    for number, signum in killed:
        if signum not in received and signum != signal.SIGTERM:
            complain(f"process {number} was killed by signal {signum} ({signal.Signals(signum).name}), likely memory")
    if received:  # also where the ranks had just ended well: what would come after them was not wanted
        return 128 + received[0]
    # The first to fail has the reason; the others were ended for it.
    reasons = [code for code in codes if 0 < code < 128] or [c if c > 0 else 128 - c for c in codes if c]
    return reasons[0] if reasons else 0


def kill_group(rank: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads its session, with all that it started."""
    # The rank leads its session, so its loader workers go with it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
