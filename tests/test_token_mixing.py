"""MixToken's boxes against the official code's draws, and what is exchanged against a slow loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from vitexp.seeding import uniforms
from vitexp.token_mixing import kept_share, mix_class_targets, mix_tokens, token_box

STATS = np.load(Path(__file__).parent / "golden" / "tlt_rand_bbox_stats.npz")


def official_box(stream: np.random.RandomState, keep: float, grid: tuple[int, int]) -> list[int]:
    """Our box for the centre that the official code draws next, as it writes boxes: first rows' and columns' ends."""
    centre = [(stream.randint(side) + 0.5) / side for side in grid]
    top, bottom, left, right = token_box([keep, *centre], grid=grid)
    return [top, left, bottom, right]


def histograms(boxes: np.ndarray, side: int) -> dict[str, np.ndarray]:
    tall, wide = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return {
        "area_hist_counts": np.bincount(tall * wide, minlength=side * side + 1),
        "side_hist_counts": np.bincount(tall, minlength=side + 1),
        "side2_hist_counts": np.bincount(wide, minlength=side + 1),
    }


@pytest.mark.parametrize("side", [14, 24, 28])
def test_boxes_are_the_official_ones_for_the_same_shares_and_centres(side: int) -> None:
    stream = np.random.RandomState(1234)
    boxes = np.array([official_box(stream, stream.beta(1, 1), (side, side)) for _ in range(10_000)])
    for name, found in histograms(boxes, side).items():
        assert np.array_equal(found, STATS[f"g{side}/{name}"]), name
    if side == 14:
        assert np.array_equal(boxes[:500], STATS["g14/boxes"])
    share = [1 - kept_share((top, bottom, left, right), grid=(side, side)) for top, left, bottom, right in boxes]
    quantiles = np.quantile(share, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    found = [np.mean(np.array(share) == 0), np.mean(share), *quantiles]
    np.testing.assert_allclose(found, STATS[f"g{side}/summary"], rtol=1e-12, atol=1e-12)


def test_single_draws_and_oblong_grids_are_the_official_ones() -> None:
    for seed, keep, *box in STATS["seeded_draws_g14"]:
        stream = np.random.RandomState(int(seed))
        assert stream.beta(1, 1) == keep
        assert official_box(stream, keep, (14, 14)) == box
    before = None
    for keep, *box in STATS["fixed_lam_draws_g14_seed99"]:
        if keep != before:
            stream, before = np.random.RandomState(99), keep
        assert official_box(stream, keep, (14, 14)) == box
    stream = np.random.RandomState(77)
    assert [official_box(stream, 0.3, (10, 20)) for _ in range(50)] == STATS["rect_draws_10x20_lam0.3"].tolist()


def test_boxes_and_kept_shares_are_those_of_cutmix_on_pixels() -> None:
    stream = np.random.RandomState(55)
    for keep, top, bottom, left, right, kept in STATS["cutmix_bbox_and_lam_224_seed55"].tolist():
        assert stream.beta(1, 1) == keep
        assert official_box(stream, keep, (224, 224)) == [top, left, bottom, right]
        assert kept_share((int(top), int(bottom), int(left), int(right)), grid=(224, 224)) == pytest.approx(kept)


@pytest.mark.parametrize("side", [14, 28])
def test_boxes_of_uniform_numbers_are_distributed_as_the_official_ones(side: int) -> None:
    numbers = uniforms(7, 0, np.arange(10_000), 3)
    drawn = np.array([token_box(u, grid=(side, side)) for u in numbers])
    for name, found in histograms(drawn[:, [0, 2, 1, 3]], side).items():
        expected = STATS[f"g{side}/{name}"]
        common = found + expected >= 20
        found = np.append(found[common], found[~common].sum())
        expected = np.append(expected[common], expected[~common].sum())
        found, expected = found[found + expected > 0], expected[found + expected > 0]
        distance = ((found - expected) ** 2 / (found + expected)).sum()
        assert chi2.sf(distance, len(found) - 1) > 0.01, name
    share = np.array([1 - kept_share(tuple(box), grid=(side, side)) for box in drawn])
    assert np.mean(share == 0) == pytest.approx(STATS[f"g{side}/summary"][0], abs=0.006)
    assert share.mean() == pytest.approx(STATS[f"g{side}/summary"][1], abs=0.01)


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize("box", [(0, 3, 0, 5), (1, 3, 2, 5), (2, 2, 1, 1), (0, 1, 4, 5)])
def test_tokens_in_the_box_are_the_partners_and_come_back(count: int, box: tuple[int, int, int, int]) -> None:
    tokens = torch.randn(count, 15, 4, generator=torch.Generator().manual_seed(0))
    mixed = mix_tokens(tokens, box=box, grid=(3, 5))
    inside = 0
    for row in range(3):
        for column in range(5):
            exchanged = box[0] <= row < box[1] and box[2] <= column < box[3]
            inside += exchanged
            for i in range(count):
                assert torch.equal(
                    mixed[i, 5 * row + column], tokens[count - 1 - i if exchanged else i, 5 * row + column]
                )
    assert torch.equal(mix_tokens(mixed, box=box, grid=(3, 5)), tokens)
    assert kept_share(box, grid=(3, 5)) == 1 - inside / 15
    targets = torch.rand(count, 7)
    expected = targets * (1 - inside / 15) + targets.flip(0) * (inside / 15)
    torch.testing.assert_close(mix_class_targets(targets, box=box, grid=(3, 5)), expected)


def test_gradients_go_back_to_the_picture_that_a_token_came_from() -> None:
    tokens = torch.zeros(2, 4, 1, requires_grad=True)
    mixed = mix_tokens(tokens, box=(0, 1, 0, 2), grid=(2, 2))
    mixed[0].sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[..., 0].tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
