"""Which micro-batches make up each update, and where training stands before it: arithmetic only, no state.

One epoch has M micro-batches on every process and A of them make one update. The last update of an epoch takes what
is left, so an epoch has ceil(M / A) updates, none spans two epochs and no micro-batch is dropped. Its loss is divided
by its own number of micro-batches (Accelerate divides by A and so halves or quarters that update).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitexp.errors import UserError
from vitexp.schedules import Schedule, number_in_range
from vitexp.types import Progress


@dataclass(frozen=True)
class Update:
    """One optimizer update: its micro-batches, counted from the first one within the epoch, and the progress before."""

    epoch: int
    first_micro_batch: int
    num_micro_batches: int  # what the update's loss is divided by
    progress: Progress


@dataclass(frozen=True)
class Horizon:
    """The length of a run. Schedules look at total_steps and total_epochs; the loop ends after num_updates."""

    micro_batches_per_epoch: int
    accumulate: int
    total_steps: int
    total_epochs: float
    num_updates: int  # less than total_steps where train.max_steps cuts the run short

    @property
    def updates_per_epoch(self) -> int:
        return updates_per_epoch(self.micro_batches_per_epoch, self.accumulate)

    def progress(self, step: int) -> Progress:
        """Where training stands after `step` updates. Its epoch is MAE's: epoch + first micro-batch / M."""
        epoch, first = self._position(step)
        return Progress(
            step=step,
            total_steps=self.total_steps,
            epoch=epoch + first / self.micro_batches_per_epoch,
            total_epochs=self.total_epochs,
        )

    def update(self, step: int) -> Update:
        """The update made after `step` others."""
        assert 0 <= step < self.num_updates, f"update {step} of a run of {self.num_updates}"
        epoch, first = self._position(step)
        count = min(self.accumulate, self.micro_batches_per_epoch - first)
        return Update(epoch=epoch, first_micro_batch=first, num_micro_batches=count, progress=self.progress(step))

    def micro_batches_before(self, step: int) -> int:
        """Micro-batches of this process that `step` updates took: where its data goes on."""
        epoch, first = self._position(step)
        return epoch * self.micro_batches_per_epoch + first

    def _position(self, step: int) -> tuple[int, int]:
        epoch, group = divmod(step, self.updates_per_epoch)
        return epoch, group * self.accumulate


def updates_per_epoch(micro_batches_per_epoch: int, accumulate: int) -> int:
    """ceil(M / A)."""
    return -(-micro_batches_per_epoch // accumulate)


def plan_horizon(
    micro_batches_per_epoch: int, *, accumulate: int, epochs: float | None, max_steps: int | None
) -> Horizon:
    """The horizon of train.epochs (a fraction is rounded up to whole updates), cut short by train.max_steps.

    Without epochs the schedule runs over max_steps. Raises UserError when neither is given or a number is out of range.
    """
    accumulate = _whole("train.accumulate", accumulate)
    if max_steps is not None:
        max_steps = _whole("train.max_steps", max_steps)
    if micro_batches_per_epoch < 1:
        raise UserError("the training split has no batch: it is empty, or smaller than train.batch_size")
    per_epoch = updates_per_epoch(micro_batches_per_epoch, accumulate)
    if epochs is None:
        if max_steps is None:
            raise UserError("train.epochs=null and train.max_steps=null: give one of them")
        full, group = divmod(max_steps, per_epoch)
        total_epochs = full + group * accumulate / micro_batches_per_epoch
        return Horizon(micro_batches_per_epoch, accumulate, max_steps, total_epochs, max_steps)
    if number_in_range("train.epochs", epochs) == 0:
        raise UserError("train.epochs=0: needs more than 0")
    total_steps = math.ceil(round(epochs * per_epoch, 6))  # 0.07 * 100 is 7.000000000000001: not eight updates
    total_steps = max(total_steps, 1)
    return Horizon(
        micro_batches_per_epoch,
        accumulate,
        total_steps,
        float(epochs),
        total_steps if max_steps is None else min(max_steps, total_steps),
    )


def preview(schedule: Schedule, horizon: Horizon, *, lr: float, points: int = 200) -> list[tuple[int, float]]:
    """(updates made before, lr) for at most `points` updates spread over the run, first and last among them."""
    last = horizon.num_updates - 1
    count = min(points, horizon.num_updates)
    steps = sorted({round(last * i / max(count - 1, 1)) for i in range(count)})
    return [(step, schedule(horizon.progress(step), lr=lr)) for step in steps]


def _whole(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key}={value}: needs a whole number of at least 1")
    return value
