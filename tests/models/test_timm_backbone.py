"""Any timm model behaves like ours: names, layers, head, copies."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from vitexp.errors import UserError
from vitexp.models.build import build_model
from vitexp.models.timm_backbone import TimmBackbone

TINY = {"options": {"depth": 2, "embed_dim": 48, "num_heads": 4}, "num_classes": 3, "image_size": 32}


def resnet(**options: object) -> TimmBackbone:
    return build_model("timm", name="resnet18", image_size=32, num_classes=10, **options)


def test_names_and_numbers_are_timms_own() -> None:
    model, theirs = resnet().eval(), timm.create_model("resnet18", num_classes=10).eval()
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    theirs.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), theirs(images))


def test_training_mode_copies_conversion_and_updates_reach_the_timm_model() -> None:
    model = resnet()
    assert model.training
    assert model.timm_model.training
    model.eval()
    assert not model.timm_model.training
    assert not model.timm_model.bn1.training
    twin = copy.deepcopy(model).double()
    assert next(twin.timm_model.parameters()).dtype == torch.float64
    assert next(model.timm_model.parameters()).dtype == torch.float32
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    images = torch.randn(1, 3, 32, 32)
    assert not twin(images.double()).any()
    assert model(images).any()
    before = model(images)
    model.load_state_dict(twin.state_dict())
    assert not torch.equal(model(images), before)


def test_one_batch_can_be_learned() -> None:
    torch.manual_seed(0)
    model = TimmBackbone("resnet10t", num_classes=4, image_size=32)
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        losses.append(F.cross_entropy(model(images), targets))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_layers_follow_timms_order() -> None:
    model = resnet()
    assert model.layer_of("conv1.weight") == 0
    order = [model.layer_of(f"layer{i}.{j}.conv1.weight") for i in range(1, 5) for j in range(2)]
    assert order == sorted(set(order))
    assert model.layer_of("fc.weight") == model.num_layers > order[-1]
    vit = TimmBackbone("vit_tiny_patch16_224", **TINY)
    assert [vit.layer_of(n) for n in ("cls_token", "blocks.0.norm1.weight", "head.weight")] == [0, 1, vit.num_layers]


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch14_dinov2",
        "deit3_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",  # pools by attention
        "test_vit",  # dynamic_img_size
    ],
)
def test_plain_vits_have_the_seam(name: str) -> None:
    size = 28 if "14" in name else 32
    model = TimmBackbone(name, **TINY | {"image_size": size}).eval()
    images = torch.randn(2, 3, size, size)
    features = model.encode(model.embed(images))
    whole = model.timm_model.forward_features(images)
    if features.cls is not None:
        torch.testing.assert_close(features.cls, whole[:, 0])
    torch.testing.assert_close(features.patches, whole[:, model.timm_model.num_prefix_tokens :])
    torch.testing.assert_close(model.classify(model.pooled(features)), model(images))
    keep = torch.tensor([[3, 0], [1, 1]])
    picked = torch.stack([model.embed(images)[i, keep[i]] for i in range(2)])
    assert torch.equal(model.embed(images, keep), picked)
    height, width = model.patch_size
    assert (height * model.grid_size[0], width * model.grid_size[1]) == (size, size)
    assert features.patches.shape[-1] == model.embed_dim


def test_a_stem_that_sees_beyond_its_patch_is_no_patch_embedding() -> None:
    model = TimmBackbone("vit_tiny_r_s16_p8_224", num_classes=0, image_size=32)
    with pytest.raises(UserError, match=r"vit_tiny_r_s16_p8_224: its stem, HybridEmbed, looks beyond a patch"):
        _ = model.patch_size


@pytest.mark.parametrize("name", ["resnet10t", "deit_tiny_distilled_patch16_224"])
def test_other_models_say_that_they_have_no_seam(name: str) -> None:
    model = TimmBackbone(name, num_classes=3, image_size=32)
    with pytest.raises(UserError, match=rf"{name}: only a plain timm ViT"):
        model.embed(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto"])
def test_reset_head_makes_a_zero_classifier(name: str) -> None:
    model = TimmBackbone(name, num_classes=3, image_size=32).eval()
    model.reset_head(7)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert not logits.any()
    assert all(name in model.state_dict() for name, _ in model.named_parameters())


def test_drop_path_and_options_reach_timm() -> None:
    model = TimmBackbone("vit_tiny_patch16_224", drop_path=0.2, **TINY)
    assert model.timm_model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    assert len(model.timm_model.blocks) == 2


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet81", {}, "model.name='resnet81': timm has no such model. Did you mean 'resnet18'?"),
        ("vgg11", {"drop_path": 0.1}, "drop_path_rate"),
        ("resnet10t", {"options": {"depht": 3}}, "depht"),
        ("resnet10t", {"drop_path": 2}, "model.drop_path=2"),
        ("resnet10t", {"image_size": 0}, "model.image_size=0"),
        ("vit_tiny_patch16_224", {"image_size": 30}, "does not divide model.image_size=30"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        TimmBackbone(name, **options)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
