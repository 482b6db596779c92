"""What each form of an export computes once it is opened again, and what no form may make fit."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vitexp.errors import UserError
from vitexp.export import export_model
from vitexp.export_formats import FORMATS, is_installed, largest_difference
from vitexp.models.deit import DeiT
from vitexp.models.lvvit import LVViT
from vitexp.models.t2t import T2TViT
from vitexp.models.t2t_dense import DenseT2TViT
from vitexp.models.t2t_variants import GhostT2TViT, SqueezeExciteT2TViT
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.vit import VisionTransformer
from vitexp.trained import TrainedRun, load_run

CLASSES = ["cat", "dog", "bird", "fish", "cow"]
SIZE = {"image_size": [24, 32], "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
T2T = {"image_size": [32, 48], "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5}
DENSE = {key: T2T[key] for key in ("image_size", "num_heads", "num_classes")}
DENSE |= {"stem_dim": 24, "depths": [1, 1], "growth": 12}
MODELS = {
    "vit": (VisionTransformer, SIZE),
    "vit_tanh": (VisionTransformer, SIZE | {"gelu": "tanh", "mlp_ratio": 2.5, "qkv_bias": False, "in_channels": 1}),
    "vit_mean": (VisionTransformer, SIZE | {"pool": "mean"}),
    "vit_mae": (VisionTransformer, SIZE | {"pool": "mean", "norm": "after_pool", "position_embedding": "sincos"}),
    "vit_fc_norm": (VisionTransformer, SIZE | {"norm": "after_pool", "layer_scale": 0.5}),
    "vit_probe": (VisionTransformer, SIZE | {"head_norm": "batch"}),
    "vit_big_vision": (
        VisionTransformer,
        SIZE | {"class_token": False, "pool": "mean", "position_embedding": "sincos_big_vision"},
    ),
    "vit_features": (VisionTransformer, SIZE | {"num_classes": 0}),
    "deit": (DeiT, SIZE),
    "deit_distilled": (DeiT, SIZE | {"distilled": True}),
    "deit3": (DeiT, SIZE | {"class_position": False, "layer_scale": 1e-4}),
    "lvvit": (LVViT, SIZE | {"stem_channels": 8}),
    "t2t": (T2TViT, T2T),
    "t2t_se": (SqueezeExciteT2TViT, T2T),
    "t2t_ghost": (GhostT2TViT, T2T),
    "t2t_dense": (DenseT2TViT, DENSE),
    "resnet": (TimmBackbone, {"name": "test_resnet", "image_size": [24, 32], "num_classes": 5}),
    "timm_vit": (TimmBackbone, {"name": "test_vit", "image_size": [32, 48], "num_classes": 5, "in_channels": 1}),
}
TIMM = [name for name in MODELS if not name.startswith(("lvvit", "t2t"))]
HF = ["vit", "vit_tanh", "vit_probe", "deit", "deit_distilled"]


def trained(kind: str, folder: Path, **changed) -> TrainedRun:
    """A run's export with weights that all matter, none of them zero or one as a fresh model's are."""
    cls, arguments = MODELS[kind]
    arguments = arguments | changed
    model = cls(**arguments)
    generator = torch.Generator().manual_seed(len(kind))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.4 + (0.3 if tensor.ndim == 1 else -0.2))
    channels = arguments.get("in_channels", 3)
    export_model(
        folder,
        model.state_dict(),
        architecture={"_target_": f"{cls.__module__}.{cls.__qualname__}", **arguments},
        classes=CLASSES[: arguments["num_classes"]],
        preprocessing={
            "image_size": arguments["image_size"], "mean": [0.4] * channels, "std": [0.2] * channels,
            "channels": channels, "crop_fraction": 0.875, "interpolation": "bicubic", "resizer": "torch",
        },
        metrics={"val/top1": 0.5, "val/loss": float("nan")},
        stage="finetune",
    )  # fmt: skip
    return load_run(folder)


def written(name: str, run: TrainedRun, folder: Path) -> Path:
    folder.mkdir()
    FORMATS[name].write(run, folder)
    assert {path.name for path in folder.iterdir()} <= set(FORMATS[name].files)
    return folder


def compared(name: str, run: TrainedRun, folder: Path) -> None:
    if not all(is_installed(package) for package in (*FORMATS[name].needs, *FORMATS[name].reads_with)):
        pytest.skip(f"the extra of {name} is not installed")
    difference, largest = largest_difference(run, FORMATS[name].reopen(written(name, run, folder)))
    assert largest > 0.05
    assert difference < 2e-5 * largest


@pytest.mark.parametrize("kind", MODELS)
def test_what_vitexp_exports_it_reads_as_it_was(tmp_path, kind):
    run = trained(kind, tmp_path / "run")
    again = load_run(written("safetensors", run, tmp_path / "out"))
    assert again.metrics == run.metrics == {"val/top1": 0.5, "val/loss": None}
    assert (again.classes, again.preprocessing, again.architecture) == (
        run.classes,
        run.preprocessing,
        run.architecture,
    )
    assert largest_difference(run, again.model)[0] == 0


@pytest.mark.parametrize("kind", TIMM)
def test_timm_computes_the_same_logits(tmp_path, kind):
    compared("timm", trained(kind, tmp_path / "run"), tmp_path / "out")


@pytest.mark.parametrize("kind", HF)
def test_transformers_computes_the_same_logits(tmp_path, kind):
    compared("hf", trained(kind, tmp_path / "run"), tmp_path / "out")


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS if kind.startswith(("lvvit", "t2t"))]
SLOW += [pytest.param(kind, marks=pytest.mark.slow) for kind in ("deit_distilled", "resnet")]


@pytest.mark.parametrize("kind", ["vit", *SLOW])
def test_a_torch_graph_takes_any_number_of_pictures_and_knows_its_classes(tmp_path, kind):
    run = trained(kind, tmp_path / "run")
    compared("torch_export", run, tmp_path / "out")
    any_number_of_pictures(run, FORMATS["torch_export"].reopen(tmp_path / "out"))
    inside = {"model.json": ""}
    torch.export.load(tmp_path / "out" / "model.pt2", extra_files=inside)
    assert json.loads(inside["model.json"]) == {"classes": CLASSES, "preprocessing": run.preprocessing}


@pytest.mark.parametrize("kind", ["vit", *SLOW])
def test_an_onnx_graph_takes_any_number_of_pictures_and_knows_its_classes(tmp_path, kind):
    run = trained(kind, tmp_path / "run")
    compared("onnx", run, tmp_path / "out")
    any_number_of_pictures(run, FORMATS["onnx"].reopen(tmp_path / "out"))
    session = importlib.import_module("onnxruntime").InferenceSession(tmp_path / "out" / "model.onnx")
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["classes"]) == CLASSES
    assert json.loads(known["preprocessing"]) == run.preprocessing


@torch.inference_mode()
def any_number_of_pictures(run: TrainedRun, reopened) -> None:
    for count in (1, 2, 7):
        images = torch.randn(count, 3, *run.preprocessing["image_size"])
        torch.testing.assert_close(reopened(images), run.model(images), rtol=1e-4, atol=1e-4)


def test_timm_prepares_a_picture_as_the_run_does(tmp_path):
    from timm.data import resolve_model_data_config

    run = trained("vit", tmp_path / "run")
    asked = resolve_model_data_config(FORMATS["timm"].reopen(written("timm", run, tmp_path / "out")))
    assert asked["input_size"] == (3, 24, 32)
    assert (list(asked["mean"]), list(asked["std"])) == ([0.4] * 3, [0.2] * 3)
    assert (asked["crop_pct"], asked["crop_mode"], asked["interpolation"]) == (0.875, "center", "bicubic")


def test_transformers_knows_the_classes_and_prepares_a_picture_as_the_run_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    import numpy as np
    from PIL import Image

    run = trained("vit", tmp_path / "run", image_size=[32, 32])
    folder = written("hf", run, tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert [config.id2label[number] for number in range(5)] == CLASSES
    smooth = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    processor = transformers.BitImageProcessor.from_pretrained(folder)
    theirs = processor(Image.fromarray(smooth), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(theirs, run.transform(smooth), rtol=0, atol=1.01 / 255 / 0.2)  # rounding of one step


@pytest.mark.parametrize(
    ("name", "kind", "changed", "words"),
    [
        ("timm", "lvvit", {}, "timm has no LVViT"),
        ("timm", "t2t", {}, "timm has no T2TViT"),
        ("timm", "t2t_dense", {}, "timm has no DenseT2TViT"),
        ("timm", "vit", {"norm_eps": 1e-5}, "norm_eps"),
        ("timm", "vit", {"attention_scale": 0.1}, "attention_scale"),
        ("timm", "vit", {"representation_dim": 8}, "representation_dim"),
        ("timm", "deit_distilled", {"class_position": False}, "class_position"),
        ("timm", "deit", {"stem": "hmlp"}, "stem=hmlp"),
        ("hf", "deit", {"stem": "hmlp"}, "stem=hmlp"),
        ("hf", "lvvit", {}, "LVViT"),
        ("hf", "resnet", {}, "TimmBackbone"),
        ("hf", "vit_mean", {}, "pool=mean"),
        ("hf", "vit_fc_norm", {}, "norm=after_pool"),
        ("hf", "deit3", {}, "layer_scale"),
        ("hf", "vit", {"attention_scale": 0.1}, "attention_scale"),
        ("hf", "vit", {"representation_dim": 8}, "representation_dim"),
        ("hf", "vit_features", {}, "no classifier"),
        ("hf", "deit", {"class_position": False}, "no position"),
    ],
)
def test_what_a_form_cannot_say_is_refused_with_those_that_can(tmp_path, name, kind, changed, words):
    run = trained(kind, tmp_path / "run", **changed)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=words) as refused:
        FORMATS[name].write(run, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    lines = str(refused.value).splitlines()
    assert len(lines) == 2
    for other in lines[1].partition(": ")[2].split(", "):
        if other in ("timm", "safetensors"):  # the graphs are of any model: tested above
            written(other, run, tmp_path / other)


def test_a_difference_is_seen(tmp_path):
    run = trained("vit", tmp_path / "run")
    other = load_run(tmp_path / "run").model
    nn.init.zeros_(other.blocks[1].mlp.fc2.bias)
    assert largest_difference(run, other)[0] > 1e-3
    assert largest_difference(run, lambda images: torch.zeros(len(images), 4))[0] == float("inf")
