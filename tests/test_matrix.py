"""Every model with every method in every stage: sensible ones run two updates, the others say in one line why not."""

from __future__ import annotations

import copy
import functools
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from tests.data.made_up_store import made_up_store
from vitexp import checks, reports, tracking
from vitexp.config import RunConfig, check, compose_unjudged
from vitexp.config_paths import conf_dir, config_groups
from vitexp.errors import UserError
from vitexp.models.build import model_names, model_options
from vitexp.run import Run, build_run, open_source
from vitexp.train import train

SIZES = {"image_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}
NO_PATCHES = {key: value for key, value in SIZES.items() if key != "patch_size"} | {"image_size": 32, "token_dim": 4}
OF_TIMM = {"patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}
OF_A_VIT = ("blocks.1.", "norm.", "fc_norm.", "pre_logits.", "head.", "head_dist.", "aux_head.")


@dataclass(frozen=True)
class Model:
    """A tiny model, and what of the rules below it falls under."""

    option: str
    settings: dict[str, Any]
    no_mae: str | None = None  # why patches cannot be left out, or what a decoder would not train
    no_tokens: str | None = None  # why its tokens cannot learn labels
    class_token: bool = True
    fixed: tuple[str, ...] = ()  # parameters that never learn
    heads: tuple[str, ...] = ("head.",)
    last: tuple[str, ...] = OF_A_VIT  # what the last block and all behind it are named
    leaves_out: dict[str, Any] = field(default_factory=lambda: {"drop_path": 0.1})  # what makes two submodels of it


OVERLAP = r"its embed\(\) cannot leave patches out .* where tokens see beyond their patches, hidden pixels would show"
NOT_TRAINED = r"model\.{} would never be trained by a masked autoencoder: model\.{}"
SINUSOID = ("pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w")
NO_VIT = r"model\.name=test_resnet: only a plain timm ViT can be split"
MODELS = {
    "vit": Model("vit", SIZES),
    "vit-mean": Model("vit", SIZES | {"pool": "mean", "class_token": False}, class_token=False),
    "vit-norm-after-pool": Model(
        "vit",
        SIZES | {"pool": "mean", "norm": "after_pool"},
        no_mae=NOT_TRAINED.format("fc_norm", "norm=before_pool"),
    ),
    "vit-representation": Model(
        "vit",
        SIZES | {"representation_dim": 8},
        no_mae=NOT_TRAINED.format("pre_logits", "representation_dim=null"),
    ),
    "vit-of-mae": Model(
        "vit", SIZES | {"position_embedding": "sincos", "init": "mae", "head_norm": "batch"}, fixed=("pos_embed",)
    ),
    "vit-of-big-vision": Model(
        "vit",
        SIZES | {"position_embedding": "sincos_big_vision", "pool": "mean", "class_token": False, "layer_scale": 0.1},
        class_token=False,
    ),
    "deit": Model("deit", SIZES),
    "deit-distilled": Model("deit", SIZES | {"distilled": True}, heads=("head.", "head_dist.")),
    "deit3": Model("deit3_small", SIZES),
    "deit3-parallel": Model("deit3_small_18x2", SIZES),
    "deit3-hmlp": Model("deit3_small", SIZES | {"stem": "hmlp"}),
    "lvvit": Model("lvvit", SIZES | {"stem_channels": 4}, no_mae=OVERLAP, heads=("head.", "aux_head.")),
    "lvvit-without-token-head": Model(
        "lvvit",
        SIZES | {"stem_channels": 4, "token_head": False, "output": "cls"},
        no_mae=OVERLAP,
        no_tokens=r"model\.token_head=false leaves no classifier of tokens to teach",
    ),
    "t2t-performer": Model("t2t", NO_PATCHES, no_mae=OVERLAP, fixed=SINUSOID),
    "t2t-transformer": Model("t2t", NO_PATCHES | {"token_module": "transformer"}, no_mae=OVERLAP, fixed=SINUSOID),
    "t2t-se": Model("t2t_14_se", NO_PATCHES | {"embed_dim": 64}, no_mae=OVERLAP, fixed=SINUSOID),
    "t2t-ghost": Model("t2t_16_ghost", NO_PATCHES, no_mae=OVERLAP, fixed=SINUSOID),
    "t2t-dense": Model(
        "t2t_dense",
        {key: NO_PATCHES[key] for key in ("image_size", "num_heads", "token_dim")}
        | {"stem_dim": 8, "depths": [1, 1], "growth": 4},
        no_mae=OVERLAP,
        fixed=SINUSOID,
        last=("blocks.1.", "blocks.2.", "norm.", "head."),  # what halves the width, and the block behind it
    ),
    "timm-convolutional": Model(
        "timm",
        {"name": "test_resnet", "image_size": 16},
        no_mae=NO_VIT,
        no_tokens=rf"TimmBackbone hands out no tokens to teach \({NO_VIT}",
        heads=("fc.",),
        last=("layer4.", "fc."),
        leaves_out={"options": {"drop_path_rate": 0.1}},
    ),
    "timm-vit": Model(
        "timm",
        {"name": "test_vit", "image_size": 16} | {"options": OF_TIMM},
        leaves_out={"options": OF_TIMM | {"drop_path_rate": 0.1}},
    ),
    "autoencoder": Model("mae", SIZES),
}
METHODS = {
    "supervised": ["method=supervised"],
    "mae": [
        "method=mae",
        *(f"method.decoder_{key}={value}" for key, value in {"dim": 8, "depth": 1, "num_heads": 2}.items()),
        "evaluators=reconstruction",
    ],
    "token_labeling": ["method=token_labeling"],
    "relabeling": ["method=token_labeling", "method.labels=picture"],
    "distillation": ["method=distillation"],
    "cosub": ["method=cosub"],
}
STAGES: dict[str, dict[str, Any]] = {
    file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in conf_dir().glob("stage/*.yaml")
}
STAGES["partial"] = STAGES["finetune"] | {"train_blocks": 1}
COMMON = ["data=fake", "data.num_train=8", "data.num_val=4", "data.num_classes=3", "augment=none", "tracking=none"]
COMMON += [
    "optim.lr=0.01",
    "optim.weight_decay=0",
    "schedule=constant",
    "train.batch_size=4",
    "train.max_steps=2",
    "train.save_every=9",
]
COMMON += ["train.eval_every=9", "train.log_every=1", "train.workers=0", "runtime.precision=fp32", "runtime.device=cpu"]


def why_not(model: str, method: str, stage: str) -> str | None:
    """The whole table: what is said of a combination that makes no sense, None of a sensible one."""
    m = MODELS[model]
    if m.option == "mae":
        return r"model\.num_classes=3: a masked autoencoder has no classifier; to train one: model=vit_base method=mae"
    if method == "mae" and m.no_mae:
        return m.no_mae
    if method == "mae" and stage in ("partial", "linear_probe"):
        return rf"stage\.train_blocks={STAGES[stage]['train_blocks']}: \w+ has no classifier to train"
    if method == "cosub" and stage == "linear_probe":
        return r"method=cosub: what trains leaves nothing out.*stage\.train_blocks"
    if method == "token_labeling" and m.no_tokens:
        return rf"method\.labels=tokens: {m.no_tokens}.*method\.labels=picture"
    return None


# ---- running one -------------------------------------------------------------------------------------------------
signature_of = functools.cache(checks.signature_of)  # else each run has the sources parsed again


@functools.cache
def composed(method: str) -> tuple[dict[str, str], dict[str, Any]]:
    return compose_unjudged([*COMMON, *METHODS[method]])


def settings(
    place: Path,
    model: str,
    method: str,
    stage: str,
    *,
    into: str = "run",
    init_from: Path | None = None,
    evaluators: dict[str, Any] | None = None,
) -> RunConfig:
    """As compose_and_check makes them, but that Hydra is asked once a method and not once a run."""
    choices, tree = copy.deepcopy(composed(method))
    tree |= {"stage": STAGES[stage], "init_from": None if init_from is None else str(init_from)}
    tree |= {"output_dir": str(place / into), "resume": "never"}
    tree["model"] = model_options(MODELS[model].option) | MODELS[model].settings
    tree["evaluators"] = tree["evaluators"] if evaluators is None else evaluators
    if choices["method"] == "token_labeling":
        tree["train"]["token_labels"] = str(place / f"labels_{MODELS[model].settings['image_size']}")
    if choices["method"] == "cosub" and model != "autoencoder":
        tree["model"] |= MODELS[model].leaves_out
    if choices["method"] == "distillation":
        tree["method"]["teacher"] = str(place / "teacher")
    return check(OmegaConf.create(tree), choices=choices, defaults={})


def quicken(patched: pytest.MonkeyPatch) -> None:
    """Leaves out what takes three quarters of so small a run's time and is no part of what is asked here."""
    for name in ("curves", "confusion_matrix", "reliability", "reconstructions"):
        patched.setattr(reports.plots, name, lambda *_, **__: None)
    for name in ("draw_pictures", "draw_token_labels"):
        patched.setattr(reports, name, lambda *_, **__: None)
    patched.setattr(Run, "gflops", lambda _: 0.0)
    patched.setattr(os, "fsync", lambda _: None)
    patched.setattr(tracking, "git_state", lambda _: {})
    patched.setattr(checks, "signature_of", signature_of)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs lie, beside a teacher and label maps of the made-up pictures, which are the same for all of a size."""
    folder = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patched:
        quicken(patched)
        for model in ("vit", "t2t-performer"):
            config = settings(folder, model, "supervised", "pretrain", into="teacher")
            source = open_source(config)
            made_up_store(folder / f"labels_{config.model['image_size']}", source.train, source.classes)
        train(settings(folder, "vit", "supervised", "pretrain", into="teacher"))
    return folder


@pytest.fixture(scope="module")
def pretrained(place: Path) -> Callable[[str, str], Path]:
    """The folder of a model's pretraining with a method, made when it is first asked for."""

    @functools.cache
    def folder_of(model: str, method: str) -> Path:
        train(settings(place, model, method, "pretrain", into=f"{model}/{method}"))
        return place / model / method

    return folder_of


def run(config: RunConfig) -> dict[str, Tensor]:
    """The weights it leaves, after two updates unless it only measures, with a loss that is finite."""
    summary = train(config)
    assert summary["step"] == (2 if config.stage.trains else 0)
    if config.stage.trains:
        assert math.isfinite(summary["train/loss"])
    assert any(name.startswith("val/") for name in summary)
    return load_file(Path(config.output_dir, "model.safetensors"))


def assert_refused(config: RunConfig, words: str) -> None:
    with pytest.raises(UserError) as caught:
        train(config)
    assert re.search(words, str(caught.value)), caught.value
    assert len(str(caught.value).splitlines()) <= 3


def assert_moved(before: dict[str, Tensor], after: dict[str, Tensor], moves: Callable[[str], bool]) -> None:
    """That those of both that `moves` names have changed, and that no bit of any other has."""
    for name in before.keys() & after.keys():
        if name.endswith("num_batches_tracked"):  # a fresh head counts from 0 again
            continue
        assert torch.equal(before[name], after[name]) != moves(name), f"{name} {'stood' if moves(name) else 'moved'}"


def learners(model: str, stage: str) -> Callable[[str], bool]:
    """Whether what has this name learns."""
    m = MODELS[model]
    places = {"evaluate": (), "linear_probe": m.heads, "partial": m.last}.get(stage, ("",))
    return lambda name: name.startswith(places) and not name.startswith(m.fixed)


# ---- the matrix --------------------------------------------------------------------------------------------------
def test_every_kind_of_model_every_method_and_every_stage_is_in_the_matrix() -> None:
    shipped = {model_options(name)["_target_"] for name in model_names()}
    assert {model_options(model.option)["_target_"] for model in MODELS.values()} == shipped
    assert {option.removeprefix("method=") for option, *_ in METHODS.values()} == set(config_groups()["method"])
    assert set(config_groups()["stage"]) < set(STAGES)


IN_THE_GUIDE = {
    "`vit`": ("vit", "vit-mean", "vit-of-mae", "vit-of-big-vision"),
    "`deit`, `deit3_*`": ("deit", "deit-distilled", "deit3", "deit3-parallel", "deit3-hmlp"),
    "`t2t`": ("t2t-performer", "t2t-transformer"),
    "`t2t_14_se`": ("t2t-se",),
    "`t2t_16_ghost`": ("t2t-ghost",),
    "`t2t_dense`": ("t2t-dense",),
    "`lvvit`": ("lvvit",),
    "`timm`, a plain ViT": ("timm-vit",),
    "`timm`, any other": ("timm-convolutional",),
}


def test_the_guide_says_of_each_pair_what_the_matrix_does(repository: Path) -> None:
    lines = (repository / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    _, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [row[0] for row in rows] == list(IN_THE_GUIDE)
    columns = ["supervised", "distillation", "cosub", "token_labeling", "relabeling", "mae"]
    for name, *cells in rows:
        for model in IN_THE_GUIDE[name]:
            sensible = [why_not(model, method, "pretrain") is None for method in columns]
            assert [cell == "yes" for cell in cells] == sensible, model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_pretraining_moves_every_weight_or_says_why_not(
    model: str, method: str, place: Path, pretrained: Callable[[str, str], Path]
) -> None:
    config = settings(place, model, method, "pretrain")
    if words := why_not(model, method, "pretrain"):
        assert_refused(config, words)
        return
    fresh = build_run(config).backbone.state_dict()
    assert_moved(fresh, load_file(pretrained(model, method) / "model.safetensors"), learners(model, "pretrain"))


LATER = [stage for stage in STAGES if stage != "pretrain"]
SENSIBLE = [
    (model, method)
    for model in MODELS
    for method in METHODS
    if method != "relabeling" and not why_not(model, method, "pretrain")  # which is supervised with other targets
]


@pytest.mark.slow
@pytest.mark.parametrize("stage", LATER)
@pytest.mark.parametrize(("model", "method"), SENSIBLE)
def test_a_stage_goes_on_with_the_same_method_and_moves_its_weights_alone(
    model: str, method: str, stage: str, place: Path, pretrained: Callable[[str, str], Path]
) -> None:
    former = pretrained(model, method)
    config = settings(place, model, method, stage, init_from=former)
    if words := why_not(model, method, stage):
        assert_refused(config, words)
        return
    assert_moved(load_file(former / "model.safetensors"), run(config), learners(model, stage))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "linear_probe"])
@pytest.mark.parametrize(("model", "method"), [pair for pair in SENSIBLE if pair[1] != "supervised"])
def test_what_a_method_has_taught_goes_on_supervised(
    model: str, method: str, stage: str, place: Path, pretrained: Callable[[str, str], Path]
) -> None:
    former = pretrained(model, method)
    after = run(settings(place, model, "supervised", stage, init_from=former))
    assert_moved(load_file(former / "model.safetensors"), after, learners(model, stage))
    assert all(after[name].any() for name in after if name.startswith(MODELS[model].heads))


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["mean", "cls", "model"])
@pytest.mark.parametrize("model", [model for model, m in MODELS.items() if m.option != "mae"])
def test_neighbours_are_found_by_features_of_every_model(
    model: str, pool: str, place: Path, pretrained: Callable[[str, str], Path]
) -> None:
    knn = {"knn": {"_target_": "vitexp.evaluators.knn.Knn", "k": 3, "pool": pool}}
    former = pretrained(model, "supervised")
    config = settings(place, model, "supervised", "evaluate", init_from=former, evaluators=knn)
    key = rf"evaluators\.knn\.pool={pool}: "
    if pool != "model" and model == "timm-convolutional":
        assert_refused(config, rf"{key}{NO_VIT}.*evaluators\.knn\.pool=model works with any timm model")
    elif pool == "cls" and not MODELS[model].class_token:
        assert_refused(config, rf"{key}the model has no class token; use mean or model")
    else:
        run(config)
