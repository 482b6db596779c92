"""T2T-ViT's variants after convolutional networks: the official code's numbers, their parts, and what a backbone owes.

Their parameters, keys and weight files are compared in test_t2t."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vitexp.attention_maps import attention_maps, attention_probabilities
from vitexp.errors import UserError
from vitexp.labeling import dense_scores
from vitexp.methods.token_labeling import TokenLabeling
from vitexp.models.build import build_model
from vitexp.models.t2t import T2TViT, sinusoid_pos_embed
from vitexp.models.t2t_dense import DenseBlock, DenseT2TViT
from vitexp.models.t2t_variants import CheapFeatures, GhostT2TViT, SqueezeExcite, SqueezeExciteT2TViT
from vitexp.models.vit import run_blocks
from vitexp.models.weights import load_weights
from vitexp.types import Batch, Progress

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"image_size": 32, "num_heads": 2, "num_classes": 5, "token_dim": 8}
KINDS = {"se": SqueezeExciteT2TViT, "ghost": GhostT2TViT, "dense": DenseT2TViT}
BLOCKS = {"se": {"depth": 2}, "ghost": {"depth": 2}, "dense": {"depths": [2, 1], "growth": 16}}


def small(kind: str, *, width: int = 32, **options: object) -> T2TViT:
    torch.manual_seed(0)
    own = {"stem_dim" if kind == "dense" else "embed_dim": width}
    return KINDS[kind](**SMALL | BLOCKS[kind] | own | options)


def wave(count: int, *, start: int = 0) -> Tensor:
    return torch.sin(100 * (torch.arange(count) + start).double().sqrt())


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Weights by a formula of place and name, as the official model's were when the golden arrays were made."""
    for number, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        values = wave(tensor.numel(), start=7919 * number).view(tensor.shape)
        matrix = values * 1.4 / tensor.shape[-1] ** 0.5
        tensor.copy_(matrix if tensor.ndim > 1 else values / 4 + name.endswith("weight"))


# ---- the official numbers ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_their_gradients_give_the_official_numbers(kind: str) -> None:
    model = small(kind, width=64, num_heads=4, num_classes=7, token_dim=64).eval()
    fill(model)
    tokens = model.norm(run_blocks(model.blocks, wave(2 * 5 * 64).view(2, 5, 64).float(), recompute=False))
    (tokens.square() * torch.arange(1, 6)[:, None]).sum().backward()
    gradients = [parameter.grad.norm() for _, parameter in sorted(model.blocks.named_parameters())]
    with np.load(GOLDEN / "t2t_cnn_variants.npz") as arrays:
        np.testing.assert_allclose(tokens.detach(), arrays[f"{kind}_tokens"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(torch.stack(gradients), arrays[f"{kind}_gradients"], rtol=1e-4, atol=1e-4)


def test_branches_are_left_out_as_often_as_in_the_official_code() -> None:
    with torch.device("meta"):
        dense, ghost = build_model("t2t_dense", drop_path=0.11), build_model("t2t_16_ghost", drop_path=0.1)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in dense.blocks if isinstance(block, DenseBlock)]
    assert rates == pytest.approx([0] * 3 + [0.01] * 6 + [0.02] * 6 + [0.03] * 4)
    assert [block.drop_path2.drop_prob for block in ghost.blocks if isinstance(block.drop_path2, DropPath)] == (
        pytest.approx([0.1 * i / 15 for i in range(1, 16)])
    )


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_official_codes(kind: str, again: bool) -> None:
    model = small(kind, width=192, num_classes=60, num_heads=4, token_dim=64)
    if again:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(3)
        model.init_weights()
    for name, p in model.named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        elif name.endswith("bias"):
            assert not p.any(), name
        elif "cheap_operation" in name:
            assert p.abs().max() <= 1, name
            assert p.std().item() == pytest.approx(3**-0.5, rel=0.2), name
        elif name == "pos_embed":
            assert torch.equal(p[0], sinusoid_pos_embed(5, 192).float())
        elif not name.endswith(".w") and name != "cls_token":
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name


# ---- parts -------------------------------------------------------------------------------------------------------
def test_squeeze_and_excitation_weighs_channels_by_their_mean_over_all_tokens() -> None:
    torch.manual_seed(0)
    layer, x = SqueezeExcite(32), torch.randn(2, 5, 32)
    assert [tuple(p.shape) for p in layer.parameters()] == [(2, 32), (32, 2)]
    share = (F.relu(x.mean(1) @ layer.fc[0].weight.T) @ layer.fc[2].weight.T).sigmoid()
    for token in range(5):
        torch.testing.assert_close(layer(x)[:, token], x[:, token] * share)
    assert SqueezeExcite(8).fc[0].out_features == 1


def test_cheap_features_are_a_depthwise_convolution() -> None:
    torch.manual_seed(0)
    layer, x = CheapFeatures(6), torch.randn(2, 5, 6)
    torch.testing.assert_close(layer(x), F.conv1d(x.transpose(1, 2), layer.weight, groups=6).transpose(1, 2))


def test_a_dense_block_keeps_what_it_gets_and_widths_follow() -> None:
    model = small("dense").eval()
    found: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: found.extend((given[0], out)))
    features = model.encode(model.embed(torch.randn(2, 3, 32, 32)))
    assert [tensor.shape[2] for tensor in found] == [32, 48, 48, 64, 64, 32, 32, 48]
    assert torch.equal(found[1][..., :32], found[0])
    assert torch.equal(found[3][..., :48], found[2])
    assert features.patches.shape == (2, 4, 48)
    assert (model.embed_dim, model.num_features, model.depth) == (48, 48, 3)


