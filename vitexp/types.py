"""What travels between the parts: one batch in, one step's result out, and where in training we are.

Letters used in tensor comments: b batch, n tokens, d width, c channels, h w picture size, k classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class LabelMaps:
    """Of each picture of a batch, what a teacher saw where: its largest logits in each of h x w cells, and where the
    crop shown lies among them. See vitexp.data.token_labels, which makes targets of these."""

    values: Tensor  # (b, k, h, w) float16 logits; 0 where nothing of the picture is
    numbers: Tensor  # (b, k, h, w) int32 classes that they belong to
    boxes: Tensor  # (b, 4) float32 top, left, height, width of the crop, in fractions of the map; stays on the CPU
    mirrored: Tensor  # (b,) bool: the crop was then turned from left to right; stays on the CPU
    lam: float = 1.0  # the share that each picture kept when the batch was mixed, the rest being that of b - 1 - i


@dataclass(frozen=True)
class Batch:
    """Pictures of one step. uint8 as the loader makes it, normalised floats from the moment it is on the device."""

    images: Tensor  # (b, c, h, w)
    targets: Tensor  # (b,) class numbers, or (b, k) probabilities after mixing; -1 where a picture has no label
    index: Tensor  # (b,) position of each picture in its split: names it in errors, counts it once in metrics
    maps: LabelMaps | None = None  # where train.token_labels names a store, in training


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

    def train(self, mode: bool = True) -> Method:
        """As torch's, but what is frozen stays in eval mode: no dropout, drop path or moving statistics there."""
        super().train(mode)
        for module in self.modules() if mode else ():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        for module in self._between_frozen() if mode else ():
            module.eval()
        return self

    def _between_frozen(self) -> Iterator[nn.Module]:
        """What has no parameters, nothing trainable before it and something frozen after it, as pos_drop in a probe."""
        waiting: list[nn.Module] = []
        for module in self.modules():
            own = list(module.parameters(recurse=False))
            if any(parameter.requires_grad for parameter in own):
                return
            if own:
                yield from waiting
                waiting = []
            elif not any(True for _ in module.parameters()):
                waiting.append(module)

    def logits(self, images: Tensor) -> Tensor:
        """(b, k) what the classifier being learned says of pictures; UserError where the method learns none."""
        return self.backbone(images)

    @property
    def has_classifier(self) -> bool:
        """Whether `logits` has an answer."""
        return True

    @property
    def whole(self) -> nn.Module | None:
        """What weights to start from are loaded into where it is more than the backbone, such as with its decoder."""
        return None

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What is kept beside the exported backbone, each as <name>.safetensors, to evaluate or go on with."""
        return {}

    def clipped(self) -> list[nn.Parameter]:
        """Those whose gradients make up the global norm that train.clip_norm bounds."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def countable(self) -> Method:
        """This method, or one of the same modules and arithmetic whose forward works on tensors without values."""
        return self

    def after_step(self, progress: Progress) -> None:
        """Called after every update; a teacher would move here."""


@dataclass(frozen=True)
class Features:
    """What a backbone's encode() returns, after its last norm where it has one before pooling."""

    cls: Tensor | None  # (b, d), None for a backbone without class token
    patches: Tensor  # (b, n, d) in raster order of the patches given


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator found. Metrics carry no split in their names: the caller adds `val/`."""

    metrics: dict[str, float]
    arrays: dict[str, np.ndarray]
    count: int  # pictures the figures stand on, over all ranks: equals the size of the split when each counted once


class Evaluator(Protocol):
    """Measures a method as it is. `batches("val")` and `batches("train")` walk a split in order without augmentation:
    this rank's share, normalised and on the device, each picture once over all ranks; shares may differ in length."""

    needs_labels: ClassVar[bool]
    reads_logits: ClassVar[bool]  # asks the method for its classifier's
    reads_train: ClassVar[bool]  # asks for batches("train"), too

    def __call__(
        self,
        method: Method,
        batches: Callable[[str], Iterable[Batch]],
        accelerator: Accelerator,
        classes: Sequence[str],
    ) -> Evaluation: ...
