"""From conf/ and the command line to checked, typed settings and built components.

Hydra composes, vitexp.checks judges, and build() is the only place that calls hydra.utils.instantiate. Everything
behind this module receives plain objects and numbers.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, OverrideType, RangeSweep
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitexp import checks
from vitexp.config_paths import conf_dir, config_groups
from vitexp.errors import UserError, nearest


@dataclass
class StageConfig:
    name: str = "pretrain"
    needs_init: bool = False
    trains: bool = True
    head: str = "auto"
    position_mode: str | None = None
    head_init: str = "zero"
    train_blocks: int | str = "all"


@dataclass
class TrainConfig:
    epochs: float | None = None
    max_steps: int | None = None
    fraction: float = 1.0
    classes: list[str | int] | None = None
    token_labels: str | None = None
    repeats: int = 1
    batch_size: int = 64
    accumulate: int = 1
    clip_norm: float | None = None
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    log_every: int = 10
    workers: int | None = None
    ema_decay: float | None = None
    ema_warmup: bool = True
    log_weights: bool = True
    overfit: int | None = None


@dataclass
class RuntimeConfig:
    precision: str = "auto"
    device: str = "auto"
    processes: int = 1
    compile: bool = False
    threads: int | None = None
    profile: int | None = None


@dataclass
class SweepConfig:
    jobs: int
    time_limit: float | None
    silence_limit: float | None
    metric: str | None
    maximize: bool


@dataclass
class RunConfig:
    """The keys of a run that are not components, typed; components stay mappings with a `_target_`."""

    name: str
    seed: int
    output_dir: str
    resume: str
    allow_changes: bool
    init_from: str | None
    group: str | None
    stage: StageConfig
    train: TrainConfig
    runtime: RuntimeConfig
    model: dict[str, Any]
    method: dict[str, Any]
    optim: dict[str, Any]
    schedule: dict[str, Any]
    data: dict[str, Any]
    augment: dict[str, Any]
    evaluators: dict[str, Any]
    tracking: dict[str, Any]
    choices: dict[str, str]
    resolved: dict[str, Any] = field(default_factory=dict)  # all of it, as config.yaml keeps it
    raw: dict[str, Any] = field(default_factory=dict)  # the same before interpolation: what overrides work on later


EXCHANGEABLE = ("data", "augment", "evaluators", "runtime", "tracking")  # groups that a finished run's weights allow
CONFIG_NAME, RAW_NAME = "config.yaml", "config.interpolated.yaml"  # in a run folder: resolved, and as composed
MOST_JOBS = 10_000  # of a sweep, each with a folder and a line of the ledger, which is written at each start and end
TYPED = {"stage": StageConfig, "train": TrainConfig, "runtime": RuntimeConfig}


def register_resolvers(swept: Collection[str] = ()) -> None:
    """`${sweep_slug:}`: sweep_slug of the job that Hydra composes."""

    def slug(*, _root_: DictConfig) -> str:
        return sweep_slug(_root_.hydra.overrides.task, swept)

    OmegaConf.register_new_resolver("sweep_slug", slug, replace=True)


def sweep_slug(overrides: Iterable[str], swept: Collection[str]) -> str:
    """A short folder name for a sweep's job, the same for the same overrides in any order.

    It is made of the values of the `swept` keys, where they are known, and a hash of all overrides."""
    overrides = sorted(overrides)
    named = [text for text in overrides if text.partition("=")[0].lstrip("+~") in swept] or overrides
    pairs = [text.partition("=") for text in named]
    words = [re.sub(r"[^A-Za-z0-9.]+", "-", f"{k.rpartition('.')[2]}-{v}").strip("-") for k, _, v in pairs]
    return f"{'_'.join(words)[:60]}-{hashlib.sha1(chr(10).join(overrides).encode()).hexdigest()[:6]}"


def sweep_axes(overrides: Iterable[str], config_dir: str | None = None, *, ends: bool = False) -> list[list[str]]:
    """Each override as the list of those it stands for in a sweep: `optim=adam,sgd` as two, a plain one as itself.

    Lists, ranges and glob(...) over a group's options. An interval has no steps: with `ends` it stands for its two
    ends, without it raises UserError."""
    axes = []
    for part in search_space(overrides, config_dir):
        if isinstance(part, str):
            axes.append([part])
        elif part.values is not None:
            axes.append([f"{part.key}={value}" for value in part.values])
        elif ends:
            axes.append([f"{part.key}={part.text(value)}" for value in (part.low, part.high)])
        else:
            raise UserError(
                f"{part.key}=interval({part.low:g},{part.high:g}): has no steps to try one after another; give values, "
                "range(first,end,step), or search it: sweep=optuna"
            )
    if not ends and (count := math.prod(map(len, axes))) > MOST_JOBS:
        raise UserError(f"the combinations of these values are {count:,} jobs; a sweep has at most {MOST_JOBS:,}")
    return axes


def covering(axes: list[list[str]]) -> Iterator[list[str]]:
    """Overrides of jobs that together show every value of every axis once: few, however large the grid.

    One seed stands for all: no check tells them apart, and composing takes 0.2 s."""
    axes = [[axis[0], *(text for text in axis[1:] if not re.fullmatch(r"seed=\d+", text))] for axis in axes]
    for values in itertools.zip_longest(*axes) if axes else [()]:
        yield [value or axis[0] for value, axis in zip(values, axes, strict=True)]


@dataclass(frozen=True)
class Dimension:
    """A key that is swept: some values, or all numbers between two."""

    key: str
    values: tuple[str, ...] | None = None  # None: an interval
    low: float = 0.0
    high: float = 0.0  # included
    step: float | None = None  # of a range, whose `values` are all of it
    log: bool = False  # the logarithm is what changes evenly
    whole: bool = False

    def text(self, value: float) -> str:
        """Short enough to read, exact enough to search."""
        return str(round(value)) if self.whole else f"{value:.6g}"


def search_space(overrides: Iterable[str], config_dir: str | None = None) -> list[str | Dimension]:
    """The overrides in their order, those that are swept as dimensions. Raises UserError."""
    overrides = list(overrides)
    found: list[str | Dimension] = []
    for text, override in zip(overrides, parse_overrides(overrides), strict=True):
        key, swept = override.get_key_element(), override.value()
        if isinstance(swept, Glob):
            options = config_groups(config_dir).get(override.key_or_group)
            if options is None:
                raise UserError(f"{text}: glob chooses options of a group, and {override.key_or_group} is none")
            values = swept.filter(options)
            if not values:
                raise UserError(f"{text}: no option of {override.key_or_group} matches; there are {', '.join(options)}")
            found.append(Dimension(key, tuple(values)))
        elif isinstance(swept, IntervalSweep):
            found.append(_interval(text, key, swept))
        elif override.is_discrete_sweep():
            if isinstance(swept, RangeSweep):
                _check_range(text, swept)
            values = tuple(override.sweep_string_iterator())
            if not values:
                raise UserError(f"{text}: holds no value to try; a range goes from its first number to below its last")
            if isinstance(swept, RangeSweep) and not swept.shuffle and swept.step > 0:
                numbers = [float(value) for value in values]
                whole = all(isinstance(number, int) for number in (swept.start, swept.stop, swept.step))
                found.append(Dimension(key, values, numbers[0], numbers[-1], float(swept.step), whole=whole))
            else:
                found.append(Dimension(key, values))
        else:
            found.append(text)
    return found


def _check_range(text: str, swept: RangeSweep) -> None:
    """Before its values are listed."""
    start, stop = float(swept.start or 0), float(swept.stop or 0)
    if swept.step == 0:
        raise UserError(f"{text}: a range with steps of 0 has no end")
    if (count := (stop - start) / float(swept.step)) > MOST_JOBS:
        raise UserError(f"{text}: holds {count:,.0f} values; a sweep has at most {MOST_JOBS:,} jobs")


def _interval(text: str, key: str, swept: IntervalSweep) -> Dimension:
    low, high = (float(end) for end in (swept.start or 0, swept.end or 0))
    log = "log" in swept.tags
    if unknown := set(swept.tags) - {"log", "int"}:
        raise UserError(f"{text}: tag {min(unknown)!r} is none of log, int")
    if not low < high or (log and low <= 0):
        raise UserError(f"{text}: an interval goes from a lower to a higher number" + (", above 0 for log" * log))
    return Dimension(key, None, low, high, log=log, whole="int" in swept.tags or isinstance(swept.start, int))


def quoted(value: Any) -> str:
    """A YAML value as Hydra's command line wants it."""
    if isinstance(value, str):  # a backslash is one there, but for those right before a quote
        return "'" + re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), value) + "'"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{quoted(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(quoted(one) for one in value) + "]"
    return json.dumps(value)


def parse_overrides(overrides: list[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise UserError(f"{text!r}: expected key=value, such as optim.lr=1e-3 or model=vit_base")
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{text!r}: {reason}; put values with = , or spaces in inner quotes: key='a=b'") from None
    return parsed


def compose_and_check(overrides: list[str], config_dir: str | None = None) -> RunConfig:
    """The settings of one run from its overrides. Raises UserError naming the key at fault, before building."""
    parsed = parse_overrides(overrides)
    refuse_sweeps(parsed)
    groups, choices = _group_overrides(parsed, config_dir)
    base = _compose([o.input_line or "" for o in choices], config_dir)
    defaults = _plain(base, resolve=False)
    del defaults["hydra"]
    known = _all_keys(defaults, groups)
    for override in parsed:
        key = override.key_or_group
        if override in choices or key.startswith("hydra.") or override.type is OverrideType.ADD:
            continue
        if key not in known:
            level = key.rpartition(".")[0]
            while level and level not in known:
                level = level.rpartition(".")[0]
            siblings = sorted(k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == level)
            there = f"has: {', '.join(siblings)}" if siblings else f"is empty, and takes a new key as +{key}=…"
            raise UserError(
                f"{override.input_line}: no such key {key!r}.{nearest(key, known)}\n{level or 'top level'} {there}"
            )
    # What each value was before a person's overrides tells its kind (text, number, list) to the checks.
    composed = _compose(overrides, config_dir)
    return check(composed, choices=group_choices(composed), defaults=defaults)


def refuse_sweeps(parsed: list[Override], *, instead: str = "a sweep is python -m vitexp --multirun …") -> None:
    """Raises UserError for an override of several values."""
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: stands for several values, and one run takes one; {instead}")


def given_folder(overrides: Iterable[str]) -> Path | None:
    """The output_dir of a sweep or pipeline as a whole, None where none is given. Raises UserError."""
    given = [override for override in parse_overrides(list(overrides)) if override.key_or_group == "output_dir"]
    if not given:
        return None
    folder = given[-1].value()
    if not isinstance(folder, str) or not folder:
        raise UserError(f"{given[-1].input_line}: expected one folder, in which each run has its own")
    return Path(folder).expanduser().absolute()


def compose_unjudged(overrides: list[str], config_dir: str | None = None) -> tuple[dict[str, str], dict[str, Any]]:
    """The option of each group, and all settings before interpolation. No value is judged: pictures and weights that
    they name need not be here. Raises UserError for an option that is not there."""
    register_resolvers()
    composed = _compose(overrides, config_dir)
    tree = _plain(composed, resolve=False)
    del tree["hydra"]
    return group_choices(composed), tree


def pipeline_settings(overrides: list[str], config_dir: str | None = None) -> dict[str, Any] | None:
    """The `pipeline` part of what these overrides compose, None for pipeline=none. Raises UserError."""
    parsed = parse_overrides(overrides)
    if not any(override.key_or_group in ("pipeline", "experiment") for override in parsed):
        return None
    _, choices = _group_overrides(parsed, config_dir)
    of_it = [*choices, *(o for o in parsed if o.key_or_group.startswith("pipeline."))]
    composed = _compose([o.input_line or "" for o in of_it], config_dir)
    if group_choices(composed)["pipeline"] == "none":
        return None
    return _plain(composed.pipeline, resolve=False)


def sweep_settings(overrides: list[str], config_dir: str | None = None) -> dict[str, Any]:
    """The `sweep` part of what these overrides compose. Raises UserError for a key that it does not have."""
    of_it = [text for text in overrides if re.match(r"sweep[=./]", text.lstrip("+~"))]
    parsed = parse_overrides(of_it)
    _, choices = _group_overrides(parsed, config_dir)
    known = _plain(_compose([o.input_line or "" for o in choices], config_dir).sweep, resolve=False)
    keys = sorted(_all_keys(known, {}))
    for override in parsed:
        key = override.key_or_group.removeprefix("sweep.")
        if override not in choices and override.type is not OverrideType.ADD and key not in keys:
            raise UserError(f"{override.input_line}: no such key.{nearest(key, keys)}\nsweep has: {', '.join(keys)}")
    settings = _plain(_compose(of_it, config_dir).sweep, resolve=False)
    checks.check_shape({"sweep": settings}, {"sweep": known})
    checks.check_values({"sweep": settings}, {"sweep": known})
    checks.check_fields(settings, SweepConfig, "sweep.")
    checks.check_components({"sweep": settings}, {"sweep": settings})
    return settings


def _group_overrides(parsed: list[Override], config_dir: str | None) -> tuple[dict[str, list[str]], list[Override]]:
    """All groups with their options, and the overrides that choose one. Raises UserError for what is not there."""
    register_resolvers()
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir {config_dir}: no such folder")
    groups = config_groups(config_dir)
    choices = [override for override in parsed if override.key_or_group in groups]
    for choice in choices:
        name = choice.value()
        known = groups[choice.key_or_group]
        if choice.type is OverrideType.ADD and (conf_dir() / choice.key_or_group).is_dir():
            raise UserError(f"{choice.input_line}: there is one already; {choice.key_or_group}={name} takes its place")
        optional = name is None and choice.key_or_group in ("experiment", "debug")
        if choice.type is OverrideType.CHANGE and not optional and str(name) not in known:
            raise UserError(
                f"{choice.key_or_group}={checks.show(name)}: no such option.{nearest(str(name), known)}\n"
                f"{choice.key_or_group} has: {', '.join(known)}"
            )
    return groups, choices


def group_choices(composed: DictConfig) -> dict[str, str]:
    """The option each group was set to, such as model: vit_micro, for names and for comparing runs."""
    chosen = composed.hydra.runtime.choices
    return {str(group): str(name) for group, name in sorted(chosen.items()) if name and "/" not in group}


def _compose(overrides: list[str], config_dir: str | None) -> DictConfig:
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3", job_name="vitexp"):
            return compose("config", overrides=[*overrides, *search], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError("\n".join(lines[:3])) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at {mark.name}:{mark.line + 1}" if mark else ""
        raise UserError(f"a configuration file is not YAML{place}: {getattr(error, 'problem', error)}") from None


def _all_keys(node: Any, groups: dict[str, list[str]], prefix: str = "") -> set[str]:
    found = set(groups) if not prefix else set()
    if isinstance(node, dict):
        for key, value in node.items():
            dotted = f"{prefix}.{key}" if prefix else str(key)
            found |= {dotted} | _all_keys(value, groups, dotted)
    return found


def check(config: DictConfig, *, choices: dict[str, str], defaults: dict[str, Any]) -> RunConfig:
    """The settings of one run, resolved and typed. Raises UserError before any data or model is touched."""
    if choices.get("pipeline", "none") != "none":
        raise UserError(
            f"pipeline={choices['pipeline']}: --multirun and the commands take one run; leave it out, give stage=…"
        )
    config = OmegaConf.masked_copy(config, [key for key in config if key not in ("hydra", "pipeline", "sweep")])
    raw = _plain(config, resolve=False)
    for key, value in checks.leaves(raw):
        if value == "???":
            raise UserError(f"{key}: has no value yet; give {key}=…")
    try:
        resolved = _plain(config, resolve=True)
    except OmegaConfBaseException as error:  # an interpolation that goes round in circles or names nothing
        lines = [line.strip() for line in str(error).splitlines() if "object_type" not in line]
        raise UserError("\n".join(lines[:3])) from None
    resolved["choices"] = choices
    return _check_resolved(resolved, raw=raw, defaults=defaults)


def _check_resolved(resolved: dict[str, Any], *, raw: dict[str, Any], defaults: dict[str, Any]) -> RunConfig:
    names = [f.name for f in fields(RunConfig) if f.name not in ("resolved", "raw")]
    for key in resolved:
        if key not in names:
            raise UserError(f"{key}: no such key.{nearest(key, names)}\ntop level has: {', '.join(names)}")
    for key in names:
        if key not in resolved:
            raise UserError(f"{key}: missing from this configuration")
    checks.check_shape(resolved, {name: value for name, value in defaults.items() if name in names})
    for group, kind in TYPED.items():
        allowed = [f.name for f in fields(kind)]
        for key in resolved[group]:
            if key not in allowed:
                near = nearest(key, allowed)
                raise UserError(f"{group}.{key}: no such key.{near}\n{group} has: {', '.join(allowed)}")
    checks.check_values(resolved, defaults)
    checks.check_fields(resolved, RunConfig, "")
    for group, kind in TYPED.items():
        checks.check_fields(resolved[group], kind, f"{group}.")
    checks.check_components(resolved, raw)
    checks.check_model_shape(resolved["model"])
    checks.check_token_labels(resolved)
    checks.check_teacher(resolved)
    if resolved["train"]["epochs"] is None and resolved["train"]["max_steps"] is None:
        raise UserError("train.epochs=null train.max_steps=null: give one of them, else the run has no end")
    if resolved["stage"]["needs_init"] and not resolved["init_from"]:
        raise UserError(
            f"stage={resolved['stage']['name']}: needs init_from=<run folder or weights file> to start from"
        )
    typed: dict[str, Any] = {group: kind(**resolved[group]) for group, kind in TYPED.items()}
    return RunConfig(**({key: resolved[key] for key in names} | typed), resolved=resolved, raw=raw)


def _plain(config: DictConfig, *, resolve: bool) -> dict[str, Any]:
    tree: Any = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(tree, dict)
    return tree


def to_yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def request_of(config: RunConfig) -> str:
    """What a process of its own needs to be told to make this run."""
    return to_yaml({"resolved": config.resolved, "raw": config.raw})


def from_request(path: Path) -> RunConfig:
    """The settings that a parent process has checked and handed over."""
    request = yaml.safe_load(path.read_text(encoding="utf-8"))
    return _check_resolved(request["resolved"], raw=request["raw"], defaults={})


def reload(run_dir: Path, overrides: list[str], config_dir: str | None = None) -> RunConfig:
    """The settings of a run from its folder, with some changed, and of EXCHANGEABLE groups another option chosen.

    Raises UserError for keys that it does not have."""
    path = run_dir / RAW_NAME
    if not run_dir.is_dir():
        raise UserError(f"run={run_dir}: no such folder")
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"run={run_dir}: not the folder of a run, {RAW_NAME} cannot be read ({error})") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path}: not the configuration of a run")
    choices = saved.pop("choices", {})
    config, defaults = OmegaConf.create(saved), dict(saved)
    parsed = parse_overrides(overrides)
    refuse_sweeps(parsed)
    of_groups = [o for o in parsed if o.key_or_group in EXCHANGEABLE and o.type is OverrideType.CHANGE]
    for override in of_groups:
        key, (_, (choice,)) = override.key_or_group, _group_overrides([override], config_dir)
        config[key] = _compose([choice.input_line or ""], config_dir)[key]
        defaults[key] = _plain(config[key], resolve=False)
        choices[key] = str(choice.value())
    known = _all_keys(defaults, {}, "")
    for override in parsed:
        key = override.key_or_group
        if override in of_groups:
            continue
        if key not in known or override.type is not OverrideType.CHANGE:
            raise UserError(f"{override.input_line}: this run has no key {key!r}.{nearest(key, known)}")
        if isinstance(saved[key.partition(".")[0]], dict) and "." not in key:
            raise UserError(f"{override.input_line}: a run keeps its {key}; what can change is below it: {key}.<key>=…")
        OmegaConf.update(config, key, override.value())
    return check(config, choices=choices, defaults=defaults)


def build(node: dict[str, Any], **given: Any) -> Any:
    """The component a `_target_` mapping describes, its nested ones included, with arguments known only at run time.

    check() has seen the mapping: the target is allowed and takes these arguments."""
    try:
        return _plain_partials(instantiate(node, _convert_="all", **given))
    except HydraException as error:
        if isinstance(error.__cause__, UserError):  # what the component itself has to say, such as a missing class
            raise error.__cause__ from None
        raise


def _plain_partials(built: Any) -> Any:
    # Hydra 1.3 wraps partials in an object that checks itself on every call: 90 us against 1 us.
    if isinstance(built, functools.partial):
        return functools.partial(built.func, *built.args, **built.keywords)
    if isinstance(built, dict):
        return {key: _plain_partials(value) for key, value in built.items()}
    return built
