"""PNG pictures of a run in one quiet style: curves, confusion matrix, inputs, attention, positions, reconstructions,
token labels.

matplotlib is imported when the first picture is drawn. Only its Figure objects are used and every setting is made on
them: pyplot and rcParams are global, and would make two threads or a person's notebook disturb each other.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitexp.run_folder import atomic_file, make_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _SOFT, _LINE = "#222222", "#666666", "#d9d9d9"
_COLOURS = ("#3465a4", "#c4572e", "#4e8f3a", "#7c5aa6", "#8a7340", "#3b8f94")
_DPI = 110
_SMALL, _NORMAL, _TITLE = 7.5, 8.5, 10.0
# Fonts with Chinese, Japanese, Korean letters, for class names; the first that the machine has.
_WIDE_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
)
_MAX_POINTS = 2000  # a curve has fewer pixels than that
_MAX_TILES, _FEW_TILES = 16, 8  # a side, of position_similarity: all of them, or so many of a larger grid
_MAX_HEADS = 12  # of attention, side by side
_HIDDEN = (203, 213, 226)  # a masked patch: no grey, for pictures may be grey
_MAP = "viridis"  # of what is a map over a picture
# Of places by class. Any two are at least 15 apart (CIE 1976 dE) also where red, green or blue cones are missing
# (Machado et al. 2009), which the colours of curves are not; the last is of all other classes.
_PLACES = ("#0072b2", "#d55e00", "#e8c000", "#b05a90", "#222222", "#aaaaaa")
_NAMED = 0.02  # of a picture: classes with less of it are not named


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
    figure = _figure(6.4, height)
    axes = figure.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.42 / height, top=1 - 0.62 / height, hspace=0.24)
    for ax in axes:
        _quiet(ax)
    for ax, (title, found) in zip(axes, panels, strict=False):
        _text(ax.set_title(title, loc="left", pad=3), size=_TITLE)
        for number, (name, (steps, values)) in enumerate(found.items()):
            last = values[np.isfinite(values)][-1]
            label = f"{name}  {100 * last:.2f} %" if title == "accuracy" else f"{name}  {last:.4g}"
            _curve(ax, steps, values, label=label, colour=_COLOURS[number % len(_COLOURS)])
        if title == "accuracy":
            low, high = ax.get_ylim()
            ax.set_ylim(max(-0.02, low), min(1.02, high))
            ax.yaxis.set_major_formatter(_formatter(lambda value, _: f"{100 * value:.4g} %"))
        elif title == "learning rate":
            ax.set_ylim(bottom=0)
            ax.yaxis.set_major_formatter(_formatter(lambda value, _: f"{value:.3g}"))
        _legend(ax)
    if not panels:
        _text(axes[0].text(0.5, 0.5, "no values yet", transform=axes[0].transAxes, ha="center"), colour=_SOFT)
    _step_axis(axes[-1], max((row["step"] for row in rows), default=0))
    _text(axes[-1].set_xlabel("update step"), colour=_SOFT)
    _epoch_axis(axes[0], rows)
    return _save(figure, path)


def lr_curve(rows: Sequence[Mapping[str, float]], path: str | Path) -> Path:
    """The learning rate of a planned run over update steps, epochs on the top axis, its peak and its end told.

    rows: step, epoch and lr, by step."""
    height = 2.7
    figure = _figure(6.4, height)
    ax = figure.subplots()
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.42 / height, top=1 - 0.62 / height)
    _quiet(ax)
    steps, rates = np.array([(row["step"], row["lr"]) for row in rows], np.float64).T
    top = int(rates.argmax())
    _text(ax.set_title("learning rate", loc="left", pad=3), size=_TITLE)
    place = f"{steps[top]:,.0f}".replace(",", " ")
    label = f"peak {rates[top]:.4g} at update {place}, end {rates[-1]:.4g}"
    ax.plot(steps, rates, color=_COLOURS[0], lw=1.4, label=label)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(_formatter(lambda value, _: f"{value:.3g}"))
    _legend(ax)
    _step_axis(ax, int(steps[-1]))
    _text(ax.set_xlabel("update step"), colour=_SOFT)
    _epoch_axis(ax, rows)
    return _save(figure, path)


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
    figure = _figure(6.4, height)
    ax = figure.subplots()
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.45 / height, top=1 - 0.4 / height)
    _quiet(ax)
    _text(ax.set_title("training loss by learning rate", loc="left", pad=3), size=_TITLE)
    curve = np.asarray(smoothed, np.float64)
    ax.set_xscale("log")
    ax.plot(rates, losses, color=_COLOURS[0], lw=0.7, alpha=0.3)
    ax.plot(rates, curve, color=_COLOURS[0], lw=1.4, label="smoothed loss")
    for (name, rate), colour in zip(marks.items(), _COLOURS[1:], strict=False):
        ax.axvline(rate, color=colour, lw=1.1, ls=(0, (4, 3)), label=f"{name}  {rate:.3g}")
    low, start = float(curve.min()), float(curve[: max(1, len(curve) // 10)].max())
    margin = 0.15 * max(start - low, 1e-3 * abs(low), 1e-9)
    ax.set_ylim(low - margin, max(start, low) + 3 * margin)
    ax.xaxis.set_major_formatter(_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")))
    _text(ax.set_xlabel("learning rate"), colour=_SOFT)
    _legend(ax)
    return _save(figure, path)


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
    labels = [_short(name, 16 if count <= 20 else 12) for name in classes]
    margin = 0.45 + (0.085 * max(map(_width, labels)) if named else 0.25)
    beside = 3.3 if listed else 0.25
    width, height = margin + side + 0.62 + beside, margin + side + 0.45
    figure = _figure(width, height)
    ax = figure.add_axes((margin / width, margin / height, side / width, side / height))
    # The square root lets single confusions be seen beside a full diagonal.
    shown = _shrink(np.sqrt(share), int(side * _DPI))
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
    _text(ax.set_title(title, loc="left", pad=5))
    _text(ax.set_xlabel("predicted class"), colour=_SOFT)
    _text(ax.set_ylabel("true class"), colour=_SOFT)
    for spine in ax.spines.values():
        spine.set_color(_LINE)
    ax.tick_params(length=0 if named else 2, color=_SOFT, labelsize=_SMALL, labelcolor=_INK)
    if named:
        size = min(_SMALL, 72 * side / count * 0.62)
        upright = max(map(_width, labels)) * size * 0.62 < 72 * side / count  # all names fit side by side
        ax.set_xticks(range(count), labels, rotation=0 if upright else 90)
        ax.set_yticks(range(count), labels)
        for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
            _text(label, size=size)
    if numbered:
        for row, column in np.argwhere(matrix > 0):
            value = 100 * share[row, column]
            _text(
                ax.text(column, row, _percent(value), ha="center", va="center"),
                size=_SMALL if count <= 10 else 6.5,
                colour="white" if share[row, column] > 0.4 else _INK,
            )
    _share_bar(figure, (margin + side + 0.12) / width, margin / height, 0.11 / width, side / height)
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
    return _save(figure, path)


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
    figure = _figure(3.6, inches)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    figure.subplots_adjust(left=0.17, right=0.97, bottom=0.42 / inches, top=1 - 0.3 / inches, hspace=0.09)
    for ax in (upper, lower):
        _quiet(ax)
        ax.set_xlim(0, 1)
    upper.plot([0, 1], [0, 1], color=_SOFT, lw=0.8, ls=(0, (4, 3)))
    upper.bar(middles, accuracy, width, color=_COLOURS[0], alpha=0.85)
    upper.hlines(confidence, middles - width / 2, middles + width / 2, color=_COLOURS[1], lw=1.6, label="confidence")
    upper.set_ylim(0, 1)
    lower.bar(middles, count, width, color=_LINE, edgecolor=_SOFT, lw=0.5)
    lower.set_ylim(0, 1.32 * max(1.0, count.max(initial=0)))
    lower.set_yticks([])
    lower.spines["left"].set_visible(False)
    lower.grid(visible=False)
    if bins <= 20:
        for middle, number in zip(middles, count, strict=True):
            place = lower.annotate(
                _compact(number), (middle, number), (0, 1.5), textcoords="offset points", ha="center"
            )
            _text(place, size=5.5, colour=_SOFT)
    percent = _formatter(lambda value, _: f"{100 * value:.4g} %")
    upper.yaxis.set_major_formatter(percent)
    lower.xaxis.set_major_formatter(percent)
    if total:
        error = f"{100 * np.sum(count * np.abs(accuracy - confidence)) / total:.2f} %"
        title = f"calibration error {error} of {total:,.0f} pictures".replace(",", " ")
        _legend(upper)
    else:
        title = "nothing counted"
    _text(upper.set_title(title, loc="left", pad=5))
    _text(upper.set_ylabel("accuracy"), colour=_SOFT)
    _text(lower.set_ylabel("pictures", labelpad=8), colour=_SOFT)
    _text(lower.set_xlabel("confidence: probability of the predicted class"), colour=_SOFT)
    return _save(figure, path)


def _compact(number: float) -> str:
    """A count in at most four letters."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.0f}{unit}" if not unit or number >= 9.95 else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.0f}G"


