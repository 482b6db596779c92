"""Losses of soft targets and token labels against the official code's values and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vitexp.losses import classification_loss, soft_target_loss, token_label_loss, with_ground_truth
from vitexp.token_mixing import mix_class_targets

GOLDEN = {name: torch.from_numpy(a) for name, a in np.load(Path(__file__).parent / "golden" / "tlt_losses.npz").items()}
ROWS = GOLDEN["TokenLabelCrossEntropy_rows"].tolist()


def box(number: float) -> tuple[int, int, int, int]:
    top, left, bottom, right = GOLDEN["boxes"][int(number)].tolist()
    return top, bottom, left, right


def loss_of(
    cls_logits: Tensor, token_logits: Tensor, *, number: float, weights: tuple[float, float], truth: bool, soft: bool
) -> Tensor:
    """The official criterion put together from ours: soft, one target a picture; else ground truth, map and tokens."""
    if soft:
        cls = GOLDEN["target2"]
        tokens = cls[:, None]
    else:
        ground_truth, cls, tokens = GOLDEN["target3"].transpose(1, 2).split([1, 1, 16], dim=1)
        ground_truth, cls = ground_truth[:, 0], cls[:, 0]
        cls = with_ground_truth(cls, ground_truth) if truth else cls
    cls = mix_class_targets(cls, box=box(number), grid=(4, 4))
    return token_label_loss(cls_logits, token_logits, cls, tokens, cls_weight=weights[0], token_weight=weights[1])


def test_every_official_value_is_reproduced() -> None:
    volo = [[*row[:3], 1.0, *row[3:5]] for row in GOLDEN["VOLO_TokenLabelGTCrossEntropy_rows"].tolist()]
    assert (len(ROWS), len(volo)) == (64, 16)
    for number, dense, cls, truth, soft, expected in ROWS + volo:
        found = loss_of(
            GOLDEN["x_cls"],
            GOLDEN["x_aux"],
            number=number,
            weights=(cls, dense),
            truth=bool(truth),
            soft=bool(soft),
        )
        assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("truth", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_every_official_gradient_is_reproduced(truth: bool, soft: bool) -> None:
    logits = [GOLDEN[name].clone().requires_grad_() for name in ("x_cls", "x_aux")]
    loss_of(*logits, number=1, weights=(1.0, 0.5), truth=truth, soft=soft).backward()
    for part, tensor in zip(("cls", "aux"), logits, strict=True):
        expected = GOLDEN[f"grad_{part}_box1_gt{truth:d}_target{2 if soft else 3}"]
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-5, atol=1e-8)


def test_soft_targets_give_the_official_loss_also_for_copies_of_a_batch() -> None:
    cases = {
        "SoftTargetCrossEntropy_target2": (GOLDEN["x_cls"], GOLDEN["target2"]),
        "SoftTargetCrossEntropy_rep2": (GOLDEN["x_rep2"], GOLDEN["target2"]),
        "TokenLabelSoftTargetCrossEntropy_target2": (GOLDEN["x_cls"], GOLDEN["target2"]),
        "TokenLabelSoftTargetCrossEntropy_size1": (GOLDEN["x_cls"], GOLDEN["target_size1"][..., 1]),
    }
    for name, (logits, targets) in cases.items():
        assert soft_target_loss(logits, targets).item() == pytest.approx(GOLDEN[name].item(), rel=1e-6), name
    distribution = torch.rand(6, 12).softmax(1)
    torch.testing.assert_close(
        soft_target_loss(GOLDEN["x_cls"], distribution), classification_loss(GOLDEN["x_cls"], distribution)
    )


def test_token_targets_count_half_unless_told() -> None:
    cls, tokens, labels = GOLDEN["x_cls"], GOLDEN["x_aux"], GOLDEN["target2"]
    expected = soft_target_loss(cls, labels) + 0.5 * soft_target_loss(tokens, labels[:, None].expand(-1, 16, -1))
    torch.testing.assert_close(token_label_loss(cls, tokens, labels, labels[:, None]), expected)


def test_half_precision_logits_are_weighed_in_single() -> None:
    logits = GOLDEN["x_cls"].bfloat16()
    loss = soft_target_loss(logits, GOLDEN["target2"])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, soft_target_loss(logits.float(), GOLDEN["target2"]))
