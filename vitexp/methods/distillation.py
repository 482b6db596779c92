"""Distillation: a student learns the class and what a teacher says of the same picture (DeiT, arXiv:2012.12877)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.losses import Distillation as Form
from vitexp.losses import Objective, check_form, check_objective, classification_loss, distillation_loss
from vitexp.metrics import batch_top1, class_of
from vitexp.types import Batch, Method, Progress, StepOutput


class Distillation(Method):
    """(1 - alpha) times the loss of the class plus alpha times that of the teacher's word; see losses.

    A model with a distillation token learns the class by its class token's classifier and the teacher's word by the
    other's; any other model by its only one. `teacher` gives logits (b, k) of the batch as the student sees it; it is
    no part of the method: neither trained nor saved nor counted. Without one the method evaluates, and with alpha=0 it
    learns the class alone, by the class token's classifier.
    Raises UserError for what does not fit together."""

    def __init__(
        self,
        backbone: Any,
        *,
        teacher: Any = None,  # a module, for which the settings have a name
        form: Form = "hard",
        alpha: float = 0.5,
        temperature: float = 1.0,
        loss: Objective = "cross_entropy",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_form(form)
        check_objective(loss, label_smoothing=label_smoothing)
        self.num_classes: int = backbone.num_classes
        if not self.num_classes:
            raise UserError("method=distillation: there are no classes to learn")
        self.backbone = backbone
        self._aside: tuple[nn.Module | None] = (teacher,)  # in a tuple torch does not take it for a part
        self.form: Form = form
        self.alpha, self.temperature = alpha, temperature
        self.loss: Objective = loss
        self.label_smoothing = label_smoothing

    @property
    def teacher(self) -> nn.Module | None:
        return self._aside[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Distillation:
        """As torch's, which moves and casts; the teacher goes along."""
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def countable(self) -> Distillation:
        """With a teacher that says nothing, at no cost."""
        twin = copy.copy(self)
        twin._aside = (_Silent(self.num_classes),)
        return twin

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        if self.teacher is None and self.alpha > 0:
            raise UserError("method=distillation: without method.teacher there is nobody to learn from")
        logits, distilled = self.both_logits(batch.images)
        of_class = classification_loss(logits, batch.targets, objective=self.loss, label_smoothing=self.label_smoothing)
        classes = class_of(batch.targets)
        top1 = batch_top1(logits, classes)
        if self.teacher is None:
            unasked = 0 * distilled.sum()  # several processes wait for a gradient of every parameter
            return StepOutput(of_class + unasked, {"top1": top1})
        with torch.no_grad():
            taught = self.teacher(batch.images)
        of_teacher = distillation_loss(distilled, taught, form=self.form, temperature=self.temperature)
        metrics = {
            "top1": top1,
            "teacher_top1": batch_top1(taught, classes),
            "agreement": batch_top1(distilled, taught.argmax(1)),
            "distillation_loss": of_teacher.detach(),
        }
        return StepOutput((1 - self.alpha) * of_class + self.alpha * of_teacher, metrics)

    def both_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(b, k) of the classifier that learns the class and of that which learns what the teacher says."""
        backbone: Any = self.backbone
        if getattr(backbone, "distilled", False):
            return backbone.distilled_logits(backbone.encode(backbone.embed(images)))
        logits = backbone(images)
        return logits, logits


class _Silent(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), self.num_classes)
