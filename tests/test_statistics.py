"""The statistics are SciPy's where it has them, and slow obvious versions' where it has not."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import sparse, stats

from vitexp import statistics
from vitexp.statistics import bootstrap_interval, marginal_effects, mcnemar, mean_std, paired_bootstrap


def test_mean_and_std_are_the_samples():
    values = np.random.default_rng(0).normal(3, 2, 7)
    found = mean_std(values)
    assert (found.mean, found.std, found.n) == (pytest.approx(np.mean(values)), pytest.approx(stats.tstd(values)), 7)
    assert mean_std([0.5]).mean == 0.5
    assert math.isnan(mean_std([0.5]).std)
    assert math.isnan(mean_std([]).mean)
    assert math.isnan(mean_std([0.5, math.nan]).mean)


def scipys(data, statistic, *, seed: int, level: float = 0.95, paired: bool = False):
    found = stats.bootstrap(
        data, statistic, n_resamples=999, confidence_level=level, paired=paired, vectorized=False,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return tuple(found.confidence_interval)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_of_a_mean_is_scipys(monkeypatch, level):
    monkeypatch.setattr(statistics, "_AT_ONCE", 1000)  # the draws come in several parts
    monkeypatch.setattr(statistics, "_ROWS_AT_ONCE", 16)
    values = np.random.default_rng(1).lognormal(size=60)
    found = bootstrap_interval(values, level=level, resamples=999, seed=5)
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(scipys((values,), np.mean, seed=5, level=level), rel=1e-9)
    assert found.low < found.value < found.high


def class_mean(right: np.ndarray, label: np.ndarray) -> float:
    return float(np.mean([right[label == k].mean() for k in np.unique(label)]))


def test_the_interval_of_a_mean_class_accuracy_is_scipys():
    rng = np.random.default_rng(2)
    label = rng.choice(3, 90, p=[0.7, 0.2, 0.1])
    right = rng.random(90) < np.array([0.9, 0.5, 0.3])[label]
    mine = np.eye(3)[label]
    columns = np.concatenate([mine * right[:, None], mine], axis=1)

    def statistic(means: np.ndarray) -> np.ndarray:
        return np.nanmean(means[:, :3] / means[:, 3:], axis=1)

    found = bootstrap_interval(columns, statistic, resamples=999, seed=3)
    expected = scipys((right, label), class_mean, seed=3, paired=True)
    assert found.value == pytest.approx(class_mean(right, label), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
    thin = bootstrap_interval(sparse.csr_array(columns), statistic, resamples=999, seed=3)
    assert (thin.low, thin.high) == pytest.approx((found.low, found.high), rel=1e-12)


def test_paired_intervals_of_each_and_of_differences_are_scipys():
    rng = np.random.default_rng(4)
    hard = rng.normal(size=80)
    losses = [hard + rng.exponential(0.3, 80) + shift for shift in (0.0, 0.1, 0.2)]
    found = paired_bootstrap(losses, resamples=999, seed=9)
    for loss, one in zip(losses, found.each, strict=True):
        assert (one.low, one.high) == pytest.approx(scipys((loss,), np.mean, seed=9), rel=1e-9)
    assert list(found.differences) == [(0, 1), (0, 2), (1, 2)]
    for (i, j), between in found.differences.items():
        expected = scipys((losses[i], losses[j]), lambda x, y: np.mean(y) - np.mean(x), seed=9, paired=True)
        assert between.value == pytest.approx(losses[j].mean() - losses[i].mean(), rel=1e-9)
        assert (between.low, between.high) == pytest.approx(expected, rel=1e-9)
        assert between.high - between.low < 0.5 * (found.each[i].high - found.each[i].low)  # pairing pays


def test_few_errors_have_the_interval_that_the_docstring_says():
    right = np.arange(359) >= 2
    found = bootstrap_interval(right.astype(float))
    exact = stats.binomtest(2, 359).proportion_ci().high
    percentile = stats.bootstrap((right,), np.mean, method="percentile", rng=0).confidence_interval.low
    assert (1 - found.low, exact, 1 - percentile) == pytest.approx((0.0195, 0.0200, 0.0139), abs=1e-4)


def test_what_the_bootstrap_cannot_tell_is_no_interval():
    sure = bootstrap_interval(np.ones(20))
    assert (sure.low, sure.high) == (1.0, 1.0)
    unknown = bootstrap_interval(np.array([0.1, math.nan, 0.3]))
    assert math.isnan(unknown.low)
    assert math.isnan(unknown.high)
    with pytest.raises(ValueError, match="2 or more"):
        bootstrap_interval(np.ones(1))
    with pytest.raises(ValueError, match="same samples"):
        paired_bootstrap([np.ones(3), np.ones(4)])


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 9), (12, 12), (24, 0), (13, 12), (20, 20), (30, 10), (5, 90)])
def test_mcnemar_is_scipys_binomial_or_chi_square(b, c):
    both, neither = 40, 7
    first = np.repeat([True, True, False, False], [both, b, c, neither])
    second = np.repeat([True, False, True, False], [both, b, c, neither])
    found = mcnemar(first, second)
    assert (found.both, found.first, found.second, found.neither) == (both, b, c, neither)
    if b + c < 25:
        assert (found.method, found.chi2) == ("exact binomial", None)
        assert found.p == pytest.approx(stats.binomtest(b, b + c).pvalue if b + c else 1.0, rel=1e-12)
    else:
        assert found.method == "chi-square with continuity correction"
        expected = max(abs(b - c) - 1, 0) ** 2 / (b + c)
        assert found.chi2 == pytest.approx(expected)
        assert found.p == pytest.approx(stats.chi2.sf(expected, 1), rel=1e-9)
    assert mcnemar(second, first).p == found.p


def grid(score) -> list[dict]:
    axes = itertools.product([1e-3, 3e-4], ["adam", "sgd"], [0, 1, 2])
    return [{"lr": lr, "optim": o, "seed": s, "val/top1": score(lr, o, s)} for lr, o, s in axes]


AXES = ["lr", "optim", "seed"]


def test_marginal_effects_of_a_full_grid_are_means_over_the_other_axes():
    rng = np.random.default_rng(0)
    rows = grid(lambda *_: rng.random())
    found = marginal_effects(rows, "lr", "val/top1", axes=AXES)
    assert [effect.value for effect in found] == [3e-4, 1e-3]
    for effect in found:
        scores = [row["val/top1"] for row in rows if row["lr"] == effect.value]
        assert (effect.all.mean, effect.all.std, effect.all.n) == pytest.approx(
            (np.mean(scores), stats.tstd(scores), 6)
        )
        assert effect.balanced == effect.all
    assert [effect.value for effect in marginal_effects(rows, "optim", "val/top1", axes=AXES)] == ["adam", "sgd"]


def test_a_value_is_not_favoured_by_the_failures_at_its_settings():
    """lr makes no difference, but at 1e-3 every run of the worse optimizer failed or came to nan."""
    rows = grid(lambda lr, optim, seed: (0.9 if optim == "adam" else 0.1) + 0.01 * seed)
    bad = [row for row in rows if row["lr"] == 1e-3 and row["optim"] == "sgd"]
    bad[0]["val/top1"], bad[1]["val/top1"] = math.nan, None
    del bad[2]["val/top1"]
    low, high = marginal_effects(rows, "lr", "val/top1", axes=AXES)
    assert (low.all.n, high.all.n) == (6, 3)
    assert high.all.mean - low.all.mean == pytest.approx(0.4)
    assert (low.balanced.n, high.balanced.n) == (3, 3)
    assert low.balanced == high.balanced
    for row in rows:  # now no setting is there at both
        if row["lr"] == 3e-4 and row["optim"] == "adam":
            row["val/top1"] = None
    assert [effect.balanced.n for effect in marginal_effects(rows, "lr", "val/top1", axes=AXES)] == [0, 0]
    with pytest.raises(ValueError, match="axis 'wd'"):
        marginal_effects(rows, "wd", "val/top1", axes=AXES)


def test_a_repeated_setting_has_the_weight_of_one():
    rows = [{"a": 1, "b": 1, "m": 0.0}, {"a": 1, "b": 1, "m": 0.2}, {"a": 1, "b": [2], "m": 0.5}]
    rows += [{"a": 2, "b": 1, "m": 0.3}, {"a": 2, "b": [2], "m": 0.7}]
    first, second = marginal_effects(rows, "a", "m", axes=["a", "b"])
    assert (first.balanced.mean, first.balanced.n) == (pytest.approx(0.3), 2)
    assert (second.balanced.mean, second.balanced.n) == (pytest.approx(0.5), 2)
