"""Supervised classification: the backbone's logits against the class."""

from __future__ import annotations

from torch import nn

from vitexp.losses import classification_loss
from vitexp.types import Batch, Method, Progress, StepOutput


class Supervised(Method):
    """Cross entropy of the backbone's logits with the class, or with a mixture of classes."""

    def __init__(self, backbone: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        logits = self.backbone(batch.images)
        loss = classification_loss(logits, batch.targets, label_smoothing=self.label_smoothing)
        hard = batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(1)
        return StepOutput(loss, {"top1": (logits.detach().argmax(1) == hard).float().mean()})
