"""Distillation against slow obvious sums, and a teacher that is neither trained nor saved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.methods.distillation import Distillation
from vitexp.models.deit import DeiT
from vitexp.models.vit import VisionTransformer
from vitexp.types import Batch, Progress

START = Progress(0, 1, 0.0, 1.0)
SHAPE = {"image_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}


def deit(**settings: Any) -> DeiT:
    torch.manual_seed(0)
    return DeiT(**SHAPE | settings)


def batch(*, mixed: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 16, 16, generator=generator)
    targets: Tensor = torch.tensor([0, 1, 2, 3, 4, 0])
    if mixed:
        targets = torch.rand(6, 5, generator=generator).softmax(1)
    return Batch(images, targets, torch.arange(6))


class Linear(nn.Module):
    """A teacher that counts how it is asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layer, self.dropout, self.modes = nn.Linear(3 * 16 * 16, 5), nn.Dropout(0.5), []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.dropout(self.layer(images.flatten(1)))


@torch.no_grad()
def slow(cls: Tensor, dist: Tensor, teacher: Tensor, targets: Tensor, *, form: str, alpha: float, t: float) -> float:
    """Sums over pictures and classes, one number after the other."""
    base = word = 0.0
    for row, (own, other, taught) in enumerate(zip(cls.double(), dist.double(), teacher.double(), strict=True)):
        log_own, log_other = own - own.logsumexp(0), other / t - (other / t).logsumexp(0)
        wanted = (taught / t).softmax(0)
        share = targets[row] if targets.ndim == 2 else nn.functional.one_hot(targets[row], 5)
        base -= sum(float(share[k]) * float(log_own[k]) for k in range(5)) / len(cls)
        if form == "hard":
            best = max(range(5), key=lambda k, taught=taught: float(taught[k]))
            word -= float(other[best] - other.logsumexp(0)) / len(cls)
        else:
            kl = sum(float(wanted[k]) * (math.log(float(wanted[k])) - float(log_other[k])) for k in range(5))
            word += t * t * kl / len(cls) / (5 if form == "soft_deit" else 1)
    return (1 - alpha) * base + alpha * word


@pytest.mark.parametrize("form", ["hard", "soft", "soft_deit"])
@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_the_loss_is_that_of_the_class_and_of_the_teachers_word(form: str, distilled: bool, mixed: bool) -> None:
    model, teacher, given = deit(distilled=distilled), Linear().eval(), batch(mixed=mixed)
    method = Distillation(model, teacher=teacher, form=form, alpha=0.3, temperature=2.0)
    output = method(given, START)
    features = model.encode(model.embed(given.images))
    both = model.distilled_logits(features) if distilled else (model(given.images), model(given.images))
    assert distilled == (not torch.equal(both[0], both[1]))
    wanted = slow(*both, teacher(given.images), given.targets, form=form, alpha=0.3, t=2.0)
    assert output.loss.item() == pytest.approx(wanted, rel=1e-5)
    answers = teacher(given.images).argmax(1)
    assert float(output.metrics["agreement"]) == pytest.approx(float((both[1].argmax(1) == answers).float().mean()))


def test_each_classifier_of_a_distilled_model_learns_its_own_part_alone() -> None:
    for alpha, taught in ((0.0, "head"), (1.0, "head_dist")):
        model = deit(distilled=True)
        Distillation(model, teacher=Linear().eval(), alpha=alpha)(batch(), START).loss.backward()
        for name in ("head", "head_dist"):
            assert bool(getattr(model, name).weight.grad.any()) == (name == taught)


def test_the_teacher_is_no_part_of_the_method_and_stays_in_eval_mode() -> None:
    teacher = Linear().eval()
    method = Distillation(deit(), teacher=teacher)
    assert set(method.state_dict()) == {f"backbone.{key}" for key in method.backbone.state_dict()}
    assert not {id(p) for p in method.parameters()} & {id(p) for p in teacher.parameters()}
    method.train()
    before = torch.get_rng_state()
    method(batch(), START).loss.backward()
    assert teacher.modes == [(False, False)]
    assert torch.equal(torch.get_rng_state(), before), "dropout of the teacher would draw"
    assert teacher.layer.weight.grad is None
    method.double()
    assert teacher.layer.weight.dtype == torch.float64, "it goes where the method goes"


def test_without_a_teacher_it_evaluates_and_does_not_learn() -> None:
    method = Distillation(deit(distilled=True), teacher=None)
    assert torch.equal(method.logits(batch().images), method.backbone(batch().images))
    with pytest.raises(UserError, match=r"method\.teacher"):
        method(batch(), START)


def test_without_a_teacher_the_class_alone_can_be_learned_by_the_class_tokens_classifier() -> None:
    model, given = deit(distilled=True), batch(mixed=True)
    output = Distillation(model, alpha=0.0)(given, START)
    logits = model.distilled_logits(model.encode(model.embed(given.images))).cls
    assert output.loss.item() == pytest.approx(nn.functional.cross_entropy(logits, given.targets).item(), rel=1e-6)
    output.loss.backward()
    assert model.head_dist is not None
    assert model.head.weight.grad.any()
    assert not model.head_dist.weight.grad.any(), "a gradient, as several processes need it, of nothing"


def test_what_does_not_fit_is_named() -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"method\.form=sof is not one of hard, soft, soft_deit\. Did you mean 'soft'"):
        Distillation(deit(), form="sof")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(UserError, match="no classes"):
        Distillation(VisionTransformer(**SHAPE | {"num_classes": 0}))
    with pytest.raises(UserError, match=r"method\.loss=binary: with method\.label_smoothing=0\.1"):
        Distillation(deit(), loss="binary", label_smoothing=0.1)
