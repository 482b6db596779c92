"""Token labels against the official code's arrays, and against a RoI-align of one loop a sample."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vitexp.data.token_labels import (
    TokenTargets,
    crop_labels,
    mix_targets,
    pack_official,
    read_official,
    read_official_crop,
    token_targets,
)
from vitexp.errors import UserError
from vitexp.mixing import mixup, one_hot

TESTS = Path(__file__).parents[1]
CROPS = {name: torch.from_numpy(a) for name, a in np.load(TESTS / "golden" / "tlt_labelmap_crop.npz").items()}
PROBE = {name: torch.from_numpy(a) for name, a in np.load(TESTS / "golden" / "tlt_axis_probe.npz").items()}
UNFLIPPED = torch.zeros(4, dtype=torch.bool)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)  # logits to 1e-5: a share to 1e-5 of itself


def some_maps(batch: int, kept: int, cells: tuple[int, int], num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(batch, num_classes, *cells, generator=generator).argsort(dim=1)[:, :kept]
    values = 4 * torch.randn(batch, kept, *cells, generator=generator)
    return values.sort(dim=1, descending=True).values.half(), ranks.int()


def some_boxes(count: int, seed: int = 1) -> Tensor:
    """Within the picture, beyond its border, and smaller than a cell."""
    u = np.random.default_rng(seed).random((count, 4))
    boxes = np.concatenate([u[:, :2] * 0.5, 0.2 + 0.3 * u[:, 2:]], axis=1)
    boxes[1::4] = u[1::4] * [-0.6, 0.9, 1.5, 0.8]
    boxes[2::4, 2:] *= 0.1
    return torch.from_numpy(boxes).float()


# ---- slow and obvious ------------------------------------------------------------------------------------------------
def slow_labels(
    values: np.ndarray, numbers: np.ndarray, box: np.ndarray, num_classes: int, grid: tuple[int, int]
) -> np.ndarray:
    """(gh * gw, k) of one crop: a dense map, RoI-align sample by sample, softmax."""
    kept, height, width = values.shape
    dense = np.zeros((height, width, num_classes))
    for row in range(height):
        for column in range(width):
            for k in range(kept):
                dense[row, column, numbers[k, row, column]] = values[k, row, column]
    top, left, tall, wide = box.astype(np.float64)
    y0, x0 = top * height - 0.5, left * width - 0.5
    bin_h, bin_w = max(tall * height, 1.0) / grid[0], max(wide * width, 1.0) / grid[1]
    points_h, points_w = math.ceil(bin_h), math.ceil(bin_w)
    labels = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            logits = np.zeros(num_classes)
            for a in range(points_h):
                for b in range(points_w):
                    y, x = y0 + (i + (a + 0.5) / points_h) * bin_h, x0 + (j + (b + 0.5) / points_w) * bin_w
                    logits += between(dense, y, x) / (points_h * points_w)
            exponentials = np.exp(logits - logits.max())
            labels.append(exponentials / exponentials.sum())
    return np.stack(labels)


def between(dense: np.ndarray, y: float, x: float) -> np.ndarray:
    height, width = dense.shape[:2]
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(dense.shape[2])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    up, left = int(y), int(x)
    down, right = min(up + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - up, x - left
    above = (1 - dx) * dense[up, left] + dx * dense[up, right]
    below = (1 - dx) * dense[down, left] + dx * dense[down, right]
    return (1 - dy) * above + dy * below


@pytest.mark.parametrize("num_classes", [6, 3000])
@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (7, 3)])
def test_labels_equal_those_of_the_slow_roi_align(num_classes: int, grid: tuple[int, int]) -> None:
    values, numbers = some_maps(9, 3, (5, 7), num_classes)
    boxes, mirrored = some_boxes(9), torch.arange(9) % 2 == 0
    (found,) = crop_labels(values, numbers, boxes, mirrored, num_classes=num_classes, grids=[grid])
    for i in range(9):
        expected = slow_labels(*(a[i].numpy() for a in (values.float(), numbers, boxes)), num_classes, grid)
        if mirrored[i]:
            expected = expected.reshape(*grid, -1)[:, ::-1].reshape(-1, num_classes)
        np.testing.assert_allclose(found[i].numpy(), expected, rtol=5e-5, atol=1e-7)


@pytest.mark.parametrize("official_axes", [False, True])
def test_a_crop_mirrored_is_the_mirrored_pictures_crop(official_axes: bool) -> None:
    """The official code flips before it crops."""
    values, numbers = some_maps(4, 3, (6, 6), 9)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.1, 0.2, 0.5, 0.3], [0.4, 0.0, 0.3, 0.9], [0.2, 0.6, 0.7, 0.4]])
    other_side = boxes.clone()
    other_side[:, 1] = 1 - boxes[:, 1] - boxes[:, 3]
    kinds = {"num_classes": 9, "grids": [(4, 4)], "official_axes": official_axes}
    after = crop_labels(values, numbers, boxes, ~UNFLIPPED, **kinds)[0]
    assert_close(after, crop_labels(values.flip(3), numbers.flip(3), other_side, UNFLIPPED, **kinds)[0])


# ---- the official code -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 4, 14])
@pytest.mark.parametrize("official_axes", [False, True])
def test_crops_of_official_maps_get_the_official_labels(size: int, official_axes: bool) -> None:
    values, numbers = read_official(CROPS["topk_maps_fp16"], num_classes=20)
    left, top, right, bottom = CROPS["coords"].unbind(1)
    boxes = torch.stack([top, left, bottom - top, right - left], dim=1)
    if official_axes:  # it takes what is given to it as the top for the left
        boxes = boxes[:, [1, 0, 3, 2]]
    cls, tokens = crop_labels(
        values, numbers, boxes, UNFLIPPED, num_classes=20, grids=[(1, 1), (size, size)], official_axes=official_axes
    )
    expected = CROPS[f"get_label_size{size}"]
    if size == 1:
        assert_close(cls[:, 0], expected)
    else:
        assert_close(torch.cat([cls, tokens], dim=1).transpose(1, 2), expected)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_official_batches_get_the_official_targets_and_stay_as_they_are(size: int, smoothing: float) -> None:
    packed = CROPS["packed"].clone()
    values, numbers = read_official(packed[:, :2], num_classes=20)
    boxes, labels = read_official_crop(packed)
    assert torch.equal(boxes, CROPS["ijhw_frac"])
    assert torch.equal(labels, CROPS["gt"])
    targets = token_targets(
        values,
        numbers,
        boxes,
        UNFLIPPED,
        labels,
        num_classes=20,
        grid=(size, size),
        smoothing=smoothing,
        official_axes=True,
    )
    columns = 2 if size == 1 else 18  # re-labeling has no tokens
    name = f"size{size}_smooth{smoothing}"
    assert_close(pack_official(targets)[..., :columns], CROPS[f"labelmaps_with_coords_{name}"])
    for lam in (1, 0.7):
        found = pack_official(mix_targets(targets, lam=lam))[..., :columns]
        assert_close(found, CROPS[f"mixup_target_lam{lam}_{name}"])
    assert torch.equal(packed, CROPS["packed"])
    ends = CROPS["packed_after_call"][:, 2, 0, 0, :4]  # the official code leaves the box's ends where its sides were
    torch.testing.assert_close(ends, torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_class_numbers_alone_get_the_official_targets(smoothing: float, lam: float) -> None:
    targets = one_hot(CROPS["int_target"], 20, smoothing=smoothing)
    mixed = mixup(torch.zeros(4, 1, 1, 1), targets, lam=lam)[1]
    assert_close(mixed, CROPS[f"int_target_smooth{smoothing}_lam{lam}"])


def test_official_maps_hold_the_dense_map_and_sparse_ones_the_same() -> None:
    values, numbers = read_official(CROPS["topk_maps_fp16"], num_classes=20)
    dense = torch.zeros(4, 20, 9, 9).scatter_(1, numbers.long(), values.float())
    assert torch.equal(dense, CROPS["full_maps"])
    every = torch.arange(20).view(1, 20, 1, 1).expand(4, 20, 9, 9)
    boxes = some_boxes(4)
    of_dense = crop_labels(dense, every, boxes, UNFLIPPED, num_classes=20, grids=[(4, 4)])[0]
    assert_close(crop_labels(values, numbers, boxes, UNFLIPPED, num_classes=20, grids=[(4, 4)])[0], of_dense)


def test_the_top_right_of_a_picture_has_the_top_rights_labels() -> None:
    boxes = (PROBE["ijhw"] / PROBE["img_size"].repeat(2)).expand(2, 4)
    assert boxes[0].tolist() == [0.0, 0.5, 0.5, 0.5]

    def ids(name: str, official_axes: bool) -> Tensor:
        values, numbers = read_official(PROBE[name][None].expand(2, -1, -1, -1, -1), num_classes=20)
        kinds = {"num_classes": 20, "grids": [(4, 4)], "official_axes": official_axes}
        return crop_labels(values, numbers, boxes, UNFLIPPED[:2], **kinds)[0].argmax(2).view(2, 4, 4)[0]

    first, second = torch.arange(4), torch.arange(4, 8)
    assert torch.equal(ids("rowmap", False), first[:, None].expand(4, 4))
    assert torch.equal(ids("colmap", False), second.expand(4, 4))
    assert torch.equal(ids("rowmap", True), PROBE["official_row_ids"])
    assert torch.equal(ids("colmap", True), PROBE["official_col_ids"])


# ---- what it promises of itself --------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 5])
def test_a_batch_is_its_pictures_one_by_one_and_its_inputs_stay(count: int) -> None:
    given = (*some_maps(count, 4, (8, 8), 50), some_boxes(count), torch.arange(count) % 2 == 0, torch.arange(count))
    before = [tensor.clone() for tensor in given]
    kinds = {"num_classes": 50, "grid": (4, 4), "smoothing": 0.1}
    whole = token_targets(*given, **kinds)
    assert [tuple(part.shape) for part in whole] == [(count, 50), (count, 50), (count, 16, 50)]
    assert whole.ground_truth.dtype == whole.cls.dtype == whole.tokens.dtype == torch.float32
    for i in range(count):
        alone = token_targets(*(tensor[i : i + 1] for tensor in given), **kinds)
        for one, all_of_them in zip(alone, whole, strict=True):
            assert_close(one[0], all_of_them[i])
    mixed = mix_targets(whole, lam=0.25)
    assert_close(mixed.tokens[count // 2], whole.tokens[count // 2])  # its own partner
    assert_close(mixed.tokens[0], 0.25 * whole.tokens[0] + 0.75 * whole.tokens[-1])
    assert all(map(torch.equal, given, before))


def test_a_map_of_all_classes_far_below_zero_is_its_softmax() -> None:
    values = torch.tensor([-300.0, -301.0, -340.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    numbers = torch.tensor([2, 0, 1]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    (found,) = crop_labels(values, numbers, some_boxes(1), UNFLIPPED[:1], num_classes=3, grids=[(2, 2)])
    assert_close(found, torch.tensor([-301.0, -340.0, -300.0]).softmax(0).expand(1, 4, 3))


def test_smoothing_adds_its_share_to_whole_distributions() -> None:
    given = (*some_maps(3, 4, (8, 8), 50), some_boxes(3), torch.zeros(3, dtype=torch.bool), torch.arange(3))
    targets: TokenTargets = token_targets(*given, num_classes=50, grid=(4, 4), smoothing=0.1)
    assert_close(targets.tokens.sum(2), torch.full((3, 16), 1 + 0.1 / 50))
    assert_close(targets.ground_truth.sum(1), torch.ones(3))


def test_official_maps_of_other_classes_are_refused() -> None:
    stored = CROPS["topk_maps_fp16"]
    with pytest.raises(UserError, match=r"3000 classes: .* exact up to 2048"):
        read_official(stored, num_classes=3000)
    with pytest.raises(UserError, match=r"from 0 to 19: not whole numbers from 0 to 9"):
        read_official(stored, num_classes=10)
    with pytest.raises(UserError, match="not whole numbers"):
        read_official(stored.flip(1), num_classes=20)
