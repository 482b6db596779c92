"""What a run carries from one update to the next: exactly what a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitexp.ema import Ema


@dataclass
class Tally:
    """Sums since the last logged row, kept on the device: reading them at every step would stall a GPU."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def means(self, *, prefix: str) -> dict[str, float]:
        """Means over the updates counted and over the ranks, read from the device; then it starts again."""
        values = torch.stack([value.float() for value in self.sums.values()])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(values)
            values /= dist.get_world_size()
        values = values.double().cpu() / max(self.updates, 1)
        found = {f"{prefix}{name}": value for name, value in zip(self.sums, values.tolist(), strict=True)}
        self.sums, self.updates = {}, 0
        return found


@dataclass
class State:
    """A run's moving parts. step counts the updates made."""

    method: nn.Module  # the bare module, without DDP
    optimizer: Any  # Accelerate's wrapper
    ema: Ema | None
    scaler: Any | None  # of fp16's gradients
    step: int = 0
    tally: Tally = field(default_factory=Tally)
    best: dict[str, float] = field(default_factory=dict)
    data: dict[str, Tensor] = field(default_factory=dict)  # Source.digests(), for telling at a resume what has changed
    evaluated: bool = True  # False while the evaluation due after the last update has not been recorded

    def to_checkpoint(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "tally": {"sums": self.tally.sums, "updates": self.tally.updates},
            "best": self.best,
            "data": self.data,
            "evaluated": self.evaluated,
        }

    def restore(self, saved: dict[str, Any], device: torch.device) -> None:
        """Takes over what to_checkpoint() returned; check_compatible has found that it fits."""
        self.method.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"] if saved["ema"] is not None else saved["model"])
        if self.scaler is not None and saved["scaler"] is not None:
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.best, self.evaluated = saved["step"], saved["best"], saved["evaluated"]
        sums = {name: value.to(device) for name, value in saved["tally"]["sums"].items()}
        self.tally = Tally(sums, saved["tally"]["updates"])
