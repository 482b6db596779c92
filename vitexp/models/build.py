"""Models by the names of their YAML files, in a notebook and without Hydra."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from vitexp.config_paths import conf_dir
from vitexp.errors import UserError, nearest


def build_model(name: str, /, **overrides: Any) -> nn.Module:
    """The freshly initialised model of conf/model/<name>.yaml with the given values in place of the file's.

    `build_model("vit_base", num_classes=10, image_size=96)`; `build_model("vit", embed_dim=..., depth=...)` for any
    ViT; `build_model("timm", name="resnet18")` for any timm model. A `num_classes` that neither the file nor the caller
    says is ImageNet's 1000. Raises UserError for unknown names and for values that do not fit."""
    options = model_options(name)
    target = options.pop("_target_")
    constructor = _import(target)
    known = [key for key in inspect.signature(constructor).parameters if key != "self"]
    for key in overrides:
        if key not in known:
            raise UserError(f"model.{key}: {constructor.__name__} has no such option.{nearest(key, known)}")
    options |= overrides
    if options.get("num_classes") is None:
        options.pop("num_classes", None)  # in a run it comes from the data; here the constructor's default stands
    return constructor(**options)


def model_names() -> list[str]:
    """What `build_model` and `model=` on the command line can name."""
    return sorted(file.stem for file in (conf_dir() / "model").glob("*.yaml"))


def model_options(name: str) -> dict[str, Any]:
    """The constructor's values of one YAML file, those of the files in its `defaults` list included."""
    known = model_names()
    if name not in known:
        raise UserError(f"no model named {name!r}.{nearest(name, known)}\nThere are: {', '.join(known)}")
    return _merged(conf_dir() / "model" / f"{name}.yaml")


def _merged(file: Path) -> dict[str, Any]:
    own = yaml.safe_load(file.read_text(encoding="utf-8"))
    defaults = own.pop("defaults", ["_self_"])
    merged: dict[str, Any] = {}
    for entry in defaults if "_self_" in defaults else [*defaults, "_self_"]:
        merged |= own if entry == "_self_" else _merged(file.parent / f"{entry}.yaml")
    return merged


def _import(target: str) -> Any:
    module, _, attribute = target.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
