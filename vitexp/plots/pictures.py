"""Pictures in a grid: what the model was shown, and what a masked one made of it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitexp.plots import style

if TYPE_CHECKING:
    pass


_HIDDEN = (203, 213, 226)  # a masked patch: no grey, for pictures may be grey


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
    inches = 1.0 if largest <= 128 else min(2.2, max(1.0, largest / style.DPI))
    cell_w, cell_h = max(0.6, inches * columns / largest), inches * rows / largest
    gap, head = 0.09, 0.19 if titles is not None else 0.0
    width = across * (cell_w + gap) + gap
    height = down * (cell_h + head + gap) + gap
    figure = style.figure(width, height)
    letters = int(cell_w * 72 / (0.6 * style.SMALL))
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
            style.text(ax.set_title(style.short(titles[place], letters), pad=2.5), size=style.SMALL)
    return style.save(figure, path, cut=False)


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
    original, restored = (uint8(values, pixel_mean, pixel_std) for values in (originals, predictions))
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
    lines = [textwrap.wrap(word, int(cell_w * 72 / (0.53 * style.SMALL))) for word in words]
    top = 0.1 + 0.125 * max(map(len, lines))
    width, height = len(words) * (cell_w + gap) + gap, number * (cell_h + gap) + top
    figure = style.figure(width, height)
    for row in range(number):
        for column, word in enumerate(lines):
            x, y = gap + column * (cell_w + gap), height - top - row * (cell_h + gap) - cell_h
            ax = figure.add_axes((x / width, y / height, cell_w / width, cell_h / height))
            cell = cells[column][row] if column < len(cells) else losses[row]
            smooth = "antialiased" if column < len(cells) and largest > 128 else "nearest"
            # The limits are of no effect on a picture in colour.
            ax.imshow(cell, cmap=style.MAP, vmin=0, vmax=max(highest, 1e-12), interpolation=smooth, aspect="auto")
            ax.set_axis_off()
            if row == 0:
                style.text(ax.set_title("\n".join(word), pad=2.5), size=style.SMALL, colour=style.SOFT)
    return style.save(figure, path, cut=False)


def _over_pixels(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(n, 1, h, w) from a value a patch (n, gh, gw): each for all pixels of its patch."""
    rows, columns = (pixels // count for pixels, count in zip(size, values.shape[1:], strict=True))
    return np.asarray(values).repeat(rows, axis=1).repeat(columns, axis=2)[:, None]


def uint8(pictures: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Pixels (n, c, h, w) from normalised ones; beyond black and white is cut off, what is not finite is black."""
    scale, shift = (np.asarray(values, np.float64).reshape(1, -1, 1, 1) for values in (std, mean))
    return np.nan_to_num((pictures * scale + shift) * 255, nan=0).round().clip(0, 255).astype(np.uint8)
