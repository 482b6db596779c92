"""Exact classification figures from a stream of batches: counted on the device, summed over ranks once, read once.

Every figure is a fraction in 0..1, never a percentage, and the loss is the mean natural-log cross entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CalibrationBins:
    """Pictures by the probability of the predicted class in equal bins (low, high] of 0 to 1. All tensors (bins,)."""

    count: Tensor  # int64 pictures with finite logits
    right: Tensor  # int64 of them predicted right
    confidence: Tensor  # float64, their mean probability; nan in an empty bin

    @property
    def ece(self) -> float:
        """Expected calibration error: |accuracy - confidence|, a mean over pictures. Guo et al. 2017, section 2,
        arXiv:1706.04599; nan of no pictures."""
        gaps = (self.right.double() - self.count * self.confidence).abs()
        return _ratio(gaps[self.count > 0].sum().item(), int(self.count.sum()))


@dataclass(frozen=True)
class ClassificationScores:
    """What a ClassificationMeter found, in float64. Figures of nothing (no pictures, an absent class) are nan."""

    count: int  # labelled pictures, the denominator of top-k and loss
    unlabelled: int  # pictures with a negative class number: in no figure
    out_of_range: int  # pictures whose class number is not below the number of classes: in no figure
    non_finite: int  # labelled pictures with a nan or infinite logit: wrong at every k, and they make the loss nan
    loss: float
    topk: dict[int, float]  # k -> share of pictures whose class is among the k best
    per_class_accuracy: Tensor  # (k,) top-1 within each class
    mean_class_accuracy: float  # mean of the above over the classes that occur
    class_counts: Tensor  # (k,) int64, labelled pictures of each class
    calibration: CalibrationBins | None  # None when it was not asked for
    confusion: Tensor | None  # (k, k) int64, true class by predicted class; non-finite pictures are in no cell

    @property
    def ece(self) -> float | None:
        """Expected calibration error, None when it was not asked for."""
        return None if self.calibration is None else self.calibration.ece


class ClassificationMeter:
    """Sums over batches of logits from which all classification figures follow. Never waits for the device before
    `scores`.

    Ties have one answer on every device: of equal logits the lower class number ranks first, as torch.argmax has it.
    So a constant predictor has the top-5 of the first five classes, whatever torch.topk would have picked.
    For k above the number of classes, top-k counts every picture with finite logits.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        topk: Sequence[int] = (1, 5),
        calibration: bool = True,
        confusion: bool = True,
        bins: int = 15,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_classes, self.topk, self.bins = num_classes, tuple(topk), bins
        device = torch.device(device)
        real = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._classes = torch.arange(num_classes, device=device)
        self._sums = {
            "seen": zeros(4),  # labelled, unlabelled, out of range, non-finite
            "right": zeros(len(self.topk)),
            "class_count": zeros(num_classes),
            "class_right": zeros(num_classes),
            "loss": zeros(1, dtype=real),
        }
        if confusion:
            self._sums["confusion"] = zeros(num_classes * num_classes)
        if calibration:
            self._sums |= {
                "bin_count": zeros(bins),
                "bin_right": zeros(bins),
                "bin_confidence": zeros(bins, dtype=real),
            }

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits (b, k) of any float type, targets (b,) class numbers, negative where unknown."""
        assert logits.shape == (*targets.shape, self.num_classes), (logits.shape, targets.shape)
        sums = self._sums
        logits = logits.detach().float()
        labelled = (targets >= 0) & (targets < self.num_classes)
        finite = torch.isfinite(logits).all(dim=1)
        counted = labelled & finite
        # Rows that count for nothing are made harmless instead of being cut out: a cut waits for the device.
        logits = torch.where(finite[:, None], logits, 0.0)
        classes = targets.clamp(0, self.num_classes - 1)

        own = logits.gather(1, classes[:, None])
        ahead = ((logits > own) | ((logits == own) & (self._classes < classes[:, None]))).sum(dim=1)
        sums["seen"] += torch.stack(
            [labelled.sum(), (targets < 0).sum(), (targets >= self.num_classes).sum(), (labelled & ~finite).sum()]
        )
        sums["right"] += torch.stack([((ahead < k) & counted).sum() for k in self.topk])
        right = (ahead == 0) & counted
        sums["class_count"].index_add_(0, classes, labelled.long())
        sums["class_right"].index_add_(0, classes, right.long())

        loss = F.cross_entropy(logits, classes, reduction="none").to(sums["loss"].dtype)
        sums["loss"] += torch.where(labelled, torch.where(finite, loss, torch.nan), 0.0).sum()

        if "confusion" in sums:
            sums["confusion"].index_add_(0, classes * self.num_classes + logits.argmax(dim=1), counted.long())
        if "bin_count" in sums:
            confidence = logits.softmax(dim=1).amax(dim=1)
            bin_of = ((confidence * self.bins).ceil().long() - 1).clamp(0, self.bins - 1)  # (low, high]
            inside = (bin_of[:, None] == torch.arange(self.bins, device=logits.device)) & counted[:, None]
            sums["bin_count"] += inside.sum(dim=0)
            sums["bin_right"] += (inside & right[:, None]).sum(dim=0)
            sums["bin_confidence"] += (inside * confidence[:, None]).sum(dim=0, dtype=sums["loss"].dtype)

    def merge(self, other: ClassificationMeter) -> None:
        """Add what another meter of the same shape has counted."""
        self.load(self.flat() + other.flat().to(self._classes.device))

    def flat(self) -> Tensor:
        """All sums as one float64 vector: add the ranks' vectors with one all-reduce, then `load` the total.
        Counts stay exact up to 2^53 pictures."""
        return torch.cat([part.double() for part in self._sums.values()])

    def load(self, flat: Tensor) -> None:
        """Take the sums of a vector made by `flat`."""
        parts = flat.split([part.numel() for part in self._sums.values()])
        for own, part in zip(self._sums.values(), parts, strict=True):
            own.copy_(part)

    def scores(self) -> ClassificationScores:
        """The figures of everything counted so far, in float64. Waits for the device."""
        sums = {name: part.cpu() for name, part in self._sums.items()}
        count, unlabelled, out_of_range, non_finite = sums["seen"].tolist()
        class_count = sums["class_count"]
        per_class = sums["class_right"].double() / class_count.double()  # 0 / 0 is nan: the class does not occur
        bins = None
        if "bin_count" in sums:
            confidence = sums["bin_confidence"].double() / sums["bin_count"].double()
            bins = CalibrationBins(count=sums["bin_count"], right=sums["bin_right"], confidence=confidence)
        return ClassificationScores(
            count=count,
            unlabelled=unlabelled,
            out_of_range=out_of_range,
            non_finite=non_finite,
            loss=_ratio(sums["loss"].item(), count),
            topk={k: _ratio(right, count) for k, right in zip(self.topk, sums["right"].tolist(), strict=True)},
            per_class_accuracy=per_class,
            mean_class_accuracy=per_class[class_count > 0].mean().item(),  # of none is nan
            class_counts=class_count,
            calibration=bins,
            confusion=sums["confusion"].view(self.num_classes, -1) if "confusion" in sums else None,
        )


def _ratio(total: float, count: int) -> float:
    return total / count if count else float("nan")


def class_of(targets: Tensor) -> Tensor:
    """(b,) the class of each picture, of targets (b, k) that are mixed the one with the largest share."""
    return targets if targets.ndim == 1 else targets.argmax(1)


def batch_top1(logits: Tensor, classes: Tensor) -> Tensor:
    """Scalar: the share of logits (b, k) that are largest at their class (b,), for the log of training."""
    return (logits.detach().argmax(1) == classes).float().mean()
