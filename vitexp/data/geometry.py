"""What an augmentation did to the places of a picture, and a label map that follows it there.

A picture in training is cut out of the whole one, mirrored, moved (rotated, sheared, shifted) and cut again, in this
order, and each of the four may do nothing. vitexp's crops come first and moves act in the crop's frame; LV-ViT's
official order moves the whole picture and cuts last. Both are `Places`.

Boxes are (top, left, height, width) in fractions of what they are cut from, and may reach outside of it. A point is
(row, column) in the same fractions, so that a picture of 4 rows has the centres of its pixels at 1/8, 3/8, 5/8, 7/8.
Pillow reckons so, too, and the moves here are Pillow's. The official code rotates label maps about a centre half a cell
off; ours follows the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

WHOLE = (0.0, 0.0, 1.0, 1.0)
STILL = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # the move that moves nothing


@dataclass(frozen=True, eq=False)
class Places:
    """How b pictures were taken from theirs: first `cut`, then `mirrored`, then each of `moves`, then `shown`."""

    cut: np.ndarray  # (b, 4) box of the whole picture
    mirrored: np.ndarray  # (b,) bool: left and right exchanged
    moves: np.ndarray  # (b, s, 2, 3): where a place's content comes from, as a matrix and a shift; STILL fills up
    shown: np.ndarray  # (b, 4) box of the moved picture

    @property
    def moved(self) -> np.ndarray:
        """(b,) whether any of the moves moves anything."""
        return (self.moves != STILL).any(axis=(1, 2, 3))


class Followed(NamedTuple):
    """Maps of pictures as they are shown: as LabelMaps, in numpy."""

    values: np.ndarray  # (b, k, h, w)
    numbers: np.ndarray  # (b, k, h, w)
    boxes: np.ndarray  # (b, 4) float32
    mirrored: np.ndarray  # (b,) bool


def cropped(boxes: np.ndarray, mirrored: np.ndarray) -> Places:
    """Boxes (b, 4) of the pictures, some of them mirrored (b,)."""
    count = len(boxes)
    return Places(boxes.astype(np.float64), mirrored, np.empty((count, 0, 2, 3)), np.tile(WHOLE, (count, 1)))


def with_moves(places: Places, moves: Sequence[Sequence[np.ndarray]]) -> Places:
    """The pictures moved after all that was done to them: of each its moves (2, 3), the first one first.

    They must not have been moved or cut again before."""
    assert places.moves.shape[1] == 0 and (places.shown == WHOLE).all()
    return replace(places, moves=_filled_up(moves))


def recut(places: Places, boxes: np.ndarray) -> Places:
    """Boxes (b, 4) cut from the pictures after all that was done to them. They must not have been cut again before."""
    assert (places.shown == WHOLE).all()
    return replace(places, shown=boxes.astype(np.float64))


def seen_through(places: Places, views: np.ndarray) -> Places:
    """The same, counted from pictures of which (b, 4) boxes are what `places` calls whole."""
    return replace(places, cut=_inside(views, places.cut))


def joined(parts: Sequence[Places]) -> Places:
    """Those of several batches, one after the other."""
    moves = _filled_up([list(of_one) for part in parts for of_one in part.moves])
    cut, mirrored, shown = (np.concatenate([getattr(p, key) for p in parts]) for key in ("cut", "mirrored", "shown"))
    return Places(cut, mirrored, moves, shown)


def follow(values: np.ndarray, numbers: np.ndarray, places: Places) -> Followed:
    """Label maps (b, k, h, w) of the whole pictures, brought to the pictures shown.

    Where nothing moved the map stays and the boxes say what of it is shown. Of a moved picture the map is laid anew, as
    many cells over the part that was moved: each takes those of the cell that its centre came from. Where that lies
    outside of the part or of the picture, values are 0 and class numbers those of the nearest cell: of such a place the
    map says nothing. Nothing given is changed."""
    shown = places.shown.copy()
    shown[:, 1] = np.where(places.mirrored, 1 - shown[:, 1] - shown[:, 3], shown[:, 1])
    boxes, mirrored = _inside(places.cut, shown), places.mirrored
    if (moved := places.moved).any():
        values, numbers = values.copy(), numbers.copy()
        values[moved], numbers[moved] = _laid_anew(
            values[moved],
            numbers[moved],
            Places(places.cut[moved], mirrored[moved], places.moves[moved], places.shown[moved]),
        )
        boxes[moved], mirrored = places.shown[moved], mirrored & ~moved
    return Followed(values, numbers, boxes.astype(np.float32), mirrored)


def _laid_anew(values: np.ndarray, numbers: np.ndarray, places: Places) -> tuple[np.ndarray, np.ndarray]:
    count, kept, height, width = values.shape
    rows, columns = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    row, column = (np.tile(part.ravel(), (count, 1)) for part in np.meshgrid(rows, columns, indexing="ij"))
    there = np.ones(row.shape, bool)
    for step in reversed(range(places.moves.shape[1])):  # the last move's content is what the one before it left
        m = places.moves[:, step, ..., None]
        # Written out: a matrix product may round differently for one picture and for many.
        row, column = (m[:, i, 0] * row + m[:, i, 1] * column + m[:, i, 2] for i in (0, 1))
        there &= _within(row, column)
    column = np.where(places.mirrored[:, None], 1 - column, column)
    top, left, tall, wide = places.cut.T[..., None]
    row, column = top + tall * row, left + wide * column
    there &= _within(row, column)
    cell_row, cell_column = (
        np.clip(np.floor(at * cells), 0, cells - 1).astype(np.int64) for at, cells in ((row, height), (column, width))
    )
    cell = (cell_row * width + cell_column)[:, None]
    taken = (np.take_along_axis(given.reshape(count, kept, -1), cell, axis=2) for given in (values, numbers))
    new_values, new_numbers = (part.reshape(count, kept, height, width) for part in taken)
    return np.where(there.reshape(count, 1, height, width), new_values, np.zeros((), values.dtype)), new_numbers


def _within(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return (row >= 0) & (row < 1) & (column >= 0) & (column < 1)


def _inside(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """(b, 4) boxes of boxes, counted from what the outer ones are cut from."""
    sides = outer[:, 2:]
    return np.concatenate([outer[:, :2] + inner[:, :2] * sides, inner[:, 2:] * sides], axis=1)


def _filled_up(moves: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """(b, s, 2, 3), s being the most that one picture has."""
    most = max(map(len, moves), default=0)
    filled = np.tile(STILL, (len(moves), most, 1, 1))
    for k, of_one in enumerate(moves):
        for s, move in enumerate(of_one):
            filled[k, s] = move
    return filled


# ---- moves of Pillow and timm, as (2, 3) of (row, column) in fractions; sizes in pixels ------------------------------


def rotation(height: int, width: int, degrees: float) -> np.ndarray:
    """Image.rotate: counter-clockwise about the middle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _about_middle(np.array([[cos, sin * width / height], [-sin * height / width, cos]]))


