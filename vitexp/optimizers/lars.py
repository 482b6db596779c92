"""LARS as MAE's linear probe uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """Momentum SGD whose step on every weight of two or more dimensions is scaled to the weight's own norm.

    arXiv:1708.03888 as MAE's linear probe has it: weight decay joins the gradient before scaling, and parameters of
    one dimension get neither decay nor scaling, whatever their group says. timm's Lars differs: without weight decay it
    scales nothing, which is plain SGD. Needs a large lr (MAE: 0.1 per 256 pictures), as a step is trust_coefficient
    times the weight's norm.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        if lr < 0 or weight_decay < 0 or trust_coefficient <= 0 or not 0 <= momentum < 1:
            raise ValueError(
                f"lr={lr}, weight_decay={weight_decay}, trust_coefficient={trust_coefficient}, momentum={momentum}: "
                "needs lr and weight_decay >= 0, trust_coefficient > 0, 0 <= momentum < 1"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update; the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    update = update * _trust_ratio(parameter, update, group["trust_coefficient"])
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(buffer, alpha=-group["lr"])
        return loss


def _trust_ratio(parameter: Tensor, update: Tensor, trust_coefficient: float) -> Tensor:
    """A scalar left on the device: reading it here would wait for the GPU at every parameter."""
    weight_norm, update_norm = parameter.norm(), update.norm()
    ratio = trust_coefficient * weight_norm / update_norm
    return torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))
