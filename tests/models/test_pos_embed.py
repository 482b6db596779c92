"""Position embeddings on other grids equal what the official codes make of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed

from vitexp.errors import UserError
from vitexp.models.pos_embed import POSITION_MODES, infer_grid, resize_pos_embed, sincos_pos_embed

GOLDEN = Path(__file__).parents[1] / "golden"


def cases() -> list[tuple[str, str]]:
    found = []
    for mode in ("jax", "mae"):
        with np.load(GOLDEN / f"vit_{mode}_positions.npz") as file:
            found += [(mode, key.removesuffix("/grids")) for key in file.files if key.endswith("/grids")]
    assert len(found) == 14
    return found


@pytest.mark.parametrize(("mode", "case"), cases())
def test_named_modes_equal_the_official_results(mode: str, case: str) -> None:
    with np.load(GOLDEN / f"vit_{mode}_positions.npz") as file:
        table, expected = (torch.from_numpy(file[f"{case}/{side}"]) for side in ("in", "out"))
        old, new, prefix = file[f"{case}/grids"].tolist()
    resized = resize_pos_embed(table, old_grid=(old, old), new_grid=(new, new), num_prefix_tokens=prefix, mode=mode)
    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 6)), ((6, 9), (4, 12)), ((14, 7), (7, 14))])
def test_timm_mode_equals_timm_on_any_grid(old: tuple[int, int], new: tuple[int, int]) -> None:
    table = torch.randn(1, 1 + old[0] * old[1], 8)
    ours = resize_pos_embed(table, old_grid=old, new_grid=new, num_prefix_tokens=1, mode="timm")
    theirs = resample_abs_pos_embed(table, new_size=list(new), old_size=list(old), num_prefix_tokens=1)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", POSITION_MODES)
def test_a_plane_stays_a_plane_and_prefix_rows_stay(mode: str) -> None:
    # Rows and columns must not be mixed up on rectangles: a ramp down the rows stays one.
    ramp = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None].expand(8, 6).reshape(1, 48, 1)
    table = torch.cat([torch.full((1, 2, 1), 7.0, dtype=torch.float64), ramp], dim=1)
    out = resize_pos_embed(table, old_grid=(8, 6), new_grid=(5, 9), num_prefix_tokens=2, mode=mode)
    assert out.shape == (1, 2 + 45, 1)
    assert out.dtype == torch.float64
    assert (out[:, :2] == 7).all()
    grid = out[0, 2:, 0].reshape(5, 9)
    torch.testing.assert_close(grid, grid[:, :1].expand(5, 9))
    assert (grid[1:, 0] > grid[:-1, 0]).all()


def test_modes_are_not_the_same() -> None:
    table = torch.randn(1, 49, 4)
    out = [
        resize_pos_embed(table, old_grid=(7, 7), new_grid=(12, 12), num_prefix_tokens=0, mode=m) for m in POSITION_MODES
    ]
    assert min((a - b).abs().max() for a, b in zip(out, out[1:] + out[:1], strict=True)) > 0.05


def test_half_precision_tables_are_resized_in_float32() -> None:
    table = torch.randn(1, 49, 4)
    narrow = resize_pos_embed(table.bfloat16(), old_grid=(7, 7), new_grid=(9, 9), num_prefix_tokens=0, mode="jax")
    wide = resize_pos_embed(table.bfloat16().float(), old_grid=(7, 7), new_grid=(9, 9), num_prefix_tokens=0, mode="jax")
    assert torch.equal(narrow, wide.bfloat16())


def test_unknown_mode_is_named() -> None:
    with pytest.raises(UserError, match=r"position_mode='bicubic'.*jax, mae, timm"):
        resize_pos_embed(torch.zeros(1, 4, 1), old_grid=(2, 2), new_grid=(3, 3), num_prefix_tokens=0, mode="bicubic")


@pytest.mark.parametrize(
    ("rows", "like", "grid"),
    [
        (196, (24, 24), (14, 14)),
        (32, (4, 8), (4, 8)),
        (128, (4, 8), (8, 16)),
        (8, (4, 8), (2, 4)),
        (49, (4, 8), (7, 7)),
    ],
)
def test_grid_is_told_from_the_number_of_rows(rows: int, like: tuple[int, int], grid: tuple[int, int]) -> None:
    assert infer_grid(rows, like=like) == grid


@pytest.mark.parametrize("rows", [195, 51, 0])
def test_grid_that_cannot_be_told_is_asked_for(rows: int) -> None:
    with pytest.raises(UserError, match=rf"{rows} patches.*grid="):
        infer_grid(rows, like=(4, 8))


SINCOS = np.load(GOLDEN / "mae_sincos_pos_embed.npz", allow_pickle=False)


@pytest.mark.parametrize("name", [name for name in SINCOS.files if name.startswith("pe2d_d")])
def test_sincos_equals_maes_table(name: str) -> None:
    dim, side, prefix = (int(part) for part in re.fullmatch(r"pe2d_d(\d+)_g(\d+)_cls(\d)", name).groups())
    table = sincos_pos_embed((side, side), dim, num_prefix_tokens=prefix)
    np.testing.assert_allclose(table.numpy(), SINCOS[name], rtol=0, atol=1e-12)


def test_sincos_of_a_rectangle_and_of_a_width_that_4_does_not_divide() -> None:
    np.testing.assert_allclose(sincos_pos_embed((2, 3), 16).numpy(), SINCOS["pe2d_rect_h2_w3_d16"], rtol=0, atol=1e-12)
    with pytest.raises(UserError, match="width 10"):
        sincos_pos_embed((2, 2), 10)
