"""Lines: the curves of a run, of learning rates, of a range test, of several runs by epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitexp.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_MAX_POINTS = 2000  # a curve has fewer pixels than that


def curves(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Loss, accuracy and learning rate over update steps, epochs on the top axis, from the rows of metrics.jsonl.

    Draws every metric named `<part>/loss`, `<part>/top…` (also knn_top…) or accuracy, and `<part>/lr`;
    a panel without a value is left out. Values that are not finite leave a gap."""
    panels = [
        (title, found)
        for title, belongs in (
            ("loss", lambda last: last == "loss" or last.endswith("_loss")),
            ("accuracy", lambda last: last == "accuracy" or last.rpartition("_")[2][:3] == "top"),
            ("learning rate", lambda last: last == "lr"),
        )
        if (found := _series(rows, belongs))
    ]
    height = 0.75 + 2.0 * max(1, len(panels))
    figure = style.figure(6.4, height)
    axes = figure.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.42 / height, top=1 - 0.62 / height, hspace=0.24)
    for ax in axes:
        style.quiet(ax)
    for ax, (title, found) in zip(axes, panels, strict=False):
        style.text(ax.set_title(title, loc="left", pad=3), size=style.TITLE)
        for number, (name, (steps, values)) in enumerate(found.items()):
            last = values[np.isfinite(values)][-1]
            label = f"{name}  {100 * last:.2f} %" if title == "accuracy" else f"{name}  {last:.4g}"
            _curve(ax, steps, values, label=label, colour=style.COLOURS[number % len(style.COLOURS)])
        if title == "accuracy":
            low, high = ax.get_ylim()
            ax.set_ylim(max(-0.02, low), min(1.02, high))
            ax.yaxis.set_major_formatter(style.formatter(lambda value, _: f"{100 * value:.4g} %"))
        elif title == "learning rate":
            ax.set_ylim(bottom=0)
            ax.yaxis.set_major_formatter(style.formatter(lambda value, _: f"{value:.3g}"))
        style.legend(ax)
    if not panels:
        style.text(axes[0].text(0.5, 0.5, "no values yet", transform=axes[0].transAxes, ha="center"), colour=style.SOFT)
    _step_axis(axes[-1], max((row["step"] for row in rows), default=0))
    style.text(axes[-1].set_xlabel("update step"), colour=style.SOFT)
    _epoch_axis(axes[0], rows)
    return style.save(figure, path)


def lr_curve(rows: Sequence[Mapping[str, float]], path: str | Path) -> Path:
    """The learning rate of a planned run over update steps, epochs on the top axis, its peak and its end told.

    rows: step, epoch and lr, by step."""
    height = 2.7
    figure = style.figure(6.4, height)
    ax = figure.subplots()
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.42 / height, top=1 - 0.62 / height)
    style.quiet(ax)
    steps, rates = np.array([(row["step"], row["lr"]) for row in rows], np.float64).T
    top = int(rates.argmax())
    style.text(ax.set_title("learning rate", loc="left", pad=3), size=style.TITLE)
    place = f"{steps[top]:,.0f}".replace(",", " ")
    label = f"peak {rates[top]:.4g} at update {place}, end {rates[-1]:.4g}"
    ax.plot(steps, rates, color=style.COLOURS[0], lw=1.4, label=label)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(style.formatter(lambda value, _: f"{value:.3g}"))
    style.legend(ax)
    _step_axis(ax, int(steps[-1]))
    style.text(ax.set_xlabel("update step"), colour=style.SOFT)
    _epoch_axis(ax, rows)
    return style.save(figure, path)


