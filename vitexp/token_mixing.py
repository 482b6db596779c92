"""MixToken: CutMix on a student's tokens, after the patches are embedded. LV-ViT, arXiv:2104.10858.

    box = token_box(u, grid=grid)
    features = encode(mix_tokens(embed(images), box=box, grid=grid))
    token_logits = mix_tokens(token_head(features.patches), box=box, grid=grid)  # every token's with its own picture
    cls_targets = mix_class_targets(cls_targets, box=box, grid=grid)  # token targets stay as they are

One box a batch; the partner of picture i is b - 1 - i, as in mixup, so a batch of one and the middle picture of an odd
one stay as they are. Tokens may already carry their positions: a token is exchanged for the one at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vitexp.mixing import Box, boxes_of

Grid = tuple[int, int]  # tokens down, tokens across


def token_box(u: Sequence[float] | np.ndarray, *, grid: Grid) -> Box:
    """The box that three numbers in [0, 1) choose: the share of tokens to keep, and its centre's row and column.

    The share is drawn from Beta(1, 1), so it is the first number itself. Sides are whole, halved towards 0 on both
    sides of the centre and clipped, so the box may be empty and takes a quarter of the tokens rather than a half."""
    keep, row, column = u
    top, bottom, left, right = boxes_of(np.array([keep]), *grid, centre=np.array([[row, column]]))[0].tolist()
    return top, bottom, left, right


def kept_share(box: Box, *, grid: Grid) -> float:
    """The share of a picture's tokens outside the box, which are its own."""
    top, bottom, left, right = box
    return 1 - (bottom - top) * (right - left) / (grid[0] * grid[1])


def mix_tokens(tokens: Tensor, *, box: Box, grid: Grid) -> Tensor:
    """(b, n, ...) with the partner's tokens inside the box, of n tokens in raster order. Done twice, it is undone."""
    top, bottom, left, right = box
    rows, columns = (torch.arange(side, device=tokens.device) for side in grid)
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    return torch.where(inside.view(1, -1, *[1] * (tokens.ndim - 2)), tokens.flip(0), tokens)


def mix_class_targets(targets: Tensor, *, box: Box, grid: Grid) -> Tensor:
    """(b, k) targets of the class token: each picture's by the share it kept, and its partner's."""
    return torch.lerp(targets.flip(0), targets, kept_share(box, grid=grid))
