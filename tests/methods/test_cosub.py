"""Two submodels that teach each other, against slow obvious sums."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.methods.cosub import Cosub
from vitexp.models.vit import VisionTransformer
from vitexp.types import Batch, Progress

START = Progress(0, 1, 0.0, 1.0)
CLASSES = torch.tensor([0, 2, 1])
SHARES = torch.tensor([[0.25, 0.0, 0.75], [1.0, 0.0, 0.0], [0.4, 0.6, 0.0]])


def vit(**settings: Any) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    return VisionTransformer(**shape | {"drop_path": 0.5, "init": "timm"} | settings)


def batch(targets: Tensor) -> Batch:
    return Batch(torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)), targets, torch.arange(3))


def binary(logits: Tensor, wanted: Tensor) -> float:
    """Mean over pictures and classes, one number after the other."""
    total = 0.0
    for x, t in zip(logits.flatten().tolist(), wanted.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    return total / logits.numel()


class Recorder(nn.Module):
    """Logits that were said, twice the batch's rows, of pictures that it keeps."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.said, self.dropout = nn.Parameter(logits), nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return self.said


@pytest.mark.parametrize(
    ("targets", "binarize", "wanted"),
    [
        (CLASSES, True, nn.functional.one_hot(CLASSES).double()),
        (SHARES, True, (SHARES > 0).double()),
        (SHARES, False, SHARES.double()),
    ],
)
def test_the_loss_is_a_quarter_of_four_binary_ones(targets: Tensor, binarize: bool, wanted: Tensor) -> None:
    said = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    backbone, given = Recorder(said), batch(targets)
    output = Cosub(backbone, binarize=binarize)(given, START)
    assert torch.equal(backbone.images, torch.cat([given.images, given.images]))
    one, other = said.double().chunk(2)
    mutual = binary(one, other.sigmoid()) + binary(other, one.sigmoid())
    assert output.loss.item() == pytest.approx((binary(one, wanted) + binary(other, wanted) + mutual) / 4, rel=1e-6)
    assert output.metrics["cosub_loss"].item() == pytest.approx(mutual / 2, rel=1e-6)
    output.loss.backward()
    assert backbone.said.grad is not None
    # d BCE / d logit is (sigmoid - target) / numbers: what the other says is a target and gets no gradient of its own.
    told = torch.cat([other, one]).sigmoid()
    expected = (2 * said.double().sigmoid() - torch.cat([wanted, wanted]) - told) / 4 / one.numel()
    torch.testing.assert_close(backbone.said.grad.double(), expected, rtol=1e-5, atol=1e-7)


def test_both_passes_leave_out_branches_of_their_own() -> None:
    method = Cosub(vit(num_classes=3)).train()
    assert method(batch(CLASSES), START).metrics["cosub_loss"] > 0
    images = batch(CLASSES).images
    one, other = method.backbone(torch.cat([images, images])).chunk(2)
    assert not torch.equal(one, other)


def test_a_model_that_leaves_nothing_out_is_refused_in_training_alone() -> None:
    method = Cosub(vit(drop_path=0.0))
    assert method.logits(batch(CLASSES).images).shape == (3, 3)
    with pytest.raises(UserError, match=r"method=cosub: what trains leaves nothing out.*model\.drop_path"):
        method(batch(CLASSES), START)
    Cosub(vit(drop_path=0.0, dropout=0.1))(batch(CLASSES), START)
    frozen = Cosub(vit())
    frozen.backbone.blocks.requires_grad_(False)
    frozen.backbone.pos_drop.eval()
    with pytest.raises(UserError, match="what trains leaves nothing out"):
        frozen.train()(batch(CLASSES), START)