def picture_grid(images: np.ndarray | Any, titles: Sequence[str] | None, path: str | Path) -> Path:
    """A grid of uint8 pictures (n, c, h, w), array or tensor, each under its title; small ones are enlarged without
    smoothing. One channel is shown grey, of more than three the first three are shown."""
    pictures = np.asarray(images)
    assert pictures.ndim == 4, pictures.shape
    assert pictures.dtype == np.uint8, pictures.dtype
    assert titles is None or len(titles) == len(pictures), "one title a picture"
    assert len(pictures), "no pictures"
    number, channels, rows, columns = pictures.shape
    pictures = pictures[:, :3] if channels >= 3 else pictures[:, :1].repeat(3, axis=1)
    across = min(number, max(1, min(8, math.ceil(math.sqrt(number * 1.4)))))
    down = math.ceil(number / across)
    largest = max(rows, columns)
    inches = 1.0 if largest <= 128 else min(2.2, max(1.0, largest / _DPI))
    cell_w, cell_h = max(0.6, inches * columns / largest), inches * rows / largest
    gap, head = 0.09, 0.19 if titles is not None else 0.0
    width = across * (cell_w + gap) + gap
    height = down * (cell_h + head + gap) + gap
    figure = _figure(width, height)
    letters = int(cell_w * 72 / (0.6 * _SMALL))
    for place, picture in enumerate(pictures):
        x = gap + (place % across) * (cell_w + gap)
        y = height - (place // across + 1) * (cell_h + head + gap)
        ax = figure.add_axes((x / width, y / height, cell_w / width, cell_h / height))
        # Enlarged or shrunk here, so that what is drawn is what the file holds.
        ax.imshow(
            picture.transpose(1, 2, 0), interpolation="nearest" if largest <= 128 else "antialiased", aspect="equal"
        )
        ax.set_axis_off()
        if titles is not None:
            _text(ax.set_title(_short(titles[place], letters), pad=2.5), size=_SMALL)
    return _save(figure, path, cut=False)


def position_similarity(similarity: np.ndarray, path: str | Path) -> Path:
    """Cosine similarity of each patch's position embedding with all others, (gh, gw, gh, gw): ViT figure 7.

    Each tile is the whole grid as one patch sees it. Of more than 16 rows or columns, 8 are shown."""
    similarity = np.asarray(similarity)
    rows, columns = similarity.shape[:2]
    assert similarity.shape == (rows, columns, rows, columns), similarity.shape
    counts = [n if n <= _MAX_TILES else _FEW_TILES for n in (rows, columns)]
    down, across = (np.linspace(0, n - 1, k).round().astype(int) for n, k in zip((rows, columns), counts, strict=True))
    gap = max(1, round(max(rows, columns) / 8))  # in cells
    canvas = np.full((len(down) * (rows + gap) - gap, len(across) * (columns + gap) - gap), np.nan)
    for i, row in enumerate(down):
        for j, column in enumerate(across):
            y, x = i * (rows + gap), j * (columns + gap)
            canvas[y : y + rows, x : x + columns] = similarity[row, column]
    longest = max(canvas.shape)
    side_h, side_w = (max(1.1, min(5.2, max(2.8, 0.05 * longest)) * n / longest) for n in canvas.shape)
    left, bottom, right, top = 0.55, 0.5, 0.75, 0.3
    width, height = left + side_w + right, bottom + side_h + top
    figure = _figure(width, height)
    ax = figure.add_axes((left / width, bottom / height, side_w / width, side_h / height))
    shown = ax.imshow(canvas, cmap=_MAP, vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
    for spine in ax.spines.values():
        spine.set_visible(False)
    every = math.ceil(len(down) / 8), math.ceil(len(across) / 8)
    ax.set_yticks([i * (rows + gap) + (rows - 1) / 2 for i in range(len(down))][:: every[0]], down[:: every[0]] + 1)
    ax.set_xticks(
        [j * (columns + gap) + (columns - 1) / 2 for j in range(len(across))][:: every[1]], across[:: every[1]] + 1
    )
    ax.tick_params(length=0, labelsize=_SMALL, labelcolor=_INK)
    _text(ax.set_title("position embeddings: cosine similarity", loc="left", pad=5))
    _text(ax.set_xlabel("column of the patch"), colour=_SOFT)
    _text(ax.set_ylabel("row of the patch"), colour=_SOFT)
    bar = figure.colorbar(
        shown, cax=figure.add_axes(((left + side_w + 0.14) / width, bottom / height, 0.11 / width, side_h / height))
    )
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    bar.outline.set_edgecolor(_LINE)  # type: ignore[operator]
    bar.ax.tick_params(length=2, pad=2, color=_SOFT, labelsize=_SMALL, labelcolor=_SOFT)
    return _save(figure, path)


def attention(
    images: np.ndarray | Any, heads: np.ndarray, rollout: np.ndarray, titles: Sequence[str], path: str | Path
) -> Path:
    """A row for each uint8 picture (n, c, h, w): itself under its title, the rollout (n, gh, gw) as light on it, and
    the maps (n, heads, gh, gw) of each head, every one from 0 to its own maximum. Of more than 12 heads the first 12
    are shown."""
    pictures, heads, rollout = (np.asarray(values) for values in (images, heads, rollout))
    number, channels, rows, columns = pictures.shape
    assert len(heads) == len(rollout) == len(titles) == number, (heads.shape, rollout.shape, len(titles), number)
    pictures = pictures[:, :3] if channels >= 3 else pictures[:, :1].repeat(3, axis=1)
    count = min(heads.shape[1], _MAX_HEADS)
    largest = max(rows, columns)
    cell_w, cell_h = 0.92 * max(0.4, columns / largest), 0.92 * rows / largest
    gap, head, wider = 0.09, 0.21, 0.12  # the last between the picture's own cells and the heads'
    width = (2 + count) * (cell_w + gap) + gap + wider
    top = 0.26  # for the words above
    height = number * (cell_h + head) + gap + top
    figure = _figure(width, height)
    letters = int((cell_w + gap) * 72 / (0.6 * _SMALL))
    for row in range(number):
        light = _light(rollout[row], (rows, columns))[..., None]
        cells = [pictures[row].transpose(1, 2, 0), (pictures[row].transpose(1, 2, 0) * light).astype(np.uint8)]
        cells += list(heads[row, :count])
        for column, cell in enumerate(cells):
            x = gap + column * (cell_w + gap) + (wider if column > 1 else 0)
            y = height - top - (row + 1) * (cell_h + head)
            ax = figure.add_axes((x / width, y / height, cell_w / width, cell_h / height))
            smooth = "antialiased" if column < 2 and largest > 128 else "nearest"
            # The limits are of no effect on a picture in colour.
            ax.imshow(cell, cmap=_MAP, vmin=0, vmax=max(float(cell.max()), 1e-12), interpolation=smooth, aspect="auto")
            ax.set_axis_off()
            if column == 0:
                _text(ax.set_title(_short(titles[row], letters), pad=2.5), size=_SMALL)
            elif row == 0:
                word = "rollout" if column == 1 else f"head {column - 1}"
                _text(ax.set_title(word, pad=2.5), size=_SMALL, colour=_SOFT)
    of = f", {count} of {heads.shape[1]} heads" if count < heads.shape[1] else ""
    said = f"attention: rollout of all blocks, and last block{of}"
    _text(figure.text(gap / width, 1 - 0.08 / height, _short(said, int(width * 72 / (0.55 * _NORMAL))), va="top"))
    return _save(figure, path, cut=False)


def _light(share: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) from 0.12 to 1: a map over the grid of patches, bilinear over the pixels, by which a picture is lit.

    From its least to its largest value: after many blocks a rollout is nearly flat."""
    low, high = float(share.min()), float(share.max())
    lit = (share - low) / (high - low) if high > low else np.ones_like(share)
    for axis, pixels in enumerate(size):
        count = lit.shape[axis]
        places = np.clip((np.arange(pixels) + 0.5) * count / pixels - 0.5, 0, count - 1)
        before = np.floor(places).astype(int)
        after, weight = np.minimum(before + 1, count - 1), places - before
        weight = np.expand_dims(weight, 1 - axis)
        lit = lit.take(before, axis) * (1 - weight) + lit.take(after, axis) * weight
    return 0.12 + 0.88 * lit


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
    top.tick_params(length=2, pad=1, color=_SOFT, labelsize=_SMALL, labelcolor=_SOFT)
    top.spines["top"].set_color(_LINE)
    _text(top.set_xlabel("epoch", labelpad=3), colour=_SOFT)


def _step_axis(ax: Axes, last_step: int) -> None:
    """From 0 to the last step, marked at whole steps."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(0, max(1, last_step) * 1.01)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    ax.xaxis.set_major_formatter(_formatter(lambda value, _: f"{value:,.0f}".replace(",", " ")))


def _formatter(function: Any) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(function)


def _legend(ax: Axes) -> None:
    legend = ax.legend(
        loc="best", frameon=False, fontsize=_SMALL, handlelength=1.3, borderaxespad=0.2, labelspacing=0.25
    )
    for label in legend.get_texts():
        _text(label, size=_SMALL)


def _share_bar(figure: Figure, left: float, bottom: float, width: float, height: float) -> None:
    """The colour scale of confusion_matrix: drawn by hand because the colours follow the square root."""
    ax = figure.add_axes((left, bottom, width, height))
    ax.imshow(
        np.linspace(0, 1, 256)[:, None],
        cmap="Blues",
        vmin=0,
        vmax=1,
        aspect="auto",
        origin="lower",
        extent=(0, 1, 0, 1),
    )
    marks = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)
    ax.set_xticks([])
    ax.yaxis.tick_right()
    ax.set_yticks([math.sqrt(mark) for mark in marks], [f"{100 * mark:.0f} %" for mark in marks])
    ax.tick_params(length=2, pad=2, color=_SOFT, labelsize=_SMALL, labelcolor=_SOFT)
    for spine in ax.spines.values():
        spine.set_color(_LINE)


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
    _text(figure.text(left, top, "most confused: true → predicted", va="top"), size=_SMALL, colour=_SOFT)
    for line, (true, predicted) in enumerate(pairs, start=1):
        names = f"{_short(classes[true], 16)} → {_short(classes[predicted], 16)}"
        words = f"{_percent(100 * share[true, predicted])} %  {names}"
        _text(figure.text(left, top - line * step - 0.3 * step, words, va="top"), size=_SMALL)
    if not pairs:
        _text(figure.text(left, top - 1.3 * step, "none", va="top"), size=_SMALL)


def _shrink(values: np.ndarray, pixels: int) -> np.ndarray:
    """Maximum over blocks, so that no more cells than pixels remain and no cell is lost."""
    step = math.ceil(len(values) / pixels)
    if step == 1:
        return values
    edges = np.arange(0, len(values), step)
    return np.maximum.reduceat(np.maximum.reduceat(values, edges, axis=0), edges, axis=1)


def _percent(value: float) -> str:
    if value >= 99.95:
        return "100"
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def _width(text: str) -> int:
    """Columns that text takes: Chinese and such letters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _short(name: object, columns: int) -> str:
    """At most so many columns on one line, the cut marked."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in str(name)).split())
    if _width(text) <= columns:
        return text
    while text and _width(text) > columns - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _quiet(ax: Axes) -> None:
    ax.grid(color=_LINE, lw=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(_LINE)
    ax.tick_params(length=2, color=_SOFT, labelsize=_SMALL, labelcolor=_INK)


def _text(text: Any, *, size: float = _NORMAL, colour: str = _INK) -> None:
    """The one style of all words. Names are shown as they are: a dollar sign starts no formula."""
    text.set_fontsize(size)
    text.set_color(colour)
    text.set_parse_math(False)
    text.set_fontfamily(list(_fonts()))


@cache
def _fonts() -> tuple[str, ...]:
    from matplotlib import font_manager

    have = set(font_manager.get_font_names())
    return ("DejaVu Sans", *[name for name in _WIDE_FONTS if name in have][:1])


def _save(figure: Figure, path: str | Path, *, cut: bool = True) -> Path:
    """Writes the file; `cut` fits its edges to what is drawn, which draws twice: not where the layout leaves none."""
    path = Path(path)
    warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box stands for the letter
    with atomic_file(make_folder(path.parent) / path.name) as beside:
        edges = "tight" if cut else None
        figure.savefig(beside, format="png", dpi=_DPI, bbox_inches=edges, pad_inches=0.09, metadata={"Software": None})
    return path


def reconstructions(
    path: str | Path,
    *,
    originals: np.ndarray,
    predictions: np.ndarray,
    masks: np.ndarray,
    losses: np.ndarray,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    means: np.ndarray | None = None,
    stds: np.ndarray | None = None,
) -> Path:
    """A row for each picture of a masked autoencoder: original, masked, reconstruction, pasted, and each patch's loss.

    originals and predictions (n, c, h, w) are normalised with the data's pixel_mean and pixel_std; masks (n, gh, gw)
    are 1 where a patch was hidden, losses (n, gh, gw) share one scale. pasted: the hidden patches as reconstructed, the
    others from the original. means and stds (n, gh, gw) of the true patches are of a model that predicts pixels
    normalised by them (norm_pix_loss); they show what the model was not told, so the words above say so."""
    number, channels, rows, columns = originals.shape
    grid = masks.shape[1:]
    assert predictions.shape == originals.shape, (predictions.shape, originals.shape)
    assert masks.shape == losses.shape == (number, *grid), (masks.shape, losses.shape)
    assert number, "no pictures"
    hidden = _over_pixels(masks, (rows, columns)) > 0.5
    told = means is not None and stds is not None
    if told:
        predictions = predictions * _over_pixels(stds, (rows, columns)) + _over_pixels(means, (rows, columns))
    original, restored = (_uint8(values, pixel_mean, pixel_std) for values in (originals, predictions))
    if channels != 3:
        original, restored = (c[:, :3] if channels > 3 else c[:, :1].repeat(3, axis=1) for c in (original, restored))
    covered = np.where(hidden, np.array(_HIDDEN, np.uint8).reshape(1, 3, 1, 1), original)
    cells = [np.moveaxis(c, 1, -1) for c in (original, covered, restored, np.where(hidden, restored, original))]
    highest = float(losses.max(initial=0, where=np.isfinite(losses)))

    note = " (with the patches' true mean and std)" if told else ""
    words = ["original", "masked", f"reconstruction{note}", f"pasted{note}", f"loss of a patch: 0 to {highest:.3g}"]
    largest = max(rows, columns)
    side, gap = 1.1 if largest <= 128 else 1.4, 0.09
    cell_w, cell_h = side * max(0.5, columns / largest), side * rows / largest
    lines = [textwrap.wrap(word, int(cell_w * 72 / (0.53 * _SMALL))) for word in words]
    top = 0.1 + 0.125 * max(map(len, lines))
    width, height = len(words) * (cell_w + gap) + gap, number * (cell_h + gap) + top
    figure = _figure(width, height)
    for row in range(number):
        for column, word in enumerate(lines):
            x, y = gap + column * (cell_w + gap), height - top - row * (cell_h + gap) - cell_h
            ax = figure.add_axes((x / width, y / height, cell_w / width, cell_h / height))
            cell = cells[column][row] if column < len(cells) else losses[row]
            smooth = "antialiased" if column < len(cells) and largest > 128 else "nearest"
            # The limits are of no effect on a picture in colour.
            ax.imshow(cell, cmap=_MAP, vmin=0, vmax=max(highest, 1e-12), interpolation=smooth, aspect="auto")
            ax.set_axis_off()
            if row == 0:
                _text(ax.set_title("\n".join(word), pad=2.5), size=_SMALL, colour=_SOFT)
    return _save(figure, path, cut=False)


def _over_pixels(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(n, 1, h, w) from a value a patch (n, gh, gw): each for all pixels of its patch."""
    rows, columns = (pixels // count for pixels, count in zip(size, values.shape[1:], strict=True))
    return np.asarray(values).repeat(rows, axis=1).repeat(columns, axis=2)[:, None]


def _uint8(pictures: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Pixels (n, c, h, w) from normalised ones; beyond black and white is cut off, what is not finite is black."""
    scale, shift = (np.asarray(values, np.float64).reshape(1, -1, 1, 1) for values in (std, mean))
    return np.nan_to_num((pictures * scale + shift) * 255, nan=0).round().clip(0, 255).astype(np.uint8)


def by_epoch(
    runs: Mapping[str, Sequence[Sequence[tuple[float, float]]]], path: str | Path, *, title: str, percent: bool = True
) -> Path:
    """One line for each name over epochs: its (epoch, value) points; of several seeds their mean in a band of least and
    most. percent: values are shares of 1."""
    from matplotlib.ticker import MaxNLocator

    height = 3.0
    figure = _figure(6.4, height)
    ax = figure.subplots()
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.45 / height, top=1 - 0.4 / height)
    _quiet(ax)
    _text(ax.set_title(title, loc="left", pad=3), size=_TITLE)
    _text(ax.set_xlabel("epoch"), colour=_SOFT)
    for number, (name, seeds) in enumerate(runs.items()):
        tables = [np.array(sorted(points), np.float64) for points in seeds]
        shortest = min(map(len, tables))
        epochs = tables[0][:shortest, 0]
        values = np.stack([table[:shortest, 1] for table in tables])
        mean, colour = values.mean(axis=0), _COLOURS[number % len(_COLOURS)]
        shown = f"{100 * mean[-1]:.2f} %" if percent else f"{mean[-1]:.4g}"
        if len(tables) > 1:
            ax.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, lw=0)
            shown += f" (mean of {len(tables)})"
        marker = "o" if shortest <= 40 else None
        ax.plot(epochs, mean, color=colour, lw=1.4, marker=marker, ms=2.6, label=f"{name}  {shown}")
    if percent:
        ax.yaxis.set_major_formatter(_formatter(lambda value, _: f"{100 * value:g} %"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if runs:
        _legend(ax)
    return _save(figure, path)


@dataclass(frozen=True, eq=False)
class PlaceLabels:
    """Of each place of a picture, in a grid, the most probable class."""

    classes: np.ndarray  # (gh, gw) numbers
    shares: np.ndarray  # (gh, gw) their probabilities


@dataclass(frozen=True, eq=False)
class LabelledPicture:
    """A row of `token_labels`."""

    own: int  # the picture's class, -1 for none
    original: np.ndarray  # uint8 (c, h, w): what of the picture the map covers
    corners: np.ndarray  # (4, 2) rows and columns of the crop's corners, in fractions of the original
    map: PlaceLabels  # the teacher's, over the original
    crop: np.ndarray  # (c, h, w) normalised
    tokens: PlaceLabels | None  # the targets of the crop's tokens; None where the picture alone has one
    mixed: np.ndarray | None  # the crop with the box; None where there is none
    box: tuple[float, float, float, float]  # top, bottom, left, right in fractions of the crop
    said: PlaceLabels | None  # by the model, of the last of the pictures above
    label: np.ndarray  # (k,) target of the class token, or of the picture where the tokens have none
    answer: np.ndarray  # (k,) probabilities that the model gives


def token_labels(
    pictures: Sequence[LabelledPicture],
    classes: Sequence[str],
    path: str | Path,
    *,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> Path:
    """A row for each picture of token labeling: itself, its label map, the crop that is shown to the model, the labels
    of the crop's tokens, MixToken's box, what the model says of every place, and a legend with the class token's label
    and answer. What all rows are without has no column.

    A square stands for a place: its colour is that of the most probable class, its area the probability. Each row has
    colours of its own for the few classes that make up most of it, so that it is read alike with 10 classes and with
    1000. The picture's own class is always blue."""
    assert pictures, "no pictures"
    pictures = [_in_pixels(picture, pixel_mean, pixel_std) for picture in pictures]
    words = [word for word, *_ in _cells(pictures[0])]
    tall, wide = pictures[0].crop.shape[1:]
    cell_h, cell_w = (1.25 * max(0.7, side / max(tall, wide)) for side in (tall, wide))
    gap, table = 0.1, 2.2
    width = gap + len(words) * (cell_w + gap) + table
    heads = [textwrap.wrap(word, int(cell_w * 72 / (0.55 * _SMALL))) for word in words]
    note = textwrap.wrap(_explained(pictures[0]), int(width * 72 / (0.5 * _SMALL)))
    line = 0.135
    top, bottom = 0.1 + line * max(map(len, heads)), 0.1 + line * len(note)
    height = top + len(pictures) * (cell_h + gap) + bottom
    figure = _figure(width, height)
    for row, picture in enumerate(pictures):
        colours, y = _class_colours(picture), height - top - row * (cell_h + gap) - cell_h
        for column, (_, shown, over, outline) in enumerate(_cells(picture)):
            x = gap + column * (cell_w + gap)
            ax = figure.add_axes((x / width, y / height, cell_w / width, cell_h / height))
            _place_cell(ax, shown, over.shape[1:], colours, outline)
            if row == 0:  # in one line, whatever the cell's proportions
                at = (x + cell_w / 2) / width, (y + cell_h + 0.03) / height
                head = figure.text(*at, "\n".join(heads[column]), ha="center", va="bottom")
                _text(head, size=_SMALL, colour=_SOFT)
        x = gap + len(words) * (cell_w + gap)
        ax = figure.add_axes((x / width, y / height, (table - gap) / width, cell_h / height))
        _share_table(ax, picture, colours, classes, size=(table - gap, cell_h))
    for number, text in enumerate(note):
        y = (bottom - 0.02 - number * line) / height
        _text(figure.text(gap / width, y, text, va="top"), size=_SMALL, colour=_SOFT)
    return _save(figure, path, cut=False)


def _explained(picture: LabelledPicture) -> str:
    said = [
        "A square is a place: its colour is the most probable class there, its area the probability.",
        "Blue is the picture's own class.",
        f"Label and answer are the {'crop' if picture.tokens is None else 'class token'}'s.",
    ]
    if picture.mixed is not None:
        said.append("The box shows the crop of the row as far from the other end.")
    return " ".join(said)


def _in_pixels(picture: LabelledPicture, mean: Sequence[float], std: Sequence[float]) -> LabelledPicture:
    crop = _uint8(picture.crop[None], mean, std)[0]
    mixed = None if picture.mixed is None else _uint8(picture.mixed[None], mean, std)[0]
    return replace(picture, crop=crop, mixed=mixed)


def _cells(picture: LabelledPicture) -> list[tuple[str, Any, np.ndarray, np.ndarray | None]]:
    """Of each column its title, what it shows, the picture that this lies over, and an outline on it."""
    box = None if picture.mixed is None else _corners(*picture.box)
    cells = [
        ("picture, and where its crop is from", picture.original, picture.original, picture.corners),
        ("its label map", picture.map, picture.original, picture.corners),
        ("the crop, augmented", picture.crop, picture.crop, None),
        ("labels of its tokens", picture.tokens, picture.crop, None),
        ("with MixToken's box", picture.mixed, picture.crop, box),
        ("what the tokens say", picture.said, picture.crop, box),
    ]
    return [cell for cell in cells if cell[1] is not None]


def _corners(top: float, bottom: float, left: float, right: float) -> np.ndarray:
    return np.array([(top, left), (top, right), (bottom, right), (bottom, left)])


def _class_colours(picture: LabelledPicture) -> dict[int, str]:
    """The picture's own class and those that make up most of what is shown of it, each with its colour."""
    weight = np.nan_to_num(picture.label + picture.answer).astype(np.float64)
    for places in (picture.map, picture.tokens, picture.said):
        if places is not None:
            np.add.at(weight, places.classes, np.nan_to_num(places.shares) / places.shares.size)
    own = [picture.own] if picture.own >= 0 else []
    found = [int(n) for n in np.argsort(-weight, kind="stable")[: len(_PLACES)] if weight[n] >= _NAMED and n not in own]
    named = _PLACES[:-1] if own else _PLACES[1:-1]
    return dict(zip([*own, *found], named, strict=False))


def _place_cell(
    ax: Axes, shown: Any, size: tuple[int, ...], colours: dict[int, str], outline: np.ndarray | None
) -> None:
    """A picture or a map over one of `size` pixels, with an outline of (4, 2) corners in fractions of it."""
    tall, wide = size
    if isinstance(shown, PlaceLabels):
        cell = _squares(shown, colours)
    else:
        cell = np.moveaxis(shown[:3] if len(shown) >= 3 else shown[:1].repeat(3, axis=0), 0, -1)
    smooth = "antialiased" if isinstance(shown, PlaceLabels) or max(size) > 128 else "nearest"
    ax.imshow(cell, extent=(0, wide, tall, 0), interpolation=smooth, aspect="equal")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_color(_LINE)
    if outline is not None:
        rows, columns = np.concatenate([outline, outline[:1]]).T
        for colour, thick in (("white", 2.4), (_INK, 1.0)):  # seen on light and on dark
            ax.plot(columns * wide, rows * tall, color=colour, lw=thick, solid_joinstyle="miter", clip_on=False)
        # A crop that was moved may reach beyond the picture.
        ax.set_xlim(wide * min(0, columns.min()), wide * max(1, columns.max()))
        ax.set_ylim(tall * max(1, rows.max()), tall * min(0, rows.min()))


def _squares(places: PlaceLabels, colours: dict[int, str]) -> np.ndarray:
    """(h, w, 3) from 0 to 1, white between the squares."""
    from matplotlib.colors import to_rgb

    count = math.ceil(280 / max(places.shares.shape))  # pixels a place
    middle = (count - 1) / 2
    away = np.abs(np.arange(count) - middle)
    away = np.maximum(away[:, None], away)  # of each pixel from its place's middle
    reach = 0.96 * np.sqrt(np.nan_to_num(places.shares).clip(0, 1)) * count / 2
    covered = (reach[:, None, :, None] - away[None, :, None, :] + 0.5).clip(0, 1)  # (gh, count, gw, count)
    rgb = np.array([[to_rgb(colours.get(int(n), _PLACES[-1])) for n in row] for row in places.classes])
    blended = 1 + covered[..., None] * (rgb[:, None, :, None] - 1)
    return blended.reshape(covered.shape[0] * count, covered.shape[2] * count, 3)


def _share_table(
    ax: Axes, picture: LabelledPicture, colours: dict[int, str], classes: Sequence[str], *, size: tuple[float, float]
) -> None:
    """A line for each coloured class: its square, its name, and its share of label and answer."""
    from matplotlib.patches import Rectangle

    wide, tall = size
    ax.set_xlim(0, wide)
    ax.set_ylim(tall, 0)
    ax.set_axis_off()
    lines = [(colour, classes[n], picture.label[n], picture.answer[n]) for n, colour in colours.items()]
    if len(lines) < len(classes):
        left = (1 - sum(line[2] for line in lines), 1 - sum(line[3] for line in lines))
        lines.append((_PLACES[-1], "others", *left))
    step = min(0.17, tall / (len(_PLACES) + 1))
    at_label, at_answer = wide - 0.56, wide - 0.02
    for word, x in (("label", at_label), ("answer", at_answer)):
        _text(ax.text(x, step / 2, word, ha="right", va="center"), size=_SMALL, colour=_SOFT)
    for number, (colour, name, label, answer) in enumerate(lines, start=1):
        y = (number + 0.5) * step
        ax.add_patch(Rectangle((0.02, y - 0.045), 0.09, 0.09, color=colour, lw=0))
        _text(ax.text(0.17, y, _short(name, 15), va="center"), size=_SMALL)
        for share, x in ((label, at_label), (answer, at_answer)):
            _text(ax.text(x, y, f"{_percent(100 * max(0.0, share))} %", ha="right", va="center"), size=_SMALL)


def effects(
    axes: Mapping[str, Sequence[tuple[str, float, float, int]]], path: str | Path, *, title: str, percent: bool = True
) -> Path:
    """A panel for each swept setting: of its (value, mean, std, runs) the mean and the standard deviation around it."""
    width = max(3.0, 0.5 * sum(len(points) + 1 for points in axes.values()) + 1)
    figure = _figure(min(width, 14.0), 3.0)
    share = [len(points) + 1 for points in axes.values()]
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False, width_ratios=share)[0]
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.24, top=0.84, wspace=0.08)
    for number, (ax, (name, points)) in enumerate(zip(panels, axes.items(), strict=True)):
        _quiet(ax)
        at, colour = range(len(points)), _COLOURS[number % len(_COLOURS)]
        spread = [0.0 if math.isnan(std) else std for _, _, std, _ in points]
        ax.errorbar(at, [mean for _, mean, _, _ in points], spread, color=colour, lw=1.2, marker="o", ms=4, capsize=3)
        ax.set_xlim(-0.6, len(points) - 0.4)
        ax.set_xticks(at, [f"{_short(value, 14)}\nn={count}" for value, _, _, count in points])
        _text(ax.set_xlabel(name), colour=_SOFT)
        if percent:
            ax.yaxis.set_major_formatter(_formatter(lambda value, _: f"{100 * value:g} %"))
    _text(panels[0].set_title(title, loc="left", pad=3), size=_TITLE)
    return _save(figure, path)


def parallel_coordinates(columns: Mapping[str, Sequence[Any]], path: str | Path, *, title: str) -> Path:
    """A line for each run through its values; the last column's decide the colour. Numbers stand at their height, on
    a logarithmic scale where all are positive and span a factor of ten, other values evenly."""
    heights, ticks = [], []
    for values in columns.values():
        height, marks = _scaled(list(values))
        heights.append(height)
        ticks.append(marks)
    figure = _figure(max(4.0, 1.7 * len(columns)), 3.2)
    ax = figure.subplots()
    figure.subplots_adjust(left=0.06, right=0.9, bottom=0.12, top=0.86)
    for side in ("top", "right", "bottom", "left"):
        ax.spines[side].set_visible(False)
    table = np.array(heights)
    for run in np.argsort(table[-1]):  # the best ones on top
        ax.plot(range(len(columns)), table[:, run], color=_shade(table[-1, run]), lw=1.2, alpha=0.85)
    for position, marks in enumerate(ticks):
        ax.axvline(position, color=_SOFT, lw=0.8)
        for height, words in marks:
            paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
            _text(ax.text(position + 0.03, height, words, va="center", bbox=paper), size=_SMALL)
    ax.set_xticks(range(len(columns)), list(columns))
    ax.tick_params(length=0, labelsize=_NORMAL, labelcolor=_INK)
    ax.set_yticks([])
    ax.set_xlim(-0.1, len(columns) - 0.6)
    _text(ax.set_title(title, loc="left", pad=6), size=_TITLE)
    return _save(figure, path)


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
    return [at[str(value)] for value in values], [(height, _short(name, 16)) for name, height in at.items()]


def _shade(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps[_MAP](0.9 * share)
