"""What settings do, over the runs of a sweep: effects and parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitexp.plots import style

if TYPE_CHECKING:
    pass


def effects(
    axes: Mapping[str, Sequence[tuple[str, float, float, int]]], path: str | Path, *, title: str, percent: bool = True
) -> Path:
    """A panel for each swept setting: of its (value, mean, std, runs) the mean and the standard deviation around it."""
    width = max(3.0, 0.5 * sum(len(points) + 1 for points in axes.values()) + 1)
    figure = style.figure(min(width, 14.0), 3.0)
    share = [len(points) + 1 for points in axes.values()]
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False, width_ratios=share)[0]
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.24, top=0.84, wspace=0.08)
    for number, (ax, (name, points)) in enumerate(zip(panels, axes.items(), strict=True)):
        style.quiet(ax)
        at, colour = range(len(points)), style.COLOURS[number % len(style.COLOURS)]
        spread = [0.0 if math.isnan(std) else std for _, _, std, _ in points]
        ax.errorbar(at, [mean for _, mean, _, _ in points], spread, color=colour, lw=1.2, marker="o", ms=4, capsize=3)
        ax.set_xlim(-0.6, len(points) - 0.4)
        ax.set_xticks(at, [f"{style.short(value, 14)}\nn={count}" for value, _, _, count in points])
        style.text(ax.set_xlabel(name), colour=style.SOFT)
        if percent:
            ax.yaxis.set_major_formatter(style.formatter(lambda value, _: f"{100 * value:g} %"))
    style.text(panels[0].set_title(title, loc="left", pad=3), size=style.TITLE)
    return style.save(figure, path)


def parallel_coordinates(columns: Mapping[str, Sequence[Any]], path: str | Path, *, title: str) -> Path:
    """A line for each run through its values; the last column's decide the colour. Numbers stand at their height, on
    a logarithmic scale where all are positive and span a factor of ten, other values evenly."""
    heights, ticks = [], []
    for values in columns.values():
        height, marks = _scaled(list(values))
        heights.append(height)
        ticks.append(marks)
    figure = style.figure(max(4.0, 1.7 * len(columns)), 3.2)
    ax = figure.subplots()
    figure.subplots_adjust(left=0.06, right=0.9, bottom=0.12, top=0.86)
    for side in ("top", "right", "bottom", "left"):
        ax.spines[side].set_visible(False)
    table = np.array(heights)
    for run in np.argsort(table[-1]):  # the best ones on top
        ax.plot(range(len(columns)), table[:, run], color=style.shade(table[-1, run]), lw=1.2, alpha=0.85)
    for position, marks in enumerate(ticks):
        ax.axvline(position, color=style.SOFT, lw=0.8)
        for height, words in marks:
            paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
            style.text(ax.text(position + 0.03, height, words, va="center", bbox=paper), size=style.SMALL)
    ax.set_xticks(range(len(columns)), list(columns))
    ax.tick_params(length=0, labelsize=style.NORMAL, labelcolor=style.INK)
    ax.set_yticks([])
    ax.set_xlim(-0.1, len(columns) - 0.6)
    style.text(ax.set_title(title, loc="left", pad=6), size=style.TITLE)
    return style.save(figure, path)


def _scaled(values: list[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in 0..1 of values, and the marks to write at theirs."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = min(values), max(values)
        log = low > 0 and high >= 10 * low
        scale = math.log if log else float
        span = scale(high) - scale(low)

        def place(value: float) -> float:
            return (scale(value) - scale(low)) / span if span else 0.5

        few = sorted(set(values))
        shown = few if len(few) <= 6 else [low, high]
        return [place(value) for value in values], [(place(value), f"{value:.4g}") for value in shown]
    names = list(dict.fromkeys(map(str, values)))
    at = {name: number / max(1, len(names) - 1) if len(names) > 1 else 0.5 for number, name in enumerate(names)}
    return [at[str(value)] for value in values], [(height, style.short(name, 16)) for name, height in at.items()]
