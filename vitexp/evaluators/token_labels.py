"""What token labeling shows a model of some training pictures, and what the model makes of them, to be drawn.

It measures nothing, so it is no evaluator that settings name. Always the same pictures, augmented and mixed as in the
first epoch, with the same box of MixToken: from one drawing to the next only the model's part is another. No random
state is drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitexp.data.batch_transforms import on_device
from vitexp.data.geometry import WHOLE, seen_through
from vitexp.data.images import Images
from vitexp.data.loader import Split, batch_at
from vitexp.data.sampler import Position
from vitexp.data.token_labels import crop_labels
from vitexp.evaluators.classification import evaluation_mode
from vitexp.methods.token_labeling import NO_BOX, TokenLabeling
from vitexp.mixing import BatchStep, Box, cutmix
from vitexp.plots import LabelledPicture, PlaceLabels
from vitexp.seeding import derive_seed, uniforms
from vitexp.token_mixing import mix_class_targets, mix_tokens, token_box
from vitexp.types import Batch

Grid = tuple[int, int]  # places down, places across

PICTURES = 6
BOX = (0.5, 0.4, 0.6)  # what MixToken's box is made from: the share of tokens kept, and where its middle lies
CORNERS = np.array([(0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0)])  # rows and columns, in fractions


@torch.no_grad()
def labelled_pictures(
    method: TokenLabeling,
    split: Split,
    images: Images,
    *,
    mix: BatchStep | None,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    pictures: int = PICTURES,
) -> list[LabelledPicture]:
    """So many of `images`, spread evenly over them, as `split` makes a training batch of them; it has label maps.

    `mix` is done to the batch as in training. Raises BadImage for a picture that cannot be read."""
    index = np.linspace(0, len(split) - 1, min(len(split), pictures)).round().astype(np.int64)
    position = Position(seed=seed, epoch=0, index=index)
    batch = on_device(batch_at(split, position), next(method.parameters()).device, mean=mean, std=std)
    own = batch.targets.tolist()
    if mix is not None:
        batch = mix(batch, num_classes=method.num_classes, seed=derive_seed(seed, 0))
    with evaluation_mode(method):
        asked = _ask(method, batch)
    rows = []
    for i, number in enumerate(index.tolist()):
        image = images.read(number)
        rows.append(
            LabelledPicture(
                own=own[i],
                original=_covered(image, split).transpose(2, 0, 1),
                corners=_corners(image, split, replace(position, index=index[i : i + 1])),
                map=_stored(split, number, num_classes=method.num_classes),
                crop=batch.images[i].cpu().numpy(),
                tokens=_places(asked.tokens, i, asked.grid),
                mixed=None if asked.mixed is None else asked.mixed[i].cpu().numpy(),
                box=asked.box,
                said=_places(asked.said, i, asked.grid),
                label=asked.label[i].cpu().numpy(),
                answer=asked.answer[i].cpu().numpy(),
            )
        )
    return rows


@dataclass(frozen=True, eq=False)
class _Asked:
    """What the method is taught about a batch, and what it says."""

    label: Tensor  # (b, k) of the class token, or of the picture
    answer: Tensor  # (b, k) probabilities
    grid: Grid = (1, 1)
    tokens: Tensor | None = None  # (b, n, k) labels
    said: Tensor | None = None  # (b, n, k) probabilities
    box: tuple[float, float, float, float] = (0, 0, 0, 0)  # top, bottom, left, right, in fractions
    mixed: Tensor | None = None  # the pictures with patches exchanged in the box, where it has any


def _ask(method: TokenLabeling, batch: Batch) -> _Asked:
    """As the method's forward goes, but for the loss, and for what the tokens say of their partners' patches."""
    if method.labels == "picture":
        (label,) = method.targets(batch)
        return _Asked(label, _shares(method.logits(batch.images)))
    backbone: Any = method.backbone
    grid: Grid = backbone.grid_size
    box = token_box(BOX, grid=grid) if method.mix_tokens else NO_BOX
    label, tokens = method.targets(batch, grids=[grid])
    cls_logits, token_logits = method.both_logits(
        backbone.encode(mix_tokens(backbone.embed(batch.images), box=box, grid=grid))
    )
    top, bottom, left, right = box
    exchanged = top < bottom and left < right
    return _Asked(
        label=mix_class_targets(label, box=box, grid=grid),
        answer=_shares(cls_logits),
        grid=grid,
        tokens=tokens,
        said=_shares(token_logits),
        box=(top / grid[0], bottom / grid[0], left / grid[1], right / grid[1]),
        mixed=_exchanged(batch.images, box, grid) if exchanged else None,
    )


def _shares(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=-1)


def _exchanged(images: Tensor, box: Box, grid: Grid) -> Tensor:
    """The pictures with their partners' pixels where their tokens are the partners'."""
    tall, wide = images.shape[2] // grid[0], images.shape[3] // grid[1]
    top, bottom, left, right = box
    in_pixels = (top * tall, bottom * tall, left * wide, right * wide)
    return cutmix(images, images.new_zeros(len(images), 1), box=in_pixels)[0]


def _places(shares: Tensor | None, i: int, grid: Grid) -> PlaceLabels | None:
    """Of picture i, from (b, n, k) in raster order; n is 1 where all places have the same."""
    if shares is None:
        return None
    best, classes = (part.expand(grid[0] * grid[1]).view(grid).cpu().numpy() for part in shares[i].max(dim=1))
    return PlaceLabels(classes, best)


def _stored(split: Split, number: int, *, num_classes: int) -> PlaceLabels:
    """The map of a whole picture: a crop that is all of it has a token a cell."""
    assert split.maps is not None
    values, numbers = (torch.from_numpy(part) for part in split.maps.of(np.array([number])))
    grid = values.shape[2], values.shape[3]
    (cells,) = crop_labels(
        values,
        numbers,
        torch.tensor([WHOLE]),
        torch.zeros(1, dtype=torch.bool),
        num_classes=num_classes,
        grids=[grid],
    )
    found = _places(cells, 0, grid)
    assert found is not None
    return found


def _covered(image: np.ndarray, split: Split) -> np.ndarray:
    """What of a picture (h, w, c) its map is of: all, or the square in its middle."""
    assert split.maps is not None
    if split.maps.store.head["crop"] == "whole":
        return image
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def _corners(image: np.ndarray, split: Split, position: Position) -> np.ndarray:
    """(4, 2) where the corners of the picture shown come from, in fractions of what the map covers; see geometry.py."""
    assert split.maps is not None
    transform: Any = split.transform  # tracked, for it has maps
    u = uniforms(position.seed, position.epoch, position.index, transform.num_uniforms)
    _, places = transform.tracked(transform.fixed(image)[None], u)
    places = seen_through(places, np.array([split.maps.view(transform, *image.shape[:2])]))
    at = places.shown[0, :2] + CORNERS * places.shown[0, 2:]
    for move in places.moves[0][::-1]:
        at = at @ move[:, :2].T + move[:, 2]
    if places.mirrored[0]:
        at[:, 1] = 1 - at[:, 1]
    return places.cut[0, :2] + at * places.cut[0, 2:]
