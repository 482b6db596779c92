"""The ViT against numbers of the official JAX and MAE codes, and against timm."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vitexp.models.build import build_model
from vitexp.models.vit import VisionTransformer
from vitexp.models.weights import load_weights

GOLDEN = Path(__file__).parents[1] / "golden"
JAX = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "gelu": "tanh"}
SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 10}


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "vit_jax_expected.npz") as arrays:
        return dict(arrays)


def pictures(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def close(actual: torch.Tensor, reference: np.ndarray, tolerance: float) -> None:
    torch.testing.assert_close(actual, torch.from_numpy(reference), rtol=tolerance, atol=tolerance)


# ---- sizes -------------------------------------------------------------------------------------------------------
# google-research/vision_transformer models_test.py for the first column; the others follow from its shapes.
COUNTS = {  # 224 px 1000 classes, 384 px 1000 classes, without head, 21843 classes with and without representation
    "vit_tiny": (5_717_416, 5_790_376, 5_524_416, 9_777_171, 9_740_115),
    "vit_small_32": (22_878_952, 22_915_432, 22_493_952, 31_051_347, 30_903_507),
    "vit_small": (22_050_664, 22_196_584, 21_665_664, 30_223_059, 30_075_219),
    "vit_base_32": (88_224_232, 88_297_192, 87_455_232, 104_843_091, 104_252_499),
    "vit_base": (86_567_656, 86_859_496, 85_798_656, 103_186_515, 102_595_923),
    "vit_base_8": (86_576_872, 87_744_232, 85_807_872, 103_195_731, 102_605_139),
    "vit_large_32": (306_535_400, 306_632_680, 305_510_400, 328_949_075, 327_899_475),
    "vit_large": (304_326_632, 304_715_752, 303_301_632, 326_740_307, 325_690_707),
    "vit_huge": (632_045_800, 632_721_640, 630_764_800, 660_385_363, 658_745_683),
}


def count(name: str, **options: object) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(name, **options).parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_papers_to_the_unit(name: str) -> None:
    with torch.device("meta"):
        width = build_model(name).embed_dim
    larger = 392 if name == "vit_huge" else 384
    pretraining = {"num_classes": 21843, "representation_dim": width}
    counted = (
        count(name),
        count(name, image_size=larger),
        count(name, num_classes=0),
        count(name, **pretraining),
        count(name, num_classes=21843),
    )
    assert counted == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "total"),
    [("vit_small", 22_049_896), ("vit_small_32", 22_878_184), ("vit_base", 86_566_120), ("vit_base_32", 88_222_696)],
)
def test_mean_pooling_without_class_token_saves_two_rows(name: str, total: int) -> None:
    assert count(name, class_token=False, pool="mean") == total


def test_timm_0_3_2_presets_have_no_qkv_bias() -> None:
    assert count("vit_small_timm032") == 48_754_408
    assert count("vit_huge_timm032") == count("vit_huge", patch_size=16) - 32 * 3 * 1280


def test_large_variants_mlp_ratios_give_their_hidden_widths() -> None:
    for width, hidden in ((1152, 4304), (1408, 6144), (1664, 8192), (1792, 15360)):
        with torch.device("meta"):
            model = build_model("vit", embed_dim=width, num_heads=16, depth=1, mlp_ratio=hidden / width)
        assert model.blocks[0].mlp.fc1.out_features == hidden


# ---- JAX ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("representation", [0, 24])
def test_official_npz_gives_the_official_features_and_logits(expected: dict, representation: int) -> None:
    tag = f"token_rep{representation}"
    model = VisionTransformer(**JAX, num_classes=10, representation_dim=representation or None)
    report = load_weights(model, GOLDEN / f"vit_jax_{tag}.npz")
    assert (report.family, report.head, report.missing, report.unexpected) == ("jax", "kept", (), ())
    seen = {}
    model.blocks[0].register_forward_hook(lambda module, given, out: seen.update(block0=out))
    with torch.no_grad():
        features = model.encode(model.embed(pictures(expected["images_nhwc"])))
        tokens = torch.cat([features.cls[:, None], features.patches], dim=1)
        hidden = model.pre_logits.fc(features.cls) if representation else features.cls
        logits = model(pictures(expected["images_nhwc"]))
    close(seen["block0"], expected[f"{tag}/block0"], 1e-5)
    close(tokens, expected[f"{tag}/encoded"], 1e-5)
    close(hidden, expected[f"{tag}/pre_logits"], 1e-5)
    close(logits, expected[f"{tag}/logits"], 1e-5)
    if representation == 0:
        close(model.classify(tokens).detach(), expected["token_unpooled/logits"], 1e-5)


def test_erf_gelu_is_another_function_than_the_official_one(expected: dict) -> None:
    model = VisionTransformer(**JAX | {"gelu": "erf"}, num_classes=10)
    report = load_weights(model, GOLDEN / "vit_jax_token_rep0.npz")
    with torch.no_grad():
        apart = (model(pictures(expected["images_nhwc"])).numpy() - expected["token_rep0/logits"]).__abs__().max()
    assert 5e-5 < apart < 5e-3
    assert "model.gelu=tanh" in str(report)


@pytest.mark.parametrize("representation", [0, 24])
def test_fine_tuning_start_equals_the_official_load_pretrained(expected: dict, representation: int) -> None:
    options = JAX | {"image_size": 48, "num_classes": 7, "representation_dim": representation or None, "init": "timm"}
    model = VisionTransformer(**options)
    report = load_weights(model, GOLDEN / "vit_jax_token_rep24.npz")
    tag = f"load_pretrained_rep{representation}"
    assert report.head == "fresh"
    assert (report.resized.old_grid, report.resized.new_grid, report.resized.mode) == ((4, 4), (6, 6), "jax")
    assert any(key.startswith("pre_logits") for key in report.unexpected) == (representation == 0)
    close(model.pos_embed.detach(), expected[f"{tag}/pos_embedding"], 1e-5)
    images = pictures(expected["images48_nhwc"])
    with torch.no_grad():
        assert model(images).abs().max() == 0
        model.head.weight.copy_(torch.from_numpy(expected[f"{tag}/probe_head_kernel"].T))
        close(model(images), expected[f"{tag}/probe_logits48"], 1e-5)


def test_todays_flax_numbering_is_read_like_the_published_one(tmp_path: Path) -> None:
    renames = {"LayerNorm_2": "LayerNorm_1", "MlpBlock_3": "MlpBlock_0"}
    renames["MultiHeadDotProductAttention_1"] = "MultiHeadDotProductAttention_0"
    with np.load(GOLDEN / "vit_jax_token_rep0.npz") as arrays:
        renamed = {}
        for key, array in arrays.items():
            for old, new in renames.items():
                key = key.replace(old, new)
            renamed["opt/target/" + key] = array
    np.savez(tmp_path / "new.npz", **renamed)
    models = [VisionTransformer(**JAX, num_classes=10) for _ in range(2)]
    load_weights(models[0], GOLDEN / "vit_jax_token_rep0.npz")
    load_weights(models[1], tmp_path / "new.npz")
    for key, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[key]), key


def test_big_visions_scanned_layout_is_read(tmp_path: Path) -> None:
    with np.load(GOLDEN / "vit_jax_token_rep0.npz") as file:
        arrays = dict(file)
    blocks = [{k.split("/", 2)[2]: v for k, v in arrays.items() if f"encoderblock_{i}/" in k} for i in range(3)]
    out = {f"params/{k}": v for k, v in arrays.items() if "encoderblock" not in k and "posembed" not in k}
    out |= {f"params/Transformer/encoderblock/{k}": np.stack([b[k] for b in blocks]) for k in blocks[0]}
    # There the class token has no position; ours then has a row of zeros.
    table = arrays["Transformer/posembed_input/pos_embedding"]
    out |= {"params/pos_embedding": table[:, 1:], "params/cls": arrays["cls"] + table[:, :1], "opt/0/count": np.ones(1)}
    np.savez(tmp_path / "bv.npz", **out)
    models = [VisionTransformer(**JAX, num_classes=10) for _ in range(2)]
    load_weights(models[0], GOLDEN / "vit_jax_token_rep0.npz")
    load_weights(models[1], tmp_path / "bv.npz")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(models[1](images), models[0](images), rtol=1e-5, atol=1e-5)


# ---- MAE's fine-tuning model ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("group", ["gp0", "gp1"])
def test_mae_fine_tuning_model_is_reproduced_in_float64(group: str) -> None:
    with np.load(GOLDEN / "vit_mae_finetune.npz") as file:
        golden = dict(file)
    pooling = {"pool": "mean", "norm": "after_pool"} if group == "gp1" else {}
    model = VisionTransformer(**SMALL, **pooling)
    keys = {k[3:]: v for k, v in golden.items() if k.startswith("sd/")}
    keys |= {k[7:]: v for k, v in golden.items() if k.startswith(f"{group}/sd/")}
    assert set(keys) == set(model.state_dict())
    model.load_state_dict({k: torch.from_numpy(v) for k, v in keys.items()})
    model.double()
    images = torch.from_numpy(golden["images"]).double()
    features = model.pooled(model.encode(model.embed(images)))
    logits = model(images)
    close(features.detach(), golden[f"{group}/f64/features"], 1e-9)
    close(logits.detach(), golden[f"{group}/f64/logits"], 1e-9)
    loss = F.cross_entropy(logits, torch.from_numpy(golden["labels"]))
    close(loss.detach(), np.asarray(golden[f"{group}/f64/ce_loss"]), 1e-9)
    loss.backward()
    gradients = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    names = [str(name) for name in golden[f"{group}/gradnorm_names"]]
    np.testing.assert_allclose([gradients[name] for name in names], golden[f"{group}/f64/gradnorms"], rtol=1e-9)


def test_drop_path_rates_are_maes() -> None:
    with np.load(GOLDEN / "vit_mae_finetune.npz") as file:
        rates = file["gp1/drop_path_rates"]
    model = VisionTransformer(**SMALL, drop_path=0.1)
    ours = [getattr(block.drop_path2, "drop_prob", 0.0) for block in model.blocks]
    np.testing.assert_allclose(ours, rates, atol=1e-8)


# ---- timm --------------------------------------------------------------------------------------------------------
PAIRS = {  # our options, timm's
    "cls": ({}, {}),
    "mae mean": ({"pool": "mean", "norm": "after_pool"}, {"global_pool": "avg"}),
    "jax gap": (
        {"class_token": False, "pool": "mean"},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ),
    "mean before pool": ({"pool": "mean"}, {"global_pool": "avg", "fc_norm": False}),
    "no qkv bias, eps": (
        {"qkv_bias": False, "norm_eps": 1e-5},
        {"qkv_bias": False, "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    ),
    "layer scale, tanh": ({"layer_scale": 0.1, "gelu": "tanh"}, {"init_values": 0.1, "act_layer": "gelu_tanh"}),
    "rectangles, grey": (
        {"image_size": (32, 48), "patch_size": (4, 8), "in_channels": 1},
        {"img_size": (32, 48), "patch_size": (4, 8), "in_chans": 1},
    ),
    "headless": ({"num_classes": 0}, {"num_classes": 0}),
}


def timm_twin(**options: object) -> nn.Module:
    given = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 10, **options}
    model = timm.models.vision_transformer.VisionTransformer(**given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_logits_equal_timms_with_weights_going_both_ways(case: str, dtype: torch.dtype, tolerance: float) -> None:
    ours_options, timm_options = PAIRS[case]
    theirs = timm_twin(**timm_options).to(dtype)
    ours = VisionTransformer(**SMALL | ours_options).to(dtype).eval()
    height, width = ours.image_size
    images = torch.randn(2, ours.in_channels, height, width, dtype=dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=tolerance, atol=tolerance)
        ours.init_weights()
        theirs.load_state_dict(ours.state_dict(), strict=True)
        torch.testing.assert_close(ours(images), theirs(images), rtol=tolerance, atol=tolerance)


def test_gradients_equal_timms() -> None:
    theirs, ours = timm_twin().double(), VisionTransformer(**SMALL).double()
    ours.load_state_dict(theirs.state_dict())
    images, targets = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 3, 9, 1])
    for model in (ours, theirs):
        F.cross_entropy(model(images), targets).backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)
