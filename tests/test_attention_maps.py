from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from vitexp.attention_maps import (
    attention_maps,
    attention_probabilities,
    attention_rollout,
    has_attention_maps,
    position_similarity,
)
from vitexp.errors import UserError
from vitexp.models.build import build_model
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.vit import VisionTransformer

SHAPE = {"image_size": [32, 48], "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def vit(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**(SHAPE | changes))
    nn.init.normal_(model.head.weight)
    for block in model.blocks:  # attention that is far from uniform
        nn.init.normal_(block.attn.qkv.weight, std=0.3)
    return model


def pictures(count: int = 2, *, size: tuple[int, int] = (32, 48)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def by_hand(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """softmax(q k^T / sqrt(d)) of every block, with loops and no help from the model's own attention."""
    cls = (model.cls_token + model.pos_embed[:, :1]).expand(len(images), -1, -1)
    tokens, found = torch.cat([cls, model.embed(images)], dim=1), []
    for block in model.blocks:
        x, width = block.norm1(tokens), model.embed_dim // model.num_heads
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        heads = []
        for head in range(model.num_heads):
            rows = slice(head * width, (head + 1) * width)
            q = x @ weight[: model.embed_dim][rows].T + bias[: model.embed_dim][rows]
            k = (
                x @ weight[model.embed_dim : 2 * model.embed_dim][rows].T
                + bias[model.embed_dim : -model.embed_dim][rows]
            )
            scores = (q @ k.transpose(1, 2) / width**0.5).exp()
            heads.append(scores / scores.sum(dim=-1, keepdim=True))
        found.append(torch.stack(heads, dim=1))
        tokens = block(tokens)
    return found


@pytest.mark.parametrize("path", ["auto", "fused", "explicit"])
@torch.no_grad()
def test_probabilities_are_the_softmax_of_the_queries_and_keys_whatever_path_the_model_takes(path):
    model, images = vit(attention=path).eval(), pictures()
    found, expected = attention_probabilities(model, images), by_hand(model, images)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (2, 3, 25, 25)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.sum(dim=-1), torch.ones(2, 3, 25))
    assert found[0].std() > 0.01  # not uniform, where a wrong order of heads or tokens would not be seen


@torch.no_grad()
def test_probabilities_give_back_what_the_blocks_attention_computes():
    model, images = vit(attention="fused").eval(), pictures()
    last = model.blocks[-1].attn
    seen = []
    handle = last.register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output)))
    model(images)
    handle.remove()
    x, output = seen[0]
    v = last.qkv(x)[..., 48:].unflatten(-1, (3, 8)).transpose(1, 2)
    mixed = (attention_probabilities(model, images)[-1] @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(last.proj(mixed), output, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_rollout_multiplies_half_mean_attention_and_half_residual():
    layers = by_hand(vit().eval(), pictures())
    eye = torch.eye(25)
    first, second, third = (0.5 * layer.mean(dim=1) + 0.5 * eye for layer in layers)
    rolled = attention_rollout(layers)
    torch.testing.assert_close(rolled, third @ (second @ first))
    torch.testing.assert_close(rolled.sum(dim=-1), torch.ones(2, 25))


@torch.no_grad()
def test_maps_lie_on_the_grid_and_are_rows_of_what_the_classifier_reads():
    model, images = vit().eval(), pictures()
    layers = attention_probabilities(model, images)
    maps = attention_maps(model, images)
    assert maps.last.shape == (2, 3, 4, 6)
    assert maps.rollout.shape == (2, 4, 6)
    torch.testing.assert_close(maps.last, layers[-1][:, :, 0, 1:].reshape(2, 3, 4, 6))
    torch.testing.assert_close(maps.rollout, attention_rollout(layers)[:, 0, 1:].reshape(2, 4, 6))
    averaged = vit(pool="mean").eval()
    layers, maps = attention_probabilities(averaged, images), attention_maps(averaged, images)
    torch.testing.assert_close(maps.last, layers[-1][:, :, 1:, 1:].mean(dim=2).reshape(2, 3, 4, 6))
    tokenless = vit(pool="mean", class_token=False).eval()
    layers, maps = attention_probabilities(tokenless, images), attention_maps(tokenless, images)
    torch.testing.assert_close(maps.last.sum(dim=(2, 3)), torch.ones(2, 3))
    torch.testing.assert_close(maps.rollout, attention_rollout(layers).mean(dim=1).reshape(2, 4, 6))


def test_looking_leaves_the_model_as_it_was():
    model, images = vit(dropout=0.5, drop_path=0.5, attention_dropout=0.5, attention="fused"), pictures()
    model.train()
    model.blocks[0].eval()  # a mixture of modes, as a probe has
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    random = torch.get_rng_state()
    torch.manual_seed(5)
    before = model(images)
    torch.set_rng_state(random)
    once, again = attention_maps(model, images), attention_maps(model, images)
    assert torch.equal(once.last, again.last)  # no dropout while looking
    assert torch.equal(torch.get_rng_state(), random)
    torch.manual_seed(5)
    assert torch.equal(model(images), before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    copy.deepcopy(model)  # refused where a tensor with a gradient was kept


def test_hooks_are_gone_after_an_error_too():
    model = vit().train()
    with pytest.raises(UserError, match="pictures are"):
        attention_maps(model, pictures(size=(16, 16)))
    broken = vit()
    broken.blocks[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("in the midst")))
    with pytest.raises(RuntimeError, match="in the midst"):
        attention_maps(broken, pictures())
    for each in (model, broken):
        assert each.training
        assert not any(block.attn._forward_pre_hooks for block in each.blocks)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 3}),
        ("deit_tiny_distilled_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 3}),
        ("vit_small_patch16_rope_224", None),
        ("swin_tiny_patch4_window7_224", None),
        ("resnet18", None),
    ],
)
@torch.no_grad()
def test_timm_models_have_maps_where_every_block_has_plain_attention(name, options):
    if options is None:
        with torch.device("meta"):
            model = TimmBackbone(name, num_classes=3)
        assert not has_attention_maps(model)
        with pytest.raises(UserError, match="no attention maps"):
            attention_maps(model, pictures(1))
        return
    torch.manual_seed(0)
    model = TimmBackbone(name, image_size=32, num_classes=3, options=options).eval()
    assert has_attention_maps(model)
    images = pictures(2, size=(32, 32))
    found = attention_probabilities(model, images)
    # timm itself, on its explicit path.
    extract = timm.utils.AttentionExtract
    for block in model.timm_model.blocks:
        block.attn.fused_attn = False
    theirs = list(extract(model.timm_model, method="hook")(images).values())
    assert len(found) == len(theirs) == 2
    for ours, expected in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, expected)
    assert attention_maps(model, images).rollout.shape == (2, 2, 2)


