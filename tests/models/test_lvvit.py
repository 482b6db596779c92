"""LV-ViT: the official code's numbers, parameters and weight files; what its tokens say; how it starts and trains."""

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

from vitexp.errors import UserError
from vitexp.models.build import build_model
from vitexp.models.layers import Block, add_branch
from vitexp.models.lvvit import LVViT
from vitexp.models.vit import VisionTransformer
from vitexp.models.weights import load_weights
from vitexp.optim import parameter_groups
from vitexp.types import Features

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = json.loads((GOLDEN / "lvvit_variants.json").read_text(encoding="utf-8"))
DROP_PATHS = VARIANTS.pop("drop_path_lists")
# The model of the golden arrays, made by the official code.
OFFICIAL = {"image_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
SMALL = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
SMALL |= {"stem_channels": 8}


def lvvit(**options: object) -> LVViT:
    return LVViT(**SMALL | options)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "lvvit_tiny64_eval.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture(scope="module")
def official_state() -> dict[str, Tensor]:
    return load_file(GOLDEN / "lvvit_tiny64.safetensors")


# ---- the official numbers ----------------------------------------------------------------------------------------
def test_every_stage_of_the_forward_equals_the_official_codes(
    golden: dict[str, Tensor], official_state: dict[str, Tensor]
) -> None:
    model = LVViT(**OFFICIAL).eval()
    model.load_state_dict(official_state, strict=True)
    after_block: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, out: after_block.append(out))
    with torch.no_grad():
        stem = model.patch_embed(golden["images"])
        features = model.encode(model.embed(golden["images"]))
        logits = model.token_logits(features)
        found = {
            "patch_embed": stem.transpose(1, 2).unflatten(2, (4, 4)),
            "norm": torch.cat([features.cls[:, None], features.patches], dim=1),
            "cls_logits": logits.cls,
            "aux_logits": logits.tokens,
            "output": model(golden["images"]),
        } | {f"block{i}": out for i, out in enumerate(after_block[:3])}
    assert set(found) == set(golden) - {"images"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, golden[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name + text)


NAMES = {"lvvit_t": "lvvit_tiny", "lvvit_s": "lvvit_small", "lvvit_m": "lvvit_medium", "lvvit_l": "lvvit_large"}
AS_OURS = {entry: (name, {}) for entry, name in NAMES.items()}
AS_OURS["lvvit"] = ("lvvit", {"token_head": False, "output": "cls"})  # the official model without token labels
PLAIN = {"embed_dim": 384, "depth": 16, "num_heads": 6, "mlp_ratio": 3.0, "qkv_bias": False, "norm_eps": 1e-5}
AS_OURS["vit"] = ("vit", PLAIN)  # its baseline is a plain ViT


@pytest.mark.parametrize("entry", VARIANTS)
def test_parameters_and_keys_are_the_official_ones_at_every_size(entry: str) -> None:
    official, (name, options) = VARIANTS[entry], AS_OURS[entry]
    counts = {}
    for size in official["params"]:
        with torch.device("meta"):
            model = build_model(name, image_size=int(size), **options)
        counts[size] = sum(parameter.numel() for parameter in model.parameters())
        if size == "224":
            keys = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    blocks = range(official["depth"])
    inside = {f"blocks.{i}.{key}": shape for i in blocks for key, shape in official["block_keys"].items()}
    assert counts == official["params"]
    assert keys == official["keys_224"] | inside
    assert model.norm.eps == model.blocks[0].norm1.eps == official["ln_eps"]
    assert {block.attn.num_heads for block in model.blocks} == {official["heads"]}
    assert {block.residual_scale for block in model.blocks} == {official["skip_lam"]}


@pytest.mark.parametrize(("case", "rates"), DROP_PATHS.items())
def test_drop_path_grows_from_block_to_block_as_in_the_official_code(case: str, rates: list[float]) -> None:
    letter, rate, _ = case.split("_")
    with torch.device("meta"):
        model = build_model(NAMES[f"lvvit_{letter.lower()}"], drop_path=float(rate))
    for part in ("drop_path1", "drop_path2"):
        ours = [getattr(getattr(block, part), "drop_prob", 0.0) for block in model.blocks]
        np.testing.assert_allclose(ours, rates, atol=1e-7)


def test_weight_decay_spares_what_the_official_code_spares() -> None:
    file = GOLDEN / "optim_weight_decay_groups.json"
    spared, decayed = (set(g["names"]) for g in json.loads(file.read_text(encoding="utf-8"))["lv"]["groups"])
    groups = parameter_groups(lvvit(), weight_decay=0.05)
    assert {name for g in groups if g["weight_decay"] for name in g["names"]} == decayed
    assert {name for g in groups if not g["weight_decay"] for name in g["names"]} == spared


# ---- residual branches -------------------------------------------------------------------------------------------
def test_residual_scale_divides_both_branches_and_nothing_else() -> None:
    torch.manual_seed(0)
    block = Block(12, 3, residual_scale=3.0).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    middle = x + block.attn(block.norm1(x)) / 3
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)) / 3, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0])
def test_a_scaled_residual_sum_has_the_formulas_values_and_gradients(dtype: torch.dtype, scale: float) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    branch = torch.randn(3, 4).to(dtype).requires_grad_()
    before = branch.detach().clone()
    out = add_branch(x, branch, scale)
    torch.testing.assert_close(out, x + branch.to(out.dtype) / scale, rtol=1e-6, atol=1e-6)
    assert torch.equal(branch, before)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 4))
    torch.testing.assert_close(branch.grad, torch.full_like(branch, 1 / scale))


