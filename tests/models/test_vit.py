"""What the ViT promises beside its numbers: start, dropout, attention paths, the seam, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from vitexp.errors import UserError
from vitexp.models.build import build_model
from vitexp.models.layers import Attention, PatchEmbed
from vitexp.models.vit import VisionTransformer
from vitexp.types import Features

SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 10}


def vit(**options: object) -> VisionTransformer:
    return VisionTransformer(**SMALL | options)


def awake(model: VisionTransformer) -> VisionTransformer:
    """With a classifier that is not zero, so that logits tell something."""
    model.reset_head(model.num_classes, init="timm")
    return model


# ---- start -------------------------------------------------------------------------------------------------------
def test_jax_start_has_the_official_distribution_of_every_parameter() -> None:
    torch.manual_seed(0)
    d = 192
    model = vit(embed_dim=d, num_heads=3, depth=2, representation_dim=d, patch_size=4)

    def uniform(weight: torch.Tensor, bound: float) -> None:
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)

    def lecun(weight: torch.Tensor) -> None:
        sigma = math.sqrt(1 / weight[0].numel())
        assert weight.std().item() == pytest.approx(sigma, rel=0.03)
        assert weight.abs().max() <= 2 * sigma / 0.8796

    checked = set()
    for name, p in model.named_parameters():
        checked.add(name)
        if name == "cls_token" or name.startswith("head."):
            assert not p.any(), name
        elif name == "pos_embed":
            assert p.std().item() == pytest.approx(0.02, rel=0.05)
            assert p[:, 0].std().item() == pytest.approx(0.02, rel=0.2)  # the class token's row as well
        elif name in ("patch_embed.proj.weight", "pre_logits.fc.weight"):
            lecun(p)
        elif name.endswith("qkv.weight"):
            for projection in p.chunk(3):
                uniform(projection, math.sqrt(6 / (2 * d)))
        elif name.endswith("attn.proj.weight"):
            uniform(p, math.sqrt(6 / (2 * d)))
        elif ".mlp." in name and name.endswith("weight"):
            uniform(p, math.sqrt(6 / (5 * d)))
        elif ".mlp." in name:
            assert p.std().item() == pytest.approx(1e-6, rel=0.2), name
        elif "norm" in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        else:
            assert name.endswith("bias")
            assert not p.any(), name
    assert checked == set(model.state_dict())


def test_timm_start_is_truncated_normal_of_0_02() -> None:
    torch.manual_seed(0)
    model = vit(embed_dim=192, num_heads=3, init="timm")
    for name, p in model.named_parameters():
        if p.ndim == 2 or name == "pos_embed":
            assert p.std().item() == pytest.approx(0.02, rel=0.06), name
        elif name == "cls_token":
            assert 0 < p.abs().max() < 1e-5
        elif name.endswith("bias") and not name.startswith("patch_embed"):
            assert not p.any(), name


def test_loss_at_the_start_is_log_of_the_classes() -> None:
    loss = F.cross_entropy(vit()(torch.randn(8, 3, 32, 32)), torch.arange(8))
    assert loss.item() == pytest.approx(math.log(10), abs=1e-6)


@pytest.mark.parametrize(("init", "std"), [("zero", 0), ("timm", 0.02), ("mae_finetune", 2e-5)])
def test_reset_head_draws_the_named_start(init: str, std: float) -> None:
    model = vit(embed_dim=192).double()
    model.reset_head(500, init=init)
    assert model.head.weight.shape == (500, 192)
    assert model.num_classes == 500
    assert model.head.weight.dtype == torch.float64
    assert model.head.weight.std().item() == pytest.approx(std, rel=0.02)
    assert not model.head.bias.any()


# ---- forward -----------------------------------------------------------------------------------------------------
def test_patch_embedding_is_a_strided_convolution() -> None:
    layer = PatchEmbed(patch_size=(4, 8), in_channels=3, embed_dim=16).double()
    images = torch.randn(2, 3, 12, 24, dtype=torch.float64)
    convolved = layer.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(layer(images), convolved, rtol=1e-12, atol=1e-12)


def test_seam_lets_tokens_be_dropped_and_reordered_between_embed_and_encode() -> None:
    model = vit().double().eval()
    tokens = model.embed(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert tokens.shape == (2, 16, 48)
    order = torch.randperm(16)
    whole, mixed = model.encode(tokens), model.encode(tokens[:, order])
    torch.testing.assert_close(mixed.cls, whole.cls)
    torch.testing.assert_close(mixed.patches, whole.patches[:, order])
    assert model.encode(tokens[:, :4]).patches.shape == (2, 4, 48)


def test_class_token_takes_no_part_in_the_mean() -> None:
    model = awake(vit(pool="mean", norm="after_pool"))
    patches = torch.randn(2, 16, 48)
    one, other = (model.pooled(Features(cls=torch.randn(2, 48), patches=patches)) for _ in range(2))
    assert torch.equal(one, other)
    torch.testing.assert_close(one, model.fc_norm(patches.mean(1)))


def test_pretraining_head_is_fc_tanh_fc() -> None:
    model = awake(vit(representation_dim=20))
    vectors = torch.randn(2, 48)
    by_hand = model.head(torch.tanh(model.pre_logits.fc(vectors)))
    torch.testing.assert_close(model.classify(vectors), by_hand)


def test_attention_scale_replaces_the_root_of_the_head_width() -> None:
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    usual, same, other = (awake(vit(attention_scale=s)) for s in (None, 12**-0.5, 48**-0.5))
    same.load_state_dict(usual.state_dict())
    other.load_state_dict(usual.state_dict())
    torch.testing.assert_close(same(images), usual(images))
    assert (other(images) - usual(images)).abs().max() > 1e-4


@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_attention_equals_softmax_written_out(attention: str) -> None:
    layer = Attention(24, 3, qkv_bias=True, attention=attention).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=-1))
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(8), dim=-1)
    by_hand = layer.proj(torch.einsum("bhqk,bhkd->bqhd", weights, v).reshape(2, 5, 24))
    torch.testing.assert_close(layer(x), by_hand, rtol=1e-12, atol=1e-12)


def test_auto_attention_is_explicit_only_for_bf16_gradients_on_a_cpu() -> None:
    layer = Attention(24, 3)
    cases = [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True), (torch.float16, True)]
    chosen = [layer.uses_explicit(torch.zeros(1, dtype=dtype, requires_grad=grad)) for dtype, grad in cases]
    assert chosen == [True, False, False, False]
    assert not layer.uses_explicit(torch.zeros(1, dtype=torch.bfloat16, device="meta", requires_grad=True))


def test_auto_attention_follows_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    model, images = awake(vit()), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_bf16 = model(images)
        assert not calls
    in_fp32 = model(images)
    assert len(calls) == 3
    torch.testing.assert_close(in_bf16.float(), in_fp32, rtol=0.05, atol=0.02)
    in_bf16.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_attention_dropout_removes_probabilities_in_training_only(attention: str) -> None:
    torch.manual_seed(0)
    layer = Attention(64, 1, attn_drop=0.25, attention=attention)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.qkv.weight[128:] = torch.eye(64)  # equal attention to all, values as given
        layer.proj.weight.copy_(torch.eye(64))
    x = torch.eye(64)[None]  # the output's entry (q, k) is then the probability itself
    out = layer(x)
    assert (out > 0).float().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(out[out > 0], torch.full_like(out[out > 0], 1 / 64 / 0.75))
    assert (layer.eval()(x) > 0).all()


def test_attention_serves_timms_block() -> None:
    ours = TimmBlock(48, 4, qkv_bias=True, qk_norm=True, scale_attn_norm=True, attn_layer=Attention).double()
    theirs = TimmBlock(48, 4, qkv_bias=True, qk_norm=True, scale_attn_norm=True).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x, is_causal=True), theirs(x, is_causal=True))


def test_dropout_sits_after_positions_attention_and_both_dense_layers() -> None:
    model = vit(dropout=0.2, attention_dropout=0.3)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    for i in range(3):
        assert rates.pop(f"blocks.{i}.attn.attn_drop") == 0.3
        assert [rates.pop(f"blocks.{i}.{n}") for n in ("attn.proj_drop", "mlp.drop1", "mlp.drop2")] == [0.2] * 3
    assert rates == {"pos_drop": 0.2}
    assert isinstance(model.blocks[0].mlp, Mlp)
    seen = []
    model.pos_drop.register_forward_hook(lambda module, given, out: seen.append(out))
    model(torch.randn(2, 3, 32, 32))
    assert seen[0].shape == (2, 17, 48)  # the class token too
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.2, abs=0.05)


def test_drop_path_drops_whole_samples_and_grows_with_depth() -> None:
    model = vit(depth=5, drop_path=0.4)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert isinstance(model.blocks[4].drop_path2, DropPath)
    torch.manual_seed(0)
    out = model.blocks[4].drop_path2(torch.ones(2000, 3, 2))
    torch.testing.assert_close(out[out > 0], torch.full_like(out[out > 0], 1 / 0.6))
    assert (out == out[:, :1, :1]).all()
    assert (out[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.4, abs=0.04)
    assert not any(isinstance(module, DropPath) for module in vit(drop_path=0.0).modules())


def test_gradient_checkpointing_changes_no_number() -> None:
    plain = awake(vit(dropout=0.1, drop_path=0.1))
    saving = vit(dropout=0.1, drop_path=0.1, gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    images, gradients, calls = torch.randn(2, 3, 32, 32), [], []
    saving.blocks[1].attn.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        torch.manual_seed(3)
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(calls) == 2  # forward, and once more for the backward


def test_compiled_model_gives_the_same_logits() -> None:
    model = awake(vit(depth=1))
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(images), model(images), rtol=0.05, atol=0.01)


def test_layer_numbers_are_maes() -> None:
    model = vit(pool="mean", norm="after_pool")
    assert model.num_layers == 4
    numbers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    for name, number in numbers.items():
        if name.startswith("blocks."):
            assert number == int(name.split(".")[1]) + 1
        else:
            assert number == (4 if name.startswith(("head", "fc_norm")) else 0), name
    assert model.layer_of("norm.weight") == 4
    assert model.layer_of("blocks.10.norm1.weight") == 11


# ---- errors ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": 5}, ["model.patch_size=5 does not divide model.image_size=32; nearest: 4, 8"]),
        ({"patch_size": 64}, ["model.patch_size=64", "nearest: 32"]),
        ({"image_size": (32, 36)}, ["model.image_size=(32, 36)", "nearest: 6, 9"]),
        ({"image_size": (32, 36, 3)}, ["model.image_size", "[height, width]"]),
        ({"num_heads": 5}, ["model.num_heads=5 does not divide model.embed_dim=48; nearest: 4, 6"]),
        ({"depth": "abc"}, ["model.depth='abc'", "whole number"]),
        ({"depth": 0}, ["model.depth=0"]),
        ({"embed_dim": 48.0}, ["model.embed_dim=48.0"]),
        ({"num_classes": -1}, ["model.num_classes=-1"]),
        ({"dropout": 1.0}, ["model.dropout=1.0"]),
        ({"attention_dropout": float("nan")}, ["model.attention_dropout=nan"]),
        ({"drop_path": -0.1}, ["model.drop_path=-0.1"]),
        ({"mlp_ratio": 0}, ["model.mlp_ratio=0"]),
        ({"mlp_ratio": 0.001}, ["model.mlp_ratio=0.001", "model.embed_dim=48"]),
        ({"norm_eps": "1e-6"}, ["model.norm_eps='1e-6'"]),
        ({"layer_scale": 0}, ["model.layer_scale=0"]),
        ({"representation_dim": 0}, ["model.representation_dim=0"]),
        ({"qkv_bias": "no"}, ["model.qkv_bias='no'", "true or false"]),
        ({"pool": "men"}, ["model.pool='men'", "cls, mean", "Did you mean 'mean'?"]),
        ({"norm": "before"}, ["model.norm='before'", "before_pool"]),
        ({"gelu": "tan"}, ["model.gelu='tan'", "Did you mean 'tanh'?"]),
        ({"attention": "flash"}, ["model.attention='flash'", "auto, fused, explicit"]),
        ({"position_embedding": "rope"}, ["model.position_embedding='rope'"]),
        ({"init": "jaxx"}, ["model.init='jaxx'"]),
        ({"class_token": False}, ["model.pool=cls", "model.class_token=true", "model.pool=mean"]),
    ],
)
def test_wrong_options_are_named_with_what_is_allowed(options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        vit(**options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_pictures_of_another_size_are_refused_in_words() -> None:
    with pytest.raises(UserError, match=r"pictures are 3x28x28 .*model.image_size.* 3x32x32"):
        vit()(torch.randn(1, 3, 28, 28))


# ---- build -------------------------------------------------------------------------------------------------------
def test_build_model_takes_the_files_values_and_the_callers() -> None:
    with torch.device("meta"):
        model = build_model("vit_base_32", num_classes=10, image_size=96)
        assert (model.embed_dim, model.grid_size, model.head.out_features) == (768, (3, 3), 10)
        assert build_model("vit_base").num_classes == 1000
        generic = build_model("vit", image_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, gelu="tanh")
    assert (generic.gelu, generic.depth, generic.image_size) == ("tanh", 1, (32, 32))


def test_build_model_names_what_it_does_not_know() -> None:
    with pytest.raises(UserError, match=r"'vit_bse'.*'vit_base'"):
        build_model("vit_bse")
    with pytest.raises(UserError, match=r"model\.dept.*'depth'"):
        build_model("vit_micro", dept=3)


def test_every_model_file_states_only_what_its_constructor_takes() -> None:
    from vitexp.models.build import model_names, model_options

    names = model_names()
    assert len(names) >= 15
    for name in names:
        options = model_options(name)
        if name == "mae":  # has no classifier
            with torch.device("meta"):
                assert build_model(name).encoder.num_classes == 0
            continue
        with torch.device("meta"):
            model = build_model(name, num_classes=7)
        assert model.num_classes == 7, name
        for key in ("depth", "embed_dim", "num_heads", "pool", "gelu"):
            if key in options:
                assert getattr(model, key) == options[key], (name, key)
