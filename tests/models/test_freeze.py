"""What trains in linear probing and partial fine-tuning, and the head that they train."""

from __future__ import annotations

import torch
from torch import nn

from vitexp.models.vit import VisionTransformer


def _vit(**options: object) -> VisionTransformer:
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    return VisionTransformer(**(sizes | options))  # pyrefly: ignore[bad-argument-type]


def test_the_probes_head_normalises_each_feature_over_the_batch_as_mae_does() -> None:
    model = _vit(head_norm="batch")
    assert {name for name in model.state_dict() if name.startswith("head.")} == {
        *(f"head.0.{part}" for part in ("running_mean", "running_var", "num_batches_tracked")),
        *("head.1.weight", "head.1.bias"),
    }
    model.reset_head(4000, init="mae_linear_probe")
    linear = model.get_submodule("head.1")
    assert isinstance(linear, nn.Linear)
    assert 0.0098 < linear.weight.std() < 0.0102
    assert not linear.bias.any()
    vectors = 3 * torch.randn(64, 16) + 2
    expected = (vectors - vectors.mean(0)) / (vectors.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(model.train().classify(vectors), linear(expected))
