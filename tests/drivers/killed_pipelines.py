"""Runs one small pipeline again and again, killing it with SIGKILL at chosen points, until it ends; reports as JSON.

A program of its own, started by tests/test_pipeline.py: it imports torch once and forks for every attempt and stage.
usage: killed_pipelines.py <folder> <plan as JSON: {"name": [[where, point, number], …]}> <config dir> <override> …
In a stage (`where` is its name) the points are those of killed_runs.py. Where "pipeline", in the process that runs the
stages, a point is a function of os whose call with that number is the last thing that happens.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from killed_runs import die, die_at

from vitexp import pipeline, plots, reports, train
from vitexp.config import compose_and_check, from_request


def die_at_call(name: str, number: int) -> None:
    original, left = getattr(os, name), [number]

    def call(*args: object, **kwargs: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            die()
        return original(*args, **kwargs)

    setattr(os, name, call)


def stage_in_a_fork(request: str, *, processes: int, kill: tuple[str, str, int] | None) -> int:
    """In place of run_in_processes: the same settings by the same way, without a second's import of torch."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
                file.write(request)
                file.flush()
                config = from_request(Path(file.name))
            if kill is not None and kill[0] == Path(config.output_dir).name:
                die_at(*kill[1:])
            train.train(config)
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempt(overrides: list[str], config_dir: str, kill: tuple[str, str, int] | None) -> int:
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 3
        try:
            untouched = {name: getattr(os, name) for name in ("replace", "rename", "mkdir")}

            def run_stage(request: str, *, processes: int) -> int:
                touched = {name: getattr(os, name) for name in untouched}
                for name, function in untouched.items():  # the stage's own calls are not the pipeline's
                    setattr(os, name, function)
                code = stage_in_a_fork(request, processes=processes, kill=kill)
                for name, function in touched.items():
                    setattr(os, name, function)
                return code

            pipeline.run_in_processes = run_stage
            if kill is not None and kill[0] == "pipeline":
                die_at_call(*kill[1:])
            code = pipeline.main(overrides, config_dir)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def main() -> None:
    # Pictures take a second a run and change no bit of what is compared; a chart is the numbers in it.
    reports.draw_pictures = lambda run, folder: None
    for name in ("curves", "confusion_matrix", "reliability", "reconstructions"):
        setattr(plots, name, lambda *given, **how: None)
    plots.by_epoch = lambda curves, path, **how: path.write_text(json.dumps(curves)) and path
    composed = functools.cache(lambda overrides, config_dir: compose_and_check(list(overrides), config_dir))
    pipeline.compose_and_check = lambda overrides, config_dir: composed(tuple(overrides), config_dir)

    place, plan, config_dir, overrides = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], sys.argv[4:]
    for name, kills in plan.items():
        folder = place / name
        shutil.rmtree(folder, ignore_errors=True)
        typed = [*overrides, f"output_dir={folder}"]
        happened, started = [], time.monotonic()
        for kill in kills:
            status = attempt(typed, config_dir, tuple(kill))
            happened.append(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)
            if not happened[-1] and status != 0:
                break
        last = attempt(typed, config_dir, None)
        report = {"name": name, "killed": happened, "last": last, "seconds": round(time.monotonic() - started, 2)}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
