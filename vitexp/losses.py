"""Losses as plain functions of logits and targets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def classification_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of logits (b, k) with class numbers (b,) or probabilities (b, k), in float32.

    Smoothing spreads its share evenly over all k classes, the right one included (torch's and timm's convention)."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
