"""Runs one small pipeline again and again, killing it with SIGKILL at chosen points, until it ends; reports as JSON.

A program of its own, started by tests/test_pipeline.py: it imports torch once and forks for every attempt and stage.
usage: killed_pipelines.py <folder> <plan as JSON: {"name": [[where, point, number], …]}> <config dir> <override> …
In a stage (`where` is its name) the points are those of killed_runs.py. In a labeling, and where "pipeline" in the
process that runs the stages, a point is "time" or a function of os whose call with that number is the last thing that
happens.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from killed_runs import die_at, die_at_call, in_a_fork, was_killed

from vitexp import pipeline, plots, reports, train
from vitexp.commands import label
from vitexp.config import compose_and_check, from_request
from vitexp.data import label_store

Kill = tuple[str, str, int]
UNTOUCHED = {name: getattr(os, name) for name in ("replace", "rename", "mkdir")}


def die_anywhere(point: str, number: int) -> None:
    (die_at if point == "time" else die_at_call)(point, number)


def in_a_stage(work: Callable[[], object]) -> int:
    """The exit code of this work in a process of its own, where calls of os are not the pipeline's."""
    touched = {name: getattr(os, name) for name in UNTOUCHED}
    for name, function in UNTOUCHED.items():
        setattr(os, name, function)
    code = os.waitstatus_to_exitcode(in_a_fork(work))
    for name, function in touched.items():
        setattr(os, name, function)
    return code


def attempt(overrides: list[str], config_dir: str, kill: Kill | None) -> int:
    """The status of one command, whose process and those of its stages are forks that share one import of torch."""

    def dies(where: str) -> bool:
        return kill is not None and kill[0] == where

    def run(request: str, *, processes: int) -> int:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(request)
            file.flush()
            config = from_request(Path(file.name))

        def work() -> None:
            if dies(Path(config.output_dir).name):
                die_at(*kill[1:])
            train.train(config)

        return in_a_stage(work)

    def command(arguments: list[str], *, config_dir: str | None) -> int:
        name, *words = arguments
        assert name == "label"
        (store,) = (Path(text.partition("=")[2]) for text in words if text.startswith("output="))

        def work() -> int:
            if dies(store.parent.name):
                die_anywhere(*kill[1:])
            return label.main(words, config_dir)

        return in_a_stage(work)

    def work() -> int:
        pipeline.run_in_processes, pipeline.run_command = run, command
        if dies("pipeline"):
            die_anywhere(*kill[1:])
        return pipeline.main(overrides, config_dir)

    return in_a_fork(work, session=True)


def main() -> None:
    # Pictures take a second a run and change no bit of what is compared; a chart is the numbers in it.
    reports.draw_pictures = lambda run, folder: None
    reports.draw_token_labels = lambda run, folder, *, epoch: None
    for name in ("curves", "confusion_matrix", "reliability", "reconstructions"):
        setattr(plots, name, lambda *given, **how: None)
    plots.by_epoch = lambda curves, path, **how: path.write_text(json.dumps(curves)) and path
    label_store.COMMIT_S = 0.0  # so that every batch is a point at which a labeling goes on
    composed = functools.cache(lambda overrides, config_dir: compose_and_check(list(overrides), config_dir))
    pipeline.compose_and_check = lambda overrides, config_dir: composed(tuple(overrides), config_dir)

    label.compose_and_check = pipeline.compose_and_check
    place, plan, config_dir, overrides = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], sys.argv[4:]
    for name, kills in plan.items():
        folder = place / name
        shutil.rmtree(folder, ignore_errors=True)
        typed = [*overrides, f"output_dir={folder}"]
        happened, started = [], time.monotonic()
        for kill in kills:
            status = attempt(typed, config_dir, tuple(kill))
            happened.append(was_killed(status))
            if not happened[-1] and status != 0:
                break
        last = attempt(typed, config_dir, None)
        report = {"name": name, "killed": happened, "last": last, "seconds": round(time.monotonic() - started, 2)}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
