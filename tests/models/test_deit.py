"""DeiT and DeiT III: the official code's numbers, parameters and weight files; two tokens at every seam; the start."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from vitexp.attention_maps import attention_maps, position_similarity
from vitexp.errors import UserError
from vitexp.evaluators.features import feature_extractor
from vitexp.labeling import dense_scores
from vitexp.methods.mae import MaskedAutoencoding
from vitexp.methods.token_labeling import TokenLabeling
from vitexp.models.build import build_model
from vitexp.models.deit import DeiT
from vitexp.models.vit import VisionTransformer
from vitexp.models.weights import load_weights
from vitexp.optim import parameter_groups
from vitexp.types import Batch, Progress

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = json.loads((GOLDEN / "deit_variants.json").read_text(encoding="utf-8"))
# The model of the golden arrays, made by the official code.
OFFICIAL = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
SMALL = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
DEIT3 = {"class_position": False, "layer_scale": 1e-4, "drop_path_growth": "constant"}


def deit(**options: object) -> DeiT:
    return DeiT(**SMALL | {"distilled": True} | options)


def saved(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def batch_of(model: DeiT, count: int = 4) -> Batch:
    images = torch.randn(count, 3, *model.image_size)
    return Batch(images, torch.arange(count) % 5, torch.arange(count))


PROGRESS = Progress(step=0, total_steps=1, epoch=0.0, total_epochs=1.0)


# ---- the official numbers ----------------------------------------------------------------------------------------
def test_a_distilled_model_gives_the_official_numbers(tmp_path: Path) -> None:
    state = load_file(GOLDEN / "deit_tiny_distilled.safetensors")
    model = DeiT(**OFFICIAL, distilled=True).eval()
    report = load_weights(model, saved(tmp_path, {"model": state}))
    assert (report.family, report.head, report.missing, report.unexpected) == ("deit", "kept", (), ())
    with np.load(GOLDEN / "deit_tiny_distilled.npz") as arrays, torch.no_grad():
        images = torch.from_numpy(arrays["images"])
        features = model.encode(model.embed(images))
        logits = model.distilled_logits(features)
        found = {
            "feat_cls": features.cls,
            "feat_dist": features.dist,
            "train_cls": logits.cls,
            "train_dist": logits.dist,
            "eval_output": model(images),
        }
        assert set(found) == set(arrays.files) - {"images"}
        for name, tensor in found.items():
            np.testing.assert_allclose(tensor, arrays[name], rtol=1e-5, atol=1e-5, err_msg=name)


AS_OURS = {entry: entry.replace("_patch16", "").removesuffix("_224") for entry in VARIANTS}
AS_OURS |= {f"deit_{size}_patch16_LS": f"deit3_{size}" for size in ("small", "medium", "base")}
TINY3 = {"embed_dim": 192, "num_heads": 3}  # the official code has this size of DeiT III without results


@pytest.mark.parametrize("entry", VARIANTS)
def test_parameters_and_keys_are_the_official_ones(entry: str) -> None:
    official = VARIANTS[entry]
    with torch.device("meta"):
        model = build_model("deit3_small", **TINY3) if entry == "deit_tiny_patch16_LS" else build_model(AS_OURS[entry])
    assert sum(parameter.numel() for parameter in model.parameters()) == official["params"]
    if "keys" in official:
        renamed = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
        found = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        for ours, theirs in renamed.items():
            found = {key.replace(ours, theirs): shape for key, shape in found.items()}
        inside = {f"blocks.{i}.{k}": s for i in range(official["depth"]) for k, s in official["block_keys"].items()}
        assert found == official["keys"] | inside
    assert model.norm.eps == model.blocks[0].norm1.eps == 1e-6


@pytest.mark.parametrize("entry", ["deit_tiny_patch16_LS", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_files_of_the_official_layout_load_without_a_missing_or_unexpected_key(
    tmp_path: Path, entry: str, prefix: str
) -> None:
    official = VARIANTS[entry]
    keys = official["keys"]
    keys = keys | {f"blocks.{i}.{k}": s for i in range(official["depth"]) for k, s in official["block_keys"].items()}
    state = {prefix + key: torch.full((1,), i / 7).expand(shape) for i, (key, shape) in enumerate(keys.items())}
    three = entry.endswith("LS")
    model = build_model("deit3_small", **TINY3) if three else build_model("deit_tiny_distilled")
    report = load_weights(model, saved(tmp_path, {"model": state}))
    assert (report.family, report.head, report.loaded) == ("deit3" if three else "deit", "kept", len(keys))
    assert (report.missing, report.unexpected, report.resized) == ((), (), None)
    own = model.state_dict()
    for key, tensor in state.items():
        ours = key.removeprefix(prefix).replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        assert torch.equal(own[ours], tensor), key


def small_timm(name: str, *, side: int = 48) -> tuple[nn.Module, dict]:
    """A timm model of few layers with every parameter drawn, and the options that make ours the same."""
    size = {"embed_dim": 48, "depth": 3, "num_heads": 3}
    theirs = timm.create_model(name, img_size=side, num_classes=7, **size).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    return theirs, size | {"image_size": side, "num_classes": 7}


@pytest.mark.parametrize("names", ["timm", "official"])
@pytest.mark.parametrize(
    ("theirs", "ours", "side"),
    [("deit3_small_patch16_224", "deit3_small", 48), ("deit3_huge_patch14_224", "deit3_huge", 28)],
)
def test_deit3_is_timms_with_weights_under_either_name(
    tmp_path: Path, theirs: str, ours: str, side: int, names: str
) -> None:
    model, options = small_timm(theirs, side=side)
    state = model.state_dict()
    if names == "official":
        state = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for key, t in state.items()}
        assert "blocks.2.gamma_2" in state
    twin = build_model(ours, **options).eval()
    report = load_weights(twin, saved(tmp_path, {"model": state}))
    assert (report.family, report.missing, report.unexpected) == ("deit3", (), ())
    images = torch.randn(2, 3, side, side)
    torch.testing.assert_close(twin(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("distilled", [False, True])
def test_deit_is_timms_and_says_both_logits_of_a_distilled_one(tmp_path: Path, distilled: bool) -> None:
    theirs, options = small_timm(f"deit_tiny{'_distilled' if distilled else ''}_patch16_224")
    ours = build_model("deit_tiny", distilled=distilled, **options).eval()
    load_weights(ours, saved(tmp_path, theirs.state_dict()))
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    features = ours.encode(ours.embed(images))
    if not distilled:
        with pytest.raises(UserError, match=r"no distillation token.*model.distilled=true"):
            ours.distilled_logits(features)
        return
    theirs.set_distilled_training(True)
    for found, expected in zip(ours.distilled_logits(features), theirs.train()(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_weight_decay_spares_what_the_official_code_spares_and_decays_the_distillation_token() -> None:
    file = GOLDEN / "optim_weight_decay_groups.json"
    spared, decayed = (set(g["names"]) for g in json.loads(file.read_text(encoding="utf-8"))["deit"]["groups"])
    groups = parameter_groups(deit(depth=1), weight_decay=0.05, no_decay="deit")
    assert {name for g in groups if g["weight_decay"] for name in g["names"]} == decayed
    assert {name for g in groups if not g["weight_decay"] for name in g["names"]} == spared
    assert "dist_token" in decayed


# ---- depth, start ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("growth", "rates"), [("linear", [0, 0.1, 0.2, 0.3]), ("constant", [0.3] * 4)])
def test_drop_path_grows_or_is_the_same_in_every_block(growth: str, rates: list[float]) -> None:
    model = deit(depth=4, drop_path=0.3, drop_path_growth=growth)
    for part in ("drop_path1", "drop_path2"):
        found = [getattr(getattr(block, part), "drop_prob", 0.0) for block in model.blocks]
        assert found == pytest.approx(rates)
    assert not any("drop_path" in name and list(m.children()) for name, m in deit(**DEIT3).named_modules())


def test_deit3_files_name_what_the_official_code_has() -> None:
    with torch.device("meta"):
        model = build_model("deit3_base", drop_path=0.2)
    assert model.pos_embed.shape == (1, 196, 768)
    assert {block.drop_path2.drop_prob for block in model.blocks} == {0.2}
    assert build_model("deit3_small", **SMALL).blocks[1].ls2.gamma.unique().item() == pytest.approx(1e-4)


@pytest.mark.parametrize("again", [False, True])
def test_the_start_is_the_official_codes(again: bool) -> None:
    torch.manual_seed(0)
    model = deit(embed_dim=192, num_heads=3, num_classes=60, layer_scale=0.01)
    if again:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(3)
        model.init_weights()
    for name, p in model.named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        elif name.endswith("gamma"):
            assert torch.equal(p, torch.full_like(p, 0.01)), name
        elif name.startswith("patch_embed."):
            bound = 48**-0.5  # torch's default for 4 x 4 x 3 inputs: uniform within it
            assert 0.8 * bound < p.abs().max() <= bound, name
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.2 if name.endswith("token") else 0.06), name


# ---- side by side, and in small steps ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("option", "settings", "parameters"),
    [
        ("deit3_small_18x2", {}, 64_665_064),
        ("deit3_small_18x2", {"layer_scale": None}, 64_637_416),
        ("deit3_base_18x2", {}, 256_731_112),
        ("deit3_huge_26x2", {}, 1_025_726_440),
        ("deit3_small", {"depth": 36}, 64_665_064),
        ("deit3_small", {"stem": "hmlp"}, 21_954_856),
    ],
)
def test_parallel_blocks_and_hmlp_stem_have_the_official_number_of_parameters(
    option: str, settings: dict, parameters: int
) -> None:
    with torch.device("meta"):
        model = build_model(option, **settings)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("form", [{}, {"attention": "explicit"}, {"gradient_checkpointing": True}])
def test_parallel_blocks_behind_an_hmlp_stem_give_the_official_numbers_and_gradients(
    tmp_path: Path, form: dict
) -> None:
    state = load_file(GOLDEN / "deit_three_things.safetensors")
    size = {"image_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    model = build_model("deit3_small_18x2", **size, num_classes=3, stem="hmlp", **form).eval()
    report = load_weights(model, saved(tmp_path, {"model": state}))
    assert (report.family, report.head, report.missing, report.unexpected) == ("deit3", "kept", (), ())
    close = {"rtol": 1e-5, "atol": 1e-5}
    with np.load(GOLDEN / "deit_three_things.npz") as arrays:
        expected = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    torch.testing.assert_close(model(expected["images"]), expected["eval_output"], **close)
    output = model.train()(expected["images"])
    torch.testing.assert_close(output, expected["train_output"], **close)
    output.square().mean().backward()
    for name, parameter in model.named_parameters():
        official = re.sub(r"ls([12])(_1)?\.gamma$", r"gamma_\1\2", name)
        torch.testing.assert_close(parameter.grad, expected.pop(f"grad/{official}"), **close, msg=name)
    assert expected.keys() == {"images", "eval_output", "train_output"}


OFFICIAL_BRANCHES = {  # in the official code's names: norm, what it feeds, its LayerScale
    "attention": (("norm1", "attn", "gamma_1"), ("norm11", "attn1", "gamma_1_1")),
    "mlp": (("norm2", "mlp", "gamma_2"), ("norm21", "mlp1", "gamma_2_1")),
}


def test_a_parallel_block_adds_both_attentions_then_both_mlps_of_an_official_file(tmp_path: Path) -> None:
    model = build_model("deit3_small_18x2", **SMALL).double().eval()
    state = {key: torch.randn_like(tensor) for key, tensor in model.state_dict().items()}
    named = {key.replace("ls1_1.gamma", "gamma_1_1").replace("ls2_1.gamma", "gamma_2_1"): t for key, t in state.items()}
    named = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for key, t in named.items()}
    block = {key.removeprefix("blocks.1."): tensor for key, tensor in named.items() if key.startswith("blocks.1.")}
    assert {key.split(".")[0] for key in block} == {
        name for pair in OFFICIAL_BRANCHES.values() for b in pair for name in b
    }
    report = load_weights(model, saved(tmp_path, {"model": named}))
    assert (report.family, report.missing, report.unexpected) == ("deit3", (), ())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    expected = x
    for kind, branches in OFFICIAL_BRANCHES.items():
        added = torch.zeros_like(x)
        for norm, layer, gamma in branches:
            part = {
                key.removeprefix(f"{layer}."): tensor for key, tensor in block.items() if key.startswith(f"{layer}.")
            }
            normed = F.layer_norm(expected, (24,), block[f"{norm}.weight"], block[f"{norm}.bias"], eps=1e-6)
            if kind == "attention":
                qkv = F.linear(normed, part["qkv.weight"], part["qkv.bias"]).unflatten(2, (3, 2, 12))
                q, k, v = qkv.permute(2, 0, 3, 1, 4)
                seen = (q @ k.mT / 12**0.5).softmax(-1) @ v
                out = F.linear(seen.transpose(1, 2).flatten(2), part["proj.weight"], part["proj.bias"])
            else:
                hidden = F.gelu(F.linear(normed, part["fc1.weight"], part["fc1.bias"]))
                out = F.linear(hidden, part["fc2.weight"], part["fc2.bias"])
            added += block[gamma] * out
        expected = expected + added
    torch.testing.assert_close(model.blocks[1](x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.blocks[1](x, last=2), expected[:, -2:], rtol=1e-10, atol=1e-10)


def test_each_of_four_parallel_branches_is_left_out_by_a_draw_of_its_own() -> None:
    block = build_model("deit3_small_18x2", **SMALL, layer_scale=1.0, drop_path=0.5).blocks[0].train()
    with torch.no_grad():
        for layer in (block.attn.proj, block.attn1.proj, block.mlp.fc2, block.mlp1.fc2):
            layer.weight.zero_()
        for number, layer in enumerate((block.attn.proj, block.attn1.proj, block.mlp.fc2, block.mlp1.fc2)):
            layer.bias.fill_(2**number)
    torch.manual_seed(0)
    sums = block(torch.zeros(400, 1, 24))[:, 0, 0] / 2  # a kept branch is worth twice its number
    assert sorted(set(sums.tolist())) == list(range(16))


def test_an_hmlp_stem_sees_patches_one_by_one() -> None:
    model = deit(stem="hmlp", patch_size=8).double().eval()
    with torch.no_grad():
        for tensor in model.patch_embed.state_dict().values():
            tensor.copy_(torch.rand_like(tensor.double()) + 0.1)
    names = [key for key in model.state_dict() if key.startswith("patch_embed.") and key.endswith("weight")]
    assert names == [f"patch_embed.proj.{i}.weight" for i in (0, 1, 3, 4, 6, 7)]
    assert [model.patch_embed.proj[i].kernel_size for i in (0, 3, 6)] == [(2, 2)] * 3
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    tokens = model.patch_embed(images)
    corner = model.patch_embed.proj(images[:, :, 8:, :8])[:, :, 0, 0]
    torch.testing.assert_close(tokens[:, 2], corner, rtol=1e-12, atol=1e-12)
    keep = torch.tensor([[3, 0], [1, 2]])
    torch.testing.assert_close(
        model.embed(images, keep),
        torch.stack([model.embed(images)[i, keep[i]] for i in (0, 1)]),
        rtol=1e-12,
        atol=1e-12,
    )
    with pytest.raises(UserError, match=r"model\.patch_size=2: model\.stem=hmlp needs a multiple of 4"):
        deit(stem="hmlp", patch_size=2)


def test_the_hmlp_stem_starts_as_the_official_code_does() -> None:
    stem = deit(stem="hmlp").patch_embed
    stem.proj[1].running_mean.fill_(3)
    torch.manual_seed(0)
    stem.reset_parameters()
    assert not stem.proj[1].running_mean.any()
    bound = 3**-0.5  # torch's default for 1 x 1 x 3 inputs: uniform within it
    assert 0.8 * bound < stem.proj[0].weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("file", "model", "words"),
    [
        ({"stem": "hmlp"}, {}, r"Only one of the two has the hMLP stem: model\.stem=hmlp"),
        ({}, {"stem": "hmlp"}, r"Only one of the two has the hMLP stem: model\.stem=linear"),
    ],
)
def test_a_file_with_the_other_stem_is_refused_and_says_which(
    tmp_path: Path, file: dict, model: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        load_weights(deit(**model), saved(tmp_path, deit(**file).state_dict()))


@pytest.mark.parametrize(
    ("file", "model", "words"),
    [
        ("deit3_small_18x2", "deit3_small", "two attentions: model=deit3_small_18x2"),
        ("deit3_small", "deit3_small_18x2", "two attentions: model=deit3_small and"),
    ],
)
def test_a_file_with_other_blocks_is_refused_and_says_which(tmp_path: Path, file: str, model: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_weights(build_model(model, **SMALL), saved(tmp_path, build_model(file, **SMALL).state_dict()))


# ---- the seam ----------------------------------------------------------------------------------------------------
def test_the_distillation_token_stands_second_with_a_position_of_its_own() -> None:
    model = deit().double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    tokens = torch.cat([model.cls_token, model.dist_token], 1).expand(2, -1, -1)
    patches = model.patch_embed(images)
    tokens = torch.cat([tokens, patches], 1) + model.pos_embed
    for block in model.blocks:
        tokens = block(tokens)
    tokens = model.norm(tokens)
    features = model.encode(model.embed(images))
    for found, expected in (
        (features.cls, tokens[:, 0]),
        (features.dist, tokens[:, 1]),
        (features.patches, tokens[:, 2:]),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)
    keep = torch.tensor([[3, 0, 9], [15, 2, 1]])
    torch.testing.assert_close(
        model.embed(images, keep), torch.stack([model.embed(images)[i, keep[i]] for i in (0, 1)])
    )
    assert model.encode(model.embed(images, keep)).patches.shape == (2, 3, 24)


@pytest.mark.parametrize("options", [{}, {"distilled": False}, {**DEIT3, "distilled": False}, DEIT3, {"stem": "hmlp"}])
def test_a_masked_autoencoder_trains_every_part_of_such_an_encoder(options: dict) -> None:
    method = MaskedAutoencoding(deit(**options), decoder_dim=16, decoder_depth=1, decoder_num_heads=2)
    method(batch_of(method.backbone), PROGRESS).loss.backward()
    silent = [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent
    assert not [name for name in method.state_dict() if "head" in name]


def test_token_labeling_teaches_both_classifiers() -> None:
    method = TokenLabeling(deit(), labels="ground_truth")
    method(batch_of(method.backbone), PROGRESS, box=(0, 2, 1, 3)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())


def test_other_parts_find_class_token_and_patches_behind_two_tokens() -> None:
    model, accelerator = deit(image_size=(16, 24)).eval(), Accelerator(cpu=True)
    images = torch.randn(2, 3, 16, 24)
    features = model.encode(model.embed(images))
    for pool, expected in (
        ("cls", features.cls),
        ("mean", features.patches.mean(1)),
        ("model", torch.cat([features.cls, features.dist], 1)),
    ):
        found = feature_extractor(model, accelerator, pool=pool, key="evaluators.knn.pool")(images)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    maps = attention_maps(model, images)
    assert maps.last.shape == (2, 2, 4, 6)
    assert (maps.rollout.flatten(1).sum(1) < 1).all()  # two tokens take a share
    similarity = position_similarity(model)
    assert similarity is not None
    expected = F.cosine_similarity(model.pos_embed[0, 2], model.pos_embed[0, 2 + 7], dim=0)
    torch.testing.assert_close(similarity[0, 0, 1, 1], expected.detach())
    scores = dense_scores(model, images)
    patch = features.patches[1, 8]  # row 1, column 2
    torch.testing.assert_close(scores[1, 1, 2], (model.head(patch) + model.head_dist(patch)) / 2, rtol=1e-5, atol=1e-5)


def test_layers_are_numbered_from_tokens_to_both_heads() -> None:
    model = deit()
    numbers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert {numbers[n] for n in numbers if n.startswith(("patch_embed.", "cls_token", "dist_token", "pos_embed"))} == {
        0
    }
    assert {numbers[n] for n in numbers if n.startswith("blocks.1.")} == {2}
    assert {numbers[n] for n in numbers if n.startswith(("head.", "head_dist.", "norm."))} == {3} == {model.num_layers}


def test_new_classes_bring_both_classifiers_and_none_leaves_the_vectors() -> None:
    model = deit(num_classes=0).eval()
    images = torch.randn(2, 3, 16, 16)
    assert model(images).shape == (2, 48)
    assert deit(num_classes=0, distilled=False)(images).shape == (2, 24)
    model.double().reset_head(7)
    assert not any(p.any() for name, p in model.named_parameters() if name.startswith(model.head_prefixes))
    assert model(images.double()).shape == (2, 7)
    model.reset_head(7, init="timm")
    for head in (model.head, model.head_dist):
        assert head.weight.dtype == torch.float64
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    model.reset_head(0)
    assert not [name for name, _ in model.named_parameters() if name.startswith("head")]


# ---- files -------------------------------------------------------------------------------------------------------
def resized(table: Tensor, *, prefix: int) -> Tensor:
    """As the official fine-tuning does it: bicubic, tokens' rows as they are."""
    grid = table[:, prefix:].transpose(1, 2).unflatten(2, (4, 4))
    patches = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat([table[:, :prefix], patches], dim=1)


