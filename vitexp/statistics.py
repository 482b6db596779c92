"""Of measured numbers: mean and spread, bootstrap intervals, McNemar's test, effects of swept settings.

Plain functions of NumPy arrays that know nothing of runs and files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import ndtr, ndtri

RESAMPLES = 9999  # of 10,000 samples they cost a second or two, and limits of 95 % move by a few percent of their width
SEED = 0
FEW_DISCORDANT = 25  # below, the chi-square of McNemar's test is too rough
_AT_ONCE = 1 << 22  # numbers drawn at a time: 32 MB
_ROWS_AT_ONCE = 1 << 24  # numbers that the jackknife holds at a time: 128 MB

Columns = Any  # (n, m) np.ndarray or scipy.sparse.csr_array: what is known of each of n samples
# Maps means of the columns (b, m) to what is measured (b, ...): one row in, one row out.
Statistic = Callable[[np.ndarray], np.ndarray]


# ---- mean and spread


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of n numbers: nan where there are none, std also where there is one."""

    mean: float
    std: float
    n: int


def mean_std(values: Sequence[float] | np.ndarray) -> Spread:
    """Mean and the sample's standard deviation sqrt(Σ(x - mean)² / (n - 1)), for Bessel's n - 1 makes its square
    unbiased. A value that is not finite makes both nan: what failed is to be left out by the caller, in the open."""
    values = np.asarray(values, np.float64)
    n = values.size
    if n == 0 or not np.isfinite(values).all():
        return Spread(math.nan, math.nan, n)
    return Spread(float(values.mean()), float(values.std(ddof=1)) if n > 1 else math.nan, n)


# ---- bootstrap


@dataclass(frozen=True, eq=False)
class Interval:
    """A measured value and the limits of its confidence interval: floats, or arrays of one shape."""

    value: Any
    low: Any
    high: Any


def mean_of_first(means: np.ndarray) -> np.ndarray:
    """The plainest statistic: the mean of the one column."""
    return means[:, 0]


