"""Every preset of conf/experiment/ is the recipe that it names: figures here are the publications', not the code's."""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.data.made_up_store import made_up_store
from vitexp.commands.plan import plan
from vitexp.config import RunConfig, build, compose_and_check
from vitexp.config_paths import conf_dir, config_groups
from vitexp.costs import count_parameters
from vitexp.data.augmentations import AugmentedWhole
from vitexp.data.sampler import effective_batch_size, micro_batches_per_epoch
from vitexp.horizon import Horizon, plan_horizon
from vitexp.models.freeze import freeze
from vitexp.optim import build_optimizer, parameter_groups, resolve_lr
from vitexp.run import build_method, open_source

IMAGENET = 1_281_167
INCEPTION = {"area": [0.05, 1.0], "aspect": [0.75, 1.33], "draw": "tensorflow", "flip": 0.5}
INCEPTION |= {"interpolation": "bilinear"}
PAD_4_OF_32 = {"padding": 0.125, "flip": 0.5}
VIT_B16 = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "class_token": True, "pool": "cls"}
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "decoupled_weight_decay": True}
ADAM_MAE = ADAM | {"betas": (0.9, 0.95)}
SGD = {"momentum": 0.9, "nesterov": False, "dampening": 0}
LAMB = {"betas": (0.9, 0.999), "eps": 1e-8, "max_grad_norm": None, "always_adapt": False}
VIT_L16 = VIT_B16 | {"embed_dim": 1024, "depth": 24, "num_heads": 16}
VIT_H14 = VIT_B16 | {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}
MAE_ENCODER = {"position_embedding": "sincos", "init": "mae", "norm": "before_pool", "qkv_bias": True, "drop_path": 0.0}
MAE_TUNED = {"pool": "mean", "norm": "after_pool", "position_embedding": "learned", "head_norm": "none"}
LVVIT = {"patch_size": 16, "mlp_ratio": 3.0, "qkv_bias": False, "norm_eps": 1e-5, "dropout": 0.0, "token_head": True}
LVVIT_S = LVVIT | {"embed_dim": 384, "depth": 16, "num_heads": 6, "stem_channels": 64, "residual_scale": 2.0}
LVVIT_M = LVVIT_S | {"embed_dim": 512, "depth": 20, "num_heads": 8}
DEIT_TI = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0, "qkv_bias": True} | {
    "norm_eps": 1e-6,
    "distilled": False,
    "class_position": True,
    "layer_scale": None,
    "dropout": 0.0,
    "drop_path_growth": "linear",
}
DEIT_S = DEIT_TI | {"embed_dim": 384, "num_heads": 6}
DEIT_B = DEIT_TI | {"embed_dim": 768, "num_heads": 12}
DEIT3_S = DEIT_S | {"class_position": False, "layer_scale": 1e-4, "drop_path_growth": "constant"}
DEIT3_B = DEIT3_S | {"embed_dim": 768, "num_heads": 12}
DEIT3_L = DEIT3_S | {"embed_dim": 1024, "depth": 24, "num_heads": 16}
DEIT3_H = DEIT3_S | {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}
T2T_14 = {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0, "token_module": "performer"} | {
    "token_dim": 64,
    "norm_eps": 1e-5,
    "qkv_bias": False,
    "dropout": 0.0,
    "drop_path": 0.1,
    "performer_dropout": 0.1,
}
T2T_7 = T2T_14 | {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0}
T2T_19 = T2T_14 | {"embed_dim": 448, "depth": 19, "num_heads": 7}
T2T_24 = T2T_14 | {"embed_dim": 512, "depth": 24, "num_heads": 8}
# Its flip stands before the steps, and those before the crop.
LVVIT_CROP = {"area": [0.08, 1.0], "aspect": [0.75, 4 / 3], "flip": 0.0, "retry": True, "interpolation": "random"}
MAE_CROP = {"area": [0.08, 1.0], "aspect": [0.75, 4 / 3], "flip": 0.5, "retry": True, "interpolation": "bicubic"}
T2T_CROP = MAE_CROP | {"interpolation": "random"}
SIMPLE_CROP = {"padding": 4}
IMAGENET_STATISTICS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
DEITS = (5, 0, 1)  # epochs of warm-up, of cooldown, and by which the rate is late
LVVITS, T2TS = (5, 10, 0), (10, 10, 0)
GOLDEN = Path(__file__).parent / "golden"


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
    in_epochs: tuple[int, int] | None = None  # warm-up and length, where the curve follows epochs and not updates
    by_epoch: tuple[int, int, int] | None = None  # timm's, one value an epoch: warm-up, cooldown, delay
    epochs: int = 310  # of the last
    # optimizer
    optimizer: str = "Adam"
    settings: dict[str, Any] = field(default_factory=lambda: ADAM)
    weight_decay: float = 0.0
    decayed: int = 0  # numbers that weight decay acts on: the kernels, or none
    decayed_tokens: tuple[str, ...] = ()  # and these
    decays_all: bool = False  # biases and norms, too
    layer_decay: float = 1.0
    clip: float | None = 1.0
    ema: float | None = None
    # model
    model: dict[str, Any] = field(default_factory=lambda: VIT_B16)
    image_size: int = 224
    parameters: int = 0
    stage: str = "pretrain"
    head: str | None = None  # as its stage has it: auto for pretrain, else fresh
    head_init: str = "zero"
    train_blocks: int | str = "all"
    # pictures
    crop: dict[str, Any] = field(default_factory=lambda: INCEPTION)
    crop_fraction: float = 0.875
    rand_augment: tuple[int, int] | None = None  # operations, magnitude
    mixup: float | None = None
    policy: str | None = None  # timm's RandAugment
    mixed: tuple[float, float, float, float] | None = None  # erasing, mixup, cutmix, smoothing within the mixing
    erased_last: bool = False  # after mixing
    three_augment: bool = False  # one of three operations, then colour jitter
    statistics: tuple[list[float], list[float]] | None = None  # mean and deviation the pictures are normalised by
    repeats: int = 1  # views of each picture
    label_smoothing: float = 0.0
    method: dict[str, Any] = field(default_factory=dict)
    data: tuple[str, ...] = ("data=parquet", "data.train={file}")


def _mae_pretrain(model: dict[str, Any], parameters: int, decayed: int) -> Recipe:
    return Recipe(
        num_train=IMAGENET,
        num_classes=1000,
        batch=(64, 64),
        steps=800 * 313,
        peak=2.4e-3,
        shape="cosine",
        warmup=40 * 313,
        in_epochs=(40, 800),
        pins={0: 0.0, 10 * 313: 6e-4, 40 * 313: 2.4e-3, 420 * 313: 1.2e-3},
        optimizer="AdamW",
        settings=ADAM_MAE,
        weight_decay=0.05,
        decayed=decayed + 512 + 8 * 12 * 512**2,
        decayed_tokens=("cls_token", "mask_token"),
        clip=None,
        model=model | MAE_ENCODER,
        parameters=parameters,
        crop=MAE_CROP | {"area": [0.2, 1.0]},
        statistics=IMAGENET_STATISTICS,
    )


def _mae_finetune(
    model: dict[str, Any],
    parameters: int,
    decayed: int,
    *,
    peak: float,
    epochs: int,
    layer_decay: float = 0.75,
    forwards: int = 32,
    train_blocks: int | str = "all",
    mixed: tuple[float, float, float, float] = (0.25, 0.8, 1.0, 0.1),
    pins: dict[int, float] | None = None,
) -> Recipe:
    updates = math.ceil(40_036 / forwards)  # an epoch's
    return Recipe(
        num_train=IMAGENET,
        num_classes=1000,
        batch=(32, forwards),
        steps=epochs * updates,
        peak=peak,
        shape="cosine",
        warmup=5 * updates,
        end=1e-6,
        in_epochs=(5, epochs),
        pins=pins or {0: 0.0, 1252: 8e-4, 6260: 4e-3, 14 * 1252: 1e-6 + 3.999e-3 * 0.9045085},
        optimizer="AdamW",
        weight_decay=0.05,
        decayed=decayed,
        layer_decay=layer_decay,
        clip=None,
        model=model | MAE_TUNED,
        parameters=parameters,
        stage="finetune",
        head_init="mae_finetune",
        train_blocks=train_blocks,
        crop=MAE_CROP,
        policy="rand-m9-mstd0.5-inc1",
        mixed=mixed,
        statistics=IMAGENET_STATISTICS,
    )


