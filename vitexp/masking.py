"""Which patches a masked autoencoder hides. MAE section 3 and figure 6, arXiv:2111.06377.

A masking is a function of uniform random numbers, one a patch, and of nothing else: the same numbers, the same mask.
It gives an order of the patches (b, n): the encoder sees the first `keep` of each row, the rest is hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitexp.errors import UserError

Grid = tuple[int, int]  # patches down, patches across

BLOCK_SHARE = 16 / 196  # of the patches, in the smallest block: BEiT's 16 of 14x14 (arXiv:2106.08254, algorithm 1)
BLOCK_ASPECT = 0.3  # of height to width, to its inverse; also BEiT's


def len_keep(num_patches: int, mask_ratio: float) -> int:
    """How many patches stay: cut off in floating point as in the official code, so 100 patches at 0.8 keep 19."""
    return int(num_patches * (1 - mask_ratio))


def random_order(noise: Tensor, *, grid: Grid, keep: int) -> Tensor:
    """Patches by their noise, ascending; equal noise in raster order."""
    return noise.argsort(dim=1, stable=True)


def grid_order(noise: Tensor, *, grid: Grid, keep: int) -> Tensor:
    """The same one of each 2x2 patches first, in raster order: the paper's grid-wise sampling, grid-75.

    The paper does not say which of the four; the smallest of a picture's first four numbers picks it, so that every
    position is seen in training. Needs even sides and keep = n / 4."""
    rows, columns = (torch.arange(side, device=noise.device) % 2 for side in grid)
    corner = (2 * rows[:, None] + columns).flatten()  # 0..3 within its 2x2
    hidden = corner != noise[:, :4].argmin(dim=1, keepdim=True)
    return hidden.byte().argsort(dim=1, stable=True)


def block_order(noise: Tensor, *, grid: Grid, keep: int) -> Tensor:
    """Patches that no block covers first: rectangles are hidden one after the other until enough are, as BEiT does.

    A block takes four numbers: its area, from BLOCK_SHARE of the grid to what is left to hide, the aspect of its sides,
    and its place. The last one is cut to the number; should n // 4 blocks not do, single patches are added. Both by
    noise. Blocks lie within the picture, so corners are hidden less often than the middle."""
    count, (height, width) = noise.shape[1], grid
    smallest = max(1.0, BLOCK_SHARE * count)
    down, across = torch.arange(height, device=noise.device), torch.arange(width, device=noise.device)
    when = noise.new_full((noise.shape[0], height, width), float(count))  # the block that hid a patch; count: none
    for k in range(count // 4):
        area, aspect, top, left = (u[:, None] for u in noise[:, 4 * k : 4 * k + 4].unbind(1))
        left_to_hide = (count - keep) - (when < count).sum((1, 2))[:, None]
        area = smallest + area * (left_to_hide - smallest).clamp(min=0)
        ratio = BLOCK_ASPECT ** (1 - 2 * aspect)
        tall = (area * ratio).sqrt().round().clamp(1, height)
        wide = (area / tall).floor().clamp(1, width)
        first_row, first_column = (top * (height - tall + 1)).floor(), (left * (width - wide + 1)).floor()
        in_rows = (down >= first_row) & (down < first_row + tall)
        in_columns = (across >= first_column) & (across < first_column + wide)
        covered = in_rows[:, :, None] & in_columns[:, None, :]
        when = torch.where(covered & (when == count), float(k), when)
    by_noise = noise.argsort(dim=1, stable=True)
    latest_first = when.flatten(1).gather(1, by_noise).argsort(dim=1, stable=True, descending=True)
    return by_noise.gather(1, latest_first)


MASKINGS = {"random": random_order, "block": block_order, "grid": grid_order}


def check_masking(masking: str, *, grid: Grid, mask_ratio: float) -> int:
    """How many of the patches this masking keeps. Raises UserError where it would keep none, hide none, or cannot."""
    count = grid[0] * grid[1]
    keep = len_keep(count, mask_ratio)
    if not 0 < keep < count:
        raise UserError(
            f"mask_ratio={mask_ratio} keeps {keep} of {count} patches: at least one is to be seen and one to be hidden"
        )
    if masking == "grid" and (grid[0] % 2 or grid[1] % 2 or 4 * keep != count):
        raise UserError(
            f"masking=grid keeps one of every 2x2 patches: it needs mask_ratio=0.75 and even sides, "
            f"not {mask_ratio} of {grid[0]}x{grid[1]} patches"
        )
    return keep
