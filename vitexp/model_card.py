"""README.md of an export: what the model is, how it was made, and how to load it. Only what the run itself recorded."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import vitexp
from vitexp.checks import leaves
from vitexp.config import CONFIG_NAME, RAW_NAME, compose_unjudged
from vitexp.errors import UserError
from vitexp.run_folder import cannot
from vitexp.trained import TrainedRun

CLASSES_SHOWN = 20
PLACES = ("output_dir", "group", "pipeline")  # of one run among others, and no part of what it is
# Of the resolved settings, those that a reader asks for first; what a run does not have is left out.
KEY_SETTINGS = (
    "stage.name", "train.epochs", "train.max_steps", "train.batch_size", "train.accumulate", "train.fraction",
    "train.repeats", "train.clip_norm", "train.ema_decay", "train.ema_warmup", "optim.name", "optim.lr",
    "optim.base_lr", "optim.reference_batch", "optim.weight_decay", "optim.layer_decay", "schedule._target_",
    "schedule.warmup_epochs", "schedule.min_lr", "model.drop_path", "model.dropout", "augment.name", "method._target_",
    "method.teacher", "method.label_smoothing", "init_from", "seed",
)  # fmt: skip
SUMMARY_FACTS = ("step", "epoch", "lr", "global_batch", "precision", "device", "processes")
PLAIN = re.compile(r"[A-Za-z_./:-][A-Za-z0-9_./:-]*")
WORDS_WITH_A_MEANING = {"true", "false", "null", "nan", "inf", "-inf"}


@dataclass(frozen=True)
class Records:
    """What a run wrote down about itself; {} where the file does not lie beside the weights."""

    settings: dict[str, Any]  # config.yaml
    composed: dict[str, Any]  # config.interpolated.yaml
    summary: dict[str, Any]  # summary.json


def read_records(folder: Path) -> Records:
    """Of a run folder, or of a folder with nothing but weights. UserError where a file is there and cannot be read."""
    return Records(
        settings=_mapping(folder / CONFIG_NAME, yaml.safe_load),
        composed=_mapping(folder / RAW_NAME, yaml.safe_load),
        summary=_mapping(folder / "summary.json", json.loads),
    )


def model_card(
    run: TrainedRun,
    records: Records,
    *,
    weights: str,
    training: str | None,
    export: str,
    library: str,
    usage: str,
    checked: str,
) -> str:
    """Markdown. `weights` says which of the run's they are, `training` and `export` are commands (None: it is not
    known), `checked` what the comparison of the export with the run came to."""
    parts = [
        _front_matter(run, library),
        f"# {_title(run, records)}",
        _model(run, records, weights),
        "## Use\n\n```python\n" + usage + "\n```\n\n" + _preprocessing(run) + "\n\n" + checked,
        _metrics(run),
        _classes(run),
        _recipe(records),
        _commands(training, export),
        _licence(records, run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def command_of(records: Records, config_dir: str | None) -> str | None:
    """`python -m vitexp ...` that composes the run's settings again, all of them; None where that is not possible.

    A run does not record the words it was started with, but its settings and the option chosen of each group: what
    differs from these options is what a person or an experiment changed. The result is composed once more and compared,
    so it is right or None."""
    choices = records.composed.get("choices")
    wanted = dict(leaves({key: records.composed[key] for key in records.composed if key not in ("choices", *PLACES)}))
    if not wanted or not isinstance(choices, dict):
        return None
    try:
        usual, _ = _composed([], config_dir)
        chosen = [f"{group}={option}" for group, option in choices.items() if usual.get(group) != option]
        _, base = _composed(chosen, config_dir)
        changed = [key for key, value in wanted.items() if key not in base or base[key] != value]
        known = {".".join(key.split(".")[:depth]) for key in base for depth in range(1, key.count(".") + 2)}
        overrides = chosen + [f"{'' if key in known else '+'}{key}={_value(wanted[key])}" for key in changed]
        _, again = _composed(overrides, config_dir)
    except UserError:  # an option that is no longer there, or lies in a --config-dir that was not given
        return None
    if any(key not in again or again[key] != value for key, value in wanted.items()):
        return None
    return " ".join(["python -m vitexp", *map(shlex.quote, overrides)])


def _composed(overrides: list[str], config_dir: str | None) -> tuple[dict[str, str], dict[str, Any]]:
    """The option of each group, and the value of each key before interpolation."""
    choices, tree = compose_unjudged(overrides, config_dir)
    return choices, dict(leaves(tree))


def _value(value: Any) -> str:
    """As Hydra's command line reads it."""
    if isinstance(value, str):
        if PLAIN.fullmatch(value) and value.lower() not in WORDS_WITH_A_MEANING:
            return value
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, list):
        return "[" + ",".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_value(inner)}" for key, inner in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


