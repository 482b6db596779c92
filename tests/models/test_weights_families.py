"""Every family's files, made from the official codes' lists of keys and shapes, load without a key too many or too few.

Files hold one number a tensor, repeated over its shape. Models have two blocks, whose keys are those of all others;
that they agree with the lists at full depth is tested with each model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitexp.models.build import build_model
from vitexp.models.vit import VisionTransformer
from vitexp.models.weights import load_weights

GOLDEN = Path(__file__).parents[1] / "golden"
DEPTH = 2
Shapes = dict[str, list[int]]


def listed(name: str) -> dict[str, dict]:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def with_blocks(keys: Shapes, block: Shapes, name: str = "blocks") -> Shapes:
    return keys | {f"{name}.{i}.{key}": shape for i in range(DEPTH) for key, shape in block.items()}


def widened(shapes: Shapes, *, old: int, new: int, hidden: int) -> Shapes:
    """The shapes of the same model with another width, and another one inside its MLPs."""
    out = {}
    for key, shape in shapes.items():
        shape = [new if size == old else size for size in shape]
        if ".mlp.fc1." in key and key.startswith("blocks."):
            shape[0] = hidden
        elif key.endswith("mlp.fc2.weight") and key.startswith("blocks."):
            shape[1] = hidden
        elif ".attn.qkv." in key and key.startswith("blocks."):
            shape[0] = 3 * new
        out[key] = shape
    return out


def empty(name: str, **options: object) -> nn.Module:
    """The model with memory that nothing was written to."""
    with torch.device("meta"):
        model = build_model(name, depth=DEPTH, **options)
    return model.to_empty(device="cpu")


def check(
    tmp_path: Path, shapes: Shapes, model: nn.Module, *, family: str, wrapper: str | None = None, prefix: str = ""
) -> None:
    """Loads such a file: every tensor of it arrives, and every one of the model's comes from it."""
    numbers = {key: torch.tensor(1 + i / 7) for i, key in enumerate(shapes)}
    if family == "mae":
        numbers["pos_embed"] = torch.tensor(0.0)  # the class token's row is zero there, which tells an encoder alone
    state = {prefix + key: numbers[key].expand(shape) for key, shape in shapes.items()}
    torch.save({wrapper: state, "epoch": 300} if wrapper else state, tmp_path / "weights.pth")
    report = load_weights(model, tmp_path / "weights.pth")
    assert (report.family, report.missing, report.unexpected, report.resized) == (family, (), (), None)
    assert report.head == ("kept" if "head.weight" in shapes else "none")
    own = model.state_dict()
    assert report.loaded == len(shapes) == len(own)
    for key, number in numbers.items():
        ours = own[key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")]
        assert list(ours.shape) == shapes[key]
        assert (ours == number.to(ours.dtype)).all(), key


# ---- LV-ViT and T2T-ViT ------------------------------------------------------------------------------------------
LVVITS = {"lvvit_t": "lvvit_tiny", "lvvit_s": "lvvit_small", "lvvit_m": "lvvit_medium", "lvvit_l": "lvvit_large"}


@pytest.mark.parametrize("entry", LVVITS)
def test_lvvit(tmp_path: Path, entry: str) -> None:
    official = listed("lvvit_variants")[entry]
    shapes = with_blocks(official["keys_224"], official["block_keys"])
    check(tmp_path, shapes, empty(LVVITS[entry]), family="lvvit", wrapper="state_dict", prefix="module.")


@pytest.mark.parametrize("size", ["7", "10", "12", "14", "19", "24", "t_14", "t_19", "t_24"])
def test_t2t(tmp_path: Path, size: str) -> None:
    variants = listed("t2t_variants")
    of_14, width = variants["t2t_vit_t_14" if "t_" in size else "t2t_vit_14"], variants[f"t2t_vit_{size}"]["dim"]
    shapes = with_blocks(of_14["keys"], of_14["block_keys"])
    shapes = widened(shapes, old=384, new=width, hidden=(2 if width == 256 else 3) * width)
    check(tmp_path, shapes, empty(f"t2t_{size}"), family="t2t", wrapper="state_dict_ema", prefix="module.")


# ---- DeiT --------------------------------------------------------------------------------------------------------
DEITS = {"tiny": 192, "small": 384, "base": 768}


@pytest.mark.parametrize("distilled", ["", "_distilled"])
@pytest.mark.parametrize(("size", "picture"), [("tiny", ""), ("small", ""), ("base", ""), ("base", "_384")])
def test_deit(tmp_path: Path, size: str, distilled: str, picture: str) -> None:
    official = listed("deit_variants")["deit_tiny_distilled_patch16_224"]
    shapes = with_blocks(official["keys"], official["block_keys"])
    shapes = widened(shapes, old=192, new=DEITS[size], hidden=4 * DEITS[size])
    if not distilled:
        shapes = {key: shape for key, shape in shapes.items() if "dist" not in key}
    shapes["pos_embed"][1] = (24 if picture else 14) ** 2 + (2 if distilled else 1)
    model = empty(f"deit_{size}{distilled}{picture}")
    check(tmp_path, shapes, model, family="deit" if distilled else "timm", wrapper="model")


@pytest.mark.parametrize("names", ["official", "timm"])
@pytest.mark.parametrize(("size", "width"), [("small", 384), ("medium", 512), ("base", 768), ("large", 1024)])
def test_deit3(tmp_path: Path, size: str, width: int, names: str) -> None:
    official = listed("deit_variants")["deit_tiny_patch16_LS"]
    shapes = with_blocks(official["keys"], official["block_keys"])
    shapes = widened(shapes, old=192, new=width, hidden=4 * width)
    if names == "timm":
        shapes = {k.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v for k, v in shapes.items()}
    check(tmp_path, shapes, empty(f"deit3_{size}"), family="deit3", wrapper="model" if names == "official" else None)


# ---- MAE ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["full", "encoder", "fine-tuned", "fine-tuned, class token"])
@pytest.mark.parametrize("size", ["base_patch16", "large_patch16", "huge_patch14"])
def test_mae(tmp_path: Path, size: str, kind: str) -> None:
    official = listed("mae_shapes")[f"mae_vit_{size}"]
    shapes = {key: shape for key, shape in official.items() if "blocks." not in key}
    for blocks in ("blocks", "decoder_blocks"):
        first = f"{blocks}.0."
        inside = {key.removeprefix(first): shape for key, shape in official.items() if key.startswith(first)}
        shapes = with_blocks(shapes, inside, blocks)
    name, width = f"vit_{size.split('_')[0]}", official["cls_token"][2]
    if kind == "full":
        sized = {"patch_size": int(size[-2:]), "embed_dim": width, "num_heads": 16, "decoder_depth": DEPTH}
        check(tmp_path, shapes, empty("mae", **sized), family="mae", wrapper="model")
        return
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith(("decoder", "mask_token"))}
    if kind == "encoder":
        check(tmp_path, shapes, empty(name, num_classes=0), family="mae", wrapper="model")
        return
    shapes |= {"head.weight": [1000, width], "head.bias": [1000]}
    options = {}
    if kind == "fine-tuned":
        options = {"pool": "mean", "norm": "after_pool"}
        shapes = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: s for key, s in shapes.items()}
    check(tmp_path, shapes, empty(name, num_classes=1000, **options), family="timm", wrapper="model")


