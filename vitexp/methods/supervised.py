"""Supervised classification: the backbone's logits against the class."""

from __future__ import annotations

from torch import nn

from vitexp.losses import Objective, check_objective, classification_loss
from vitexp.metrics import batch_top1, class_of
from vitexp.types import Batch, Method, Progress, StepOutput


class Supervised(Method):
    """Loss of the backbone's logits with the class, or with a mixture of classes; see losses.classification_loss."""

    def __init__(self, backbone: nn.Module, *, loss: Objective = "cross_entropy", label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_objective(loss, label_smoothing=label_smoothing)
        self.backbone = backbone
        self.loss: Objective = loss
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        logits = self.backbone(batch.images)
        loss = classification_loss(logits, batch.targets, objective=self.loss, label_smoothing=self.label_smoothing)
        return StepOutput(loss, {"top1": batch_top1(logits, class_of(batch.targets))})
