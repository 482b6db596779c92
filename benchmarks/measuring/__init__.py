"""Side-by-side timing: contenders take turns, in one process or each in its own, and ratios are taken within a turn.

Other load on the machine slows a whole turn down, so it cancels in the ratio. With one thread the processor's clock is
read, which does not run while another process has the core; with more threads only the wall clock tells.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitexp.runtime import has_amx

Clock = Callable[[], float]
Times = dict[str, list[float]]  # seconds of each turn, in the order of the turns


def parser(description: str) -> argparse.ArgumentParser:
    """What every script here takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a few turns: does it run? Its figures say little")
    made.add_argument("--rounds", type=int, default=None, help="turns of every contender")
    made.add_argument("--threads", type=int, default=1, help="of torch; more than one needs --wall")
    made.add_argument("--wall", action="store_true", help="the wall clock, for a machine that does nothing else")
    return made


def start(arguments: argparse.Namespace) -> Clock:
    """The clock asked for, after setting the threads and printing what the figures depend on."""
    if arguments.threads > 1 and not arguments.wall:
        raise SystemExit("--threads above 1 needs --wall: the processor's clock adds the threads up")
    torch.set_num_threads(arguments.threads)
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "pillow"))
    print(f"{os.cpu_count()} cores ({platform.machine()}), AMX bf16: {'yes' if has_amx() else 'no'}, load {load}")
    print(f"Python {platform.python_version()}, {packages}")
    threads = f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}"
    print(f"{threads}, {'wall' if arguments.wall else 'processor'} clock{', quick' if arguments.quick else ''}\n")
    return time.perf_counter if arguments.wall else time.process_time


class Elsewhere:
    """A contender in a process of its own, where settings of the whole process are its alone; timed there.

    `make(**given)` returns the step there. Both have to be what a fresh interpreter can import."""

    def __init__(self, make: Callable[..., Callable[[], object]], given: dict[str, Any], *, clock: Clock) -> None:
        fresh = multiprocessing.get_context("spawn")
        self._connection, there = fresh.Pipe()
        job = (there, make, given, clock is time.perf_counter, torch.get_num_threads())
        self._process = fresh.Process(target=_serve, args=job, daemon=True)
        self._process.start()
        there.close()

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._connection.close()
        self._process.join()

    def seconds(self) -> float:
        self._connection.send(None)
        return self._connection.recv()


def _serve(
    connection: Connection, make: Callable[..., Callable[[], object]], given: dict[str, Any], wall: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    step, clock = make(**given), time.perf_counter if wall else time.process_time
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(_seconds(step, clock))


def _seconds(step: Callable[[], object], clock: Clock) -> float:
    began = clock()
    step()
    return clock() - began


def take_turns(contenders: Mapping[str, Callable[[], object] | Elsewhere], *, rounds: int, clock: Clock) -> Times:
    """Every contender once a round, each round beginning with another one; one round before is not counted."""
    names, times = list(contenders), {name: [] for name in contenders}
    for turn in range(-1, rounds):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            contender = contenders[name]
            seconds = contender.seconds() if isinstance(contender, Elsewhere) else _seconds(contender, clock)
            if turn >= 0:
                times[name].append(seconds)
    return times


def classification_step(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    """Forward in bf16, backward, clip, fused AdamW."""
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ratio(times: Times, *, ours: str, theirs: str) -> float:
    """How many times as fast ours is: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(times[ours], times[theirs], strict=True))


def spread(times: Times, *, ours: str, theirs: str) -> str:
    """`1.91 (1.85-1.97)`: the median ratio and the middle half of the rounds."""
    each = [b / a for a, b in zip(times[ours], times[theirs], strict=True)]
    low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return f"{statistics.median(each):.2f} ({low:.2f}-{high:.2f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows under their header, the first column to the left."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        print("| " + " | ".join(cells) + " |")


def verdict(reached: float, goal: float) -> str:
    """`>= 1.9 reached` or `>= 1.9 missed`"""
    return f">= {goal:g} {'reached' if reached >= goal else 'missed'}"
