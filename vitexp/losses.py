"""Losses as plain functions of logits and targets."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vitexp.errors import UserError, nearest

Distillation = Literal["hard", "soft", "soft_deit"]
Objective = Literal["cross_entropy", "binary"]


def classification_loss(
    logits: Tensor, targets: Tensor, *, objective: Objective = "cross_entropy", label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross entropy of logits (b, k) with class numbers (b,) or probabilities (b, k), in float32.

    Smoothing spreads its share evenly over all k classes, the right one included (torch's and timm's convention).
    binary: see binary_loss, which knows no smoothing: it would make every class a right one."""
    if objective == "binary":
        return binary_loss(logits, targets)
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def binary_loss(logits: Tensor, targets: Tensor, *, binarize: bool = True) -> Tensor:
    """Mean over batch and classes of the binary cross entropy, in float32: each class is a question of its own.

    Every class with a share in a picture is right there, however small: of two mixed pictures both (DeiT III,
    arXiv:2204.07118; Wightman et al. 2021, arXiv:2110.00476), or with binarize=False by that share alone. Targets as
    those of classification_loss."""
    logits = logits.float()
    right = F.one_hot(targets, logits.shape[1]) if targets.ndim == 1 else targets
    right = right > 0 if binarize else right
    return F.binary_cross_entropy_with_logits(logits, right.to(logits))


def check_objective(objective: str, *, label_smoothing: float) -> None:
    """Raises UserError for one that is not there, or that the smoothing would spoil."""
    if objective not in get_args(Objective):
        known = get_args(Objective)
        raise UserError(f"method.loss={objective} is not one of {', '.join(known)}.{nearest(objective, known)}")
    if objective == "binary" and label_smoothing:
        raise UserError(
            f"method.loss=binary: with method.label_smoothing={label_smoothing} every class would be right; set it to 0"
        )


def soft_target_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of -sum(targets * log softmax(logits)), in float32.

    logits (m * b, ..., k) are m copies of a batch, one after the other, with targets (b, ..., k), which may have 1
    where what stands there shares a target. Targets need not sum to 1: those of smoothed token labels do not."""
    log_probabilities = F.log_softmax(logits.float(), dim=-1).unflatten(0, (-1, len(targets)))
    return -(targets * log_probabilities).sum(-1).mean()


def token_label_loss(
    cls_logits: Tensor,
    token_logits: Tensor,
    cls_targets: Tensor,
    token_targets: Tensor,
    *,
    cls_weight: float = 1.0,
    token_weight: float = 0.5,
) -> Tensor:
    """Weighted sum of the class token's loss, (b, k), and the mean of the patch tokens', (b, n, k).

    Token targets (b, 1, k) are the same for all tokens of a picture. The token's weight is the paper's
    (arXiv:2104.10858); the official code's default is 1."""
    cls_loss, token_loss = soft_target_loss(cls_logits, cls_targets), soft_target_loss(token_logits, token_targets)
    return cls_weight * cls_loss + token_weight * token_loss


def with_ground_truth(cls_targets: Tensor, ground_truth: Tensor) -> Tensor:
    """(b, k) a teacher's labels mixed with the ground truth's: half of each where both name the same class.

    Where they differ 0.9 is the teacher's, as the official code does, and not as its comment says."""
    agree = cls_targets.argmax(1, keepdim=True) == ground_truth.argmax(1, keepdim=True)
    return torch.lerp(ground_truth, cls_targets, torch.where(agree, 0.5, 0.9))


def distillation_loss(logits: Tensor, teacher: Tensor, *, form: Distillation, temperature: float = 1.0) -> Tensor:
    """How far a student's logits (b, k) are from a teacher's, in float32; nothing flows back into the teacher.

    hard: cross entropy with the class that the teacher finds most likely. soft: temperature² times the mean over the
    batch of KL(teacher, student), both softened by the temperature (Hinton et al. 2015, arXiv:1503.02531). soft_deit:
    the same divided by the number of classes, as the official DeiT code does it. Raises UserError for another form."""
    logits, teacher = logits.float(), teacher.detach().float()
    if form == "hard":
        return F.cross_entropy(logits, teacher.argmax(dim=1))
    check_form(form)
    student, wanted = (F.log_softmax(part / temperature, dim=1) for part in (logits, teacher))
    divergence = F.kl_div(student, wanted, reduction="batchmean", log_target=True) * temperature**2
    return divergence / logits.shape[1] if form == "soft_deit" else divergence


def check_form(form: str) -> None:
    """Raises UserError for a form of distillation that is not there."""
    forms = get_args(Distillation)
    if form not in forms:
        raise UserError(f"method.form={form} is not one of {', '.join(forms)}.{nearest(str(form), forms)}")