def bootstrap_interval(
    columns: Columns,
    statistic: Statistic = mean_of_first,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """Bias-corrected and accelerated (BCa) bootstrap interval of a smooth function of means of samples (n,) or (n, m).

    The samples are drawn n at a time with replacement; with G the distribution of the statistic t over such draws, the
    limits are its quantiles Φ(z0 + (z0 + z) / (1 - a (z0 + z))) at z = ±Φ⁻¹((1 + level) / 2), where z0 = Φ⁻¹(G(t)),
    ties counted half, and a = Σd³ / (6 (Σd²)^1.5) of the jackknife's d = mean of t₍ᵢ₎ - t₍ᵢ₎. Efron 1987, "Better
    bootstrap confidence intervals", JASA 82:171; Efron and Tibshirani 1993, "An Introduction to the Bootstrap", 14.3.

    BCa and not the percentile interval (z0 = a = 0): accuracies near 1 have skewed distributions. With 2 errors in 359
    pictures the exact upper limit is 2.00 % of errors, BCa's 1.95 %, the percentile interval's 1.39 %.

    Without any spread in the draws, such as of no error at all, both limits are the value itself, which then says
    nothing of how sure it is. Where the value or a draw is not finite, or all draws lie on one side of the value, the
    limits are nan."""
    if columns.ndim == 1:
        columns = np.asarray(columns)[:, None]
    n = columns.shape[0]
    if n < 2 or not 0 < level < 1 or resamples < 1:
        raise ValueError(f"{n} samples, level={level}, resamples={resamples}: needs 2 or more, 0 to 1, 1 or more")
    with np.errstate(all="ignore"):  # 0 / 0 is nan, and means that there is nothing to be said
        totals = np.asarray(columns.sum(axis=0), np.float64).reshape(1, -1)
        value = np.asarray(statistic(totals / n))[0]
        drawn = _drawn(columns, statistic, resamples, seed).reshape(resamples, -1)
        left_out = _left_out(columns, totals, statistic).reshape(n, -1)
        limits = [
            _bca(one, replicates, jackknife, level)
            for one, replicates, jackknife in zip(np.ravel(value), drawn.T, left_out.T, strict=True)
        ]
    low, high = np.array(limits, np.float64).T.reshape(2, *np.shape(value))
    return Interval(value[()], low[()], high[()])


@dataclass(frozen=True, eq=False)
class PairedIntervals:
    """What `paired_bootstrap` found: of each, and of the second less the first of each pair (i, j), i < j."""

    each: list[Interval]
    differences: dict[tuple[int, int], Interval]


def paired_bootstrap(
    each: Sequence[Columns],
    statistic: Statistic = mean_of_first,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> PairedIntervals:
    """Intervals of the statistic of several (n,) or (n, m) measured on the same n samples, and of their differences.

    Every draw takes the same samples of all, so that what makes a sample hard for all of them drops out of the
    difference. See bootstrap_interval."""
    wide = [sparse.csr_array(np.reshape(c, (len(c), -1)) if isinstance(c, np.ndarray) else c) for c in each]
    if len({part.shape for part in wide}) != 1:
        raise ValueError(f"all need the same samples and columns; given are {[part.shape for part in wide]}")
    pairs = [(i, j) for j in range(len(wide)) for i in range(j)]

    def all_of_them(means: np.ndarray) -> np.ndarray:
        values = [np.asarray(statistic(part)) for part in np.split(means, len(wide), axis=1)]
        return np.stack([*values, *(values[j] - values[i] for i, j in pairs)], axis=1)

    joined = sparse.csr_array(sparse.hstack(wide, format="csr"))
    found = bootstrap_interval(joined, all_of_them, level=level, resamples=resamples, seed=seed)
    parts = [Interval(*limits) for limits in zip(found.value, found.low, found.high, strict=True)]
    return PairedIntervals(parts[: len(wide)], dict(zip(pairs, parts[len(wide) :], strict=True)))


def _drawn(columns: Columns, statistic: Statistic, resamples: int, seed: int) -> np.ndarray:
    """(resamples, ...) the statistic of samples drawn with replacement."""
    rng, n = np.random.default_rng(seed), columns.shape[0]
    batch = max(1, _AT_ONCE // n)
    found = []
    for begin in range(0, resamples, batch):
        count = min(batch, resamples - begin)
        chosen = rng.integers(0, n, (count, n))
        chosen += np.arange(count)[:, None] * n
        times = np.bincount(chosen.ravel(), minlength=count * n).reshape(count, n)  # each sample came up
        found.append(np.asarray(statistic((times @ columns) / n)))
    return np.concatenate(found)


def _left_out(columns: Columns, totals: np.ndarray, statistic: Statistic) -> np.ndarray:
    """(n, ...) the statistic without each sample in turn."""
    n, m = columns.shape
    batch = max(1, _ROWS_AT_ONCE // m)
    return np.concatenate(
        [np.asarray(statistic((totals - columns[i : i + batch]) / (n - 1))) for i in range(0, n, batch)]
    )


def _bca(value: float, drawn: np.ndarray, left_out: np.ndarray, level: float) -> tuple[float, float]:
    if not (np.isfinite(value) and np.isfinite(drawn).all() and np.isfinite(left_out).all()):
        return math.nan, math.nan
    tied = np.abs(drawn - value) <= 1e-12 * np.abs(drawn).max()  # differences of shares are equal but for rounding
    if tied.all():
        return value, value
    z0 = ndtri(((drawn < value) & ~tied).mean() + tied.mean() / 2)
    if not np.isfinite(z0):
        return math.nan, math.nan
    gaps = left_out.mean() - left_out
    a = (gaps**3).sum() / (6 * (gaps**2).sum() ** 1.5)
    z = z0 + np.array([-1, 1]) * ndtri((1 + level) / 2)
    low, high = np.quantile(drawn, ndtr(z0 + z / (1 - a * z)))
    return float(low), float(high)


# ---- two classifiers on the same pictures


@dataclass(frozen=True)
class McNemar:
    """Whether two classifiers err equally often on the same pictures."""

    both: int  # right
    first: int  # alone is right
    second: int
    neither: int
    p: float  # of so uneven a split between `first` and `second`, or a more uneven one, if both err equally often
    method: str  # "exact binomial", or "chi-square with continuity correction"
    chi2: float | None  # None where the test is exact


def mcnemar(first_right: np.ndarray, second_right: np.ndarray) -> McNemar:
    """McNemar's test of two (n,) boolean arrays: which pictures each classifier gets right.

    Of the pictures that one alone gets right, b the first and c the second, half are expected of each. For b + c < 25
    the p value is the exact two-sided binomial one, min(1, 2 P(X <= min(b, c))) of X ~ B(b + c, 1/2); else that of
    χ² = max(|b - c| - 1, 0)² / (b + c) with one degree of freedom. McNemar 1947, Psychometrika 12:153; Edwards 1948,
    Psychometrika 13:185 for the correction, which here never goes below 0. Both tests are compared by Fagerland et al.
    2013, BMC Med. Res. Methodol. 13:91."""
    first_right, second_right = np.asarray(first_right, bool), np.asarray(second_right, bool)
    if first_right.shape != second_right.shape or first_right.ndim != 1:
        raise ValueError(f"needs two (n,) arrays, not {first_right.shape} and {second_right.shape}")
    b, c = int((first_right & ~second_right).sum()), int((~first_right & second_right).sum())
    n = b + c
    if n < FEW_DISCORDANT:
        chi2, method = None, "exact binomial"
        p = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2**n)
    else:
        chi2, method = max(abs(b - c) - 1, 0) ** 2 / n, "chi-square with continuity correction"
        p = math.erfc(math.sqrt(chi2 / 2))
    both = int((first_right & second_right).sum())
    return McNemar(both, b, c, first_right.size - both - n, p, method, chi2)


# ---- sweeps


@dataclass(frozen=True)
class Effect:
    """What a metric was at one value of a swept setting."""

    value: Any
    all: Spread  # over every row with that value
    balanced: Spread  # over the settings that were finished at all values: n counts settings


def marginal_effects(rows: Sequence[Mapping[str, Any]], axis: str, metric: str, *, axes: Sequence[str]) -> list[Effect]:
    """The metric's mean and spread at each value of one swept axis, over all finished rows and balanced.

    A row maps the names of swept settings to their values and those of metrics to numbers; one whose metric is
    missing, None or not finite is left out. `axes` are all swept settings, `axis` among them. Where jobs failed or a
    search chose freely, the rows at one value may have had better company than those at another: the balanced effect
    takes only the settings of the other axes that are there for every value of `axis`, each with the same weight (of
    repetitions their mean), as population marginal means do (Searle, Speed and Milliken 1980, Am. Stat. 34:216).

    Numbers in their order, other values as they come. Raises ValueError for an axis that is not in `axes`."""
    if axis not in axes:
        raise ValueError(f"axis {axis!r} is none of {list(axes)}")
    others = [name for name in axes if name != axis]
    values: dict[str, Any] = {}
    scores: dict[str, dict[tuple[str, ...], list[float]]] = {}
    for row in rows:
        score = row.get(metric)
        if score is None or not math.isfinite(score):
            continue
        key = _as_key(row.get(axis))
        values.setdefault(key, row.get(axis))
        company = tuple(_as_key(row.get(name)) for name in others)
        scores.setdefault(key, {}).setdefault(company, []).append(float(score))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values.values()):
        values = dict(sorted(values.items(), key=lambda item: item[1]))
    common = set.intersection(*(set(found) for found in scores.values())) if scores else set()
    return [
        Effect(
            value,
            mean_std([score for found in scores[key].values() for score in found]),
            mean_std([float(np.mean(found)) for company, found in scores[key].items() if company in common]),
        )
        for key, value in values.items()
    ]


def _as_key(value: Any) -> str:
    """The same for equal values, lists and mappings included."""
    return json.dumps(value, sort_keys=True, default=str)
