"""Every preset of conf/experiment/ is the recipe that it names: figures here are the publications', not the code's."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vitexp.config import RunConfig, build, compose_and_check
from vitexp.config_paths import conf_dir, config_groups
from vitexp.costs import count_parameters
from vitexp.data.sampler import effective_batch_size, micro_batches_per_epoch
from vitexp.horizon import Horizon, plan_horizon
from vitexp.optim import build_optimizer, parameter_groups, resolve_lr

IMAGENET = 1_281_167
INCEPTION = {"area": [0.05, 1.0], "aspect": [0.75, 4 / 3], "flip": 0.5, "interpolation": "bilinear"}
PAD_4_OF_32 = {"padding": 0.125, "flip": 0.5}
VIT_B16 = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "class_token": True, "pool": "cls"}
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "decoupled_weight_decay": True}
SGD = {"momentum": 0.9, "nesterov": False, "dampening": 0}


@dataclass(frozen=True)
class Recipe:
    """What a publication (or, for our own presets, their design) says, on the data set it says it of."""

    # data, and how much of it an update sees
    num_train: int
    num_classes: int
    batch: tuple[int, int]  # pictures of a forward, forwards of an update
    steps: int  # updates of the whole run
    # learning rate
    peak: float
    shape: str  # of the decay: linear | cosine
    warmup: int  # updates
    start: float = 0.0
    end: float = 0.0
    pins: dict[int, float] = field(default_factory=dict)  # update: rate, worked out by hand
    # optimizer
    optimizer: str = "Adam"
    settings: dict[str, Any] = field(default_factory=lambda: ADAM)
    weight_decay: float = 0.0
    decayed: int = 0  # numbers that weight decay acts on: the kernels, or none
    clip: float | None = 1.0
    # model
    model: dict[str, Any] = field(default_factory=lambda: VIT_B16)
    image_size: int = 224
    parameters: int = 0
    stage: str = "pretrain"
    # pictures
    crop: dict[str, Any] = field(default_factory=lambda: INCEPTION)
    crop_fraction: float = 0.875
    rand_augment: tuple[int, int] | None = None  # operations, magnitude
    mixup: float | None = None
    label_smoothing: float = 0.0
    data: tuple[str, ...] = ("data=parquet", "data.train={file}")


# A block of B/16 has 4 x 768^2 + 2 x 768 x 3072 = 7,077,888 numbers in its kernels, the patch embedding 3 x 16^2 x 768
# = 589,824, the hidden layer of the head 768^2 = 589,824 and 768 biases. Warm-up of table 3: 10,000 updates.
RECIPES = {
    # arXiv:2010.11929 table 3. JFT: 303 M pictures; floor(303e6 / 64) = 4,734,375 forwards, 73,975 updates an epoch.
    "vit_pretrain": Recipe(
        num_train=303_000_000,
        num_classes=1000,
        batch=(64, 64),
        steps=7 * 73_975,
        peak=8e-4,
        shape="linear",
        warmup=10_000,
        end=1e-5,
        pins={0: 0.0, 5000: 4e-4, 10_000: 8e-4, 517_824: 1.000156e-5},
        weight_decay=0.1,
        decayed=589_824 + 12 * 7_077_888 + 589_824 + 768_000,
        model=VIT_B16 | {"representation_dim": 768, "gelu": "tanh", "dropout": 0.0},
        parameters=86_567_656 + 590_592,
    ),
    # 14,197,122 pictures of 21,843 classes: 221,830 forwards, 3,467 updates an epoch.
    "vit_imagenet21k": Recipe(
        num_train=14_197_122,
        num_classes=21_843,
        batch=(64, 64),
        steps=90 * 3467,
        peak=1e-3,
        shape="linear",
        warmup=10_000,
        end=1e-5,
        pins={1: 1e-7, 10_000: 1e-3, 161_015: 5.05e-4},
        weight_decay=0.03,
        decayed=102_889_728,
        model=VIT_B16 | {"representation_dim": 768, "gelu": "tanh", "dropout": 0.1, "attention_dropout": 0.0},
        parameters=103_186_515,
    ),
    # 20,018 forwards, 313 updates an epoch.
    "vit_imagenet": Recipe(
        num_train=IMAGENET,
        num_classes=1000,
        batch=(64, 64),
        steps=300 * 313,
        peak=3e-3,
        shape="cosine",
        warmup=10_000,
        pins={0: 0.0, 2500: 7.5e-4, 10_000: 3e-3, 30_975: 2.5606602e-3, 51_950: 1.5e-3},
        weight_decay=0.3,
        decayed=86_882_304,
        model=VIT_B16 | {"representation_dim": 768, "gelu": "tanh", "dropout": 0.1, "attention_dropout": 0.0},
        parameters=86_567_656 + 590_592,
    ),
    # Table 4 and google-research/vision_transformer configs/common.py; no weight decay at all.
    "vit_finetune_imagenet": Recipe(
        num_train=IMAGENET,
        num_classes=1000,
        batch=(64, 8),
        steps=20_000,
        peak=0.03,
        shape="cosine",
        warmup=500,
        pins={0: 0.0, 250: 0.015, 500: 0.03, 5375: 0.025606602, 10_250: 0.015},
        optimizer="SGD",
        settings=SGD,
        model=VIT_B16 | {"representation_dim": None, "gelu": "tanh", "dropout": 0.0},
        image_size=384,
        parameters=86_859_496,
        stage="finetune",
        crop_fraction=1.0,
    ),
    "vit_finetune_cifar10": Recipe(
        num_train=50_000,
        num_classes=10,
        batch=(64, 8),
        steps=10_000,
        peak=0.01,
        shape="cosine",
        warmup=500,
        pins={0: 0.0, 50: 0.001, 500: 0.01, 5250: 0.005},
        optimizer="SGD",
        settings=SGD,
        model=VIT_B16 | {"representation_dim": None, "gelu": "tanh", "dropout": 0.0},
        image_size=384,
        parameters=86_859_496 - 990 * 769,
        stage="finetune",
        crop_fraction=1.0,
    ),
    "vit_finetune_cifar100": Recipe(
        num_train=50_000,
        num_classes=100,
        batch=(64, 8),
        steps=10_000,
        peak=0.03,
        shape="cosine",
        warmup=500,
        pins={0: 0.0, 50: 0.003, 500: 0.03, 5250: 0.015},
        optimizer="SGD",
        settings=SGD,
        model=VIT_B16 | {"representation_dim": None, "gelu": "tanh", "dropout": 0.0},
        image_size=384,
        parameters=86_859_496 - 900 * 769,
        stage="finetune",
        crop_fraction=1.0,
    ),
    # arXiv:2205.01580, learned positions; 99 % of ImageNet: 9,909 forwards, 1,239 updates an epoch. 22,122,472
    # parameters with fixed positions, and 196 x 384 for learned ones.
    "vit_s16_better": Recipe(
        num_train=1_268_355,
        num_classes=1000,
        batch=(128, 8),
        steps=90 * 1239,
        peak=1e-3,
        shape="cosine",
        warmup=10_000,
        pins={0: 0.0, 1000: 1e-4, 10_000: 1e-3, 60_755: 5e-4},
        optimizer="AdamW",
        weight_decay=0.1,
        decayed=294_912 + 12 * 1_769_472 + 147_456 + 384_000,
        model={"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, "class_token": False, "pool": "mean"}
        | {"representation_dim": 384, "norm": "before_pool", "gelu": "tanh", "dropout": 0.0, "drop_path": 0.0},
        parameters=22_122_472 + 196 * 384,
        rand_augment=(2, 10),
        mixup=0.2,
    ),
    # A thousand pictures of six classes: 31 updates an epoch, of which 20 x 31 warm up.
    "small_transfer": Recipe(
        num_train=1000,
        num_classes=6,
        batch=(32, 1),
        steps=50 * 31,
        peak=5e-4,
        shape="cosine",
        warmup=620,
        start=1e-6,
        end=1e-6,
        pins={0: 1e-6, 310: 2.505e-4, 620: 5e-4, 1085: 2.505e-4, 1549: 1.001424e-6},
        optimizer="SGD",
        settings=SGD,
        model=VIT_B16 | {"gelu": "tanh", "dropout": 0.0},
        parameters=86_567_656 - 994 * 769,
        stage="finetune",
        crop_fraction=1.0,
    ),
    # Our own: 781 updates an epoch.
    "cifar10_vit": Recipe(
        num_train=50_000,
        num_classes=10,
        batch=(64, 1),
        steps=20 * 781,
        peak=1e-3,
        shape="cosine",
        warmup=2 * 781,
        pins={0: 0.0, 781: 5e-4, 1562: 1e-3, 8591: 5e-4},
        optimizer="AdamW",
        weight_decay=0.05,
        decayed=9216 + 6 * 442_368 + 1920,
        model={"patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3, "class_token": False, "pool": "mean"},
        image_size=32,
        parameters=2_693_194,
        crop=PAD_4_OF_32,
        crop_fraction=1.0,
        label_smoothing=0.1,
        data=(),
    ),
    "cifar10_resnet18": Recipe(
        num_train=50_000,
        num_classes=10,
        batch=(64, 1),
        steps=12 * 781,
        peak=1e-3,
        shape="cosine",
        warmup=2 * 781,
        pins={781: 5e-4, 1562: 1e-3, 5467: 5e-4},
        optimizer="AdamW",
        weight_decay=0.05,
        decayed=11_181_642 - 2 * 4800 - 10,  # all but the 4,800 batch-norm channels and the classifier's biases
        model={"name": "resnet18", "pretrained": False},
        image_size=64,
        parameters=11_181_642,
        crop=PAD_4_OF_32,
        crop_fraction=1.0,
        label_smoothing=0.1,
        data=(),
    ),
    "digits": Recipe(
        num_train=1438,
        num_classes=10,
        batch=(64, 1),
        steps=60 * 22,
        peak=1e-3,
        shape="cosine",
        warmup=6 * 22,
        pins={0: 0.0, 66: 5e-4, 132: 1e-3, 726: 5e-4},
        optimizer="AdamW",
        weight_decay=0.05,
        decayed=6144 + 4 * 196_608 + 1280,
        model={"patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4},
        image_size=32,
        parameters=809_354,
        crop=PAD_4_OF_32 | {"flip": 0.0},
        crop_fraction=1.0,
        data=(),
    ),
    "digits_resnet18": Recipe(
        num_train=1438,
        num_classes=10,
        batch=(64, 1),
        steps=20 * 22,
        peak=1e-3,
        shape="cosine",
        warmup=2 * 22,
        pins={22: 5e-4, 44: 1e-3, 242: 5e-4},
        optimizer="AdamW",
        weight_decay=0.05,
        decayed=11_181_642 - 2 * 4800 - 10,
        model={"name": "resnet18", "pretrained": False},
        image_size=32,
        parameters=11_181_642,
        crop=PAD_4_OF_32 | {"flip": 0.0},
        crop_fraction=1.0,
        data=(),
    ),
}
each_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture
def config(name: str, tmp_path: Path) -> RunConfig:
    """The preset with data of the recipe's kind; nothing of it is read."""
    file = tmp_path / "file.safetensors"
    file.write_bytes(b"")
    recipe = RECIPES[name]
    init = [f"init_from={file}"] if recipe.stage == "finetune" else []
    return compose_and_check([f"experiment={name}", *init, *(text.format(file=file) for text in recipe.data)])