# ---- sections --------------------------------------------------------------------------------------------------------


def _front_matter(run: TrainedRun, library: str) -> str:
    lines = [
        "---",
        f"library_name: {library}",
        "tags: [vitexp, image-classification]" if run.classes else "tags: [vitexp]",
    ]
    if run.classes:
        lines.append("pipeline_tag: image-classification")
    return "\n".join([*lines, "---"])


def _title(run: TrainedRun, records: Records) -> str:
    model = run.architecture.get("name") or records.settings.get("choices", {}).get("model")
    data = records.summary.get("data", {}).get("name") or records.settings.get("data", {}).get("name")
    kind = str(run.architecture["_target_"]).rpartition(".")[2]
    return f"{model or kind}{f' on {data}' if data else ''}"


def _model(run: TrainedRun, records: Records, weights: str) -> str:
    height, width = run.preprocessing["image_size"]
    facts = records.summary
    lines = [
        f"- architecture: `{run.architecture['_target_']}`, pictures of {height}x{width} with "
        f"{run.preprocessing['channels']} channels, "
        + (f"{len(run.classes)} classes" if run.classes else "no classifier: features come out"),
        f"- weights: {weights}",
    ]
    if "parameters" in facts:
        lines.append(f"- size: {facts['parameters']:,} parameters, {facts['gflops']:g} GFLOPs a picture")
    if "name" in facts:
        lines.append(f"- experiment: {facts['name']}, stage {run.stage}, seed {facts['seed']}")
    if "data" in facts:
        lines.append(f"- data: {facts['data']['name']}, fingerprint `{facts['data']['fingerprint']}`")
    if facts.get("git"):
        lines.append(f"- code: {', '.join(f'{key} {value}' for key, value in facts['git'].items())}")
    if facts.get("versions"):
        lines.append(f"- versions: {', '.join(f'{name} {number}' for name, number in facts['versions'].items())}")
    return "\n".join(lines)


def _preprocessing(run: TrainedRun) -> str:
    given = run.preprocessing
    height, width = given["image_size"]
    return (
        f"Preprocessing: the short side to {int(min(height, width) / given['crop_fraction'])} pixels "
        f"({given['interpolation']}), the middle {height}x{width} of it, pixels in 0..1 less mean {given['mean']}, "
        f"over std {given['std']}. A picture that has {height}x{width} already is taken as it is."
    )


def _metrics(run: TrainedRun) -> str:
    if not run.metrics:
        return (
            "## Metrics\n\nThese weights were not measured: `python -m vitexp evaluate run=<this folder> data=…` does."
        )
    rows = [f"| {name} | {'none' if value is None else f'{value:.6g}'} |" for name, value in run.metrics.items()]
    return "\n".join(["## Metrics", "", "On the run's validation split.", "", "| metric | value |", "|---|---|", *rows])


def _classes(run: TrainedRun) -> str:
    if not run.classes:
        return ""
    shown = ", ".join(run.classes[:CLASSES_SHOWN])
    more = len(run.classes) - CLASSES_SHOWN
    return f"## Classes\n\nIn the order of the logits: {shown}{f', and {more} more' if more > 0 else ''}."


def _recipe(records: Records) -> str:
    if not records.settings:
        return "## Recipe\n\nThe settings of the run did not lie beside its weights."
    choices = records.settings.get("choices", {})
    flat = dict(leaves(records.settings))
    rows = [f"| {key} | {flat[key]} |" for key in KEY_SETTINGS if flat.get(key) is not None]
    rows += [f"| {key}, as it came out | {records.summary[key]} |" for key in SUMMARY_FACTS if key in records.summary]
    chosen = ", ".join(f"{group}={option}" for group, option in choices.items())
    return "\n".join(["## Recipe", "", f"Options chosen: {chosen}.", "", "| setting | value |", "|---|---|", *rows])


def _commands(training: str | None, export: str) -> str:
    if training is None:
        how = "The run's settings do not lie here in a form that could be composed again."
    else:
        how = f"Trained with these settings:\n\n```\n{training}\n```"
    return f"## Commands\n\n{how}\n\nExported by vitexp {vitexp.__version__}:\n\n```\n{export}\n```"


def _licence(records: Records, run: TrainedRun) -> str:
    start = records.settings.get("init_from") or ("timm's" if run.architecture.get("pretrained") else None)
    text = "Whoever trained the weights decides on their licence, within what that of the pictures allows."
    if start:
        text += f" They were started from {start} weights, whose licence applies, too."
    return f"## Licence\n\n{text}"


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise cannot("read", path, error) from error
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: cannot be read: it holds no settings of a run")
    return content
