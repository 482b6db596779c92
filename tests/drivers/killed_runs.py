"""Runs one small run again and again, killing it with SIGKILL at chosen points, until it ends; reports as JSON lines.

A program of its own, started by tests/test_resume.py: it imports torch once and forks for every attempt, so that twenty
kills take seconds. usage: killed_runs.py <folder> <plan as JSON: {"name": [[point, number], …]}> <override> …
A point is "step" (after that many updates of the attempt), "time" (after that many milliseconds; half of them where a
fresh run was faster than that), or a function of os whose call with that number is the last thing the attempt does
("replace:3"), counted from the first save on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

torch.set_num_threads(1)

from vitexp import checkpoint, plots, reports, train  # noqa: E402
from vitexp.config import RunConfig, compose_and_check  # noqa: E402
from vitexp.reports import Books  # noqa: E402


def die() -> None:
    os.killpg(0, signal.SIGKILL)  # loader workers too: nothing gets the chance to tidy up


def die_at(point: str, number: int) -> None:
    """Arranges this process's death."""
    if point == "step":
        left = [number]
        stepped = Books.stepped

        def count(self: Books, step: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                die()
            stepped(self, step)

        Books.stepped = count  # type: ignore[method-assign]
    elif point == "time":
        timer = threading.Timer(number / 1000, die)
        timer.daemon = True
        timer.start()
    else:
        saving, save = [False], checkpoint.save

        def saved(*args: object, **kwargs: object) -> object:
            saving[0] = True
            try:
                return save(*args, **kwargs)  # type: ignore[arg-type]
            finally:
                saving[0] = False

        die_at_call(point, number, counts=lambda: saving[0])
        checkpoint.save = saved  # type: ignore[assignment]


def die_at_call(name: str, number: int, *, counts: Callable[[], bool] = lambda: True) -> None:
    """Death right before the call of os.<name> with that number, of those made while `counts` says so."""
    original, left = getattr(os, name), [number]

    def call(*args: object, **kwargs: object) -> object:
        if counts():
            left[0] -= 1
            if left[0] == 0:
                die()
        return original(*args, **kwargs)

    setattr(os, name, call)


def in_a_fork(work: Callable[[], object], *, session: bool = False) -> int:
    """The status with which a process ends that does this work; `session`: with all that it starts, when it dies."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            if session:
                os.setsid()
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            returned = work()
            code = returned if isinstance(returned, int) else 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def was_killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def attempt(config: RunConfig, kill: tuple[str, int] | None) -> int:
    def work() -> None:
        if kill is not None:
            die_at(*kill)
        train.train(config)

    return in_a_fork(work, session=True)


def main() -> None:
    # Pictures take a second a run and change no bit of what is compared.
    reports.draw_pictures = lambda run, folder: None
    for name in ("curves", "confusion_matrix"):
        setattr(plots, name, lambda *given: None)
    place, plan, overrides = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    for name, kills in plan.items():
        folder = place / name
        shutil.rmtree(folder, ignore_errors=True)
        config = compose_and_check([*overrides, f"output_dir={folder}"])
        happened, started = [], time.monotonic()
        for point, number in kills:
            status = attempt(config, (point, number))
            while status == 0 and point == "time" and not happened:  # a machine's speed is not the same all the time
                shutil.rmtree(folder)
                number //= 2
                status = attempt(config, (point, number))
            happened.append(was_killed(status))
            if not happened[-1] and status != 0:
                break
        last = attempt(config, None)
        report = {"name": name, "killed": happened, "last": last, "seconds": round(time.monotonic() - started, 2)}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
