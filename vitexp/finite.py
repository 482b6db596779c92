"""A loss that is not finite stops the run before the update it would have made, and says with which pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from vitexp.errors import UserError


class FiniteGuard:
    """Asked once an update, between the backward passes and the optimizer's step.

    On a CPU the loss is read at once. On a GPU that would stall it every step, so a fused optimizer is told through its
    `found_inf` input to leave the weights as they are from the first bad update on, and the host finds out at the next
    logged row. An optimizer without that input is checked at once everywhere."""

    def __init__(self, optimizer: Optimizer, *, deferred: bool, names: Sequence[str]) -> None:
        self.optimizer, self.names = optimizer, names
        self.deferred = deferred and getattr(optimizer, "_step_supports_amp_scaling", False)
        self._found: Tensor | None = None
        self._losses: list[tuple[int, Tensor, Tensor]] = []  # (step, loss, picture numbers) not looked at yet

    def admit(self, step: int, loss: Tensor, index: Tensor) -> None:
        """Raises UserError, or sees to it that the optimizer changes nothing, when any rank's loss is not finite."""
        finite = torch.isfinite(loss)
        if dist.is_initialized() and dist.get_world_size() > 1:
            shared = finite.to(torch.int32)
            dist.all_reduce(shared, op=dist.ReduceOp.MIN)
            finite = shared.bool()
        self._losses.append((step, loss, index))
        if not self.deferred:
            if not finite:
                self._raise()
            self._losses.clear()
            return
        bad = (~finite).to(torch.float32).reshape(())
        self._found = bad if self._found is None else torch.maximum(self._found, bad)
        self.optimizer.found_inf = self._found  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def look(self) -> None:
        """Raises UserError if a loss since the last look was not finite. Reads the device: call it when logging."""
        if self._found is not None and self._found.item():
            self._raise()
        self._losses.clear()

    def check_weights(self, parameters: Sequence[Tensor], step: int) -> None:
        """Raises UserError rather than let a checkpoint with non-finite weights replace a good one."""
        norms = torch._foreach_norm([p.detach() for p in parameters], math.inf)
        if not torch.isfinite(torch.stack([n.to(norms[0].device) for n in norms]).max()):
            raise UserError(
                f"weights are not finite after step {step}: not saved, the previous checkpoint is kept\n"
                "a lower optim.lr, train.clip_norm=1 or runtime.precision=fp32 may help"
            )

    def _raise(self) -> None:
        # A rank whose own loss is fine names the step all the same: another rank's was not.
        step, loss, index = next((x for x in self._losses if not torch.isfinite(x[1])), self._losses[0])
        pictures = [self.names[i] for i in index.flatten().tolist()]
        more = f" and {len(pictures) - 5} more" if len(pictures) > 5 else ""
        raise UserError(
            f"train/loss is {loss.item():g} at step {step + 1}: stopped before the weights were touched\n"
            f"pictures of this step: {', '.join(pictures[:5])}{more}\n"
            "a lower optim.lr, a longer schedule.warmup_epochs, train.clip_norm=1 or runtime.precision=fp32 may help"
        )