def _lvvit(
    model: dict[str, Any],
    parameters: int,
    decayed: int,
    *,
    peak: float = 1.6e-3,
    forwards: tuple[int, int] = (128, 8),
    pins: dict[int, float] | None = None,
    **further: Any,
) -> Recipe:
    """zihangJiang/TokenLabeling main.py and README.md; decayed: kernels of the blocks and heads."""
    stem = model["stem_channels"]
    first, rest = 3 * stem * 49 + 2 * stem**2 * 9, stem * 64 * model["embed_dim"]
    settings: dict[str, Any] = {
        "num_train": IMAGENET,
        "num_classes": 1000,
        "shape": "cosine",
        "by_epoch": LVVITS,
        "steps": 310 * math.ceil(IMAGENET // forwards[0] / forwards[1]),
        "warmup": 5 * math.ceil(IMAGENET // forwards[0] / forwards[1]),
        "start": 1e-6,
        "end": 1e-5,
        "weight_decay": 0.05,
        "method": {"labels": "tokens", "cls_weight": 1.0, "token_weight": 1.0, "mix_tokens": True}
        | {"ground_truth_mixing": False, "official_axes": False},
        "ema": 0.99992,
        "crop_fraction": 0.9,
        "policy": "rand-m9-mstd0.5-inc1",
        "mixed": (0.25, 0.0, 0.0, 0.0),
        "erased_last": True,
        "data": ("data=parquet", "data.train={file}", "train.token_labels=store"),
    }
    return Recipe(
        batch=forwards,
        peak=peak,
        pins=pins or {0: 1e-6, 1251: 1e-6, 1252: 3.208e-4, 5 * 1252: 1.59891e-3, 150 * 1252: 8.05e-4, 300 * 1252: 1e-5},
        optimizer="AdamW",
        decayed=first + rest + decayed,
        clip=None,
        model=model,
        parameters=parameters,
        crop=LVVIT_CROP,
        statistics=IMAGENET_STATISTICS,
        label_smoothing=0.1,
        **settings | further,
    )


def _deit(
    model: dict[str, Any], parameters: int, decayed: int, *, forwards: tuple[int, int] = (256, 4), **further: Any
) -> Recipe:
    """facebookresearch/deit main.py: 5e-4 x 1024 / 512. The sampler's 1,281,024 views are 1251 updates of 1024."""
    settings: dict[str, Any] = {
        "peak": 1e-3,
        "end": 1e-5,
        "pins": {0: 1e-6, 1251: 1e-6, 2 * 1251: 2.008e-4, 151 * 1251: 5.05e-4, 299 * 1251: 1.01085617e-5},
        "steps": 300 * 1251,
        "warmup": 5 * 1251,
        "epochs": 300,
        "weight_decay": 0.05,
        "method": {"loss": "cross_entropy"},
    }
    return Recipe(
        num_train=IMAGENET,
        num_classes=1000,
        batch=forwards,
        shape="cosine",
        by_epoch=DEITS,
        start=1e-6,
        optimizer="AdamW",
        decayed=decayed,
        clip=None,
        repeats=3,
        model=model,
        parameters=parameters,
        crop=MAE_CROP,
        policy="rand-m9-mstd0.5-inc1",
        mixed=(0.25, 0.8, 1.0, 0.1),
        statistics=IMAGENET_STATISTICS,
        **settings | further,
    )


def _distilled(model: dict[str, Any], parameters: int, decayed: int, **further: Any) -> Recipe:
    """As _deit, with section 4's hard distillation. The distillation token decays."""
    taught = {"teacher": "timm:regnety_160.deit_in1k", "form": "hard", "alpha": 0.5, "loss": "cross_entropy"}
    model = model | {"distilled": True}
    return _deit(model, parameters, decayed, method=taught, decayed_tokens=("dist_token",), **further)


def _deit3(
    model: dict[str, Any],
    parameters: int,
    decayed: int,
    *,
    peak: float,
    epochs: int,
    updates: int,  # of an epoch
    forwards: tuple[int, int] = (64, 32),
    pins: dict[int, float],
    **further: Any,
) -> Recipe:
    """facebookresearch/deit README_revenge.md, ImageNet-1k's training but for what is given. Fused LAMB clips at 1."""
    settings: dict[str, Any] = {
        "num_train": IMAGENET,
        "num_classes": 1000,
        "optimizer": "Lamb",
        "settings": LAMB,
        "weight_decay": 0.05,
        "clip": 1.0,
        "repeats": 3,
        "crop": MAE_CROP,
        "three_augment": True,
        "mixed": (0.0, 0.8, 1.0, 0.0),
        "method": {"loss": "binary"},
    }
    return Recipe(
        batch=forwards,
        steps=epochs * updates,
        peak=peak,
        shape="cosine",
        by_epoch=DEITS,
        epochs=epochs,
        warmup=5 * updates,
        start=1e-6,
        end=1e-5,
        pins={0: 1e-6, updates: 1e-6} | {epoch * updates: rate for epoch, rate in pins.items()},
        decayed=decayed,
        model=model,
        parameters=parameters,
        crop_fraction=1.0,
        statistics=IMAGENET_STATISTICS,
        **settings | further,
    )


DEIT_384: dict[str, Any] = {
    "forwards": (32, 16),
    "peak": 5e-6,
    "end": 5e-6,
    "pins": {0: 1e-6, 2502: 1e-6, 2 * 2502: 1.8e-6, 6 * 2502: 5e-6, 29 * 2502: 5e-6},
    "steps": 30 * 2502,
    "warmup": 5 * 2502,
    "epochs": 30,
    "weight_decay": 1e-8,
    "stage": "finetune",
    "head": "auto",
    "image_size": 384,
}
# After ImageNet-1k: AdamW, RandAugment and cross entropy again. Before and after ImageNet-21k: cutmix alone.
DEIT3_TUNED: dict[str, Any] = {
    "peak": 1e-5,
    "epochs": 20,
    "updates": 2503,
    "forwards": (64, 8),
    "pins": {2: 2.8e-6, 6: 1e-5, 19: 1e-5},
    "optimizer": "AdamW",
    "settings": ADAM,
    "weight_decay": 0.1,
    "clip": None,
    "repeats": 1,
    "three_augment": False,
    "policy": "rand-m9-mstd0.5-inc1",
    "mixed": (0.0, 0.8, 1.0, 0.1),
    "method": {"loss": "cross_entropy"},
    "stage": "finetune",
    "head": "auto",
}
DEIT3_21K: dict[str, Any] = {
    "weight_decay": 0.02,
    "repeats": 1,
    "crop": SIMPLE_CROP,
    "mixed": (0.0, 0.0, 1.0, 0.1),
    "method": {"loss": "cross_entropy"},
}


def _t2t(model: dict[str, Any], parameters: int, decayed: int, *, peak: float = 5e-4, **further: Any) -> Recipe:
    """yitu-opensource/T2T-ViT README.md, main.py. decayed: kernels of the blocks and the head; those of the two token
    attentions and of the projection that follows them are added."""
    pins = {0: 1e-6, 2503: 1e-6 + (peak - 1e-6) / 10, 150 * 2503: (peak + 1e-5) / 2, 300 * 2503: 1e-5}
    return Recipe(
        num_train=IMAGENET,
        num_classes=1000,
        batch=(64, 8),
        steps=310 * 2503,
        peak=peak,
        shape="cosine",
        by_epoch=T2TS,
        warmup=10 * 2503,
        start=1e-6,
        end=1e-5,
        pins=pins,
        optimizer="AdamW",
        decayed=_soft_splits(model["embed_dim"]) + decayed,
        clip=None,
        ema=0.99996,
        model=model,
        parameters=parameters,
        crop=T2T_CROP,
        crop_fraction=0.9,
        policy="rand-m9-mstd0.5-inc1",
        mixed=(0.25, 0.8, 1.0, 0.1),
        erased_last=True,
        statistics=IMAGENET_STATISTICS,
        **further,
    )


def _soft_splits(width: int) -> int:
    """147 and 576 numbers of a neighbourhood to three times 64, six layers of 64 x 64, and 576 numbers to the width."""
    return (147 + 576) * 192 + 6 * 64**2 + 576 * width


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
    # arXiv:2205.01580; 99 % of ImageNet: 9,909 forwards, 1,239 updates an epoch. Fixed positions are no parameters.
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
        | {"representation_dim": 384, "norm": "before_pool", "gelu": "tanh", "dropout": 0.0, "drop_path": 0.0}
        | {"position_embedding": "sincos_big_vision"},
        parameters=22_122_472,
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
    # Our own: 390 and 781 updates an epoch.
    "cifar10_vit": Recipe(
        num_train=50_000,
        num_classes=10,
        batch=(128, 1),
        steps=16 * 390,
        peak=2e-3,
        shape="cosine",
        warmup=390,
        pins={0: 0.0, 195: 1e-3, 390: 2e-3, 3315: 1e-3},
        optimizer="Muon",
        settings={"momentum": 0.95, "nesterov": True, "betas": (0.9, 0.95)},
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
        steps=8 * 781,
        peak=1e-3,
        shape="cosine",
        warmup=781,
        pins={0: 0.0, 781: 1e-3, 3514: 5.001437e-4},
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
    # arXiv:2111.06377, table 8; facebookresearch/mae PRETRAIN.md: 1.5e-4 x 4096 / 256 = 2.4e-3; 313 updates an epoch.
    # Decayed: kernels of encoder and decoder (of width 512: 12 x 512^2 a block) and the two tokens.
    "mae_pretrain": _mae_pretrain(VIT_B16, 111_907_840, 589_824 + 12 * 7_077_888 + 768 + 768 * 512 + 512 * 768),
    "mae_pretrain_large": _mae_pretrain(
        VIT_L16, 329_541_888, 786_432 + 24 * 12_582_912 + 1024 + 1024 * 512 + 512 * 768
    ),
    "mae_pretrain_huge": _mae_pretrain(VIT_H14, 657_074_508, 752_640 + 32 * 19_660_800 + 1280 + 1280 * 512 + 512 * 588),
    # Table 9 with FINETUNE.md's rates for weights of normalised pixels. 40,036 forwards of 32, 1,252 updates of 1024 an
    # epoch. 14 of 50 epochs, and 24 of 100, are a fifth of the way down: (1 + cos 0.2 pi) / 2 = 0.9045085.
    "mae_finetune_base": _mae_finetune(
        VIT_B16 | {"drop_path": 0.1},
        86_567_656,
        589_824 + 12 * 7_077_888 + 768_000,
        peak=2e-3,
        epochs=100,
        layer_decay=0.65,
        pins={0: 0.0, 1252: 4e-4, 6260: 2e-3, 24 * 1252: 1e-6 + 1.999e-3 * 0.9045085},
    ),
    "mae_finetune_large": _mae_finetune(
        VIT_L16 | {"drop_path": 0.2}, 304_326_632, 786_432 + 24 * 12_582_912 + 1_024_000, peak=4e-3, epochs=50
    ),
    "mae_finetune_huge": _mae_finetune(
        VIT_H14 | {"drop_path": 0.3}, 632_045_800, 752_640 + 32 * 19_660_800 + 1_280_000, peak=4e-3, epochs=50
    ),
    # Figure 9. A block of L has 12 x 1024^2 numbers in its kernels.
    "mae_partial": _mae_finetune(
        VIT_L16 | {"drop_path": 0.1}, 304_326_632, 4 * 12_582_912 + 1_024_000, peak=4e-3, epochs=50, train_blocks=4
    ),
    # main_finetune.py's defaults at batch 256: 5,005 updates an epoch.
    "mae_finetune_brief": _mae_finetune(
        VIT_B16 | {"drop_path": 0.1},
        86_567_656,
        589_824 + 12 * 7_077_888 + 768_000,
        peak=1e-3,
        epochs=50,
        forwards=8,
        mixed=(0.25, 0.0, 0.0, 0.1),
        pins={0: 0.0, 5005: 2e-4, 5 * 5005: 1e-3, 14 * 5005: 1e-6 + 9.99e-4 * 0.9045085},
    ),
    # Table 10: 0.1 x 16384 / 256 = 6.4. 2,502 forwards of 512, 79 updates an epoch; only the last layer trains.
    "mae_linear_probe": Recipe(
        num_train=IMAGENET,
        num_classes=1000,
        batch=(512, 32),
        steps=90 * 79,
        peak=6.4,
        shape="cosine",
        warmup=10 * 79,
        in_epochs=(10, 90),
        pins={0: 0.0, 5 * 79: 3.2, 10 * 79: 6.4, 50 * 79: 3.2},
        optimizer="LARS",
        settings={"momentum": 0.9, "trust_coefficient": 0.001},
        clip=None,
        model=VIT_B16 | {"norm": "before_pool", "head_norm": "batch", "drop_path": 0.0},
        parameters=86_567_656,
        stage="linear_probe",
        head_init="mae_linear_probe",
        train_blocks=0,
        crop=MAE_CROP | {"retry": False},
        statistics=IMAGENET_STATISTICS,
    ),
    # Table 11: 1e-4 x 4096 / 256 = 1.6e-3.
    "mae_scratch": Recipe(
        num_train=IMAGENET,
        num_classes=1000,
        batch=(64, 64),
        steps=300 * 313,
        peak=1.6e-3,
        shape="cosine",
        warmup=20 * 313,
        in_epochs=(20, 300),
        pins={0: 0.0, 10 * 313: 8e-4, 20 * 313: 1.6e-3, 160 * 313: 8e-4},
        optimizer="AdamW",
        settings=ADAM_MAE,
        weight_decay=0.3,
        decayed=589_824 + 12 * 7_077_888 + 768_000,
        clip=None,
        ema=0.9999,
        model=VIT_B16 | MAE_TUNED | {"drop_path": 0.1},
        parameters=86_567_656,
        crop=MAE_CROP,
        policy="rand-m9-mstd0.5-inc1",
        mixed=(0.0, 0.8, 1.0, 0.1),
        statistics=IMAGENET_STATISTICS,
    ),
    # 10,009 forwards of 128, 1,252 updates of 1024 an epoch. A block of width d has 10 d^2 numbers in its kernels, each
    # of the two heads 1000 d. Half way through the cosine, at 150 epochs, (1.6e-3 + 1e-5) / 2.
    "lvvit_tiny": _lvvit(
        LVVIT_S | {"embed_dim": 240, "depth": 12, "num_heads": 4, "residual_scale": 1.0, "drop_path": 0.1},
        8_534_720,
        12 * 576_000 + 480_000,
    ),
    "lvvit_small": _lvvit(LVVIT_S | {"drop_path": 0.1}, 26_151_824, 16 * 1_474_560 + 768_000),
    "lvvit_medium": _lvvit(LVVIT_M | {"drop_path": 0.2}, 55_830_544, 20 * 2_621_440 + 1_024_000, crop_fraction=1.0),
    "lvvit_large": _lvvit(
        LVVIT_S
        | {"embed_dim": 768, "depth": 24, "num_heads": 12, "stem_channels": 128, "residual_scale": 3.0}
        | {"drop_path": 0.3},
        150_021_968,
        24 * 5_898_240 + 1_536_000,
        peak=1e-3,
        pins={0: 1e-6, 1252: 2.008e-4, 150 * 1252: 5.05e-4, 309 * 1252: 1e-5},
        crop_fraction=1.0,
        policy="rand-n3-m9-mstd0.5-inc1",
    ),
    # The brief figures: 1e-3 per 1024, a smooth cosine over 300 epochs, tokens at half the weight.
    "lvvit_brief": _lvvit(
        LVVIT_S | {"drop_path": 0.1},
        26_151_824,
        16 * 1_474_560 + 768_000,
        peak=1e-3,
        by_epoch=None,
        steps=300 * 1252,
        start=0.0,
        end=0.0,
        in_epochs=(5, 300),
        pins={0: 0.0, 1252: 2e-4, 5 * 1252: 1e-3},
        method={"labels": "tokens", "cls_weight": 1.0, "token_weight": 0.5, "mix_tokens": True},
        ema=None,
        mixed=(0.25, 0.8, 0.0, 0.0),
    ),
    # 20,018 forwards of 64, 2,503 updates of 512 an epoch; 5 epochs up to 5e-6, which stays.
    "lvvit_finetune_384": _lvvit(
        LVVIT_S | {"drop_path": 0.1},
        26_297_744,
        16 * 1_474_560 + 768_000,
        peak=5e-6,
        end=5e-6,
        forwards=(64, 8),
        pins={0: 1e-6, 2503: 1.8e-6, 5 * 2503: 5e-6, 150 * 2503: 5e-6, 309 * 2503: 5e-6},
        weight_decay=1e-8,
        ema=None,
        stage="finetune",
        head="auto",
        image_size=384,
    ),
    "lvvit_finetune_448": _lvvit(
        LVVIT_M | {"drop_path": 0.2},
        56_131_600,
        20 * 2_621_440 + 1_024_000,
        peak=5e-6,
        end=5e-6,
        forwards=(64, 8),
        pins={0: 1e-6, 2503: 1.8e-6, 150 * 2503: 5e-6},
        weight_decay=1e-8,
        ema=None,
        stage="finetune",
        head="auto",
        image_size=448,
        crop_fraction=1.0,
    ),
    # On CIFAR-10: 781 forwards of 64, 98 updates an epoch; two heads of 10 classes.
    "lvvit_transfer": _lvvit(
        LVVIT_S | {"drop_path": 0.1},
        26_151_824 - 2 * 990 * 385,
        16 * 1_474_560 + 7_680,
        num_train=50_000,
        num_classes=10,
        forwards=(64, 8),
        steps=310 * 98,
        warmup=5 * 98,
        pins={0: 1e-6, 98: 3.208e-4, 150 * 98: 8.05e-4, 300 * 98: 1e-5},
        method={"labels": "ground_truth", "cls_weight": 1.0, "token_weight": 0.0, "mix_tokens": True},
        ema=None,
        stage="finetune",
        head_init="timm",
        data=("data=parquet", "data.train={file}"),
    ),
    # arXiv:2012.12877. A block of width d has 12 d^2 numbers in its kernels; parameters are the official models'.
    "deit_tiny": _deit(DEIT_TI | {"drop_path": 0.1}, 5_717_416, 147_456 + 12 * 442_368 + 192_000),
    "deit_small": _deit(DEIT_S | {"drop_path": 0.1}, 22_050_664, 294_912 + 12 * 1_769_472 + 384_000),
    "deit_base": _deit(DEIT_B | {"drop_path": 0.1}, 86_567_656, 589_824 + 12 * 7_077_888 + 768_000, forwards=(64, 16)),
    "deit_tiny_distilled": _distilled(
        DEIT_TI | {"drop_path": 0.1}, 5_910_800, 147_456 + 12 * 442_368 + 2 * 192_000 + 192
    ),
    "deit_small_distilled": _distilled(
        DEIT_S | {"drop_path": 0.1}, 22_436_432, 294_912 + 12 * 1_769_472 + 2 * 384_000 + 384
    ),
    "deit_base_distilled": _distilled(
        DEIT_B | {"drop_path": 0.1}, 87_338_192, 589_824 + 12 * 7_077_888 + 2 * 768_000 + 768, forwards=(64, 16)
    ),
    # 1,281,024 views: 40,032 forwards of 32, 2502 updates of 512. In evaluation mode, so without drop path.
    "deit_finetune_384": _deit(
        DEIT_B | {"drop_path": 0.0},
        86_859_496,
        589_824 + 12 * 7_077_888 + 768_000,
        **DEIT_384,
    ),
    "deit_finetune_384_distilled": _distilled(
        DEIT_B | {"drop_path": 0.0}, 87_630_032, 589_824 + 12 * 7_077_888 + 2 * 768_000 + 768, **DEIT_384
    ),
    # arXiv:2204.07118. 626 updates of 2048 an epoch. A picture of 192 px has 52 places fewer than one of 224, one of
    # 154 in patches of 14 has 135 fewer. L and H at 224 px: MAE's, less the class token's place, with 2 LayerScales a
    # block.
    "deit3_small": _deit3(
        DEIT3_S | {"drop_path": 0.05},
        22_059_496,
        294_912 + 12 * 1_769_472 + 384_000,
        peak=4e-3,
        epochs=800,
        updates=626,
        forwards=(256, 8),
        pins={2: 8.008e-4, 401: 2.005e-3},
    ),
    "deit3_base": _deit3(
        DEIT3_B | {"drop_path": 0.2},
        86_585_320 - 52 * 768,
        589_824 + 12 * 7_077_888 + 768_000,
        peak=3e-3,
        epochs=800,
        updates=626,
        forwards=(256, 8),
        pins={2: 6.008e-4, 401: 1.505e-3},
        image_size=192,
    ),
    "deit3_large": _deit3(
        DEIT3_L | {"drop_path": 0.45},
        304_326_632 - 1024 + 48 * 1024 - 52 * 1024,
        786_432 + 24 * 12_582_912 + 1_024_000,
        peak=3e-3,
        epochs=800,
        updates=626,
        pins={2: 6.008e-4, 401: 1.505e-3},
        image_size=192,
    ),
    "deit3_huge": _deit3(
        DEIT3_H | {"drop_path": 0.6},
        632_045_800 - 1280 + 64 * 1280 - 135 * 1280,
        752_640 + 32 * 19_660_800 + 1_280_000,
        peak=3e-3,
        epochs=800,
        updates=626,
        pins={2: 6.008e-4, 401: 1.505e-3},
        image_size=154,
    ),
    "deit3_finetune_224": _deit3(
        DEIT3_B | {"drop_path": 0.2}, 86_585_320, 589_824 + 12 * 7_077_888 + 768_000, **DEIT3_TUNED
    ),
    "deit3_finetune_384": _deit3(
        DEIT3_S | {"drop_path": 0.0},
        22_059_496 + 380 * 384,
        294_912 + 12 * 1_769_472 + 384_000,
        image_size=384,
        **DEIT3_TUNED,
    ),
    # As vit_imagenet21k, 221,830 forwards of 64, 6,933 updates of 2048 an epoch; 20,843 classes more.
    "deit3_imagenet21k": _deit3(
        DEIT3_B | {"drop_path": 0.1},
        86_585_320 + 20_843 * 769,
        589_824 + 12 * 7_077_888 + 21_843 * 768,
        num_train=14_197_122,
        num_classes=21_843,
        peak=1e-3,
        epochs=240,
        updates=6933,
        pins={2: 2.008e-4, 121: 5.05e-4},
        **DEIT3_21K,
    ),
    "deit3_finetune_imagenet": _deit3(
        DEIT3_B | {"drop_path": 0.15},
        86_585_320,
        589_824 + 12 * 7_077_888 + 768_000,
        peak=3e-4,
        epochs=50,
        updates=626,
        pins={2: 6.08e-5, 26: 1.55e-4},
        stage="finetune",
        head_init="timm",
        **DEIT3_21K,
    ),
    # arXiv:2101.11986; parameters as the official code counts them, fixed ones included. A block of width d has 10 d^2
    # numbers in its kernels, of the lite ones 8 d^2.
    "t2t_7": _t2t(T2T_7, 4_310_222, 7 * 524_288 + 256_000, peak=1e-3, weight_decay=0.03),
    "t2t_14": _t2t(T2T_14, 21_545_550, 14 * 1_474_560 + 384_000, weight_decay=0.05),
    "t2t_19": _t2t(T2T_19, 39_177_422, 19 * 2_007_040 + 448_000, weight_decay=0.065),
    "t2t_24": _t2t(T2T_24, 64_105_934, 24 * 2_621_440 + 512_000, weight_decay=0.065),
    # The figures of lvvit_small; the classifier of tokens is the method's.
    "t2t_24_token_labeling": Recipe(
        num_train=IMAGENET,
        num_classes=1000,
        batch=(128, 8),
        steps=310 * 1252,
        peak=1.6e-3,
        shape="cosine",
        by_epoch=LVVITS,
        warmup=5 * 1252,
        start=1e-6,
        end=1e-5,
        pins={0: 1e-6, 1252: 3.208e-4, 5 * 1252: 1.59891e-3, 150 * 1252: 8.05e-4},
        optimizer="AdamW",
        weight_decay=0.05,
        decayed=_soft_splits(512) + 24 * 2_621_440 + 2 * 512_000,
        clip=None,
        ema=0.99992,
        model=T2T_24,
        parameters=64_105_934 + 513_000,
        crop=LVVIT_CROP,
        crop_fraction=0.9,
        policy="rand-m9-mstd0.5-inc1",
        mixed=(0.25, 0.0, 0.0, 0.0),
        erased_last=True,
        statistics=IMAGENET_STATISTICS,
        label_smoothing=0.1,
        method={"labels": "tokens", "cls_weight": 1.0, "token_weight": 1.0, "mix_tokens": True},
        data=("data=parquet", "data.train={file}", "train.token_labels=store"),
    ),
    # 781 forwards of 64. Everything decays but the fixed positions and random features.
    "t2t_transfer": Recipe(
        num_train=50_000,
        num_classes=10,
        batch=(64, 1),
        steps=60 * 781,
        peak=5e-4,
        shape="cosine",
        by_epoch=(0, 0, 0),
        epochs=60,
        warmup=0,
        end=2e-4,
        pins={0: 5e-4, 780: 5e-4, 781: 4.997944e-4, 30 * 781: 3.5e-4, 59 * 781: 2.002056e-4},
        optimizer="SGD",
        settings=SGD,
        weight_decay=5e-4,
        decayed=21_465_806 - 990 * 385,
        decays_all=True,
        clip=None,
        model=T2T_14,
        parameters=21_545_550 - 990 * 385,
        stage="finetune",
        head_init="timm",
        crop=PAD_4_OF_32 | {"interpolation": "bilinear"},
        crop_fraction=1.0,
        statistics=([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
        data=(),
    ),
    # README_cosub.md gives no command: DeiT III-S's, each picture twice through the model.
    "deit3_small_cosub": _deit3(
        DEIT3_S | {"drop_path": 0.05},
        22_059_496,
        294_912 + 12 * 1_769_472 + 384_000,
        peak=4e-3,
        epochs=800,
        updates=626,
        forwards=(256, 8),
        pins={2: 8.008e-4, 401: 2.005e-3},
        method={"binarize": True},
    ),
}
each_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(scope="module")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for pictures and for weights where neither is read."""
    file = tmp_path_factory.mktemp("empty") / "file.safetensors"
    file.write_bytes(b"")
    return file


@pytest.fixture
def config(name: str, empty_file: Path) -> RunConfig:
    """The preset with data of the recipe's kind; nothing of it is read."""
    return _composed(name, empty_file)


@functools.cache
def _composed(name: str, file: Path, *overrides: str) -> RunConfig:
    recipe = RECIPES[name]
    init = [f"init_from={file}"] if recipe.stage != "pretrain" else []
    data = [text.format(file=file) for text in recipe.data]
    return compose_and_check([f"experiment={name}", *init, *data, *overrides])


def _horizon(config: RunConfig, num_train: int) -> Horizon:
    train = config.train
    forwards = micro_batches_per_epoch(num_train, train.batch_size, config.runtime.processes, repeats=train.repeats)
    return plan_horizon(forwards, accumulate=train.accumulate, epochs=train.epochs, max_steps=train.max_steps)


def _peak(config: RunConfig, num_train: int) -> float:
    train, processes = config.train, config.runtime.processes
    size = effective_batch_size(num_train, train.batch_size, processes, repeats=train.repeats)
    rates = {key: config.optim[key] for key in ("lr", "base_lr", "reference_batch")}
    return resolve_lr(**rates, global_batch=size * processes * train.accumulate)


def _published_lr(recipe: Recipe, step: int) -> float:
    """From the formulas of google-research/vision_transformer's utils.py, with a start and an end for the others, and
    of facebookresearch/mae's lr_sched.py."""
    at, warmup, end = float(step), recipe.warmup, recipe.steps
    if recipe.by_epoch is not None:  # timm's CosineLRScheduler: the epoch alone, a cosine that the warm-up covers
        rising, cooldown, late = recipe.by_epoch
        epoch, falling = max(step // (recipe.steps // recipe.epochs) - late, 0), recipe.epochs - cooldown
        if epoch < rising:
            return recipe.start + (recipe.peak - recipe.start) * epoch / rising
        return recipe.end + (recipe.peak - recipe.end) * (1 + math.cos(math.pi * min(epoch / falling, 1))) / 2
    if recipe.in_epochs is not None:  # MAE's: whole epochs, and the forwards made of the one begun
        warmup, end = recipe.in_epochs
        epoch, update = divmod(step, recipe.steps // end)
        at = epoch + update * recipe.batch[1] / (recipe.num_train // recipe.batch[0])
    if at < warmup:
        return recipe.start + (recipe.peak - recipe.start) * at / warmup
    t = (at - warmup) / (end - warmup)
    left = 1 - t if recipe.shape == "linear" else (1 + math.cos(math.pi * t)) / 2
    return recipe.end + (recipe.peak - recipe.end) * left


def test_every_preset_has_its_figures_here() -> None:
    presets = {path.stem: path.read_text(encoding="utf-8") for path in (conf_dir() / "experiment").glob("*.yaml")}
    pipelines = {name for name, text in presets.items() if "override /pipeline" in text}
    assert RECIPES.keys() == presets.keys() - pipelines


@each_recipe
def test_batch_clip_and_length_are_the_recipes(name: str, config: RunConfig) -> None:
    recipe, horizon = RECIPES[name], _horizon(config, RECIPES[name].num_train)
    assert (config.train.batch_size, config.train.accumulate) == recipe.batch
    assert config.runtime.processes == 1
    assert config.train.clip_norm == recipe.clip
    assert horizon.num_updates == horizon.total_steps == recipe.steps
    assert config.stage.name == recipe.stage
    assert config.stage.head == (recipe.head or ("auto" if recipe.stage == "pretrain" else "fresh"))
    assert (config.stage.head_init, config.stage.train_blocks) == (recipe.head_init, recipe.train_blocks)
    assert (config.train.ema_decay, config.train.repeats) == (recipe.ema, recipe.repeats)
    assert config.train.ema_warmup == (recipe.ema is None), "the published averages have a constant decay"


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
def test_weight_decay_acts_on_kernels_and_layers_learn_at_the_recipes_rates(name: str, config: RunConfig) -> None:
    recipe = RECIPES[name]
    rules = {key: config.optim[key] for key in ("weight_decay", "layer_decay", "no_decay")}
    method = _method(config, recipe)
    groups = parameter_groups(method, **rules)
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    kernels = {name for name, p in trained.items() if recipe.decays_all or (name.endswith(".weight") and p.ndim > 1)}
    tokens = {name for name in trained if name.endswith(recipe.decayed_tokens)} if recipe.decayed_tokens else set()
    assert len(tokens) == len(recipe.decayed_tokens)
    assert decayed == (kernels | tokens if recipe.weight_decay else set())
    assert {group["weight_decay"] for group in groups} == {recipe.weight_decay, *([] if recipe.decays_all else [0.0])}
    layers = 1 if recipe.layer_decay == 1 else recipe.model["depth"] + 2
    layers = layers if recipe.train_blocks == "all" or layers == 1 else int(recipe.train_blocks) + 1
    scales = sorted({group["lr_scale"] for group in groups}, reverse=True)
    assert scales == pytest.approx([recipe.layer_decay**below for below in range(layers)])
    assert sum(p.numel() for group in groups if group["weight_decay"] for p in group["params"]) == recipe.decayed
    assert sum(len(group["names"]) for group in groups) == len(trained)


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
        drawn = crop.interpolation if "area" in recipe.crop else crop.resized["interpolation"]
        assert drawn == recipe.crop["interpolation"]
        assert evaluated.resized["interpolation"] == {"random": "bicubic"}.get(drawn, drawn)
    kinds = {"SimpleRandomCrop": recipe.crop == SIMPLE_CROP, "ResizedCropFlip": "area" in recipe.crop}
    assert type(crop).__name__ == next((kind for kind, fits in kinds.items() if fits), "PadCropFlip")
    for key, value in found.items():
        assert list(_listed(value)) == pytest.approx(list(_listed(recipe.crop[key]))), key
    assert tuple(crop.size) == tuple(evaluated.size) == (recipe.image_size, recipe.image_size)
    assert evaluated.crop_fraction == recipe.crop_fraction
    assert config.method.get("label_smoothing", 0.0) == recipe.label_smoothing
    assert {key: config.method[key] for key in recipe.method} == recipe.method
    assert isinstance(train, AugmentedWhole) == (recipe.crop == LVVIT_CROP)
    assert getattr(train, "flip", 0.5) == 0.5 or config.data["name"] == "digits"
    if recipe.statistics is not None:
        assert (config.data["mean"], config.data["std"]) == recipe.statistics
    mix: Any = None if config.augment["batch"] is None else build(config.augment["batch"])
    if recipe.mixed is not None:
        steps = {type(step).__name__: step for step in getattr(mix, "steps", [mix])}
        erasing, mixing = steps.get("RandomErasing"), steps["Mix"]
        strengths = mixing.mixup_alpha, mixing.cutmix_alpha, mixing.label_smoothing
        assert (0.0 if erasing is None else erasing.prob, *strengths) == recipe.mixed
        assert recipe.erased_last == (list(steps) == ["Mix", "RandomErasing"])
        assert (mixing.prob, mixing.switch_prob, mixing.mode) == (1.0, 0.5, "batch")
    elif recipe.mixup is None:
        assert mix is None
    else:
        assert (type(mix).__name__, mix.alpha, mix.label_smoothing) == ("RolledMixup", recipe.mixup, 0.0)
    if recipe.three_augment:
        one_of_three, jitter = train.steps
        assert (type(one_of_three).__name__, type(jitter).__name__) == ("ThreeAugment", "ColorJitter")
        assert (one_of_three.threshold, list(one_of_three.radius)) == (128, [0.1, 2.0])
        assert [strength for _, strength in jitter.parts] == [0.3, 0.3, 0.3]
    elif recipe.policy is not None:
        assert [type(step).__name__ for step in train.steps] == ["RandAugment"]
        assert config.augment["policy"] == recipe.policy
        drawn = isinstance(train.steps[0]._augment.ops[0].kwargs["resample"], tuple)
        assert drawn == (crop.interpolation == "random")
    elif recipe.rand_augment is None:
        assert crop is train  # no steps after the crop
    else:
        (step,) = train.steps
        *operations, cut_out = step.operations
        assert (step.num_ops, len(step.operations)) == (recipe.rand_augment[0], 16)
        assert {(operation.magnitude, operation.prob) for operation in operations} == {(recipe.rand_augment[1], 1.0)}
        assert cut_out.keywords["reach"] * 224 == pytest.approx(40)
        (shift,) = {operation.hparams["translate_pct"] for operation in operations}
        assert shift * 224 == pytest.approx(100)


# ---- DeiT's, T2T-ViT's and LV-ViT's presets against the numbers of their official code ------------------------------
@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("deit_tiny", "deit/deit_bs1024"),
        ("deit_small", "deit/deit_bs1024"),
        ("deit_base", "deit/deit_bs1024"),
        ("deit_base_distilled", "deit/deit_bs1024"),
        ("deit3_small", "deit/deit3_small_800ep"),
        ("t2t_7", "t2t/t2t_7_4gpu"),
        ("t2t_14", "t2t/t2t_14_8gpu"),
        ("t2t_24", "t2t/t2t_14_8gpu"),
        ("lvvit_small", "lv/lvvit_s"),
        ("lvvit_large", "lv/lvvit_l"),
        ("lvvit_finetune_384", "lv/finetune384"),
        ("t2t_24_token_labeling", "lv/lvvit_s"),
    ],
)
def test_the_rate_of_every_epoch_is_that_of_the_official_code(name: str, curve: str, config: RunConfig) -> None:
    with np.load(GOLDEN / "schedules_lvvit_deit_t2t.npz") as golden:
        official = golden[curve]
    np.testing.assert_allclose(_rates(config, IMAGENET), np.repeat(official, 3), rtol=1e-12)


@pytest.mark.parametrize("name", ["deit_small", "deit3_small", "deit_finetune_384"])
def test_without_its_delay_deits_rate_is_what_it_is_with_it_an_epoch_later(
    name: str, config: RunConfig, empty_file: Path
) -> None:
    late, mended = (_rates(c, IMAGENET) for c in (config, _composed(name, empty_file, "schedule.lag_epochs=0")))
    assert mended[:-3] == late[3:]
    assert late[:6] == [1e-6] * 6
    assert mended[3] > 1e-6


def _rates(config: RunConfig, num_train: int) -> list[float]:
    """Of every update, three an epoch."""
    schedule, peak = build(config.schedule), _peak(config, num_train)
    horizon = plan_horizon(3, accumulate=1, epochs=config.train.epochs, max_steps=None)
    return [schedule(horizon.progress(step), lr=peak) for step in range(horizon.num_updates)]


@pytest.mark.parametrize(
    ("name", "official", "depth"),
    [
        ("deit_tiny_distilled", "deit", 1),
        ("deit_small_distilled", "deit", 1),
        ("deit_base_distilled", "deit", 1),
        ("deit_finetune_384_distilled", "deit", 1),
        ("t2t_7", "t2t", 1),
        ("t2t_14", "t2t", 1),
        ("lvvit_small", "lv", 2),
        ("lvvit_finetune_384", "lv", 2),
    ],
)
def test_what_decays_is_what_decays_in_the_official_code(
    name: str, official: str, depth: int, empty_file: Path
) -> None:
    config = _composed(name, empty_file, f"model.depth={depth}")
    golden = json.loads((GOLDEN / "optim_weight_decay_groups.json").read_text(encoding="utf-8"))[official]["groups"]
    rules = {key: config.optim[key] for key in ("weight_decay", "layer_decay", "no_decay")}
    groups = parameter_groups(_method(config, RECIPES[name]), **rules)
    for decays, theirs in zip((False, True), golden, strict=True):
        ours = {n.removeprefix("backbone.") for g in groups if bool(g["weight_decay"]) == decays for n in g["names"]}
        assert ours == set(theirs["names"])


# The published models that a preset's header reaches by settings: parameters, and what else is published of them.
VARIED = {
    "t2t_7 model=t2t_10": (5_889_230, {"model.depth": 10}),
    "t2t_7 model=t2t_12": (6_941_902, {"model.depth": 12}),
    "t2t_14 model=t2t_t_14": (21_541_070, {"model.token_module": "transformer"}),
    "t2t_14 model.image_size=384": (21_545_550 + 380 * 384, {"model.drop_path": 0.1}),
    "t2t_19 model=t2t_t_19": (39_172_942, {"model.drop_path": 0.1}),
    "t2t_24 model=t2t_t_24": (64_101_454, {"model.drop_path": 0.1}),
    "t2t_transfer model=t2t_19": (39_177_422, {"model.drop_path": 0.1}),
    "deit3_finetune_224 model=deit3_large model.drop_path=0.45": (
        304_326_632 - 1024 + 48 * 1024,
        {"model.image_size": 224, "model.drop_path": 0.45, "train.batch_size": 64},
    ),
    "deit3_finetune_224 model=deit3_huge model.drop_path=0.55 train.batch_size=32 train.accumulate=16": (
        632_045_800 - 1280 + 64 * 1280,
        {"model.image_size": 224, "model.drop_path": 0.55, "train.batch_size": 32},
    ),
    "deit3_finetune_384 model=deit3_base model.drop_path=0.15 train.batch_size=32 train.accumulate=16": (
        86_585_320 + 380 * 768,
        {"model.drop_path": 0.15, "train.batch_size": 32},
    ),
    "deit3_finetune_384 model=deit3_large model.drop_path=0.4 train.batch_size=16 train.accumulate=32": (
        304_326_632 - 1024 + 48 * 1024 + 380 * 1024,
        {"model.drop_path": 0.4, "train.batch_size": 16},
    ),
    "deit3_imagenet21k model=deit3_small model.drop_path=0.05 train.batch_size=128 train.accumulate=16": (
        22_059_496,
        {"model.drop_path": 0.05, "train.batch_size": 128},
    ),
    "deit3_imagenet21k model=deit3_large model.drop_path=0.3": (
        304_326_632 - 1024 + 48 * 1024,
        {"model.drop_path": 0.3, "train.batch_size": 64},
    ),
    "deit3_imagenet21k model=deit3_huge model.drop_path=0.5 model.image_size=126 train.epochs=90": (
        632_045_800 - 1280 + 64 * 1280 - (256 - 81) * 1280,
        {"model.drop_path": 0.5, "train.epochs": 90},
    ),
    "deit3_finetune_imagenet model=deit3_small model.drop_path=0.05 train.batch_size=128 train.accumulate=16": (
        22_059_496,
        {"model.drop_path": 0.05},
    ),
    "deit3_finetune_imagenet model=deit3_large model.drop_path=0.4": (
        304_326_632 - 1024 + 48 * 1024,
        {"model.drop_path": 0.4},
    ),
    "deit3_finetune_imagenet model=deit3_huge model.drop_path=0.45": (
        632_045_800 - 1280 + 64 * 1280,
        {"model.drop_path": 0.45, "model.image_size": 224},
    ),
}


@pytest.mark.parametrize("command", VARIED)
def test_the_headers_commands_are_the_other_published_models(command: str, empty_file: Path) -> None:
    name, *overrides = command.split()
    parameters, said = VARIED[command]
    config = _composed(name, empty_file, *overrides)
    with torch.device("meta"):
        assert count_parameters(build({**config.model, "num_classes": 1000})) == parameters
    sections: dict[str, Any] = {"model": config.model, "train": vars(config.train)}
    assert {key: sections[key.partition(".")[0]][key.partition(".")[2]] for key in said} == said
    base = RECIPES[name]
    assert config.train.batch_size * config.train.accumulate == base.batch[0] * base.batch[1]


def test_every_command_of_a_header_with_another_model_is_one_of_those() -> None:
    found = set()
    for path in (conf_dir() / "experiment").glob("*.yaml"):
        if path.stem.startswith(("deit", "t2t")):
            header = re.sub(r"\\\n#\s+", "", path.read_text(encoding="utf-8"))
            for words in re.findall(r"vitexp experiment=(.*)", header):
                kept = [w for w in words.split() if "<" not in w and "…" not in w and not w.startswith("data")]
                found |= {" ".join(kept)} if len(kept) > 1 else set()
    assert found == VARIED.keys()


# ---- MAE's presets against the numbers of its official code, at tiny sizes -------------------------------------------
MAE = [name for name in RECIPES if name.startswith("mae_")]
TINY = ["model.image_size=32", "model.patch_size=8", "model.embed_dim=48", "model.num_heads=4"]
DECODER = ["method.decoder_dim=32", "method.decoder_depth=2", "method.decoder_num_heads=4"]


def _tiny(name: str, *overrides: str, file: Path, depth: int = 3) -> RunConfig:
    decoder = DECODER if name.startswith("mae_pretrain") else []
    init = [f"init_from={file}"] if RECIPES[name].stage != "pretrain" else []
    return compose_and_check([f"experiment={name}", *TINY, f"model.depth={depth}", *decoder, *init, *overrides])


@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("mae_pretrain", "pretrain_400"),
        ("mae_linear_probe", "linprobe"),
        ("mae_finetune_base", "finetune_vitb"),
        ("mae_finetune_large", "finetune_vitl"),
        ("mae_finetune_brief", "seed_finetune"),
    ],
)
def test_the_rate_of_every_forward_is_that_of_maes_code(name: str, curve: str, config: RunConfig) -> None:
    golden = np.load(GOLDEN / "schedules_mae.npz")
    meta, schedule = json.loads(str(golden["meta_json"]))[curve], build(config.schedule)
    epochs = 400 if name == "mae_pretrain" else config.train.epochs
    assert config.train.batch_size * config.train.accumulate == meta["eff_batch"]
    rates = {key: config.optim[key] for key in ("lr", "base_lr", "reference_batch")}
    peak = resolve_lr(**rates, global_batch=meta["eff_batch"])
    horizon = plan_horizon(meta["iters_per_epoch"], accumulate=meta["accum_iter"], epochs=epochs, max_steps=None)
    updates = [horizon.update(step) for step in range(horizon.num_updates)]
    held = [schedule(update.progress, lr=peak) for update in updates for _ in range(update.num_micro_batches)]
    np.testing.assert_allclose(held, golden[f"{curve}/lr"], rtol=1e-14, atol=1e-18)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("mae_finetune_base", "lrd_globalpool1_decay0.65"),
        ("mae_finetune_large", "lrd_globalpool1_decay0.75"),
        ("mae_finetune_huge", "lrd_globalpool1_decay0.75"),
        ("mae_finetune_brief", "lrd_globalpool1_decay0.75"),
        ("mae_pretrain", None),
        ("mae_pretrain_large", None),
        ("mae_pretrain_huge", None),
    ],
)
def test_parameter_groups_are_those_of_maes_code(name: str, reference: str | None, tmp_path: Path) -> None:
    (file := tmp_path / "file.safetensors").write_bytes(b"")
    config, golden = (
        _tiny(name, file=file),
        json.loads((GOLDEN / "optim_mae_param_groups.json").read_text(encoding="utf-8")),
    )
    official = golden["pretrain_wd_groups"] if reference is None else golden[reference]["groups"]
    expected = {
        parameter: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in official
        for parameter in group["params"]
    }
    rules = {key: config.optim[key] for key in ("weight_decay", "layer_decay", "no_decay")}
    groups = parameter_groups(_method(config, RECIPES[name]), **rules)
    ours = {
        re.sub(r"^(backbone|autoencoder)\.(encoder\.)?", "", parameter): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["names"]
    }
    assert set(ours) == set(expected)
    for parameter, pair in expected.items():
        assert ours[parameter] == pytest.approx(pair, rel=1e-14), parameter


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mae_finetune_base", {"base_lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.1}),
        ("mae_finetune_large", {"base_lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.1}),
        ("mae_finetune_huge", {"base_lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.2}),
    ],
)
def test_the_header_names_what_makes_it_the_papers_table_9(name: str, said: dict[str, float], tmp_path: Path) -> None:
    header = (conf_dir() / f"experiment/{name}.yaml").read_text(encoding="utf-8")
    (file := tmp_path / "file.safetensors").write_bytes(b"")
    sentence = header.partition("table 9")[2].partition("\n# Expected")[0].replace("\n#", "")
    overrides = re.findall(r"(?:optim|model)\.\w+=[\d.e-]*\d", sentence.partition("At 448")[0])
    config = compose_and_check([f"experiment={name}", f"init_from={file}", *overrides])
    assert {key: (config.optim | config.model)[key] for key in said} == said


@pytest.fixture(scope="module")
def mae_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pretraining of two updates."""
    return _two_steps("mae_pretrain", tmp_path_factory.mktemp("mae") / "run", file=Path())


def _two_steps(name: str, folder: Path, *, file: Path) -> Path:
    from vitexp.train import train

    train(_tiny(name, "debug=fast", f"output_dir={folder}", file=file, depth=5))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
    found = {key for row in rows for key in row if key.startswith("val")}
    wanted = "val/knn_top1" if name.startswith("mae_pretrain") else "val/top1"
    assert wanted in found, found
    assert ("val_ema/top1" in found) == (RECIPES[name].ema is not None)
    return folder


SAME_PATH = ["mae_pretrain_large", "mae_pretrain_huge", "mae_finetune_large", "mae_finetune_huge", "mae_finetune_brief"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SAME_PATH else n for n in MAE if n != "mae_pretrain"],
)
def test_a_preset_of_mae_makes_two_updates_at_a_tiny_size(name: str, mae_weights: Path, tmp_path: Path) -> None:
    assert (_two_steps(name, tmp_path / "run", file=mae_weights) / "model.safetensors").is_file()


# ---- LV-ViT's presets at a tiny size, with label maps ----------------------------------------------------------------
TINY_LVVIT = [*TINY, "model.depth=2", "model.stem_channels=8"]


def _two_steps_of_lvvit(name: str, folder: Path, *, weights: Path) -> None:
    from vitexp.train import train

    init = [f"init_from={weights}"] if RECIPES[name].stage != "pretrain" else []
    fast = [f"experiment={name}", *TINY_LVVIT, *init, "debug=fast", f"output_dir={folder}"]
    reads = RECIPES[name].method["labels"] != "ground_truth"
    if reads:
        source = open_source(compose_and_check(["data=fake", "data.num_train=16", "data.num_val=8"]))
        store = made_up_store(folder.parent / "store", source.train, source.classes)
        fast += [f"train.token_labels={store}"]
    config = compose_and_check(fast)
    assert plan(config, probe=False) == 0
    summary = train(config)
    assert summary["step"] == 2
    assert ("token_labels" in summary) == reads
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(math.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)
    assert any("val_ema/top1" in row for row in rows) == (RECIPES[name].ema is not None)


@pytest.fixture(scope="module")
def lvvit_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lvvit") / "run"
    _two_steps_of_lvvit("lvvit_small", folder, weights=Path())
    return folder


SAME_AS_SMALL = ["lvvit_tiny", "lvvit_medium", "lvvit_finetune_448"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in SAME_AS_SMALL else n
        for n in RECIPES
        if n.startswith("lvvit_") and n != "lvvit_small"
    ],
)
def test_a_preset_of_lvvit_is_planned_and_makes_two_updates_at_a_tiny_size(
    name: str, lvvit_weights: Path, tmp_path: Path
) -> None:
    _two_steps_of_lvvit(name, tmp_path / "run", weights=lvvit_weights)


# ---- DeiT's and T2T-ViT's presets at a tiny size ---------------------------------------------------------------------
DEIT_AND_T2T = [name for name in RECIPES if name.startswith(("deit", "t2t"))]
# Beside those that others start from. What is slow takes the same paths through the code.
NOT_SLOW = ["deit_finetune_384_distilled", "t2t_24_token_labeling", "t2t_transfer"]


def _two_steps_of_deit_or_t2t(name: str, folder: Path, *, weights: Path, teacher: Path) -> dict[str, float]:
    """The last row of two updates; `weights` and `teacher` are folders of runs, for the recipes that have one."""
    from vitexp.train import train

    recipe = RECIPES[name]
    tiny = ["model.image_size=32", "model.embed_dim=48", "model.num_heads=4", "model.depth=2"]
    tiny += ["model.token_dim=8"] if name.startswith("t2t") else ["model.patch_size=8"]
    tiny += [f"init_from={weights}"] if recipe.stage != "pretrain" else []
    tiny += [f"method.teacher={teacher}"] if "teacher" in recipe.method else []
    if "labels" in recipe.method:
        source = open_source(compose_and_check(["data=fake", "data.num_train=16", "data.num_val=8"]))
        tiny += [f"train.token_labels={made_up_store(folder.parent / 'store', source.train, source.classes)}"]
    config = compose_and_check([f"experiment={name}", *tiny, "debug=fast", f"output_dir={folder}"])
    assert plan(config, probe=False) == 0
    assert train(config)["step"] == 2
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("val_ema/top1" in row for row in rows) == (recipe.ema is not None)
    trained = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in trained] == [1, 2]
    assert all(math.isfinite(row["train/loss"]) for row in trained)
    return trained[-1]


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny trainings of two updates: what the recipes of these beginnings start from."""
    folder = tmp_path_factory.mktemp("tiny")
    runs = {"deit": "deit_tiny", "deit3": "deit3_small", "t2t": "t2t_14"}
    for name in runs.values():
        _two_steps_of_deit_or_t2t(name, folder / name, weights=Path(), teacher=Path())
    teacher = folder / "deit_tiny"
    _two_steps_of_deit_or_t2t("deit_tiny_distilled", folder / "distilled", weights=Path(), teacher=teacher)
    return {beginning: folder / name for beginning, name in runs.items()} | {"distilled": folder / "distilled"}


@pytest.mark.parametrize(
    "name", [n if n in NOT_SLOW else pytest.param(n, marks=pytest.mark.slow) for n in DEIT_AND_T2T]
)
def test_a_preset_of_deit_or_t2t_is_planned_and_makes_two_updates_at_a_tiny_size(
    name: str, tiny_runs: dict[str, Path], tmp_path: Path
) -> None:
    kind = "distilled" if name.endswith("384_distilled") else name.partition("_")[0]
    row = _two_steps_of_deit_or_t2t(name, tmp_path / "run", weights=tiny_runs[kind], teacher=tiny_runs["deit"])
    assert ("train/teacher_top1" in row) == ("teacher" in RECIPES[name].method)
    assert row["train/lr"] == pytest.approx(1e-6 if RECIPES[name].by_epoch == DEITS else row["train/lr"])


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
        backbone = build({**config.model, "num_classes": recipe.num_classes})
        method = build_method(config, backbone, None)
    freeze(backbone, config.stage.train_blocks)
    return method


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("name", ["vit_finetune_imagenet", "vit_finetune_cifar10", "vit_finetune_cifar100"])
def test_vits_fine_tuning_resizes_positions_as_jax_does_whoever_wrote_the_weights(name: str, empty_file: Path) -> None:
    assert _composed(name, empty_file).stage.position_mode == "jax"


@pytest.mark.parametrize("name", ["vit_pretrain", "vit_imagenet21k", "vit_imagenet"])
def test_the_hidden_layer_of_the_head_is_as_wide_as_the_model(name: str, empty_file: Path) -> None:
    assert _composed(name, empty_file, "model=vit_large").model["representation_dim"] == 1024


def test_cosub_is_deit3_small_but_for_its_method(empty_file: Path) -> None:
    ours, plain = (_composed(name, empty_file) for name in ("deit3_small_cosub", "deit3_small"))
    assert (ours.method.pop("_target_"), ours.method) == ("vitexp.methods.cosub.Cosub", {"binarize": True})
    assert plain.method["loss"] == "binary", "of mixed pictures each class is right in both"
    for group in ("model", "optim", "schedule", "augment", "data", "train", "stage"):
        assert getattr(ours, group) == getattr(plain, group), group
