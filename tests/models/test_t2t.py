"""T2T-ViT: the official code's numbers, parameters and weight files; soft splits, performers, the seam, the start."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vitexp.attention_maps import attention_maps
from vitexp.errors import UserError
from vitexp.labeling import dense_scores
from vitexp.methods.mae import MaskedAutoencoding
from vitexp.methods.token_labeling import TokenLabeling
from vitexp.models.build import build_model
from vitexp.models.layers import Block
from vitexp.models.t2t import (
    EPSILON,
    T2TViT,
    TokenAttention,
    TokenPerformer,
    kernel_attention,
    sinusoid_pos_embed,
    soft_split,
)
from vitexp.models.vit import VisionTransformer
from vitexp.models.weights import load_weights
from vitexp.optim import parameter_groups
from vitexp.token_mixing import mix_tokens
from vitexp.types import Batch, Progress

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = json.loads((GOLDEN / "t2t_variants.json").read_text(encoding="utf-8"))
# The model of the golden arrays, made by the official code.
OFFICIAL = {"image_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "num_classes": 10}
OFFICIAL |= {"token_module": "transformer", "token_dim": 32}
SMALL = {"image_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5, "token_dim": 8}
MODULES = ("performer", "transformer")


def t2t(**options: object) -> T2TViT:
    return T2TViT(**SMALL | options)


def saved(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "weights.pth.tar")
    return tmp_path / "weights.pth.tar"


# ---- the official numbers ----------------------------------------------------------------------------------------
def test_every_step_gives_the_official_numbers(tmp_path: Path) -> None:
    model = T2TViT(**OFFICIAL).eval()
    state = {f"module.{key}": tensor for key, tensor in load_file(GOLDEN / "t2t_tiny_transformer.safetensors").items()}
    report = load_weights(model, saved(tmp_path, {"state_dict": {}, "state_dict_ema": state}))
    assert (report.family, report.head, report.missing, report.unexpected) == ("t2t", "kept", (), ())
    given: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}

    def remember(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            given[name], found[name] = inputs[0], output

        parent = model.tokens_to_token if name != "block0" else model.blocks
        getattr(parent, name if name != "block0" else "0").register_forward_hook(hook)

    for name in ("attention1", "attention2", "project", "block0"):
        remember(name)
    with np.load(GOLDEN / "t2t_tiny_transformer.npz") as arrays, torch.no_grad():
        images = torch.from_numpy(arrays["images"])
        found["features_cls"] = model.encode(model.embed(images)).cls
        found["output"] = model(images)
        found["soft_split0_img0_tok0to3"] = given["attention1"][0, :4].T
        found["soft_split1_img0"], found["soft_split2_img0"] = given["attention2"][0].T, given["project"][0].T
        assert set(found) == set(arrays.files) - {"images"}
        for name, tensor in found.items():
            np.testing.assert_allclose(tensor, arrays[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_positions_are_the_official_sinusoids() -> None:
    with np.load(GOLDEN / "t2t_sinusoid.npz") as arrays:
        for name in arrays.files:
            count, dim = (int(part) for part in name.removesuffix("_rows").split("_")[1].split("x"))
            table = sinusoid_pos_embed(count, dim).float()[None]
            table = table[:, [0, 1, 2, 100, 196]] if name.endswith("_rows") else table
            np.testing.assert_allclose(table, arrays[name], rtol=0, atol=1e-7, err_msg=name)
    model = t2t(image_size=(32, 64))
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed[0], sinusoid_pos_embed(1 + 8, 24).float())
    with pytest.raises(UserError, match=r"model.embed_dim=15.*even"):
        t2t(embed_dim=15, num_heads=3)


AS_OURS = {entry: entry.replace("t2t_vit_", "t2t_") for entry in VARIANTS}


@pytest.mark.parametrize("entry", VARIANTS)
def test_parameters_scales_and_keys_are_the_official_ones(entry: str) -> None:
    official = VARIANTS[entry]
    with torch.device("meta"):
        model = build_model(AS_OURS[entry])
    assert sum(p.numel() for p in model.parameters()) == official["params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == official["trainable"]
    assert (model.embed_dim, model.depth, model.num_heads) == (official["dim"], official["depth"], official["heads"])
    scales = {block.attn.scale for block in model.blocks if isinstance(block, Block)}
    assert scales == set(np.atleast_1d(official["scale"]))
    assert model.norm.eps == model.blocks[0].norm1.eps == model.tokens_to_token.attention1.norm1.eps == 1e-5
    if official["t2t_attn_scale"] is not None:
        assert model.tokens_to_token.attention1.attn.scale == pytest.approx(official["t2t_attn_scale"], rel=1e-12)
        assert model.tokens_to_token.attention2.attn.scale == pytest.approx(1 / 24, rel=1e-12)  # of 9 x 64 channels
    if "keys" in official:
        inside = {f"blocks.{i}.{k}": s for i in range(official["depth"]) for k, s in official["block_keys"].items()}
        assert {key: list(t.shape) for key, t in model.state_dict().items()} == official["keys"] | inside


@pytest.mark.parametrize("entry", [name for name in VARIANTS if "keys" in VARIANTS[name]])
def test_files_of_the_official_layout_load_without_a_missing_or_unexpected_key(tmp_path: Path, entry: str) -> None:
    official = VARIANTS[entry]
    inside = {f"blocks.{i}.{k}": s for i in range(official["depth"]) for k, s in official["block_keys"].items()}
    keys = official["keys"] | inside
    state = {f"module.{key}": torch.full((1,), i / 7).expand(shape) for i, (key, shape) in enumerate(keys.items())}
    model = build_model(AS_OURS[entry]).eval()
    report = load_weights(model, saved(tmp_path, {"state_dict_ema": state, "epoch": 310}))
    assert (report.family, report.head, report.loaded) == ("t2t", "kept", len(keys))
    assert (report.missing, report.unexpected, report.resized) == ((), (), None)
    assert all(torch.equal(tensor, state[f"module.{key}"]) for key, tensor in model.state_dict().items())


def test_weight_decay_spares_what_the_official_code_spares_and_fixed_tables_do_not_train() -> None:
    file = GOLDEN / "optim_weight_decay_groups.json"
    spared, decayed = (set(g["names"]) for g in json.loads(file.read_text(encoding="utf-8"))["t2t"]["groups"])
    groups = parameter_groups(t2t(depth=1), weight_decay=0.05)
    assert {name for g in groups if g["weight_decay"] for name in g["names"]} == decayed
    assert {name for g in groups if not g["weight_decay"] for name in g["names"]} == spared


# ---- soft splits -------------------------------------------------------------------------------------------------
def test_a_soft_split_gathers_neighbourhoods_channel_by_channel() -> None:
    maps = torch.randn(2, 3, 8, 12)
    tokens = soft_split(maps, kernel=7, stride=4, padding=2)
    assert tokens.shape == (2, 2 * 3, 3 * 49)
    padded = F.pad(maps, (2, 2, 2, 2))
    for row in range(2):
        for column in range(3):
            place = padded[1, :, 4 * row : 4 * row + 7, 4 * column : 4 * column + 7]
            expected = torch.stack([place[c, i, j] for c in range(3) for i in range(7) for j in range(7)])
            assert torch.equal(tokens[1, 3 * row + column], expected)


@pytest.mark.parametrize("token_module", MODULES)
def test_a_picture_may_be_wider_than_tall_and_tokens_lie_in_raster_order(token_module: str) -> None:
    model = t2t(image_size=(32, 64), token_module=token_module).eval()
    assert model.grid_size == (2, 4)
    assert model(torch.randn(2, 3, 32, 64)).shape == (2, 5)
    # Without attention to all, and without positions, a token depends on what is around its own 16 x 16 px.
    for attention in (model.tokens_to_token.attention1, model.tokens_to_token.attention2):
        nn.init.zeros_(attention.attn.proj.weight if token_module == "transformer" else attention.proj.weight)
    pixels = torch.randn(1, 3, 32, 64, requires_grad=True)
    model.embed(pixels)[0, 4 + 2].sum().backward()  # row 1, column 2
    rows, columns = pixels.grad[0].abs().sum(0).nonzero().unbind(1)
    # 2 px more on all sides for the first kernel of 7 at stride 4, then 4 and 8 px to the left for the two of 3
    assert (rows.min().item(), rows.max().item()) == (16 - 14, 31)
    assert (columns.min().item(), columns.max().item()) == (32 - 14, 47 + 1)


def test_a_token_transformers_stream_is_its_values_and_its_scale_of_the_width_coming_in() -> None:
    torch.manual_seed(0)
    layer = TokenAttention(20, 6).double()
    x = torch.randn(2, 7, 20, dtype=torch.float64)
    q, k, v = layer.qkv(x).split(6, dim=2)
    expected = v + layer.proj((q @ k.transpose(1, 2) / math.sqrt(20)).softmax(2) @ v)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


# ---- performers --------------------------------------------------------------------------------------------------
def slow_kernel_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """The formula token by token, with nothing taken out of the exponentials."""
    m = len(w)

    def phi(x: Tensor) -> Tensor:
        return torch.stack([(w[j] @ x - x @ x / 2).exp() / math.sqrt(m) for j in range(m)])

    out = []
    for b in range(len(q)):
        features = [phi(k[b, t]) for t in range(k.shape[1])]
        for t in range(q.shape[1]):
            weights = [phi(q[b, t]) @ each for each in features]
            out.append(sum(weight * v[b, s] for s, weight in enumerate(weights)) / (sum(weights) + EPSILON))
    return torch.stack(out).view_as(v)


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])  # at 3 the 1e-8 outweighs most sums
def test_performer_attention_and_its_gradients_are_the_formulas(size: float) -> None:
    torch.manual_seed(0)
    given = [(size * torch.randn(2, 6, 8, dtype=torch.float64)).requires_grad_() for _ in range(3)]
    w, weights = torch.randn(4, 8, dtype=torch.float64), torch.randn(2, 6, 8, dtype=torch.float64)
    found, expected = kernel_attention(*given, w), slow_kernel_attention(*given, w)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    wanted = torch.autograd.grad((expected * weights).sum(), given)
    for gradient, slow in zip(torch.autograd.grad((found * weights).sum(), given), wanted, strict=True):
        torch.testing.assert_close(gradient, slow, rtol=1e-7, atol=1e-13)


def test_performer_attention_neither_overflows_nor_vanishes_in_float32() -> None:
    torch.manual_seed(0)
    w = 8 * torch.randn(4, 8)
    q, k, v = 6 * torch.randn(3, 2, 6, 8)
    slow = slow_kernel_attention(q, k, v, w)
    assert not slow.isfinite().all()  # what the plain form makes of these
    expected = slow_kernel_attention(*(x.double() for x in (q, k, v, w)))
    assert expected.abs().max() > 0.1
    given = [x.requires_grad_() for x in (q, k, v)]
    found = kernel_attention(*given, w)
    torch.testing.assert_close(
        found, expected.float(), rtol=2e-4, atol=1e-5
    )  # exponents near 300: 1e-5 of each is lost
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(found.sum(), given))


def test_the_exponentials_are_float32_under_autocast() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 50, 64).bfloat16()
    w = torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = kernel_attention(q, k, v, w)
    assert found.dtype == torch.float32
    assert torch.equal(found, kernel_attention(q.float(), k.float(), v.float(), w))


def test_a_performer_is_the_formula_and_drops_a_tenth_in_training() -> None:
    torch.manual_seed(0)
    layer = TokenPerformer(20, 8).double()
    layer.draw_features()
    x = torch.randn(2, 7, 20, dtype=torch.float64)
    k, q, v = layer.kqv(F.layer_norm(x, (20,))).split(8, dim=2)  # keys come first
    y = v + layer.proj(slow_kernel_attention(q, k, v, layer.w))
    inner = layer.mlp[2](F.gelu(layer.mlp[0](F.layer_norm(y, (8,)))))
    torch.testing.assert_close(layer.eval()(x), y + inner, rtol=1e-6, atol=1e-9)
    assert [module.p for module in layer.modules() if isinstance(module, nn.Dropout)] == [0.1, 0.1]
    assert not torch.equal(layer.train()(x), layer(x))
    still = TokenPerformer(20, 8, dropout=0.0).double()
    still.draw_features()
    assert torch.equal(still.train()(x), still(x))
    with torch.device("meta"):
        model = build_model("t2t_14", dropout=0.0)
    assert model.tokens_to_token.attention2.drop.p == 0.1
    assert t2t(performer_dropout=0.2).tokens_to_token.attention1.mlp[3].p == 0.2


# ---- the seam ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("token_module", MODULES)
def test_token_labeling_and_mixtoken_work_between_embed_and_encode(token_module: str) -> None:
    model = t2t(token_module=token_module, image_size=64)
    images, box = torch.randn(4, 3, 64, 64), (1, 3, 0, 2)
    method = TokenLabeling(model, labels="ground_truth")
    batch, progress = Batch(images, torch.arange(4), torch.arange(4)), Progress(0, 1, 0.0, 1.0)
    method(batch, progress, box=box).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters() if p.requires_grad)
    model.eval()
    tokens = model.embed(images)
    mixed = mix_tokens(tokens, box=box, grid=model.grid_size)
    assert torch.equal(mixed[0, 4], tokens[3, 4])  # row 1, column 0
    assert torch.equal(mixed[0, 3], tokens[0, 3])
    assert model.encode(mixed).patches.shape == (4, 16, 24)


def test_a_masked_autoencoder_is_refused_because_no_patch_can_be_left_out() -> None:
    with pytest.raises(UserError, match=r"model T2TViT: its embed\(\) cannot leave patches out"):
        MaskedAutoencoding(t2t(), decoder_dim=16, decoder_depth=1, decoder_num_heads=2)


def test_other_parts_see_a_vit_behind_the_soft_splits() -> None:
    model = t2t(image_size=(32, 64)).eval()
    images = torch.randn(2, 3, 32, 64)
    assert attention_maps(model, images).last.shape == (2, 2, 2, 4)
    features = model.encode(model.embed(images))
    scores = dense_scores(model, images)
    torch.testing.assert_close(scores[1, 1, 2], model.head(features.patches[1, 6]), rtol=1e-5, atol=1e-5)
    numbers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    embedding = ("tokens_to_token.", "cls_token", "pos_embed")
    assert {numbers[n] for n in numbers if n.startswith(embedding)} == {0}
    assert {numbers[n] for n in numbers if n.startswith("blocks.1.")} == {2}
    assert {numbers[n] for n in numbers if n.startswith(("head.", "norm."))} == {3} == {model.num_layers}
    with pytest.raises(UserError, match=r"pictures are 3x64x64 .*model.image_size.* 3x32x64"):
        model(torch.randn(1, 3, 64, 64))


# ---- start -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("token_module", MODULES)
def test_the_start_is_the_official_codes(token_module: str, again: bool) -> None:
    torch.manual_seed(0)
    model = t2t(embed_dim=192, num_heads=3, num_classes=60, token_dim=64, token_module=token_module)
    if again:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(3)
        model.init_weights()
    for name, p in model.named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        elif name.endswith(".w"):
            torch.testing.assert_close(p @ p.T, 32 * torch.eye(32), rtol=1e-4, atol=1e-4)  # orthogonal rows of 32 ** .5
            assert not p.requires_grad
        elif name.endswith("bias"):
            assert not p.any(), name
        elif name == "pos_embed":
            assert torch.equal(p[0], sinusoid_pos_embed(5, 192).float())
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.2 if name == "cls_token" else 0.06), name


# ---- files -------------------------------------------------------------------------------------------------------
def test_positions_are_resized_as_the_official_transfer_does(tmp_path: Path) -> None:
    source, model = t2t(image_size=64), t2t(image_size=96)
    report = load_weights(model, saved(tmp_path, source.state_dict()))
    assert (report.family, report.resized.mode, report.resized.new_grid) == ("t2t", "mae", (6, 6))
    grid = source.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    expected = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed[:, 1:], expected)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])
    assert torch.equal(model.tokens_to_token.attention1.w, source.tokens_to_token.attention1.w)


def test_a_file_of_another_kind_is_refused_with_what_would_fit(tmp_path: Path) -> None:
    plain = VisionTransformer(image_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    performer = saved(tmp_path, t2t().state_dict())
    with pytest.raises(UserError, match=r"does not fit(?s:.*)T2T-ViT: model=t2t_7"):
        load_weights(plain, performer)
    with pytest.raises(UserError, match=r"does not fit(?s:.*)model.token_module=performer"):
        load_weights(t2t(token_module="transformer"), performer)
    torch.save(t2t(token_module="transformer").state_dict(), tmp_path / "transformer.pth")
    with pytest.raises(UserError, match=r"does not fit(?s:.*)model.token_module=transformer"):
        load_weights(t2t(), tmp_path / "transformer.pth")
    torch.save(plain.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"does not fit(?s:.*)no soft splits"):
        load_weights(t2t(), tmp_path / "vit.pth")


# ---- options -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 40}, ["model.image_size=40", "multiples of 16"]),
        ({"token_module": "performr"}, ["model.token_module='performr'", "'performer'"]),
        ({"token_dim": 1}, ["model.token_dim=1", "at least 2"]),
        ({"performer_dropout": 1.0}, ["model.performer_dropout=1.0"]),
        ({"num_heads": 5}, ["model.num_heads=5", "model.embed_dim=24"]),
    ],
)
def test_wrong_options_are_one_clear_error(options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        t2t(**options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "patch_size=" not in str(caught.value)  # which is no option here
    assert len(str(caught.value).splitlines()) <= 3


# ---- training ----------------------------------------------------------------------------------------------------
def test_a_performer_trains_supervised_and_its_run_is_read_back(workdir: Path) -> None:
    from vitexp.config import compose_and_check
    from vitexp.train import train

    small = [f"model.{key}={value}" for key, value in SMALL.items() if key != "num_classes"]
    train(compose_and_check(["model=t2t_7", *small, "debug=fast", "output_dir=run", "runtime.precision=bf16"]))
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
    report = load_weights(t2t(num_classes=10, mlp_ratio=2.0), Path("run"))
    assert (report.family, report.head, report.missing) == ("t2t", "kept", ())