def _horizon(config: RunConfig, num_train: int) -> Horizon:
    train = config.train
    forwards = micro_batches_per_epoch(num_train, train.batch_size, config.runtime.processes)
    return plan_horizon(forwards, accumulate=train.accumulate, epochs=train.epochs, max_steps=train.max_steps)


def _peak(config: RunConfig, num_train: int) -> float:
    size = effective_batch_size(num_train, config.train.batch_size, config.runtime.processes)
    rates = {key: config.optim[key] for key in ("lr", "base_lr", "reference_batch")}
    return resolve_lr(**rates, global_batch=size * config.runtime.processes * config.train.accumulate)


def _published_lr(recipe: Recipe, step: int) -> float:
    """From the formulas of google-research/vision_transformer's utils.py, with a start and an end for the others."""
    if step < recipe.warmup:
        return recipe.start + (recipe.peak - recipe.start) * step / recipe.warmup
    t = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    left = 1 - t if recipe.shape == "linear" else (1 + math.cos(math.pi * t)) / 2
    return recipe.end + (recipe.peak - recipe.end) * left


def test_every_preset_has_its_figures_here() -> None:
    assert sorted(RECIPES) == sorted(config_groups()["experiment"])


@each_recipe
def test_batch_clip_and_length_are_the_recipes(name: str, config: RunConfig) -> None:
    recipe, horizon = RECIPES[name], _horizon(config, RECIPES[name].num_train)
    assert (config.train.batch_size, config.train.accumulate) == recipe.batch
    assert config.runtime.processes == 1
    assert config.train.clip_norm == recipe.clip
    assert horizon.num_updates == horizon.total_steps == recipe.steps
    assert config.stage.name == recipe.stage
    assert config.stage.head == ("fresh" if recipe.stage == "finetune" else "auto")


