"""Every shipped YAML file composes, passes the checks and builds; every experiment runs two steps."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from vitexp.config import build, compose_and_check
from vitexp.config_paths import conf_dir, config_groups
from vitexp.models.build import build_model

OPTIONS = [f"{group}={name}" for group, names in config_groups().items() for name in names]
GROUPS = ("stage", "method", "model", "optim", "schedule", "data", "augment", "evaluators", "runtime", "tracking")
# What an option needs before it can run at all.
NEEDS = {
    "data=folder": lambda folder: [f"data.root={folder}"],
    "data=parquet": lambda folder: [f"data.train={_file(folder / 'train.parquet')}"],
    "data=hf": lambda folder: ["data.name=owner/name"],
}
STAGES = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in conf_dir().glob("stage/*")}
AFTER_ANOTHER = [name for name, stage in STAGES.items() if stage["needs_init"]]
EXPERIMENTS = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in conf_dir().glob("experiment/*")}
FROM_WEIGHTS = [
    name
    for name, preset in EXPERIMENTS.items()
    if any(part.get("override /stage") in AFTER_ANOTHER for part in preset["defaults"])
]
NEEDS |= {
    option: lambda folder: ["init_from=" + str(_file(folder / "weights.safetensors"))]
    for option in [*(f"stage={name}" for name in AFTER_ANOTHER), *(f"experiment={name}" for name in FROM_WEIGHTS)]
}
LABELLED = [
    f"experiment={name}"
    for name, preset in EXPERIMENTS.items()
    if {"override /method": "token_labeling"} in preset["defaults"]
    and preset.get("method", {}).get("labels") != "ground_truth"
]


def _with_store(needs: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    return lambda folder: [*needs(folder), f"train.token_labels={folder / 'store'}"]  # opened when training starts


NEEDS |= {option: _with_store(NEEDS.get(option, lambda folder: [])) for option in [*LABELLED, "method=token_labeling"]}
TAUGHT = [
    f"experiment={name}"
    for name, preset in EXPERIMENTS.items()
    if {"override /method": "distillation"} in preset["defaults"] and not preset.get("method", {}).get("teacher")
]
NEEDS |= {
    option: lambda folder: [f"method.teacher={folder / 'teacher'}"] for option in [*TAUGHT, "method=distillation"]
}
# Stages one after another: composed stage by stage in test_pipeline.py.
PIPELINES = [name for name, preset in EXPERIMENTS.items() if any("override /pipeline" in p for p in preset["defaults"])]
NO_SINGLE_RUN = [f"experiment={name}" for name in PIPELINES]
NO_SINGLE_RUN += [option for option in OPTIONS if option.startswith("pipeline=") and option != "pipeline=none"]
NO_SINGLE_RUN += [
    option for option in OPTIONS if option.startswith("sweep/")
]  # of a sweep's own: sweeps/test_search.py
TINY_ELSEWHERE = [
    name for name in EXPERIMENTS if name.startswith(("mae_", "lvvit_", "deit", "t2t_"))
]  # two steps of each in test_recipes.py
TWINS = ["vit_imagenet", "vit_imagenet21k"]  # vit_pretrain with other numbers
SLOW = [
    "vit_pretrain",
    "small_transfer",
    *TWINS,
    *(name for name, preset in EXPERIMENTS.items() if preset.get("model", {}).get("image_size", 0) > 224),
]


def _file(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def test_the_files_are_found() -> None:
    assert len(OPTIONS) == len(list(conf_dir().rglob("*.yaml"))) - 1  # config.yaml is no option
    assert len(OPTIONS) > 40
    within = {"sweep/launcher", "sweep/search", "sweep/space"}
    top = {*GROUPS, "pipeline", "sweep", "experiment", "debug"}
    assert {option.partition("=")[0] for option in OPTIONS} == top | within


@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in NO_SINGLE_RUN])
def test_an_option_composes_and_passes_the_checks(option: str, tmp_path: Path) -> None:
    needs = NEEDS.get(option, lambda folder: [])(tmp_path)
    config = compose_and_check([option, *needs])
    assert config.choices[option.partition("=")[0]] == option.partition("=")[2]


# A masked autoencoder has no class head: tests/models/test_mae.py builds it.
@pytest.mark.parametrize("option", [o for o in OPTIONS if o.startswith("model=") and o != "model=mae"])
def test_a_model_builds_on_the_meta_device_with_a_class_head(option: str) -> None:
    config = compose_and_check([option])
    with torch.device("meta"):
        model = build({**config.model, "num_classes": 7})
        size = config.model["image_size"]
        assert isinstance(model, nn.Module)
        assert model(torch.empty(2, config.model["in_channels"], size, size)).shape == (2, 7)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "option", [o for o in OPTIONS if o.split("=")[0] in ("optim", "schedule", "tracking", "augment")]
)
def test_a_component_takes_the_arguments_its_file_gives(option: str) -> None:
    config = compose_and_check([option])
    built = [build(config.optim["optimizer"]), build(config.schedule), build(config.tracking)]
    built += [build(config.augment["train"]), build(config.augment["eval"])]
    for part in built:
        if isinstance(part, partial):
            inspect.signature(part.func).bind_partial(*part.args, **part.keywords)


@pytest.mark.parametrize("path", sorted(conf_dir().glob("experiment/*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any("python -m vitexp experiment=" in line for line in header), "the command"
    assert any("Source:" in line for line in header), "the source"
    assert yaml.safe_load(text)["name"]


@pytest.fixture(scope="session")
def vit_base_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as a pretraining at 224 px leaves it, for what starts from weights; made once, in half precision."""
    file = tmp_path_factory.mktemp("weights") / "vit_base.safetensors"
    state = build_model("vit_base", num_classes=1000).state_dict()
    save_file({key: tensor.bfloat16() for key, tensor in state.items()}, file)
    return file


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in EXPERIMENTS
        if name not in (*TINY_ELSEWHERE, *PIPELINES)
    ],
)
def test_an_experiment_runs_two_steps(name: str, workdir: Path, request: pytest.FixtureRequest) -> None:
    from vitexp.train import train

    init = [f"init_from={request.getfixturevalue('vit_base_weights')}"] if name in FROM_WEIGHTS else []
    config = compose_and_check([f"experiment={name}", "debug=fast", "output_dir=run", *init])
    train(config)
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
    assert any("val/top1" in row for row in rows)
    assert Path("run/model.safetensors").is_file()