# ---- what a backbone owes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_token_labeling_reaches_every_weight(kind: str) -> None:
    model = small(kind, image_size=64, width=64)
    method = TokenLabeling(model, labels="ground_truth")
    batch = Batch(torch.randn(4, 3, 64, 64), torch.arange(4), torch.arange(4))
    method(batch, Progress(0, 1, 0.0, 1.0), box=(1, 3, 0, 2)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters() if p.requires_grad)
    assert dense_scores(model.eval(), batch.images).shape == (4, 4, 4, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_give_the_same_gradients(kind: str) -> None:
    images, gradients = torch.randn(2, 3, 32, 32), []
    for gradient_checkpointing in (False, True):
        model = small(kind, gradient_checkpointing=gradient_checkpointing, performer_dropout=0.0)
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_numbered_from_embedding_to_head(kind: str) -> None:
    model = small(kind)
    numbers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert {numbers[n] for n in numbers if n.startswith(("tokens_to_token.", "cls_token", "pos_embed"))} == {0}
    assert {numbers[n] for n in numbers if n.startswith(("head.", "norm."))} == {model.num_layers}
    places = {int(n.split(".")[1]): numbers[n] for n in numbers if n.startswith("blocks.")}
    # blocks.2 of the dense one halves the width for the block behind it
    assert places == ({0: 1, 1: 2, 2: 3, 3: 3} if kind == "dense" else {0: 1, 1: 2})


@pytest.mark.parametrize("kind", KINDS)
def test_the_classifier_may_be_another(kind: str) -> None:
    model = small(kind)
    model.reset_head(3, init="timm")
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    model.reset_head(0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, model.embed_dim)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_resized_for_larger_pictures(tmp_path: Path, kind: str) -> None:
    source, model = small(kind, image_size=64), small(kind, image_size=96)
    torch.save({"state_dict_ema": source.state_dict()}, tmp_path / "weights.pth.tar")
    report = load_weights(model, tmp_path / "weights.pth.tar")
    assert (report.family, report.resized.mode, report.resized.new_grid) == ("t2t", "mae", (6, 6))
    assert (report.head, report.missing, report.unexpected) == ("kept", (), ())
    assert model.eval()(torch.randn(1, 3, 96, 96)).shape == (1, 5)


def test_a_ghosts_attention_is_drawn_as_it_is_and_a_dense_model_says_that_it_has_none() -> None:
    images = torch.randn(2, 3, 32, 32)
    assert attention_maps(small("se"), images).last.shape == (2, 2, 2, 2)
    model = small("ghost").eval()
    inside: list[Tensor] = []
    model.blocks[0].attn.register_forward_pre_hook(lambda _, given: inside.append(given[0]))
    probabilities = attention_probabilities(model, images)[0]
    attn = model.blocks[0].attn
    q, k = attn.q(inside[0]), attn.k(inside[0])
    # Two heads: the first is what was computed, the second the cheap features of it.
    for head, (own_q, own_k) in enumerate([(q, k), (attn.cheap_operation_q(q), attn.cheap_operation_k(k))]):
        torch.testing.assert_close(probabilities[:, head], (own_q @ own_k.transpose(1, 2) / 4).softmax(2))
    with pytest.raises(UserError, match="DenseT2TViT has no attention maps"):
        attention_maps(small("dense"), images)


# ---- errors ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("file", "model", "words"),
    [
        ("se", "plain", "other blocks: model=t2t_14_se"),
        ("ghost", "se", "other blocks: model=t2t_16_ghost"),
        ("dense", "ghost", "other blocks: model=t2t_dense"),
        ("plain", "dense", "plain blocks: model=t2t_7"),
    ],
)
def test_a_file_of_another_variant_is_refused_with_what_would_fit(
    tmp_path: Path, file: str, model: str, words: str
) -> None:
    plain = T2TViT(**SMALL, embed_dim=32, depth=2)
    torch.save((plain if file == "plain" else small(file)).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=rf"does not fit(?s:.*){words}"):
        load_weights(plain if model == "plain" else small(model), tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("ghost", {"mlp_ratio": 2.0}, ["model.mlp_ratio=2.0", "3"]),
        ("dense", {"depths": []}, ["model.depths=[]", "[3, 6, 6, 4]"]),
        ("dense", {"depths": 4}, ["model.depths=4", "list"]),
        ("dense", {"depths": [2, 0]}, ["model.depths=0", "at least 1"]),
        ("dense", {"growth": 0}, ["model.growth=0"]),
        ("dense", {"stem_dim": 15}, ["model.stem_dim=15", "even"]),
        ("dense", {"growth": 3}, ["model.num_heads=2", "35", "stage 0", "model.growth"]),
    ],
)
def test_wrong_options_are_one_clear_error(kind: str, options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        small(kind, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_settings_of_a_variant_are_checked_as_those_of_the_model_it_is_made_from(workdir: Path) -> None:
    from vitexp.config import compose_and_check

    assert compose_and_check(["model=t2t_14_se", "model.token_dim=8"]).model["token_dim"] == 8
    with pytest.raises(UserError, match=r"model\.token_din.*token_dim"):
        compose_and_check(["model=t2t_14_se", "+model.token_din=8"])
    with pytest.raises(UserError, match=r"model\.depths"):
        compose_and_check(["model=t2t_dense", "model.depths=four"])