@each_recipe
def test_the_learning_rate_follows_the_recipes_curve(name: str, config: RunConfig) -> None:
    recipe = RECIPES[name]
    horizon, peak, schedule = (
        _horizon(config, recipe.num_train),
        _peak(config, recipe.num_train),
        build(config.schedule),
    )
    assert peak == pytest.approx(recipe.peak)
    for step, rate in recipe.pins.items():
        assert schedule(horizon.progress(step), lr=peak) == pytest.approx(rate, rel=1e-5, abs=1e-15), step
    around_the_top = [recipe.warmup - 1, recipe.warmup, recipe.warmup + 1, recipe.steps - 1]
    for step in [*range(0, recipe.steps, max(recipe.steps // 97, 1)), *around_the_top]:
        got = schedule(horizon.progress(step), lr=peak)
        assert got == pytest.approx(_published_lr(recipe, step), rel=1e-6, abs=1e-12), step


@each_recipe
def test_the_model_has_the_published_size_and_shape(name: str, config: RunConfig) -> None:
    recipe = RECIPES[name]
    assert {key: config.model[key] for key in recipe.model} == recipe.model
    assert config.model["image_size"] == recipe.image_size
    assert count_parameters(_method(config, recipe)) == recipe.parameters


@each_recipe
def test_weight_decay_acts_on_kernels_alone_and_every_layer_learns_at_one_rate(name: str, config: RunConfig) -> None:
    recipe = RECIPES[name]
    rules = {key: config.optim[key] for key in ("weight_decay", "layer_decay", "no_decay")}
    method = _method(config, recipe)
    groups = parameter_groups(method, **rules)
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    kernels = {name for name, p in method.named_parameters() if name.endswith(".weight") and p.ndim > 1}
    assert decayed == (kernels if recipe.weight_decay else set())
    assert {group["weight_decay"] for group in groups} == {recipe.weight_decay, 0.0}
    assert {group["lr_scale"] for group in groups} == {1.0}
    assert sum(p.numel() for group in groups if group["weight_decay"] for p in group["params"]) == recipe.decayed
    assert sum(len(group["names"]) for group in groups) == len(list(method.parameters()))


@each_recipe
def test_the_optimizer_and_its_settings_are_the_recipes(name: str, config: RunConfig) -> None:
    recipe = RECIPES[name]
    optimizer = build_optimizer(
        build(config.optim["optimizer"]), nn.Linear(2, 2), lr=recipe.peak, weight_decay=recipe.weight_decay
    )
    assert type(optimizer).__name__ == recipe.optimizer
    kept = {key: optimizer.defaults[key] for key in recipe.settings}
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in kept.items()} == recipe.settings


@each_recipe
def test_pictures_are_changed_as_the_recipe_says(name: str, config: RunConfig) -> None:
    recipe = RECIPES[name]
    train, evaluated = build(config.augment["train"]), build(config.augment["eval"])
    crop = getattr(train, "crop", train)
    found = {key: getattr(crop, key) for key in recipe.crop if key != "interpolation"}
    if "interpolation" in recipe.crop:
        assert (crop.resized["interpolation"], evaluated.resized["interpolation"]) == ("bilinear", "bilinear")
    assert type(crop).__name__ == ("ResizedCropFlip" if "area" in recipe.crop else "PadCropFlip")
    for key, value in found.items():
        assert list(_listed(value)) == pytest.approx(list(_listed(recipe.crop[key]))), key
    assert tuple(crop.size) == tuple(evaluated.size) == (recipe.image_size, recipe.image_size)
    assert evaluated.crop_fraction == recipe.crop_fraction
    smoothing = config.method["label_smoothing"]
    assert smoothing == recipe.label_smoothing
    mix = None if config.augment["batch"] is None else build(config.augment["batch"])
    if recipe.mixup is None:
        assert mix is None
    else:
        assert (type(mix).__name__, mix.alpha, mix.label_smoothing) == ("RolledMixup", recipe.mixup, 0.0)
    if recipe.rand_augment is None:
        assert crop is train  # no steps after the crop
    else:
        (step,) = train.steps
        *operations, cut_out = step.operations
        assert (step.num_ops, len(step.operations)) == (recipe.rand_augment[0], 16)
        assert {(operation.magnitude, operation.prob) for operation in operations} == {(recipe.rand_augment[1], 1.0)}
        assert cut_out.keywords["reach"] * 224 == pytest.approx(40)
        (shift,) = {operation.hparams["translate_pct"] for operation in operations}
        assert shift * 224 == pytest.approx(100)


@pytest.mark.parametrize("name", config_groups()["experiment"])
def test_the_header_and_the_table_say_what_to_expect(name: str, repository: Path) -> None:
    header = [line for line in (conf_dir() / f"experiment/{name}.yaml").read_text().splitlines() if line[:1] == "#"]
    text = "\n".join(header)
    assert f"python -m vitexp experiment={name}" in text
    for word in ("Expected: ", "Time: ", "Source: "):
        assert word in text, word
    rows = [
        line for line in (repository / "docs/recipes.md").read_text().splitlines() if line.startswith(f"| `{name}`")
    ]
    assert len(rows) == 1
    figures = re.findall(r"\b\d\d\.\d\d?\b", text.partition("Expected: ")[2].partition("Time: ")[0])
    assert all(figure in rows[0] for figure in figures), figures


def _method(config: RunConfig, recipe: Recipe) -> nn.Module:
    with torch.device("meta"):
        return build(config.method, backbone=build({**config.model, "num_classes": recipe.num_classes}))


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]