def test_stochastic_depth_leaves_out_branches_of_single_samples() -> None:
    torch.manual_seed(0)
    block = Block(12, 3, residual_scale=2.0, drop_path=0.25).double().train()
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)  # leaves the attention's branch alone
    x = torch.randn(400, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        added, branch = block(x) - x, block.attn(block.norm1(x))
    skipped = (added == 0).flatten(1).all(1)
    torch.testing.assert_close(added[~skipped], branch[~skipped] / 0.75 / 2, rtol=1e-9, atol=1e-12)
    assert skipped.double().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 400))
    block.eval()
    torch.testing.assert_close(block(x), x + branch / 2, rtol=1e-9, atol=1e-12)


# ---- stem --------------------------------------------------------------------------------------------------------
def test_patches_may_be_taller_than_wide() -> None:
    model = lvvit(image_size=(16, 24), patch_size=(4, 8))
    assert model.embed(torch.randn(2, 3, 16, 24)).shape == (2, 12, 24)
    assert model.grid_size == (4, 3)


def test_tokens_lie_in_raster_order_and_the_stem_sees_a_little_around_each_patch() -> None:
    model = lvvit(image_size=32).eval()
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    model.embed(pixels)[0, 8 * 3 + 5].sum().backward()  # row 3, column 5 of 8 x 8
    rows, columns = pixels.grad[0].abs().sum(0).nonzero().unbind(1)
    # 4 px of the patch, 3 px for the first kernel of 7, and 2 * 2 px for the two of 3 on the halved picture
    assert (rows.min().item(), rows.max().item()) == (12 - 7, 15 + 6)
    assert (columns.min().item(), columns.max().item()) == (20 - 7, 23 + 6)


# ---- what tokens say ---------------------------------------------------------------------------------------------
def test_outputs_are_made_of_the_two_classifiers_logits_as_named() -> None:
    model = lvvit().eval()
    features = Features(cls=torch.randn(3, 24), patches=torch.randn(3, 16, 24))
    cls, tokens = model.token_logits(features)
    assert (cls.shape, tokens.shape) == ((3, 5), (3, 16, 5))
    torch.testing.assert_close(tokens[1, 7], model.aux_head.weight @ features.patches[1, 7] + model.aux_head.bias)
    greatest = torch.tensor([[max(tokens[i, :, k].tolist()) for k in range(5)] for i in range(3)])
    mean = sum(tokens[:, n] for n in range(16)) / 16
    by_hand = {
        "cls_plus_max": cls + 0.5 * greatest,
        "cls_plus_mean": cls + 0.5 * mean,
        "cls": cls,
        "tokens_mean": mean,
    }
    for name, logits in by_hand.items():
        model.output = name
        torch.testing.assert_close(model.predict(features), logits)
    assert lvvit().output == "cls_plus_max"