def lr_range(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float] | np.ndarray,
    path: str | Path,
    *,
    marks: Mapping[str, float],
) -> Path:
    """Losses of updates at growing learning rates on a logarithmic axis, faint under their smoothed curve; each named
    rate of `marks` a line. What rises beyond the first losses is cut off: how far a run diverges says nothing."""
    height = 3.0
    figure = style.figure(6.4, height)
    ax = figure.subplots()
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.45 / height, top=1 - 0.4 / height)
    style.quiet(ax)
    style.text(ax.set_title("training loss by learning rate", loc="left", pad=3), size=style.TITLE)
    curve = np.asarray(smoothed, np.float64)
    ax.set_xscale("log")
    ax.plot(rates, losses, color=style.COLOURS[0], lw=0.7, alpha=0.3)
    ax.plot(rates, curve, color=style.COLOURS[0], lw=1.4, label="smoothed loss")
    for (name, rate), colour in zip(marks.items(), style.COLOURS[1:], strict=False):
        ax.axvline(rate, color=colour, lw=1.1, ls=(0, (4, 3)), label=f"{name}  {rate:.3g}")
    low, start = float(curve.min()), float(curve[: max(1, len(curve) // 10)].max())
    margin = 0.15 * max(start - low, 1e-3 * abs(low), 1e-9)
    ax.set_ylim(low - margin, max(start, low) + 3 * margin)
    ax.xaxis.set_major_formatter(
        style.formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e"))
    )
    style.text(ax.set_xlabel("learning rate"), colour=style.SOFT)
    style.legend(ax)
    return style.save(figure, path)


def _series(
    rows: Sequence[Mapping[str, Any]], belongs: Callable[[str], bool]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (steps, values) by step, of the metrics whose last part belongs and which have a finite value."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            part, _, last = name.rpartition("/")
            if part and belongs(last) and isinstance(value, (int, float)):
                found.setdefault(name, []).append((row["step"], value))
    result = {}
    for name, points in found.items():
        steps, values = np.array(sorted(points, key=lambda point: point[0]), np.float64).T
        if np.isfinite(values).any():
            result[name] = steps, np.where(np.isfinite(values), values, np.nan)
    return result


def _curve(ax: Axes, steps: np.ndarray, values: np.ndarray, *, label: str, colour: str) -> None:
    """A line; few points are marked, and a long noisy one is drawn faint under its running mean."""
    steps, values = _thin(steps, values)
    if len(steps) <= 40:
        ax.plot(steps, values, color=colour, lw=1.3, marker="o", ms=2.6, label=label)
        return
    smooth = _running_mean(values, max(3, len(values) // 60))
    noisy = np.nanmean(np.abs(values - smooth)) > 0.01 * (np.nanmax(values) - np.nanmin(values))
    if noisy:
        ax.plot(steps, values, color=colour, lw=0.7, alpha=0.3)
    ax.plot(steps, smooth if noisy else values, color=colour, lw=1.4, label=label)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over neighbours, so that a curve has at most _MAX_POINTS points."""
    width = math.ceil(len(steps) / _MAX_POINTS)
    if width == 1:
        return steps, values
    edges = np.arange(0, len(steps), width)
    counts = np.diff(np.append(edges, len(steps)))
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the finite values in a centred window, nan where the middle one is nan."""
    finite, window = np.isfinite(values), np.ones(2 * (width // 2) + 1)
    total = np.convolve(np.where(finite, values, 0), window, mode="same")
    count = np.convolve(finite, window, mode="same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def _epoch_axis(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Epochs above the first panel. Within a run they are a fixed multiple of the steps."""
    known = [(row["epoch"], row["step"]) for row in rows if row.get("step") and row.get("epoch")]
    if not known:
        return
    per_step = known[-1][0] / known[-1][1]
    top = ax.secondary_xaxis("top", functions=(lambda step: step * per_step, lambda epoch: epoch / per_step))
    top.tick_params(length=2, pad=1, color=style.SOFT, labelsize=style.SMALL, labelcolor=style.SOFT)
    top.spines["top"].set_color(style.LINE)
    style.text(top.set_xlabel("epoch", labelpad=3), colour=style.SOFT)


def _step_axis(ax: Axes, last_step: int) -> None:
    """From 0 to the last step, marked at whole steps."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(0, max(1, last_step) * 1.01)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    ax.xaxis.set_major_formatter(style.formatter(lambda value, _: f"{value:,.0f}".replace(",", " ")))


def by_epoch(
    runs: Mapping[str, Sequence[Sequence[tuple[float, float]]]], path: str | Path, *, title: str, percent: bool = True
) -> Path:
    """One line for each name over epochs: its (epoch, value) points; of several seeds their mean in a band of least and
    most. percent: values are shares of 1."""
    from matplotlib.ticker import MaxNLocator

    height = 3.0
    figure = style.figure(6.4, height)
    ax = figure.subplots()
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.45 / height, top=1 - 0.4 / height)
    style.quiet(ax)
    style.text(ax.set_title(title, loc="left", pad=3), size=style.TITLE)
    style.text(ax.set_xlabel("epoch"), colour=style.SOFT)
    for number, (name, seeds) in enumerate(runs.items()):
        tables = [np.array(sorted(points), np.float64) for points in seeds]
        shortest = min(map(len, tables))
        epochs = tables[0][:shortest, 0]
        values = np.stack([table[:shortest, 1] for table in tables])
        mean, colour = values.mean(axis=0), style.COLOURS[number % len(style.COLOURS)]
        shown = f"{100 * mean[-1]:.2f} %" if percent else f"{mean[-1]:.4g}"
        if len(tables) > 1:
            ax.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, lw=0)
            shown += f" (mean of {len(tables)})"
        marker = "o" if shortest <= 40 else None
        ax.plot(epochs, mean, color=colour, lw=1.4, marker=marker, ms=2.6, label=f"{name}  {shown}")
    if percent:
        ax.yaxis.set_major_formatter(style.formatter(lambda value, _: f"{100 * value:g} %"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if runs:
        style.legend(ax)
    return style.save(figure, path)
