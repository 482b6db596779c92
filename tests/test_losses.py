"""Losses of soft targets and token labels against the official code's values and gradients."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitexp.errors import UserError
from vitexp.losses import (
    binary_loss,
    classification_loss,
    distillation_loss,
    soft_target_loss,
    token_label_loss,
    with_ground_truth,
)
from vitexp.token_mixing import mix_class_targets

FOLDER = Path(__file__).parent / "golden"
GOLDEN = {name: torch.from_numpy(array) for name, array in np.load(FOLDER / "tlt_losses.npz").items()}
ROWS = GOLDEN["TokenLabelCrossEntropy_rows"].tolist()
DEIT = {name: torch.from_numpy(array) for name, array in np.load(FOLDER / "deit_distill_loss.npz").items()}
FORMS = {1: "soft_deit", 2: "hard"}  # by the golden rows' numbers


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


# ---- distillation ------------------------------------------------------------------------------------------------
def base_loss(number: float, logits: Tensor) -> Tensor:
    """What the official criterion adds the distillation to."""
    soft, hard = DEIT["soft_labels"], DEIT["int_labels"]
    if number == 3:
        return F.binary_cross_entropy_with_logits(logits, soft)
    if number == 0:
        return soft_target_loss(logits, soft)
    return classification_loss(logits, hard, label_smoothing=0.1 if number == 1 else 0.0)


def deit_loss(form: float, alpha: float, temperature: float, base: float, cls: Tensor, dist: Tensor) -> Tensor:
    if form == 0:
        return base_loss(base, cls)
    distilled = distillation_loss(dist, DEIT["teacher"], form=FORMS[int(form)], temperature=temperature)
    return (1 - alpha) * base_loss(base, cls) + alpha * distilled


def test_every_official_distillation_loss_is_reproduced() -> None:
    rows = DEIT["rows"].tolist()
    assert (len(rows), {row[0] for row in rows}) == (72, {0, 1, 2})
    for *case, expected in rows:
        found = deit_loss(*case, DEIT["student_cls"], DEIT["student_kd"])
        assert found.item() == pytest.approx(expected, rel=1e-6), case


@pytest.mark.parametrize("form", FORMS)
def test_every_official_distillation_gradient_is_reproduced(form: int) -> None:
    logits = [DEIT[name].clone().requires_grad_() for name in ("student_cls", "student_kd")]
    deit_loss(form, 0.5, 3.0, 0, *logits).backward()
    for part, tensor in zip(("cls", "kd"), logits, strict=True):
        expected = DEIT[f"grad_{part}_{FORMS[form].removesuffix('_deit')}_a0.5_t3"]
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-5, atol=1e-8)


def test_the_textbooks_soft_loss_is_the_mean_over_pictures() -> None:
    student, teacher = DEIT["student_kd"].double(), DEIT["teacher"].double()
    total = 0.0
    for said, wanted in zip(student / 2, teacher / 2, strict=True):
        p, q = wanted.exp() / wanted.exp().sum(), said.exp() / said.exp().sum()
        total += sum(p[k] * (p[k] / q[k]).log() for k in range(10)).item()
    assert distillation_loss(student, teacher, form="soft", temperature=2.0).item() == pytest.approx(4 * total / 6)
    official = distillation_loss(student, teacher, form="soft_deit", temperature=2.0).item()
    assert official == pytest.approx(4 * total / 6 / 10)


@pytest.mark.parametrize("form", ["soft", "soft_deit", "hard"])
def test_a_teacher_learns_nothing_and_half_precision_is_weighed_in_single(form: str) -> None:
    student, teacher = DEIT["student_kd"].bfloat16().requires_grad_(), DEIT["teacher"].bfloat16().requires_grad_()
    loss = distillation_loss(student, teacher, form=form)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss(student.float(), teacher.float(), form=form))
    assert teacher.grad is None
    assert student.grad.any()


def test_an_unknown_form_of_distillation_is_named() -> None:
    with pytest.raises(UserError, match=r"form=sofft is not one of hard, soft, soft_deit.*'soft'"):
        distillation_loss(DEIT["student_kd"], DEIT["teacher"], form="sofft")


def test_each_class_is_a_question_of_its_own_for_the_binary_loss() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed = torch.tensor([[0.7, 0, 0, 0.3, 0], [0, 1, 0, 0, 0], [0, 0, 0.001, 0, 0.999], [0, 0, 0, 1, 0]])
    wanted = 0.0
    for row in range(4):
        for k in range(5):
            chance = float(logits[row, k].sigmoid())
            wanted -= math.log(chance if mixed[row, k] > 0 else 1 - chance) / 20
    assert float(binary_loss(logits, mixed)) == pytest.approx(wanted, rel=1e-6)
    numbers = torch.tensor([3, 1, 2, 0])
    assert float(classification_loss(logits, numbers, objective="binary")) == pytest.approx(
        float(binary_loss(logits, F.one_hot(numbers, 5).float())), rel=1e-7
    )