def test_a_model_without_token_classifier_says_so() -> None:
    model = lvvit(token_head=False, output="cls")
    assert "aux_head.weight" not in model.state_dict()
    features = model.encode(model.embed(torch.randn(2, 3, 16, 16)))
    with pytest.raises(UserError, match=r"no classifier of tokens.*token_head"):
        model.token_logits(features)
    assert model.predict(features).shape == (2, 5)


def test_without_classes_it_gives_its_vectors_and_new_classes_bring_both_heads_back() -> None:
    model = lvvit(num_classes=0).eval()
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 24)
    model.double().reset_head(7)
    assert model.aux_head.weight.dtype == torch.float64
    assert not any(p.any() for name, p in model.named_parameters() if name.startswith(model.head_prefixes))
    assert model(torch.randn(2, 3, 16, 16, dtype=torch.float64)).shape == (2, 7)
    model.reset_head(7, init="timm")
    assert all(head.weight.std().item() == pytest.approx(0.02, rel=0.2) for head in (model.head, model.aux_head))


def test_layers_are_numbered_from_stem_to_both_heads() -> None:
    model = lvvit()
    numbers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert {numbers[n] for n in numbers if n.startswith(("patch_embed.", "cls_token", "pos_embed"))} == {0}
    assert {numbers[n] for n in numbers if n.startswith("blocks.1.")} == {2}
    assert {numbers[n] for n in numbers if n.startswith(("head.", "aux_head.", "norm."))} == {3} == {model.num_layers}


# ---- start -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("again", [False, True])
def test_the_start_is_the_official_codes(again: bool) -> None:
    torch.manual_seed(0)
    model = lvvit(embed_dim=192, num_heads=3, stem_channels=32, num_classes=60)
    if again:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(3)
        model.init_weights()
    for name, p in model.named_parameters():
        if "bn" in name or "norm" in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        elif name == "patch_embed.proj.bias" or "conv" in name or name == "patch_embed.proj.weight":
            weight = model.get_parameter(name.replace("bias", "weight"))
            bound = 1 / math.sqrt(weight[0].numel())  # torch's default: uniform within it
            assert 0.8 * bound < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.2 if name == "cls_token" else 0.06), name
    buffers = dict(model.named_buffers())
    assert not buffers["patch_embed.bn2.running_mean"].any()
    assert buffers["patch_embed.bn2.running_var"].eq(1).all()


# ---- files -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "state_dict_ema"])
def test_official_files_load_bare_and_wrapped(
    tmp_path: Path, wrapper: str | None, golden: dict[str, Tensor], official_state: dict[str, Tensor]
) -> None:
    state = {f"module.{key}": tensor for key, tensor in official_state.items()} if wrapper else official_state
    file = tmp_path / ("weights.pth.tar" if wrapper else "weights.pth")
    torch.save({wrapper: state, "epoch": 300} if wrapper else state, file)
    model = LVViT(**OFFICIAL).eval()
    report = load_weights(model, file)
    assert (report.family, report.head, report.missing, report.unexpected) == ("lvvit", "kept", (), ())
    assert report.loaded == len(official_state)
    with torch.no_grad():
        torch.testing.assert_close(model(golden["images"]), golden["output"], rtol=1e-5, atol=1e-5)


