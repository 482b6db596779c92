"""What vitexp's loop costs beside a bare PyTorch loop that clips, schedules and autocasts the same: CPU us a step.

The model is so small that little else is left. Everything a run does at each step counts: Accelerate, seeding, the
check of the loss, averages, the display, the journal and MLflow's mirror in its thread. Pictures come from the same
loader on both sides; `input.py` measures that one.
"""

from __future__ import annotations

import contextlib
import cProfile
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measuring import Clock, parser, start, table
from torch import Tensor, nn

from vitexp import reports, runtime
from vitexp.config import compose_and_check
from vitexp.data.batch_transforms import normalise
from vitexp.data.loader import train_batches
from vitexp.methods.supervised import Supervised
from vitexp.run import Run, build_run
from vitexp.signals import StopRequest
from vitexp.state import Tally
from vitexp.train import fit
from vitexp.types import Progress

SIDE, BATCH, CLASSES, LOG_EVERY = 8, 32, 10, 10
SETTINGS = [
    "model=vit_debug",
    f"model.image_size={SIDE}",
    "model.patch_size=4",
    "data=fake",
    f"data.num_classes={CLASSES}",
    "data.num_train=2048",
    "evaluators=none",
    "runtime.device=cpu",
    "runtime.precision=bf16",
    "runtime.threads=1",
    "train.workers=0",
    f"train.batch_size={BATCH}",
    "train.save_every=1000000",
    "train.epochs=null",
]
WARM_STEPS = 1000  # until MLflow's run has been made in its thread
GOALS = {"loop": 350.0, "logging": 30.0}  # us a step


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 * SIDE * SIDE, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, CLASSES)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.flatten(1))


class Watched(Supervised):
    """Reads the clocks after the update WARM_STEPS and after `steps` more."""

    def __init__(self, backbone: nn.Module, steps: int, *, clock: Clock, profile: cProfile.Profile | None) -> None:
        super().__init__(backbone)
        self.steps, self.clock, self.profile = steps, clock, profile
        self.watching = False
        self.all_s = self.others_s = self.rows_s = 0.0

    def after_step(self, progress: Progress) -> None:
        if progress.step == WARM_STEPS:
            time.sleep(2)  # MLflow's run is made in its thread, and what has been logged so far is delivered
            self.watching = True
            if self.profile is not None:
                self.profile.enable()
            self.all_s, self.others_s = self.clock(), _other_threads()
        elif progress.step == WARM_STEPS + self.steps:
            self.all_s, self.others_s = self.clock() - self.all_s, _other_threads() - self.others_s
            self.watching = False
            if self.profile is not None:
                self.profile.disable()


def _other_threads() -> float:
    """CPU seconds of all threads but this one: with one torch thread, of MLflow's mirror."""
    return time.process_time() - time.thread_time()


@contextlib.contextmanager
def rows_timed(watched: Watched) -> Iterator[None]:
    """Adds up the training thread's CPU time of what a logged row takes, in the watched steps."""
    owners = ((Tally, "means"), (reports.Books, "trained"))
    inner = [getattr(owner, name) for owner, name in owners]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*arguments: Any, **words: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **words)
            finally:
                watched.rows_s += (time.thread_time() - began) * watched.watching

        return outer

    for (owner, name), function in zip(owners, inner, strict=True):
        setattr(owner, name, timed(function))
    try:
        yield
    finally:
        for (owner, name), function in zip(owners, inner, strict=True):
            setattr(owner, name, function)


class Cost(NamedTuple):
    """us a step."""

    everything: float
    mirror: float  # MLflow, in its own thread
    rows: float  # metrics.jsonl and what goes before it, in the training thread


def a_run(folder: Path, steps: int, *words: str) -> Run:
    config = compose_and_check([*SETTINGS, f"train.max_steps={steps + WARM_STEPS + 1}", f"output_dir={folder}", *words])
    return build_run(config)