# ---- timm's ViTs -------------------------------------------------------------------------------------------------
TIMMS = {f"vit_{size}_patch16_224": f"vit_{size}" for size in ("tiny", "small", "base", "large")}
TIMMS |= {
    "vit_base_patch32_224": "vit_base_32",
    "vit_base_patch8_224": "vit_base_8",
    "vit_huge_patch14_224": "vit_huge",
}
TIMMS |= {"deit_small_distilled_patch16_224": "deit_small_distilled", "deit3_base_patch16_224": "deit3_base"}


@pytest.mark.parametrize("theirs", TIMMS)
def test_timm(tmp_path: Path, theirs: str) -> None:
    with torch.device("meta"):
        shapes = {
            k: list(t.shape) for k, t in timm.create_model(theirs, depth=DEPTH, num_classes=1000).state_dict().items()
        }
    family = "deit3" if "deit3" in theirs else "deit" if "distilled" in theirs else "timm"
    check(tmp_path, shapes, empty(TIMMS[theirs], num_classes=1000), family=family)


# ---- the official JAX files --------------------------------------------------------------------------------------
JAX = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
JAX |= {"num_classes": 10, "gelu": "tanh"}
LINEN = {"LayerNorm_2": "LayerNorm_1", "MlpBlock_3": "MlpBlock_0"}
LINEN |= {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0"}
BLOCK = "Transformer/encoderblock"
POSITIONS = "Transformer/posembed_input/pos_embedding"


@pytest.mark.parametrize("blocks", ["one by one", "scanned"])
@pytest.mark.parametrize("numbering", ["published", "linen"])
@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/", "params/img/"])
@pytest.mark.parametrize("kind", ["token", "gap", "big_vision"])
def test_jax(tmp_path: Path, blocks: str, numbering: str, prefix: str, kind: str) -> None:
    with np.load(GOLDEN / "vit_jax_token_rep24.npz") as file:
        arrays = dict(file)
    if kind != "token":  # big_vision's class token has no position, and what averages patches has no class token
        arrays["pos_embedding" if kind == "big_vision" else POSITIONS] = arrays.pop(POSITIONS)[:, 1:]
    if kind == "gap":
        del arrays["cls"]
    options = {"class_token": False, "pool": "mean"} if kind == "gap" else {}
    plain, other = (VisionTransformer(**JAX, **options, representation_dim=24) for _ in range(2))
    np.savez(tmp_path / "plain.npz", **arrays)
    if numbering == "linen":
        for old, new in LINEN.items():
            arrays = {key.replace(old, new): array for key, array in arrays.items()}
    if blocks == "scanned":
        inside = [key.removeprefix(f"{BLOCK}_0/") for key in arrays if key.startswith(f"{BLOCK}_0/")]
        stacked = {f"{BLOCK}/{key}": np.stack([arrays[f"{BLOCK}_{i}/{key}"] for i in range(3)]) for key in inside}
        arrays = {key: array for key, array in arrays.items() if not key.startswith(BLOCK)} | stacked
    # Beside a picture's encoder a checkpoint may hold the text's and what the optimizer keeps.
    beside = {"opt/0/count": np.ones(1), "params/txt/head/bias": np.ones(3)} if prefix == "params/img/" else {}
    np.savez(tmp_path / "other.npz", **{prefix + key: array for key, array in arrays.items()}, **beside)
    for model, name in ((plain, "plain"), (other, "other")):
        report = load_weights(model, tmp_path / f"{name}.npz")
        assert (report.family, report.head, report.missing, report.unexpected) == ("jax", "kept", (), ())
        assert report.loaded == len(model.state_dict())
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in plain.state_dict().items())


def test_big_visions_pooling_by_attention_stays_in_the_file(tmp_path: Path) -> None:
    with np.load(GOLDEN / "vit_jax_token_rep0.npz") as file:
        arrays = dict(file)
    del arrays["cls"]
    arrays["pos_embedding"] = arrays.pop(POSITIONS)[:, 1:]
    np.savez(tmp_path / "map.npz", **arrays, **{"MAPHead_0/probe": np.zeros((1, 1, 48), np.float32)})
    model = VisionTransformer(**JAX, class_token=False, pool="mean")
    report = load_weights(model, tmp_path / "map.npz")
    assert (report.head, set(report.missing)) == ("fresh", {"head.weight", "head.bias"})
    assert set(report.unexpected) == {"MAPHead_0/probe", "head.weight", "head.bias"}
