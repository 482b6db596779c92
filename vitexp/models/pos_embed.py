"""Position embeddings between grids: what moves when a model meets pictures of another size than it was trained on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vitexp.errors import UserError
from vitexp.models.checks import one_of

Grid = tuple[int, int]  # patches down, patches across


class _Resampling(NamedTuple):
    mode: str
    align_corners: bool
    antialias: bool


# Each named after the code whose result it equals. They differ by far more than rounding: on a table of unit variance
# mae and timm are 0.2 to 0.4 apart when it grows and about 1 when it shrinks.
POSITION_MODES = {
    "jax": _Resampling("bilinear", align_corners=True, antialias=False),  # google-research's scipy zoom of order 1
    "mae": _Resampling("bicubic", align_corners=False, antialias=False),  # facebookresearch's mae and deit
    "timm": _Resampling("bicubic", align_corners=False, antialias=True),  # timm since 0.9
}


def resize_pos_embed(pos_embed: Tensor, *, old_grid: Grid, new_grid: Grid, num_prefix_tokens: int, mode: str) -> Tensor:
    """(1, prefix + new patches, d) from (1, prefix + old patches, d): a picture of d channels resized. ViT 3.2.

    Rows of prefix tokens (class token) come first and are kept as they are. `mode` is jax, mae or timm. An unchanged
    grid returns the table itself. Raises UserError for an unknown mode."""
    how = POSITION_MODES[one_of("position_mode", mode, tuple(POSITION_MODES))]
    assert pos_embed.ndim == 3
    assert pos_embed.shape[1] == num_prefix_tokens + old_grid[0] * old_grid[1]
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    prefix, table = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    picture = rearrange(table, "b (h w) d -> b d h w", h=old_grid[0])
    # Half precision tables are resized in float32: the weights of the kernel would be rounded otherwise.
    wide = picture if picture.dtype == torch.float64 else picture.float()
    resized = F.interpolate(
        wide, size=tuple(new_grid), mode=how.mode, align_corners=how.align_corners, antialias=how.antialias
    ).to(pos_embed.dtype)
    return torch.cat([prefix, rearrange(resized, "b d h w -> b (h w) d")], dim=1)


def square_side(count: int) -> int | None:
    """The side of the square of `count` patches, None when they make no square."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count and count > 0 else None


def infer_grid(num_patches: int, *, like: Grid) -> Grid:
    """The grid a table of `num_patches` rows was made for, where its file does not say.

    The model's own grid when the number agrees, else a square, else the model's proportions. Raises UserError when
    none of them fits."""
    if num_patches == like[0] * like[1]:
        return like
    side = square_side(num_patches)
    if side is not None:
        return side, side
    divisor = math.gcd(*like)
    rows, columns = like[0] // divisor, like[1] // divisor
    times = square_side(num_patches // (rows * columns)) if num_patches % (rows * columns) == 0 else None
    if times is None:
        raise UserError(
            f"position embedding of {num_patches} patches is no square and not shaped like the model's "
            f"{like[0]}x{like[1]}; say its grid: load_weights(..., grid=(rows, columns))"
        )
    return rows * times, columns * times


def sincos_pos_embed(grid: Grid, dim: int, *, num_prefix_tokens: int = 0) -> Tensor:
    """float64 (num_prefix_tokens + h*w, dim): MAE's fixed embedding, zeros for the prefix. arXiv:2111.06377, section 3.

    Of each patch in raster order [sin, cos] of its column, then of its row, at frequencies 10000^(-i / (dim / 4)).
    timm's and MoCo v3's have other orders or frequencies. Raises UserError unless 4 divides dim."""
    if dim % 4:
        raise UserError(f"a sine-cosine position embedding of width {dim}: 4 does not divide it")
    table = _of_grid(grid, dim // 4, steps=dim // 4)
    return torch.cat([torch.zeros(num_prefix_tokens, dim, dtype=torch.float64), table])


def big_vision_pos_embed(grid: Grid, dim: int) -> Tensor:
    """float64 (h*w, dim): the fixed embedding of big_vision and MoCo v3; no class token has a row. arXiv:2205.01580.

    As MAE's, but at frequencies 10000^(-i / (dim / 4 - 1)). Raises UserError unless 4 divides dim, from 8 on."""
    if dim % 4 or dim < 8:
        raise UserError(f"a big_vision position embedding of width {dim}: a multiple of 4 from 8 on is needed")
    return _of_grid(grid, dim // 4, steps=dim // 4 - 1)


def sincos(positions: Tensor, count: int, *, steps: int) -> Tensor:
    """float64 (m, 2 * count): sines, then cosines of m positions at frequencies 10000^(-i / steps), i below count."""
    frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / steps)
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _of_grid(grid: Grid, count: int, *, steps: int) -> Tensor:
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    return torch.cat([sincos(places.flatten(), count, steps=steps) for places in (columns, rows)], dim=1)
