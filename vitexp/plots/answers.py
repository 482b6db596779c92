"""What a classifier answered: confusion matrix and reliability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vitexp.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def confusion_matrix(matrix: np.ndarray, classes: Sequence[str], path: str | Path) -> Path:
    """The (k, k) counts of true by predicted class, coloured by their share of the true class.

    Up to 16 classes the cells carry their share in per cent; above, the most frequent confusions are listed beside,
    which are the readable part of a picture of 1000 classes. Up to 50 classes the axes carry names."""
    matrix = np.asarray(matrix)
    count = len(matrix)
    assert matrix.shape == (count, len(classes)), (matrix.shape, len(classes))
    totals = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, totals, out=np.zeros(matrix.shape, np.float64), where=totals > 0)

    numbered, named, listed = count <= 16, count <= 50, count > 16
    side = min(7.5, max(2.6, 0.42 * count)) if named else 6.4
    labels = [style.short(name, 16 if count <= 20 else 12) for name in classes]
    margin = 0.45 + (0.085 * max(map(style.width, labels)) if named else 0.25)
    beside = 3.3 if listed else 0.25
    width, height = margin + side + 0.62 + beside, margin + side + 0.45
    figure = style.figure(width, height)
    ax = figure.add_axes((margin / width, margin / height, side / width, side / height))
    # The square root lets single confusions be seen beside a full diagonal.
    shown = _shrink(np.sqrt(share), int(side * style.DPI))
    ax.imshow(
        shown,
        cmap="Blues",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        aspect="auto",
        extent=(-0.5, count - 0.5, count - 0.5, -0.5),
    )
    right = np.trace(matrix)
    total = int(totals.sum())
    accuracy = f"{100 * right / total:.2f} % of {total} right" if total else "nothing counted"
    title = f"{accuracy}; cells: % of the true class" if numbered and side > 4 else accuracy
    style.text(ax.set_title(title, loc="left", pad=5))
    style.text(ax.set_xlabel("predicted class"), colour=style.SOFT)
    style.text(ax.set_ylabel("true class"), colour=style.SOFT)
    for spine in ax.spines.values():
        spine.set_color(style.LINE)
    ax.tick_params(length=0 if named else 2, color=style.SOFT, labelsize=style.SMALL, labelcolor=style.INK)
    if named:
        size = min(style.SMALL, 72 * side / count * 0.62)
        upright = max(map(style.width, labels)) * size * 0.62 < 72 * side / count  # all names fit side by side
        ax.set_xticks(range(count), labels, rotation=0 if upright else 90)
        ax.set_yticks(range(count), labels)
        for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
            style.text(label, size=size)
    if numbered:
        for row, column in np.argwhere(matrix > 0):
            value = 100 * share[row, column]
            style.text(
                ax.text(column, row, style.percent(value), ha="center", va="center"),
                size=style.SMALL if count <= 10 else 6.5,
                colour="white" if share[row, column] > 0.4 else style.INK,
            )
    style.share_bar(figure, (margin + side + 0.12) / width, margin / height, 0.11 / width, side / height)
    if listed:
        lines = int((side - 0.3) / 0.185)
        _most_confused(
            figure,
            matrix,
            share,
            classes,
            left=(margin + side + 0.72) / width,
            top=(margin + side) / height,
            step=0.185 / height,
            lines=min(lines, 24),
        )
    return style.save(figure, path)


def reliability(calibration: np.ndarray, path: str | Path) -> Path:
    """Accuracy against confidence in equal bins of confidence from 0 to 1, and below how many pictures each bin has.

    calibration (3, bins): pictures, right ones among them, their mean confidence. A line at each bar marks the bin's
    mean confidence, what a calibrated model would reach there: a bar that ends below it is overconfident."""
    count, right, confidence = np.asarray(calibration, np.float64)
    bins, total, filled = len(count), count.sum(), count > 0
    edges = np.linspace(0, 1, bins + 1)
    middles, width = (edges[:-1] + edges[1:])[filled] / 2, 0.94 / bins
    accuracy, confidence, count = right[filled] / count[filled], confidence[filled], count[filled]
    inches = 4.4
    figure = style.figure(3.6, inches)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    figure.subplots_adjust(left=0.17, right=0.97, bottom=0.42 / inches, top=1 - 0.3 / inches, hspace=0.09)
    for ax in (upper, lower):
        style.quiet(ax)
        ax.set_xlim(0, 1)
    upper.plot([0, 1], [0, 1], color=style.SOFT, lw=0.8, ls=(0, (4, 3)))
    upper.bar(middles, accuracy, width, color=style.COLOURS[0], alpha=0.85)
    upper.hlines(
        confidence, middles - width / 2, middles + width / 2, color=style.COLOURS[1], lw=1.6, label="confidence"
    )
    upper.set_ylim(0, 1)
    lower.bar(middles, count, width, color=style.LINE, edgecolor=style.SOFT, lw=0.5)
    lower.set_ylim(0, 1.32 * max(1.0, count.max(initial=0)))
    lower.set_yticks([])
    lower.spines["left"].set_visible(False)
    lower.grid(visible=False)
    if bins <= 20:
        for middle, number in zip(middles, count, strict=True):
            place = lower.annotate(
                style.compact(number), (middle, number), (0, 1.5), textcoords="offset points", ha="center"
            )
            style.text(place, size=5.5, colour=style.SOFT)
    percent = style.formatter(lambda value, _: f"{100 * value:.4g} %")
    upper.yaxis.set_major_formatter(percent)
    lower.xaxis.set_major_formatter(percent)
    if total:
        error = f"{100 * np.sum(count * np.abs(accuracy - confidence)) / total:.2f} %"
        title = f"calibration error {error} of {total:,.0f} pictures".replace(",", " ")
        style.legend(upper)
    else:
        title = "nothing counted"
    style.text(upper.set_title(title, loc="left", pad=5))
    style.text(upper.set_ylabel("accuracy"), colour=style.SOFT)
    style.text(lower.set_ylabel("pictures", labelpad=8), colour=style.SOFT)
    style.text(lower.set_xlabel("confidence: probability of the predicted class"), colour=style.SOFT)
    return style.save(figure, path)


def _most_confused(
    figure: Figure,
    matrix: np.ndarray,
    share: np.ndarray,
    classes: Sequence[str],
    *,
    left: float,
    top: float,
    step: float,
    lines: int,
) -> None:
    """The largest off-diagonal shares as lines of text, ties by count."""
    wrong = share * (1 - np.eye(len(share)))
    flat = np.lexsort((-matrix.ravel(), -wrong.ravel()))[:lines]
    pairs = [divmod(int(place), len(share)) for place in flat if wrong.flat[place] > 0]
    style.text(figure.text(left, top, "most confused: true → predicted", va="top"), size=style.SMALL, colour=style.SOFT)
    for line, (true, predicted) in enumerate(pairs, start=1):
        names = f"{style.short(classes[true], 16)} → {style.short(classes[predicted], 16)}"
        words = f"{style.percent(100 * share[true, predicted])} %  {names}"
        style.text(figure.text(left, top - line * step - 0.3 * step, words, va="top"), size=style.SMALL)
    if not pairs:
        style.text(figure.text(left, top - 1.3 * step, "none", va="top"), size=style.SMALL)


def _shrink(values: np.ndarray, pixels: int) -> np.ndarray:
    """Maximum over blocks, so that no more cells than pixels remain and no cell is lost."""
    step = math.ceil(len(values) / pixels)
    if step == 1:
        return values
    edges = np.arange(0, len(values), step)
    return np.maximum.reduceat(np.maximum.reduceat(values, edges, axis=0), edges, axis=1)
