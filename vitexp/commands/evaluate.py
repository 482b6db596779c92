"""`python -m vitexp evaluate run=<run>`, or `init_from=<weights> model=…`: measures the validation split.

`run` is a run folder, weights it exported (without their run's settings beside them the data is to be named), or
mlflow:<run id> (runs:/<run id>) with `uri=` as tracking.uri; evaluation.json goes beside the weights. `data=…` measures
on other pictures of the same classes: model, what it does to a picture, method and evaluators stay the run's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitexp.checks import check_components
from vitexp.config import RAW_NAME, RunConfig, compose_and_check
from vitexp.errors import UserError
from vitexp.locate import locate, own_settings, take_uri


def main(arguments: list[str], config_dir: str | None) -> int:
    named = [text.partition("=")[2] for text in arguments if text.startswith("run=")]
    weights = [text.partition("=")[2] for text in arguments if text.startswith("weights=")]
    rest = [text for text in arguments if not text.startswith(("run=", "weights="))]
    if named:
        if start := [text for text in rest if text.startswith("init_from=")]:
            raise UserError(f"{start[-1]}: run={named[-1]} has weights of its own; give one of the two")
        uri, rest = take_uri(rest)
        run = locate(named[-1], uri=uri, weights=weights[-1] if weights else None, needed=[RAW_NAME])
        place, file = run.folder, run.weights or "model.safetensors"
        config = own_settings(run, rest, config_dir)
        if config is None:
            config = as_exported(compose_and_check(rest, config_dir), place, file, given=rest)
        found = evaluate(config, run_dir=place, weights=file)
    else:
        config = compose_and_check(rest, config_dir)
        if config.init_from is None:
            raise UserError("evaluate: give run=<run folder>, or init_from=<weights> with the model they belong to")
        found = evaluate(config)
        place = Path(config.output_dir)
    from vitexp.run_folder import make_folder, write_atomic

    path = make_folder(place) / "evaluation.json"
    write_atomic(path, json.dumps(found, indent=2) + "\n")
    width = max(map(len, found), default=0) + 2
    for name, value in found.items():
        if isinstance(value, float):
            print(f"{name:<{width}}{value:.6g}")
    print(f"written to {path}")
    return 0


def evaluate(config: RunConfig, *, run_dir: Path | None = None, weights: str = "model.safetensors") -> dict[str, Any]:
    """Metrics of the validation split, named as in training (val/top1), and the accuracy of each class.

    With a run folder its exported weights are taken, else those that the settings name."""
    import torch

    from vitexp.export import load_part
    from vitexp.run import build_run
    from vitexp.runtime import make_accelerator
    from vitexp.train import measure
    from vitexp.trained import load_run

    if run_dir is not None:
        config.init_from = None
    accelerator = make_accelerator(
        precision=config.runtime.precision, device=config.runtime.device, threads=config.runtime.threads
    )
    try:
        run = build_run(config, for_training=False)
        if run.val_data is None:
            raise UserError(
                f"data={run.source.name}: has no validation split, or evaluators=none leaves nothing to measure"
            )
        if run_dir is not None:
            trained = load_run(run_dir, weights=weights)
            if trained.classes != run.source.classes:
                raise UserError(
                    f"run={run_dir}: was trained on other classes than the data has: "
                    f"{_differing(trained.classes, run.source.classes)}"
                )
            run.backbone.load_state_dict(trained.model.state_dict())
            for name, part in run.method.parts.items():
                part.load_state_dict(load_part(run_dir, name))
        run.method.to(accelerator.device)
        with torch.no_grad():
            metrics, arrays = measure(run, "val", accelerator=accelerator)
    finally:
        accelerator.end_training()
    per_class = arrays.get("val/per_class_accuracy")
    found: dict[str, Any] = dict(metrics)
    if per_class is not None:
        accuracy = {name: float(a) for name, a in zip(run.source.classes, per_class, strict=True)}
        found["val/class_accuracy"] = {name: None if math.isnan(a) else a for name, a in accuracy.items()}
    return found


def as_exported(config: RunConfig, folder: Path, weights: str, *, given: Sequence[str] = ()) -> RunConfig:
    """The settings with the model of exported weights and what its run did to a picture to evaluate it, so that only
    the data is to be named. Where the run's settings lie beside, method and evaluators are its own, too, unless the
    overrides `given` say otherwise. Raises UserError."""
    from vitexp.trained import load_run

    trained = load_run(folder, weights=weights)
    seen = dict(trained.preprocessing)
    config.data |= {key: seen.pop(key) for key in ("mean", "std", "channels")}
    if "channels" in config.data["source"]:  # resolved before
        config.data["source"]["channels"] = config.data["channels"]
    config.augment["eval"] = {"_target_": "vitexp.data.transforms.ResizeCenterCrop", **seen}
    named = {text.partition("=")[0].partition(".")[0] for text in given}
    own = {group: trained.config[group] for group in ("method", "evaluators") if group in set(trained.config) - named}
    check_components(own, own)  # a file of the folder must not name what is built unseen
    for group, node in own.items():
        setattr(config, group, node)
        config.choices[group] = trained.config.get("choices", {}).get(group, "")
    config.model = trained.architecture
    if "method" in own or trained.architecture.get("num_classes"):
        config.model = trained.architecture | {"num_classes": None}  # the data's: compared by name later
    return config


def _differing(ours: list[str], theirs: list[str]) -> str:
    missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    return f"missing {', '.join(missing[:5]) or 'none'}; extra {', '.join(extra[:5]) or 'none'}"
