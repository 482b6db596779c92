"""How fast a run would be on this machine: a few real updates on made-up pictures. No file is read or written."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from vitexp.ema import Ema
from vitexp.optim import set_lr
from vitexp.runtime import seed_forward
from vitexp.types import Batch, Method, Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

AT_MOST_UPDATES = 20
TINY_LR = 1e-8  # random weights and pictures must not diverge; an update costs the same
MATRIX = 1024  # rows and columns of the product that tells the machine's arithmetic


@dataclass(frozen=True)
class Speed:
    """Seconds on one process, medians over `rounds`."""

    batch_size: int  # pictures of a forward
    forward_s: float  # one forward and backward, normalising and mixing included
    update_s: float  # what follows the forwards of an update: clipping, the optimizer, the average of the weights
    rounds: int

    def run_s(self, *, pictures: int, updates: int) -> float:
        """Seconds for so many pictures on this process in so many updates; the reading of pictures not included."""
        return self.forward_s * pictures / self.batch_size + self.update_s * updates


def measure_speed(
    method: Method,
    optimizer: torch.optim.Optimizer,
    make_batch: Callable[[int], Batch],
    *,
    accelerator: Accelerator,
    clip_norm: float | None,
    ema_decay: float | None,
    seconds: float,
) -> Speed:
    """The steps of train.fit's loop, timed for at most about `seconds`, and for two rounds at least.

    make_batch: the batch of a round, prepared as the loop does between loader and method. The first round, in which
    memory is taken and kernels are chosen, does not count. Without torch.compile."""
    method.train()
    wrapped, prepared = accelerator.prepare(method, optimizer)
    if accelerator.scaler is not None:
        optimizer = prepared
    set_lr(optimizer, TINY_LR)
    parameters = [p for p in method.parameters() if p.requires_grad]
    ema = None if ema_decay is None else Ema(method, decay=ema_decay)
    progress = Progress(step=0, total_steps=1, epoch=0.0, total_epochs=1.0)
    forwards, updates, pictures = [], [], 0
    deadline = time.perf_counter() + seconds
    while len(forwards) <= AT_MOST_UPDATES:
        with _timed(forwards, accelerator.device):
            batch = make_batch(len(forwards))
            seed_forward(0, len(forwards), 0)
            accelerator.backward(wrapped(batch, progress).loss)
        with _timed(updates, accelerator.device):
            if clip_norm is not None:
                accelerator.unscale_gradients()
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(progress)
            if ema is not None:
                ema.update(0)
        pictures = len(batch.index)
        if len(forwards) > 1 and time.perf_counter() + forwards[-1] + updates[-1] > deadline:
            break
    return Speed(
        batch_size=pictures,
        forward_s=statistics.median(forwards[1:]),
        update_s=statistics.median(updates[1:]),
        rounds=len(forwards) - 1,
    )


def matrix_gflops(dtype: torch.dtype, device: torch.device) -> float:
    """10^9 operations a second of a product of two square matrices: more than any model reaches."""
    left = torch.ones(MATRIX, MATRIX, dtype=dtype, device=device)
    seconds: list[float] = []
    for _ in range(3):
        with _timed(seconds, device):
            left @ left
    return 2 * MATRIX**3 / 1e9 / min(seconds)


@contextmanager
def _timed(into: list[float], device: torch.device) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    into.append(time.perf_counter() - begun)