def vitexp_loop(place: Path, steps: int, store: str, *, clock: Clock, profile: cProfile.Profile | None = None) -> Cost:
    """`fit` without its start and end."""
    words = (f"train.log_every={LOG_EVERY}", "tracking=mlflow", f"tracking.uri={store}")
    with tempfile.TemporaryDirectory(dir=place) as made, StopRequest() as stop, quiet():
        folder = Path(made)
        accelerator = runtime.make_accelerator(precision="bf16", device="cpu", threads=torch.get_num_threads())
        run = a_run(folder, steps, *words)
        run.backbone = Mlp()
        run.method = watched = Watched(run.backbone, steps, clock=clock, profile=profile)
        with rows_timed(watched):
            fit(run, folder, accelerator=accelerator, stop=stop, found=None)
    return Cost(*(1e6 * seconds / steps for seconds in (watched.all_s, watched.others_s, watched.rows_s)))


def bare_loop(place: Path, steps: int, *, clock: Clock) -> float:
    """Seconds a step of the loop that one would write by hand."""
    with quiet():
        run = a_run(place, steps, "tracking=none")
    batches = train_batches(run.train_data, batch_size=BATCH, seed=0, workers=0)
    model = Mlp()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, fused=True)
    total = steps + WARM_STEPS + 1
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    mean, std = run.preprocessing["mean"], run.preprocessing["std"]
    began = 0.0
    for step in range(total):
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(normalise(batch.images, mean, std)), batch.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step == WARM_STEPS:
            began = clock()
    return (clock() - began) / steps


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the run's own lines, and without a file descriptor on the terminal that would draw a bar."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--steps", type=int, default=None, help="of every contender in a turn")
    arguments.add_argument("--profile", action="store_true", help="print where vitexp's loop spends its time")
    arguments = arguments.parse_args()
    clock = start(arguments)
    rounds = arguments.rounds or (1 if arguments.quick else 7)
    steps = arguments.steps or (300 if arguments.quick else 3000)
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        store = f"sqlite:///{place}/mlflow.db"
        vitexp_loop(place, 10, store, clock=clock)  # makes MLflow's tables, which takes seconds
        bare, ours = [], []
        for turn in range(rounds):
            for which in ("bare", "ours") if turn % 2 else ("ours", "bare"):
                if which == "ours":
                    ours.append(vitexp_loop(place, steps, store, clock=clock))
                else:
                    bare.append(1e6 * bare_loop(place, steps, clock=clock))
        report(bare, ours)
        if arguments.profile:
            profile = cProfile.Profile()
            vitexp_loop(place, steps, store, clock=clock, profile=profile)
            print(f"\nProfile of {steps} steps; the profiler makes calls of Python look dearer than they are")
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)


def report(bare: list[float], ours: list[Cost]) -> None:
    everything = statistics.median(cost.everything for cost in ours)
    mirror, rows = (statistics.median(getattr(cost, name) for cost in ours) for name in ("mirror", "rows"))
    loop = statistics.median(
        cost.everything - cost.mirror - cost.rows - base for cost, base in zip(ours, bare, strict=True)
    )

    def row(text: str, found: float, goal: float | None = None) -> list[str]:
        return [text, f"{found:.0f}", "" if goal is None else f"<= {goal:g} {'reached' if found <= goal else 'missed'}"]

    table(
        ["loop", "CPU us a step", "goal"],
        [
            row("bare loop: same input, autocast, clip, schedule", statistics.median(bare)),
            row("vitexp's fit, logging to MLflow", everything),
            row("  over the bare loop, without logging", loop, GOALS["loop"]),
            row(f"  logging, a row every {LOG_EVERY} steps", mirror + rows, GOALS["logging"]),
            row("    metrics.jsonl, in the training thread", rows),
            row("    MLflow, in a thread of its own", mirror),
        ],
    )


if __name__ == "__main__":
    main()
