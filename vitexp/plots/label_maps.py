"""Token labels over the picture they belong to."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitexp.plots import style
from vitexp.plots.pictures import uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Of places by class. Any two are at least 15 apart (CIE 1976 dE) also where red, green or blue cones are missing
# (Machado et al. 2009), which the colours of curves are not; the last is of all other classes.
_PLACES = ("#0072b2", "#d55e00", "#e8c000", "#b05a90", "#222222", "#aaaaaa")
_NAMED = 0.02  # of a picture: classes with less of it are not named


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
    heads = [textwrap.wrap(word, int(cell_w * 72 / (0.55 * style.SMALL))) for word in words]
    note = textwrap.wrap(_explained(pictures[0]), int(width * 72 / (0.5 * style.SMALL)))
    line = 0.135
    top, bottom = 0.1 + line * max(map(len, heads)), 0.1 + line * len(note)
    height = top + len(pictures) * (cell_h + gap) + bottom
    figure = style.figure(width, height)
    for row, picture in enumerate(pictures):
        colours, y = _class_colours(picture), height - top - row * (cell_h + gap) - cell_h
        for column, (_, shown, over, outline) in enumerate(_cells(picture)):
            x = gap + column * (cell_w + gap)
            ax = figure.add_axes((x / width, y / height, cell_w / width, cell_h / height))
            _place_cell(ax, shown, over.shape[1:], colours, outline)
            if row == 0:  # in one line, whatever the cell's proportions
                at = (x + cell_w / 2) / width, (y + cell_h + 0.03) / height
                head = figure.text(*at, "\n".join(heads[column]), ha="center", va="bottom")
                style.text(head, size=style.SMALL, colour=style.SOFT)
        x = gap + len(words) * (cell_w + gap)
        ax = figure.add_axes((x / width, y / height, (table - gap) / width, cell_h / height))
        _share_table(ax, picture, colours, classes, size=(table - gap, cell_h))
    for number, text in enumerate(note):
        y = (bottom - 0.02 - number * line) / height
        style.text(figure.text(gap / width, y, text, va="top"), size=style.SMALL, colour=style.SOFT)
    return style.save(figure, path, cut=False)


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
    crop = uint8(picture.crop[None], mean, std)[0]
    mixed = None if picture.mixed is None else uint8(picture.mixed[None], mean, std)[0]
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
        spine.set_color(style.LINE)
    if outline is not None:
        rows, columns = np.concatenate([outline, outline[:1]]).T
        for colour, thick in (("white", 2.4), (style.INK, 1.0)):  # seen on light and on dark
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
        style.text(ax.text(x, step / 2, word, ha="right", va="center"), size=style.SMALL, colour=style.SOFT)
    for number, (colour, name, label, answer) in enumerate(lines, start=1):
        y = (number + 0.5) * step
        ax.add_patch(Rectangle((0.02, y - 0.045), 0.09, 0.09, color=colour, lw=0))
        style.text(ax.text(0.17, y, style.short(name, 15), va="center"), size=style.SMALL)
        for share, x in ((label, at_label), (answer, at_answer)):
            style.text(
                ax.text(x, y, f"{style.percent(100 * max(0.0, share))} %", ha="right", va="center"), size=style.SMALL
            )
