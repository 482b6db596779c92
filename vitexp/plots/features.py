"""Inside a network: the similarity of its positions, and where its attention goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitexp.plots import style

if TYPE_CHECKING:
    pass


_MAX_TILES, _FEW_TILES = 16, 8  # a side, of position_similarity: all of them, or so many of a larger grid
_MAX_HEADS = 12  # of attention, side by side


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
    figure = style.figure(width, height)
    ax = figure.add_axes((left / width, bottom / height, side_w / width, side_h / height))
    shown = ax.imshow(canvas, cmap=style.MAP, vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
    for spine in ax.spines.values():
        spine.set_visible(False)
    every = math.ceil(len(down) / 8), math.ceil(len(across) / 8)
    ax.set_yticks([i * (rows + gap) + (rows - 1) / 2 for i in range(len(down))][:: every[0]], down[:: every[0]] + 1)
    ax.set_xticks(
        [j * (columns + gap) + (columns - 1) / 2 for j in range(len(across))][:: every[1]], across[:: every[1]] + 1
    )
    ax.tick_params(length=0, labelsize=style.SMALL, labelcolor=style.INK)
    style.text(ax.set_title("position embeddings: cosine similarity", loc="left", pad=5))
    style.text(ax.set_xlabel("column of the patch"), colour=style.SOFT)
    style.text(ax.set_ylabel("row of the patch"), colour=style.SOFT)
    bar = figure.colorbar(
        shown, cax=figure.add_axes(((left + side_w + 0.14) / width, bottom / height, 0.11 / width, side_h / height))
    )
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    bar.outline.set_edgecolor(style.LINE)  # type: ignore[operator]
    bar.ax.tick_params(length=2, pad=2, color=style.SOFT, labelsize=style.SMALL, labelcolor=style.SOFT)
    return style.save(figure, path)


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
    figure = style.figure(width, height)
    letters = int((cell_w + gap) * 72 / (0.6 * style.SMALL))
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
            ax.imshow(
                cell, cmap=style.MAP, vmin=0, vmax=max(float(cell.max()), 1e-12), interpolation=smooth, aspect="auto"
            )
            ax.set_axis_off()
            if column == 0:
                style.text(ax.set_title(style.short(titles[row], letters), pad=2.5), size=style.SMALL)
            elif row == 0:
                word = "rollout" if column == 1 else f"head {column - 1}"
                style.text(ax.set_title(word, pad=2.5), size=style.SMALL, colour=style.SOFT)
    of = f", {count} of {heads.shape[1]} heads" if count < heads.shape[1] else ""
    said = f"attention: rollout of all blocks, and last block{of}"
    style.text(
        figure.text(
            gap / width, 1 - 0.08 / height, style.short(said, int(width * 72 / (0.55 * style.NORMAL))), va="top"
        )
    )
    return style.save(figure, path, cut=False)


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
