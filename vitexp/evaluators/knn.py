"""Weighted k-nearest-neighbour classification on the features of a backbone: what they know of the classes before
anything was trained on top of them. Wu et al. 2018 (arXiv:1805.01978), section 3.4."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.evaluators.classification import evaluation_mode
from vitexp.evaluators.features import POOLS, Pool, feature_extractor, gather_rows
from vitexp.models.checks import one_of, positive, whole
from vitexp.types import Batch, Evaluation, Method

SIMILARITIES = 2**25  # held at once: 128 MB of float32, and up to twice that where neighbours tie
TOP5_FROM = 5  # classes


class Knn:
    """Evaluator of frozen features. The k training pictures most similar to a picture vote for their classes, each
    with exp(cosine similarity / temperature).

    `pool`: mean of the patch tokens, the class token, or what the model's own classifier reads (see
    `feature_extractor`). The training split is encoded anew each time and its features (n, d) are held in float32 on
    the device of every rank: 4 GB for ImageNet at width 768."""

    needs_labels: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = False
    reads_train: ClassVar[bool] = True

    def __init__(self, *, k: int = 20, temperature: float = 0.07, pool: Pool = "mean") -> None:
        self.k = whole("evaluators.knn.k", k)
        self.temperature = positive("evaluators.knn.temperature", temperature)
        one_of("evaluators.knn.pool", pool, POOLS)
        self.pool: Pool = pool

    @torch.no_grad()
    def __call__(
        self,
        method: Method,
        batches: Callable[[str], Iterable[Batch]],
        accelerator: Accelerator,
        classes: Sequence[str],
    ) -> Evaluation:
        """Metrics knn_top1 and, from five classes on, knn_top5: fractions 0..1 of the validation pictures. A class
        without a vote is no answer; equal votes go to the lower class number. Of a training split of fewer than k
        pictures all vote.

        Raises UserError for an empty split, and for pictures of either split without one of the classes."""
        extract = feature_extractor(method.backbone, accelerator, pool=self.pool, key="evaluators.knn.pool")
        num_classes, device = len(classes), accelerator.device
        with evaluation_mode(method.backbone):
            bank, labels = _bank(extract, batches("train"), accelerator)
            _check_labels(labels, num_classes, "training")
            found = torch.zeros(3, dtype=torch.int64, device=device)  # pictures, right ones, right among five
            strange = torch.zeros((), dtype=torch.int64, device=device)
            for batch in batches("val"):
                vectors = nn.functional.normalize(extract(batch.images), dim=1)
                strange += ((batch.targets < 0) | (batch.targets >= num_classes)).sum()
                targets = batch.targets.clamp(0, num_classes - 1)
                rows = max(1, SIMILARITIES // len(bank))
                for part, truth in zip(vectors.split(rows), targets.split(rows), strict=True):
                    votes = class_votes(
                        part @ bank.T, labels, num_classes=num_classes, k=self.k, temperature=self.temperature
                    )
                    place = place_of_truth(votes, truth)
                    found += torch.stack([torch.ones_like(place), place < 1, place < 5]).sum(dim=1)
        count, right, among_five, strangers = _sum(torch.cat([found, strange[None]]), accelerator)
        if strangers:
            raise UserError(_STRANGE.format(count=strangers, split="validation", last=num_classes - 1))
        if not count:
            raise UserError("evaluators.knn: there are no validation pictures; evaluators=none trains without")
        metrics = {"knn_top1": right / count}
        if num_classes >= TOP5_FROM:
            metrics["knn_top5"] = among_five / count
        return Evaluation(metrics=metrics, arrays={}, count=count)


_STRANGE = (
    "evaluators.knn: {count} {split} pictures have no class from 0 to {last}: it needs two labelled splits; "
    "evaluators=none trains without"
)


def class_votes(similarity: Tensor, labels: Tensor, *, num_classes: int, k: int, temperature: float) -> Tensor:
    """(b, classes) votes of each picture's k neighbours from their similarities (b, n) and classes (n,).

    Relative to the nearest neighbour's vote, which is 1: exp(1 / 0.01) would be too large for float32."""
    values, positions = nearest_neighbours(similarity, min(k, similarity.shape[1]))
    weights = ((values - values.amax(dim=1, keepdim=True)) / temperature).exp()
    votes = weights.new_zeros(len(weights), num_classes)
    for neighbour in range(weights.shape[1]):  # one after the other: a sum in parallel has no fixed order on a GPU
        column = slice(neighbour, neighbour + 1)
        votes.scatter_add_(1, labels[positions[:, column]], weights[:, column])
    return votes


def nearest_neighbours(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and positions (b, k) of the largest in each row of (b, n), in no fixed order. Of equal ones at the edge
    those that come first are taken; torch's topk takes any."""
    values, positions = similarity.topk(k, dim=1)
    least = values.amin(dim=1, keepdim=True)
    tied = ((similarity == least).sum(dim=1) > (values == least).sum(dim=1)).nonzero()[:, 0]
    if len(tied):
        rows, edge = similarity[tied], least[tied]
        above, equal = ~(rows <= edge), rows == edge  # a nan counts as above, as in topk
        room = k - above.sum(dim=1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
        positions[tied] = chosen.nonzero()[:, 1].view(-1, k)
        values[tied] = rows.gather(1, positions[tied])
    return values, positions


def place_of_truth(votes: Tensor, truth: Tensor) -> Tensor:
    """(b,) how many classes come before the true one; all of them where it has no vote, or votes are nan."""
    own = votes.gather(1, truth[:, None])
    number = torch.arange(votes.shape[1], device=votes.device)
    before = (votes > own) | ((votes == own) & (number < truth[:, None]))
    return torch.where(own[:, 0] > 0, before.sum(dim=1), votes.shape[1])


def _bank(
    extract: Callable[[Tensor], Tensor], batches: Iterable[Batch], accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Unit features (n, d) and classes (n,) of the whole training split in its own order, on every rank."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        vectors = nn.functional.normalize(extract(batch.images), dim=1)
        parts.append((vectors, batch.targets, batch.index.to(accelerator.device)))
    if parts:
        mine = [torch.cat(column) for column in zip(*parts, strict=True)]
    else:  # more ranks than pictures
        nothing = torch.empty(0, 0, device=accelerator.device)
        mine = [nothing, nothing.flatten().long(), nothing.flatten().long()]
    del parts
    bank, classes, positions = (gather_rows(rows, accelerator) for rows in mine)
    if not len(bank):
        raise UserError("evaluators.knn: there are no training pictures to compare with")
    order = positions.argsort()
    return bank[order], classes[order]


def _check_labels(labels: Tensor, num_classes: int, split: str) -> None:
    strange = int(((labels < 0) | (labels >= num_classes)).sum())
    if strange:
        raise UserError(_STRANGE.format(count=strange, split=split, last=num_classes - 1))


def _sum(counts: Tensor, accelerator: Accelerator) -> list[int]:
    total = accelerator.reduce(counts, reduction="sum") if accelerator.num_processes > 1 else counts
    assert isinstance(total, Tensor)
    return [int(value) for value in total.tolist()]