def test_positions_are_resized_as_the_official_code_does_and_other_classes_start_at_zero(
    tmp_path: Path, official_state: dict[str, Tensor]
) -> None:
    torch.save(official_state, tmp_path / "weights.pth")
    model = LVViT(**OFFICIAL | {"image_size": 96, "num_classes": 7})
    report = load_weights(model, tmp_path / "weights.pth")
    assert (report.resized.old_grid, report.resized.new_grid, report.resized.mode) == ((4, 4), (6, 6), "mae")
    heads = ("head.weight", "head.bias", "aux_head.weight", "aux_head.bias")
    assert set(report.missing) == set(heads) == set(report.unexpected)
    assert not any(model.get_parameter(name).any() for name in heads)
    table = official_state["pos_embed"]
    picture = table[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    resized = F.interpolate(picture, size=(6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.pos_embed[:, 1:], resized.flatten(2).transpose(1, 2))
    assert torch.equal(model.pos_embed[:, :1], table[:, :1])
    for name, tensor in model.state_dict().items():
        if name not in (*heads, "pos_embed"):
            assert torch.equal(tensor, official_state[name]), name  # BatchNorm's statistics as well


def test_a_model_without_token_classifier_keeps_the_class_tokens(
    tmp_path: Path, official_state: dict[str, Tensor]
) -> None:
    torch.save(official_state, tmp_path / "weights.pth")
    model = LVViT(**OFFICIAL, token_head=False, output="cls")
    report = load_weights(model, tmp_path / "weights.pth", head="keep")
    assert (report.head, set(report.unexpected)) == ("kept", {"aux_head.weight", "aux_head.bias"})
    assert torch.equal(model.head.weight, official_state["head.weight"])
    torch.save(model.state_dict(), tmp_path / "without.pth")
    assert load_weights(LVViT(**OFFICIAL), tmp_path / "without.pth").head == "fresh"
    with pytest.raises(UserError, match="the file has no aux_head"):
        load_weights(LVViT(**OFFICIAL), tmp_path / "without.pth", head="keep")


def test_a_file_of_the_other_kind_of_vit_is_refused_with_the_right_one(
    tmp_path: Path, official_state: dict[str, Tensor]
) -> None:
    torch.save(official_state, tmp_path / "lvvit.pth")
    plain = VisionTransformer(**OFFICIAL, mlp_ratio=3.0, qkv_bias=False)
    with pytest.raises(UserError, match=r"does not fit(?s:.*)model=lvvit_tiny"):
        load_weights(plain, tmp_path / "lvvit.pth")
    torch.save(plain.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"does not fit(?s:.*)model=vit_base"):
        load_weights(LVViT(**OFFICIAL), tmp_path / "vit.pth")


# ---- options -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": 1}, ["model.patch_size=1", "even"]),
        ({"image_size": 15, "patch_size": 5}, ["model.patch_size=5", "even"]),
        ({"image_size": 30}, ["model.patch_size=4", "does not divide", "model.image_size=30"]),
        ({"num_heads": 5}, ["model.num_heads=5", "model.embed_dim=24"]),
        ({"stem_channels": 0}, ["model.stem_channels=0", "at least 1"]),
        ({"residual_scale": 0}, ["model.residual_scale=0", "above 0"]),
        ({"drop_path": 1.0}, ["model.drop_path=1.0"]),
        ({"output": "cls_plus_maxx"}, ["model.output='cls_plus_maxx'", "'cls_plus_max'"]),
        ({"token_head": False}, ["model.output=cls_plus_max", "model.token_head=true", "output=cls"]),
        ({"token_head": "no"}, ["model.token_head='no'", "true or false"]),
    ],
)
def test_wrong_options_are_one_clear_error(options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        lvvit(**options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_pictures_of_another_size_are_refused_in_words() -> None:
    with pytest.raises(UserError, match=r"pictures are 3x20x20 .*model.image_size.* 3x16x16"):
        lvvit()(torch.randn(1, 3, 20, 20))


def test_the_residual_scale_reaches_the_blocks() -> None:
    assert build_model("lvvit", **SMALL, residual_scale=1.5).blocks[1].residual_scale == 1.5


# ---- training ----------------------------------------------------------------------------------------------------
def test_every_parameter_learns_from_the_default_output() -> None:
    model = lvvit(gradient_checkpointing=True).train()
    F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert model.patch_embed.bn3.num_batches_tracked.item() == 1


def test_it_trains_supervised_for_two_steps(workdir: Path) -> None:
    from vitexp.config import compose_and_check
    from vitexp.train import train

    small = [f"model.{key}={value}" for key, value in SMALL.items() if key not in ("num_classes", "image_size")]
    options = ["model=lvvit", "model.image_size=16", *small, "method=supervised", "debug=fast", "output_dir=run"]
    train(compose_and_check([*options, "model.drop_path=0.1"]))
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
    assert any("val/top1" in row for row in rows)
    trained = load_file("run/model.safetensors")
    assert trained["patch_embed.bn1.num_batches_tracked"].item() == 2
    assert load_weights(lvvit(num_classes=10), Path("run")).head == "kept"
