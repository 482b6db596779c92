"""Top-k accuracy, loss, per-class accuracy, calibration and the confusion matrix of a classifier on one split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from vitexp.errors import UserError
from vitexp.metrics import ClassificationMeter
from vitexp.types import Batch, Evaluation, Method

# The matrix is (k, k) int64 on the device and once more in the all-reduce: 32 MB at this size, 3.8 GB for ImageNet-21k.
CONFUSION_LIMIT = 2048


class Classification:
    """Evaluator of class predictions. `topk` names the metrics top1, top5, ...; `calibration` adds ece; `prefix` stands
    before every name, as probe_ in probe_top1."""

    needs_labels: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = True
    reads_train: ClassVar[bool] = False

    def __init__(self, *, topk: Sequence[int] = (1, 5), calibration: bool = True, prefix: str = "") -> None:
        if not topk or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in topk):
            raise UserError(f"evaluators.classification.topk={list(topk)}: allowed are whole numbers from 1, as [1, 5]")
        self.topk, self.calibration, self.prefix = tuple(topk), calibration, prefix

    def __call__(
        self,
        method: Method,
        batches: Callable[[str], Iterable[Batch]],
        accelerator: Accelerator,
        classes: Sequence[str],
    ) -> Evaluation:
        """Metrics top1, top5, mean_class_accuracy, ece as fractions 0..1 and loss in nats; arrays confusion (true by
        predicted, up to 2048 classes), per_class_accuracy (nan where a class does not occur), counts, and calibration:
        rows of pictures, right ones and mean confidence (nan of none) in equal bins of confidence.

        The method gives logits (b, classes). Raises UserError for pictures without a class or with one the model
        lacks, and for an empty split."""
        meter = ClassificationMeter(
            len(classes),
            topk=self.topk,
            calibration=self.calibration,
            confusion=len(classes) <= CONFUSION_LIMIT,
            device=accelerator.device,
        )
        with evaluation_mode(method):
            for batch in batches("val"):
                # Not around the loop: what the loader makes and keeps must not become an inference tensor.
                with torch.inference_mode(), accelerator.autocast():
                    logits = method.logits(batch.images)
                    if logits.shape[-1] != len(classes):
                        raise UserError(f"the model has {logits.shape[-1]} outputs, the data {len(classes)} classes")
                    meter.add(logits, batch.targets)
        if accelerator.num_processes > 1:
            meter.load(accelerator.reduce(meter.flat(), reduction="sum"))

        scores = meter.scores()
        if scores.unlabelled:
            raise UserError(
                f"{scores.unlabelled} of {scores.count + scores.unlabelled + scores.out_of_range} pictures to evaluate "
                "have no class: classification needs a labelled split; evaluators=none trains without"
            )
        if scores.out_of_range:
            raise UserError(
                f"{scores.out_of_range} pictures have a class number above {len(classes) - 1}, the last one"
            )
        if not scores.count:
            raise UserError("there are no pictures to evaluate: the split is empty; evaluators=none trains without")

        metrics = {f"top{k}": share for k, share in scores.topk.items()}
        metrics |= {"loss": scores.loss, "mean_class_accuracy": scores.mean_class_accuracy}
        bins = scores.calibration
        if bins is not None:
            metrics["ece"] = bins.ece
        arrays = {"per_class_accuracy": scores.per_class_accuracy.numpy(), "counts": scores.class_counts.numpy()}
        if bins is not None:
            arrays["calibration"] = np.stack([part.numpy() for part in (bins.count, bins.right, bins.confidence)])
        if scores.confusion is not None:
            arrays["confusion"] = scores.confusion.numpy()
        return Evaluation(
            metrics={self.prefix + name: value for name, value in metrics.items()},
            arrays={self.prefix + name: value for name, value in arrays.items()},
            count=scores.count,
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, each in its own former mode afterwards: a linear probe trains its head while
    its backbone stays in eval mode, which `model.train()` would undo."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
