from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vitexp.metrics import ClassificationMeter, ClassificationScores


def measure(logits: np.ndarray, targets: np.ndarray, sizes: list[int], **options) -> ClassificationScores:
    meter = ClassificationMeter(logits.shape[1], **options)
    start = 0
    for size in sizes:
        chunk = slice(start, start + size)
        meter.add(torch.from_numpy(logits[chunk]), torch.from_numpy(targets[chunk]))
        start += size
    assert start == len(logits)
    return meter.scores()


def random_case(seed: int, count: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, num_classes)).astype(np.float32)
    targets = rng.integers(0, max(1, num_classes - 1), count)  # the last class never occurs
    logits[np.arange(count), targets] += 1.5
    logits[::3] *= 0.05  # some say next to nothing, as far as the lowest bins of calibration
    return logits, targets


def slow_scores(logits: np.ndarray, targets: np.ndarray, bins: int = 15) -> dict:
    """The same figures one picture at a time."""
    count, num_classes = logits.shape
    confusion = np.zeros((num_classes, num_classes), np.int64)
    right_at = {1: 0, 5: 0}
    loss, binned = 0.0, [[] for _ in range(bins)]
    for row, target in zip(logits.astype(np.float64), targets, strict=True):
        ranking = sorted(range(num_classes), key=lambda c: (-row[c], c))
        for k in right_at:
            right_at[k] += target in ranking[:k]
        confusion[target, ranking[0]] += 1
        shares = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        loss -= math.log(shares[target])
        edge = next(b for b in range(bins) if shares.max() <= (b + 1) / bins + 1e-12)
        binned[edge].append((ranking[0] == target, shares.max()))
    ece = sum(len(b) / count * abs(np.mean([r for r, _ in b]) - np.mean([c for _, c in b])) for b in binned if b)
    per_class = [confusion[c, c] / n if (n := (targets == c).sum()) else math.nan for c in range(num_classes)]
    return {
        "topk": {k: n / count for k, n in right_at.items()},
        "loss": loss / count,
        "confusion": confusion,
        "per_class": np.array(per_class),
        "mean_class": np.nanmean(per_class),
        "ece": ece,
        "bins": [(len(b), sum(r for r, _ in b), np.mean([c for _, c in b]) if b else math.nan) for b in binned],
    }


@pytest.mark.parametrize("num_classes", [2, 3, 10, 300])
def test_figures_equal_the_slow_version_over_ragged_batches(num_classes):
    logits, targets = random_case(num_classes, 211, num_classes)
    got, want = measure(logits, targets, [64, 1, 100, 46]), slow_scores(logits, targets)
    assert got.count == 211
    assert got.topk == pytest.approx(want["topk"], abs=1e-15)
    assert got.loss == pytest.approx(want["loss"], rel=1e-6)
    assert got.ece == pytest.approx(want["ece"], abs=1e-6)
    bins = got.calibration
    np.testing.assert_allclose(np.stack([bins.count, bins.right, bins.confidence], axis=1), want["bins"], rtol=1e-6)
    np.testing.assert_array_equal(got.confusion.numpy(), want["confusion"])
    np.testing.assert_allclose(got.per_class_accuracy.numpy(), want["per_class"], rtol=1e-15)
    assert got.mean_class_accuracy == pytest.approx(want["mean_class"], rel=1e-14)
    np.testing.assert_array_equal(got.class_counts.numpy(), np.bincount(targets, minlength=num_classes))


def test_top5_of_fewer_than_five_classes_counts_every_picture():
    assert measure(*random_case(0, 30, 3), [30]).topk[5] == 1.0


def test_merged_parts_equal_the_whole():
    logits, targets = map(torch.from_numpy, random_case(7, 150, 12))
    whole, left, right = (ClassificationMeter(12) for _ in range(3))
    whole.add(logits, targets)
    left.add(logits[:37], targets[:37])
    for start in range(37, 150, 20):
        right.add(logits[start : start + 20], targets[start : start + 20])
    left.merge(right)
    a, b = whole.scores(), left.scores()
    assert a.topk == b.topk
    assert a.count == b.count == 150
    assert torch.equal(a.confusion, b.confusion)
    assert a.loss == pytest.approx(b.loss, rel=1e-12)
    assert a.ece == pytest.approx(b.ece, rel=1e-12)
    np.testing.assert_array_equal(a.per_class_accuracy, b.per_class_accuracy)


def test_a_rank_without_pictures_changes_nothing_in_the_sum():
    logits, targets = map(torch.from_numpy, random_case(3, 20, 4))
    busy, idle, total = (ClassificationMeter(4) for _ in range(3))
    busy.add(logits, targets)
    total.load(busy.flat() + idle.flat())
    assert total.scores().topk == busy.scores().topk
    assert total.scores().loss == busy.scores().loss


def test_a_constant_predictor_has_no_luck_with_ties():
    targets = torch.arange(10).repeat_interleave(3)
    meter = ClassificationMeter(10)
    meter.add(torch.zeros(30, 10), targets)
    scores = meter.scores()
    assert scores.topk == {1: 0.1, 5: 0.5}
    assert scores.confusion[:, 0].sum() == 30
    assert scores.ece == pytest.approx(0.0, abs=1e-7)  # says 10 %, is right in 10 %


def test_ties_agree_between_top1_and_confusion_in_low_precision():
    torch.manual_seed(0)
    logits = torch.randn(500, 6).bfloat16().mul(2).round().div(2)  # many equal logits
    targets = torch.randint(6, (500,))
    meter = ClassificationMeter(6)
    meter.add(logits, targets)
    scores = meter.scores()
    assert scores.topk[1] == pytest.approx(scores.confusion.diagonal().sum().item() / 500)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_logit_is_never_right(bad):
    logits, targets = torch.eye(6).mul(5), torch.arange(6)
    logits[2, 2] = logits[4, 0] = bad
    meter = ClassificationMeter(6)
    meter.add(logits, targets)
    scores = meter.scores()
    assert scores.topk == pytest.approx({1: 4 / 6, 5: 4 / 6})
    assert scores.non_finite == 2
    assert math.isnan(scores.loss)
    assert scores.confusion.sum() == 4
    assert scores.per_class_accuracy.tolist() == [1, 1, 0, 1, 0, 1]


def test_pictures_without_a_usable_class_are_counted_apart():
    logits, targets = random_case(5, 40, 5)
    want = measure(logits, targets, [40])
    padded = np.concatenate([targets, [-1, -1, 5]])
    got = measure(np.concatenate([logits, logits[:3]]), padded, [43])
    assert (got.unlabelled, got.out_of_range, got.count) == (2, 1, 40)
    assert (got.topk, got.loss, got.ece) == (want.topk, want.loss, want.ece)


def test_nothing_counted_gives_nan_not_an_error():
    scores = ClassificationMeter(3).scores()
    assert all(math.isnan(x) for x in (scores.loss, scores.topk[1], scores.mean_class_accuracy, scores.ece))


def test_confusion_and_calibration_can_be_left_out():
    scores = measure(*random_case(1, 20, 4), [20], confusion=False, calibration=False)
    assert scores.confusion is None
    assert scores.ece is scores.calibration is None
    assert scores.topk == measure(*random_case(1, 20, 4), [20]).topk