def test_position_similarity_compares_patches_by_their_place():
    model = vit()
    with torch.no_grad():
        model.pos_embed.copy_(torch.randn_like(model.pos_embed))
    found = position_similarity(model)
    assert found is not None
    assert found.shape == (4, 6, 4, 6)
    one, other = model.pos_embed[0, 1 + 2 * 6 + 3], model.pos_embed[0, 1 + 0 * 6 + 5]
    expected = (one @ other / one.norm() / other.norm()).item()
    assert found[2, 3, 0, 5].item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(found.flatten(2).flatten(0, 1).diagonal(), torch.ones(24))
    assert position_similarity(TimmBackbone("resnet18", num_classes=2)) is None


@torch.no_grad()
def test_a_block_of_two_attentions_has_the_heads_of_both():
    torch.manual_seed(0)
    model = build_model(
        "deit3_small_18x2", image_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3
    )
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    images = torch.randn(2, 3, 16, 16)
    found = attention_probabilities(model, images)
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), model.embed(images)], dim=1)
    for block, probabilities in zip(model.blocks, found, strict=True):
        for number, (norm, layer) in enumerate(((block.norm1, block.attn), (block.norm11, block.attn1))):
            q, k, _ = layer.qkv(norm(tokens)).unflatten(2, (3, 2, 12)).permute(2, 0, 3, 1, 4)
            expected = (q @ k.mT / 12**0.5).softmax(-1)
            torch.testing.assert_close(probabilities[:, 2 * number : 2 * number + 2], expected, rtol=1e-4, atol=1e-6)
        tokens = block(tokens)
    assert attention_maps(model, images).last.shape == (2, 4, 4, 4)
