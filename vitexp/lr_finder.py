"""The learning-rate range test (Smith 2015, arXiv:1506.01186): a run's first updates, each at a larger rate than the
one before, and what their losses say of a good one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from vitexp.config import RunConfig
from vitexp.data.loader import train_batches
from vitexp.data.sampler import effective_batch_size, micro_batches_per_epoch
from vitexp.horizon import plan_horizon
from vitexp.optim import resolve_lr, set_lr
from vitexp.run import Run
from vitexp.state import Tally
from vitexp.train import gradients, prepare
from vitexp.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

DIVERGED = 4.0  # times the least smoothed loss: where fastai stops, too
MEMORY, WINDOW = 0.05, 0.025  # of the sweep's updates that the two ways of smoothing look over
FEWEST = 5  # losses that a slope can be read from
SAFETY = 10.0  # the rate of the least loss is on the brink, a tenth of it is not


@dataclass(frozen=True)
class Sweep:
    """Losses of updates at growing rates, up to the last finite one, and why there are no more."""

    rates: list[float]
    losses: list[float]
    ended: str  # a sentence
    diverged: bool
    global_batch: int

    def smoothed(self) -> np.ndarray:
        """The losses as a mean of their neighbours on both sides, which moves no slope to another rate."""
        return centred_mean(np.array(self.losses), width=max(1.0, WINDOW * self.planned))

    planned: int = 0  # updates, had it not ended before


@dataclass(frozen=True)
class Suggestion:
    """Two usual readings of the curve, as rates of the largest group of weights."""

    steepest: float  # where the loss falls fastest over the logarithm of the rate
    tenth: float  # a tenth of the rate of the least loss
    least: float  # the rate of the least loss


def exponential_rates(lr_min: float, lr_max: float, steps: int) -> list[float]:
    """`steps` rates from lr_min to lr_max, each the same factor above the one before."""
    return [lr_min * (lr_max / lr_min) ** (step / (steps - 1)) for step in range(steps)]


def global_batch_of(config: RunConfig, count: int) -> tuple[int, int]:
    """(pictures of a forward, of an update) of the run on all its processes, with `count` training pictures."""
    settings, processes = config.train, config.runtime.processes
    size = effective_batch_size(count, settings.batch_size, processes, repeats=settings.repeats)
    return size, size * processes * settings.accumulate


def sweep(
    run: Run,
    rates: list[float],
    *,
    accelerator: Accelerator,
    tell: Callable[[int, float, float], None] = lambda done, loss, lr: None,
) -> Sweep:
    """The losses of the run's first updates at these rates. What other processes would do is done here, one forward
    after another, so an update sees as many pictures as the run's. Ends at a loss that diverges or is not finite.

    The run's method is trained by it. tell hears of each update, its loss and its rate."""
    config, settings = run.config, run.config.train
    count, repeats = len(run.train_data), settings.repeats
    batch_size, global_batch = global_batch_of(config, count)
    horizon = plan_horizon(
        micro_batches_per_epoch(count, batch_size, 1, repeats=repeats),
        accumulate=settings.accumulate * config.runtime.processes,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
    )
    horizon = replace(horizon, num_updates=len(rates), total_steps=max(horizon.total_steps, len(rates)))
    method, optimizer = prepare(run, accelerator, lr=rates[0])
    clipped, tally = run.method.clipped(), Tally()
    watch = Divergence(memory=max(1.0, MEMORY * len(rates)))
    losses: list[float] = []
    ended, diverged = f"all {len(rates)} updates made", False
    run.method.train()
    batches = train_batches(
        run.train_data, batch_size=batch_size, seed=config.seed, workers=settings.workers, repeats=repeats
    )
    with _closing(batches):
        for step, lr in enumerate(rates):
            set_lr(optimizer, lr)
            update, position = horizon.update(step), horizon.micro_batches_before(step)
            loss = gradients(run, method, batches, update, position=position, accelerator=accelerator, tally=tally)[
                0
            ].item()
            if not math.isfinite(loss):
                ended, diverged = f"the loss is {loss:g} at {lr:.3g}, after {step} updates", True
                break
            losses.append(loss)
            tell(step + 1, loss, lr)
            if watch.diverged(loss):
                ended, diverged = f"the loss has risen to {DIVERGED:g} times its least at {lr:.3g}", True
                break
            if settings.clip_norm is not None:
                accelerator.unscale_gradients()
                nn.utils.clip_grad_norm_(clipped, settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            run.method.after_step(update.progress)
    return Sweep(rates[: len(losses)], losses, ended, diverged, global_batch, planned=len(rates))


@contextlib.contextmanager
def _closing(batches: Iterator[Batch]) -> Iterator[None]:
    """Ends loader processes with the sweep, not when the iterator is forgotten."""
    try:
        yield
    finally:
        getattr(batches, "close", lambda: None)()


class Divergence:
    """Whether the exponential mean of the losses so far, its start corrected for, is DIVERGED times its least."""

    def __init__(self, *, memory: float) -> None:
        self.keep = 1 - 1 / memory if memory > 1 else 0.0
        self.mean = self.weight = 0.0
        self.least = math.inf

    def diverged(self, loss: float) -> bool:
        self.mean = self.keep * self.mean + (1 - self.keep) * loss
        self.weight = self.keep * self.weight + (1 - self.keep)
        smoothed = self.mean / self.weight
        self.least = min(self.least, smoothed)
        return smoothed > DIVERGED * self.least


def centred_mean(values: np.ndarray, *, width: float) -> np.ndarray:
    """Gaussian means with a standard deviation of `width` places, over what there is on either side."""
    place = np.arange(len(values))
    weights = np.exp(-0.5 * ((place[:, None] - place[None, :]) / width) ** 2)
    return weights @ values / weights.sum(axis=1)


def suggest(found: Sweep) -> Suggestion | None:
    """What the curve suggests; None where it does not fall by more than its noise before it ends."""
    if len(found.losses) < FEWEST:
        return None
    smoothed, logs = found.smoothed(), np.log(found.rates)
    least = int(smoothed.argmin())
    noise = float(np.std(np.array(found.losses)[: least + 1] - smoothed[: least + 1]))
    if least == 0 or smoothed[0] - smoothed[least] <= 2 * noise:
        return None
    slopes = np.gradient(smoothed, logs)
    steepest = int(slopes[: least + 1].argmin())
    return Suggestion(steepest=found.rates[steepest], tenth=found.rates[least] / SAFETY, least=found.rates[least])


def overrides_for(rate: float, optim: dict[str, Any], *, global_batch: int) -> list[str]:
    """What to type for this rate: optim.lr=…, and optim.base_lr=… where the settings have no lr of their own."""
    said = [f"optim.lr={rate:.3g}"]
    if optim["lr"] is None and optim["base_lr"] is not None:
        factor = resolve_lr(lr=None, base_lr=1.0, reference_batch=optim["reference_batch"], global_batch=global_batch)
        said.append(f"optim.base_lr={rate / factor:.3g}")
    return said