@pytest.mark.parametrize(
    ("options", "family", "prefix"),
    [({}, "deit", 2), ({"distilled": False}, "timm", 1), ({"distilled": False, **DEIT3}, "deit3", 0)],
)
def test_positions_are_resized_as_the_official_code_does_whatever_the_keys_tell(
    tmp_path: Path, options: dict, family: str, prefix: int
) -> None:
    source = deit(**options)
    model = deit(image_size=24, **options)
    report = load_weights(model, saved(tmp_path, source.state_dict()))
    assert (report.family, report.head) == (family, "kept")
    assert (report.resized.old_grid, report.resized.new_grid, report.resized.mode) == ((4, 4), (6, 6), "mae")
    torch.testing.assert_close(model.pos_embed, resized(source.pos_embed.detach(), prefix=prefix))
    assert (
        load_weights(deit(image_size=24, **options), tmp_path / "weights.pth", position_mode="timm").resized.mode
        == "timm"
    )


def test_other_classes_start_both_classifiers_at_zero(tmp_path: Path) -> None:
    path = saved(tmp_path, deit().state_dict())
    model = deit(num_classes=7)
    report = load_weights(model, path)
    heads = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
    assert set(report.missing) == set(heads) == set(report.unexpected)
    assert not any(model.get_parameter(name).any() for name in heads)


