"""What travels between the parts: one batch in, one step's result out, and where in training we are.

Letters used in tensor comments: b batch, n tokens, d width, c channels, h w picture size, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Pictures of one step. uint8 as the loader makes it, normalised floats from the moment it is on the device."""

    images: Tensor  # (b, c, h, w)
    targets: Tensor  # (b,) class numbers, or (b, k) probabilities after mixing; -1 where a picture has no label
    index: Tensor  # (b,) position of each picture in its split: names it in errors, counts it once in metrics


@dataclass(frozen=True)
class Progress:
    """Where training stands when an update is about to be made. All durations are functions of this alone."""

    step: int  # updates made before this one: 0 for the first
    total_steps: int  # updates of the whole run as configured by train.epochs (train.max_steps only cuts it short)
    epoch: float  # passes over the data before this update, a fraction within an epoch
    total_epochs: float


@dataclass(frozen=True)
class StepOutput:
    """What a method returns for a batch: the loss to minimise and detached numbers worth logging."""

    loss: Tensor  # scalar, mean over the batch
    metrics: dict[str, Tensor] = field(default_factory=dict)  # detached scalars on the device; never .item() here


class Method(nn.Module):
    """A learning objective around one backbone: batch in, loss out. Knows no optimizer, device, file or config."""

    backbone: nn.Module

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        raise NotImplementedError

    def after_step(self, progress: Progress) -> None:
        """Called after every update; a teacher would move here."""


@dataclass(frozen=True)
class Features:
    """What a backbone's encode() returns, after its last norm where it has one before pooling."""

    cls: Tensor | None  # (b, d), None for a backbone without class token
    patches: Tensor  # (b, n, d) in raster order of the patches given