def shear_x(height: int, width: int, factor: float) -> np.ndarray:
    """Columns taken from as much further right as the row is far down."""
    return np.array([[1.0, 0.0, 0.0], [factor * height / width, 1.0, 0.0]])


def shear_y(height: int, width: int, factor: float) -> np.ndarray:
    return np.array([[1.0, factor * width / height, 0.0], [0.0, 1.0, 0.0]])


def shift_x(height: int, width: int, share: float) -> np.ndarray:
    return np.array([[1.0, 0.0, 0.0], [0.0, 1.0, share]])


def shift_y(height: int, width: int, share: float) -> np.ndarray:
    return np.array([[1.0, 0.0, share], [0.0, 1.0, 0.0]])


def shift_x_pixels(height: int, width: int, pixels: float) -> np.ndarray:
    return shift_x(height, width, pixels / width)


def shift_y_pixels(height: int, width: int, pixels: float) -> np.ndarray:
    return shift_y(height, width, pixels / height)


# By the names of timm's operations; each takes the picture's height and width and what timm hands the operation.
MOVES: dict[str, Callable[[int, int, float], np.ndarray]] = {
    "Rotate": rotation,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": shift_x_pixels,
    "TranslateY": shift_y_pixels,
    "TranslateXRel": shift_x,
    "TranslateYRel": shift_y,
}


def _about_middle(matrix: np.ndarray) -> np.ndarray:
    middle = np.array([0.5, 0.5])
    return np.concatenate([matrix, (middle - matrix @ middle)[:, None]], axis=1)
