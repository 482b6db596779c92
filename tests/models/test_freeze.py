"""What trains in linear probing and partial fine-tuning, and the head that they train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitexp.errors import UserError
from vitexp.methods.supervised import Supervised
from vitexp.models.freeze import freeze
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.vit import VisionTransformer
from vitexp.optim import parameter_groups
from vitexp.types import Batch, Progress


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


def _trained(model: nn.Module) -> set[str]:
    """Modules that hold trainable parameters, by the first two parts of their names."""
    return {
        ".".join(name.split(".")[: 2 if "block" in name else 1])
        for name, p in model.named_parameters()
        if p.requires_grad
    }


EMBEDDING = {"cls_token", "pos_embed", "patch_embed"}


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("all", EMBEDDING | {"blocks.0", "blocks.1", "blocks.2", "norm", "head"}),
        (0, {"head"}),
        (1, {"blocks.2", "norm", "head"}),
        (3, {"blocks.0", "blocks.1", "blocks.2", "norm", "head"}),
    ],
)
def test_the_last_blocks_the_last_norm_and_the_head_train(blocks: int | str, expected: set[str]) -> None:
    model = _vit()
    freeze(model, blocks)
    assert _trained(model) == expected


def test_the_norm_after_pooling_trains_with_the_blocks() -> None:
    model = _vit(pool="mean", norm="after_pool")
    freeze(model, 1)
    assert _trained(model) == {"blocks.2", "fc_norm", "head"}


def test_a_timm_vit_is_frozen_by_its_own_layers() -> None:
    model = TimmBackbone("vit_tiny_patch16_224", image_size=32, num_classes=5, options={"depth": 3})
    freeze(model, 1)
    assert _trained(model) == {"blocks.2", "norm", "head"}
    resnet = TimmBackbone("resnet18", image_size=32, num_classes=5)
    freeze(resnet, 0)
    assert _trained(resnet) == {"fc"}


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_nothing_below_the_first_trained_block_enters_backward(blocks: int) -> None:
    model = _vit()
    freeze(model, blocks)
    method = Supervised(model).train()
    inside = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, made: inside.append((given[0].requires_grad, made.requires_grad)))
    batch = Batch(torch.randn(4, 3, 16, 16), torch.arange(4), torch.arange(4))
    method(batch, Progress(0, 1, 0.0, 1.0)).loss.backward()
    flows = [(False, False)] * 3 + [(False, True)] + [(True, True)]  # (into, out of) a block, from the lowest
    assert inside == flows[blocks : blocks + 3]
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_only_what_trains_reaches_the_optimizer_at_its_layers_rate() -> None:
    model = _vit()
    freeze(model, 1)
    groups = parameter_groups(Supervised(model), weight_decay=0.05, layer_decay=0.5, no_decay="mae_finetune")
    scales = {name.removeprefix("backbone."): group["lr_scale"] for group in groups for name in group["names"]}
    assert set(scales) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {scale for name, scale in scales.items() if "blocks" in name} == {0.5}
    assert {scale for name, scale in scales.items() if "blocks" not in name} == {1.0}


@pytest.mark.parametrize(
    ("model", "blocks", "fresh", "words"),
    [
        (_vit(), 4, (), ["stage.train_blocks=4", "has 3 blocks"]),
        (_vit(num_classes=0), 0, (), ["stage.train_blocks=0", "no classifier"]),
        (nn.Linear(2, 2), 0, (), ["stage.train_blocks=0", "no classifier"]),
        (_vit(pool="mean", norm="after_pool"), 0, ("fc_norm.weight",), ["fc_norm.weight", "model.norm=before_pool"]),
    ],
)
def test_what_cannot_be_frozen_is_said(model: nn.Module, blocks: int, fresh: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        freeze(model, blocks, fresh=fresh)
    assert all(word in str(error.value) for word in words)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("blocks", "dropping"),
    [
        ("all", {"pos_drop", "blocks.0", "blocks.1", "blocks.2"}),
        (3, {"pos_drop", "blocks.0", "blocks.1", "blocks.2"}),  # what the first block that trains is given
        (1, {"blocks.2"}),
        (0, set()),
    ],
)
def test_what_is_frozen_drops_nothing(blocks: int | str, dropping: set[str]) -> None:
    model = _vit(dropout=0.5)
    freeze(model, blocks)
    method = Supervised(model).train()
    found = {name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.training}
    assert {".".join(name.split(".")[: 2 if "block" in name else 1]) for name in found} == dropping
    method.eval()
    assert not any(module.training for module in method.modules())


def test_a_probes_own_dropout_stays_on() -> None:
    model = TimmBackbone("vit_tiny_patch16_224", image_size=32, num_classes=5, options={"depth": 2, "drop_rate": 0.5})
    freeze(model, 0)
    Supervised(model).train()
    assert model.timm_model.head_drop.training
    assert not model.timm_model.blocks.training