def test_a_plain_vit_takes_deit3s_class_token_without_position(tmp_path: Path) -> None:
    source = deit(distilled=False, **DEIT3).eval()
    path = saved(tmp_path, source.state_dict())
    plain = VisionTransformer(**SMALL, layer_scale=1.0).eval()
    assert load_weights(plain, path).family == "deit3"
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain(images), source(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("of_file", "of_model", "words"),
    [
        ({}, {"distilled": False}, "distilled DeiT: model=deit_base_distilled"),
        ({"distilled": False}, {}, "no distillation token: model.distilled=false"),
        ({}, {"class_position": False}, "model.class_position=true"),
        ({"layer_scale": 0.1}, {}, "model.layer_scale=1.0e-4"),
        ({}, {"layer_scale": 0.1}, "model.layer_scale=null"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_the_option_that_mends_it(
    tmp_path: Path, of_file: dict, of_model: dict, words: str
) -> None:
    path = saved(tmp_path, deit(**of_file).state_dict())
    with pytest.raises(UserError) as caught:
        load_weights(deit(**of_model), path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


# ---- options -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distilled": "yes"}, ["model.distilled='yes'", "true or false"]),
        ({"class_position": 0}, ["model.class_position=0", "true or false"]),
        ({"drop_path_growth": "constnt"}, ["model.drop_path_growth='constnt'", "'constant'"]),
        ({"drop_path_growth": "constant", "drop_path": 1.0}, ["model.drop_path=1.0"]),
        ({"layer_scale": 0}, ["model.layer_scale=0", "above 0"]),
        ({"num_heads": 5}, ["model.num_heads=5", "model.embed_dim=24"]),
    ],
)
def test_wrong_options_are_one_clear_error(options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        deit(**options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


# ---- training ----------------------------------------------------------------------------------------------------
def test_a_distilled_model_trains_supervised_and_its_run_is_read_back(workdir: Path) -> None:
    from vitexp.config import compose_and_check
    from vitexp.train import train

    small = [f"model.{key}={value}" for key, value in SMALL.items() if key not in ("num_classes", "image_size")]
    options = ["model=deit_tiny_distilled", "model.image_size=16", *small, "debug=fast", "output_dir=run"]
    train(compose_and_check([*options, "model.drop_path=0.1", "model.drop_path_growth=constant"]))
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
    report = load_weights(deit(num_classes=10), Path("run"))
    assert (report.family, report.head, report.missing) == ("deit", "kept", ())
