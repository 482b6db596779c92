"""`python -m vitexp pipeline=mae`: stages one after another, each a run of its own, and a report that compares them.

A pipeline is a YAML file: the stages' names in order, and under each the settings one would type for it. Besides them
`parent` names the stage whose weights it starts from, `teacher` the one whose word method=distillation teaches, and
`token_labels` the one whose label maps it learns from. Such a stage is no run but the command `label`
(`command: label`): its `parent` is the teacher, unless it says teacher=…, and its settings are that command's.
`baseline` names the stage with which the report compares the others.

What a person types goes to every stage and wins over the file; `finetune.train.epochs=5` goes to one stage, and
`finetune.run=<folder>` takes a finished run in its place. Labeling hears only of data and devices unless it is named.
The same command again runs only what is missing: a stage has finished when its settings, its data and what it takes
from other stages are those it finished with.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vitexp.checks import leaves, show
from vitexp.commands import label
from vitexp.config import (
    RunConfig,
    compose_and_check,
    given_folder,
    parse_overrides,
    pipeline_settings,
    quoted,
    refuse_sweeps,
    request_of,
)
from vitexp.config_paths import config_groups
from vitexp.errors import UserError, nearest
from vitexp.launch import ranks_given, run_command, run_in_processes
from vitexp.run_folder import RunLock, archive_previous, write_atomic
from vitexp.signals import StopRequest

LEDGER = "pipeline.json"
# Settings that leave no trace in a stage's weights and figures; all others make it another stage.
NO_TRACE = ("choices", "output_dir", "resume", "allow_changes", "group", "tracking")
NO_TRACE += ("train.save_every", "train.keep", "train.workers")
# Settings for all stages that a label stage hears of, and those that leave a trace in its maps.
LABELING = ("experiment", "data", "train.classes", "train.fraction", "train.workers", "runtime", "resume")
LABELING_TRACE = ("data", "train.classes", "train.fraction", "runtime")
OF_BARE_WEIGHTS = ("model", "augment.eval")  # leave one, too, where the teacher is built and shown as they say


@dataclass(frozen=True)
class Stage:
    """One run of the pipeline: what one would type for it, and what it takes from stages before it."""

    name: str
    overrides: tuple[str, ...]
    parent: Stage | None = None  # whose weights it starts from
    teacher: Stage | None = None  # whose word it learns
    token_labels: LabelStage | None = None  # whose maps it learns from
    run: Path | None = None  # a finished one that stands in its place

    def place(self, folder: Path) -> Path:
        """Its folder, `folder` being the pipeline's."""
        return self.run or folder / self.name

    def config(self, folder: Path, config_dir: str | None) -> RunConfig:
        """Its settings, with what it takes from others, whether that is there by now or not. Raises UserError."""
        place = [f"output_dir={quoted(str(self.place(folder)))}", f"group={quoted(folder.name)}"]
        if self.parent is not None:
            place.append("init_from='.'")  # one that is there, for the checks
        if self.teacher is not None:
            place.append(f"method.teacher={quoted(str(self.teacher.place(folder)))}")
        if self.token_labels is not None:
            place.append(f"train.token_labels={quoted(str(self.token_labels.training_store(folder)))}")
        try:
            config = compose_and_check([*self.overrides, *place], config_dir)
        except UserError as error:
            raise UserError(f"stage {self.name}: {error}") from None
        if self.parent is None:
            return config
        given = {"init_from": str(self.parent.place(folder))}
        return replace(config, **given, resolved=config.resolved | given, raw=config.raw | given)

    def made_of(self, config: RunConfig, folder: Path) -> dict[str, Any]:
        """What decides its result: settings, the pictures' fingerprint, and the identity of what it takes."""
        from vitexp.data.label_store import open_store

        made_of = {key: value for key, value in leaves(config.resolved) if not _below(key, NO_TRACE)}
        made_of["pictures"] = _pictures(config)
        if self.parent is not None:
            del made_of["init_from"]  # the place of weights that their checksum tells better
            made_of |= _weights_of(self.parent, folder)
        if self.teacher is not None:
            del made_of["method.teacher"]
            made_of |= _weights_of(self.teacher, folder)
        if self.token_labels is not None:
            del made_of["train.token_labels"]
            store = open_store(self.token_labels.training_store(folder))
            made_of[f"token labels of {self.token_labels.name}"] = store.fingerprint()
        return made_of

    def is_finished(self, folder: Path) -> bool:
        return (self.place(folder) / "summary.json").exists()

    def start(self, config: RunConfig, folder: Path, config_dir: str | None) -> int:
        """Runs it or goes on with it, and returns its exit code."""
        return run_in_processes(request_of(config), processes=config.runtime.processes)


@dataclass(frozen=True)
class LabelStage(Stage):
    """One labeling: `parent` is the teacher, `words` are what the command takes besides settings."""

    words: Mapping[str, str] = field(default_factory=dict)

    def store(self, folder: Path) -> Path:
        return self.place(folder) / "store"

    def training_store(self, folder: Path) -> Path:
        return self.store(folder) / "train" if self.words.get("split") == "all" else self.store(folder)

    def config(self, folder: Path, config_dir: str | None) -> RunConfig:
        config = Stage.config(replace(self, parent=None), folder, config_dir)  # a teacher is no start
        try:
            label.parse(self.arguments(config, folder), config_dir)
        except UserError as error:
            raise UserError(f"stage {self.name}: {error}") from None
        return config

    def arguments(self, config: RunConfig, folder: Path) -> list[str]:
        """What one would type behind `python -m vitexp label`."""
        teacher = {} if self.parent is None else {"teacher": str(self.parent.place(folder))}
        words = {**teacher, **self.words, "output": str(self.store(folder))}
        # Said in any case: without it the command would take the teacher's pictures.
        data = [] if "data" in map(_key, self.overrides) else [f"data={config.choices['data']}"]
        return [*(f"{key}={text}" for key, text in words.items()), *data, *self.overrides]

    def made_of(self, config: RunConfig, folder: Path) -> dict[str, Any]:
        traced = LABELING_TRACE + (OF_BARE_WEIGHTS if "model" in map(_key, self.overrides) else ())
        made_of = {key: value for key, value in leaves(config.resolved) if _below(key, traced)}
        made_of |= {key: text for key, text in self.words.items() if key != "uri"}
        made_of["pictures"] = _pictures(config)
        return made_of | (_weights_of(self.parent, folder) if self.parent is not None else self._weights_named())

    def _weights_named(self) -> dict[str, str]:
        """The checksum of a teacher's weights that lie here; a name of timm's or MLflow's stands for the same ones."""
        from vitexp.export import sha256_of

        named = Path(self.words.get("teacher", "")).expanduser()
        if named.is_dir():
            named = named / self.words.get("weights", "model.safetensors")
        return {"weights of the teacher": sha256_of(named)[:12]} if named.is_file() else {}

    def is_finished(self, folder: Path) -> bool:
        from vitexp.data.label_store import HEAD

        return (self.training_store(folder) / HEAD).exists()

    def start(self, config: RunConfig, folder: Path, config_dir: str | None) -> int:
        if config.resume == "never":
            set_aside(self.place(folder))
        return run_command(["label", *self.arguments(config, folder)], config_dir=config_dir)


@dataclass(frozen=True)
class Pipeline:
    name: str
    stages: list[Stage]
    baseline: str | None  # the stage with which the report compares the others


def main(overrides: list[str], config_dir: str | None) -> int:
    """Runs what is missing of the pipeline that the overrides choose, writes the report, and returns an exit code."""
    planned = plan(overrides, config_dir)
    if ranks_given():
        raise UserError(
            f"pipeline={planned.name}: starts the ranks of its stages itself; give runtime.processes, no launcher"
        )
    folder = folder_of(planned, overrides, config_dir)
    # The last one's mistake is said before any runs.
    configs = {stage.name: stage.config(folder, config_dir) for stage in planned.stages if stage.run is None}
    with StopRequest(), RunLock(folder):
        for number, stage in enumerate(planned.stages, start=1):
            say(f"\n== {number}/{len(planned.stages)} {stage.name}: {stage.place(folder)}")
            if stage.run is not None:
                say("a finished run")
                continue
            code = run_stage(stage, configs[stage.name], folder, config_dir)
            if code:
                say(f"vitexp: {stage.name} did not finish; the same command goes on from there")
                return code
        from vitexp.pipeline_report import Part, write_report

        parts = [
            Part(
                name=stage.name,
                folder=stage.place(folder),
                parent=_name_of(stage.parent),
                teacher=_name_of(stage.teacher),
                token_labels=_name_of(stage.token_labels),
                store=stage.training_store(folder) if isinstance(stage, LabelStage) else None,
            )
            for stage in planned.stages
        ]
        print("\n" + write_report(folder, name=planned.name, parts=parts, baseline=planned.baseline), flush=True)
    return 0


# ---- What was asked for ----------------------------------------------------------------------------------------------


def plan(overrides: list[str], config_dir: str | None) -> Pipeline:
    """The pipeline that the overrides choose, with those of a person dealt out to its stages. Raises UserError."""
    settings = pipeline_settings(overrides, config_dir)
    assert settings is not None
    name, table, baseline = (settings.get(key) for key in ("name", "stages", "baseline"))
    if not name or not isinstance(table, dict) or not table:
        raise UserError(f"pipeline={name}: a pipeline's file has a name and, under stages, its stages in order")
    refuse_sweeps(parse_overrides(overrides), instead=f"start pipeline={name} once for each")
    taken = {*(field.name for field in fields(RunConfig)), *config_groups(config_dir), "hydra"}
    common, own = deal_out(overrides, stages=list(table), settings=taken)
    planned: dict[str, Stage] = {}
    for stage, given in table.items():
        place = f"pipeline.stages.{stage}"
        if stage in (*taken, "plots") or not re.fullmatch(r"[A-Za-z_][\w-]*", stage, re.ASCII):
            raise UserError(f"{place}: a stage's name is a word of its own, and no setting's or group's name")
        if not isinstance(given, dict):
            raise UserError(f"{place}={show(given)}: expected settings, such as `train.epochs: 5`, or {{}} for none")
        command = given.get("command", "train")
        if command not in ("train", "label"):
            raise UserError(f"{place}.command={show(command)}: expected train or label")
        make = label_stage if command == "label" else training_stage
        planned[stage] = make(stage, given, common=common, own=own[stage], earlier=planned)
    if baseline is not None and baseline not in planned:
        raise UserError(f"pipeline.baseline={show(baseline)}: no stage has that name.{nearest(str(baseline), planned)}")
    return Pipeline(str(name), list(planned.values()), baseline)


def training_stage(
    name: str, given: Mapping[str, Any], *, common: list[str], own: list[str], earlier: Mapping[str, Stage]
) -> Stage:
    links, settings, typed = _split(given, own, ("command", "parent", "teacher", "token_labels", "run"))
    parent, teacher, labels = (_earlier(name, key, links, earlier) for key in ("parent", "teacher", "token_labels"))
    for key, other in (("parent", parent), ("teacher", teacher)):
        if isinstance(other, LabelStage):
            raise UserError(
                f"pipeline.stages.{name}.{key}={other.name}: labels pictures, so there are no weights of it"
            )
    if labels is not None and not isinstance(labels, LabelStage):
        raise UserError(f"pipeline.stages.{name}.token_labels={labels.name}: is no stage with command: label")
    if links.get("run") is not None:
        return Stage(name, (), run=_finished_run(name, str(links["run"]), typed))
    return Stage(name, _last_words(settings, common, typed), parent, teacher, labels)


def label_stage(
    name: str, given: Mapping[str, Any], *, common: list[str], own: list[str], earlier: Mapping[str, Stage]
) -> LabelStage:
    words, settings, typed = _split(given, own, ("command", "parent", *label.KEYS))
    if "output" in words:
        raise UserError(f"{name}.output={words['output']}: the store lies in the stage's folder, give output_dir=")
    elsewhere = "teacher" in words or "from" in words
    teacher = None if elsewhere else _earlier(name, "parent", words, earlier)
    if isinstance(teacher, LabelStage):
        raise UserError(f"pipeline.stages.{name}.parent={teacher.name}: labels pictures, so it can be no teacher")
    texts = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in words.items()
        if key not in ("command", "parent") and value is not None
    }
    heard = [text for text in common if _below(_key(text), LABELING)]
    return LabelStage(name, _last_words(settings, heard, typed), teacher, words=texts)


def _split(
    given: Mapping[str, Any], own: list[str], keys: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(values of `keys`, settings) of the file, those of `keys` that were typed for the stage being put in, and what
    else was typed for it."""
    typed = {text: parse_overrides([text])[0] for text in own}
    words = {key: value for key, value in given.items() if key in keys}
    words |= {override.key_or_group: override.value() for override in typed.values() if override.key_or_group in keys}
    settings = {key: value for key, value in given.items() if key not in keys}
    return words, settings, [text for text, override in typed.items() if override.key_or_group not in keys]


def _earlier(stage: str, key: str, links: Mapping[str, Any], earlier: Mapping[str, Stage]) -> Stage | None:
    wanted = links.get(key)
    if wanted is not None and not (isinstance(wanted, str) and wanted in earlier):
        raise UserError(
            f"pipeline.stages.{stage}.{key}={show(wanted)}: no stage before it has that name."
            f"{nearest(str(wanted), earlier)}"
        )
    return None if wanted is None else earlier[wanted]


def _finished_run(stage: str, given: str, typed: list[str]) -> Path:
    run = Path(given).expanduser().absolute()
    for name in ("summary.json", "model.json"):
        if not (run / name).is_file():
            raise UserError(f"{stage}.run={given}: not the folder of a finished run, it has no {name}")
    if typed:
        raise UserError(f"{stage}.{typed[0]}: {stage}.run={given} is a finished run, which stays as it is")
    return run


def _last_words(settings: Mapping[str, Any], common: list[str], own: list[str]) -> tuple[str, ...]:
    """The last word has the stage's own override, then the common one, then the file."""
    typed: dict[str, str] = {}
    for text in [*(f"{key}={quoted(value)}" for key, value in settings.items()), *common, *own, "pipeline=none"]:
        key = _key(text)
        typed.pop(key, None)
        typed[key] = text
    return tuple(typed.values())


def _key(override: str) -> str:
    return parse_overrides([override])[0].key_or_group


def _below(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _name_of(stage: Stage | None) -> str | None:
    return None if stage is None else stage.name


def deal_out(overrides: list[str], *, stages: list[str], settings: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """(overrides of all stages, those of each): `finetune.train.epochs=5` is `train.epochs=5` of one stage.

    `settings` are the first words of keys that are no stage. Raises UserError for a first word that is neither."""
    common: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in stages}
    for text, override in zip(overrides, parse_overrides(overrides), strict=True):
        first, dot, _ = override.key_or_group.partition(".")
        if dot and first in own:
            own[first].append(text.replace(f"{first}.", "", 1))
        elif dot and first not in settings:
            near = nearest(first, [*stages, *settings])
            raise UserError(f"{text}: {first!r} is no stage and no setting.{near}\nstages: {', '.join(stages)}")
        elif first not in ("pipeline", "output_dir"):
            common.append(text)
    return common, own


def folder_of(planned: Pipeline, overrides: list[str], config_dir: str | None) -> Path:
    """Where the stages' folders lie: output_dir, or one that the same overrides in any order find again."""
    if (given := given_folder(overrides)) is not None:
        return given
    to_run = [stage for stage in planned.stages if stage.run is None]
    if not to_run:
        raise UserError(f"pipeline={planned.name}: all stages are finished runs; give output_dir= for the report")
    experiment = to_run[0].config(Path("outputs").absolute(), config_dir).name
    digest = hashlib.sha1("\n".join(sorted(overrides)).encode()).hexdigest()[:8]
    return Path("outputs", experiment, f"pipeline_{planned.name}-{digest}").absolute()


# ---- What runs -------------------------------------------------------------------------------------------------------


def run_stage(stage: Stage, config: RunConfig, folder: Path, config_dir: str | None) -> int:
    """Runs it, goes on with it, or finds it finished; returns its exit code."""
    made_of = stage.made_of(config, folder)
    ledger = read_ledger(folder)
    before = ledger.pop(stage.name, None)
    if before is None or before["made_of"] != made_of:
        if before is not None:
            say(f"runs anew, for this has changed: {'; '.join(differences(before['made_of'], made_of))}")
        # Whose files lie there is not known from here until they are set aside, also to who is killed in between.
        write_ledger(folder, ledger)
        set_aside(stage.place(folder))
    elif before["finished"] and stage.is_finished(folder) and config.resume != "never":
        say("finished already")
        return 0
    write_ledger(folder, {**ledger, stage.name: {"finished": False, "made_of": made_of}})
    code = stage.start(config, folder, config_dir)
    if code == 0:
        write_ledger(folder, {**ledger, stage.name: {"finished": True, "made_of": made_of}})
    return code


def set_aside(run_dir: Path) -> None:
    with RunLock(run_dir):
        archive_previous(run_dir)


def _pictures(config: RunConfig) -> str:
    from vitexp.run import open_source

    return open_source(config).fingerprint()


def _weights_of(stage: Stage, folder: Path) -> dict[str, str]:
    described = json.loads((stage.place(folder) / "model.json").read_text(encoding="utf-8"))
    return {f"weights of {stage.name}": described["weights"]["sha256"][:12]}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    keys = [key for key in sorted(old.keys() | new.keys()) if (key in old, old.get(key)) != (key in new, new.get(key))]
    told = [f"{key}: {show(old.get(key, 'absent'))} -> {show(new.get(key, 'absent'))}" for key in keys[:4]]
    return [*told, f"{len(keys) - 4} more"] if len(keys) > 4 else told


def read_ledger(folder: Path) -> dict[str, dict[str, Any]]:
    """{stage: {"finished", "made_of"}} of the stages begun, made_of being their identity()."""
    try:
        return json.loads((folder / LEDGER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{folder / LEDGER} cannot be read: {error}") from None


def write_ledger(folder: Path, ledger: dict[str, dict[str, Any]]) -> None:
    write_atomic(folder / LEDGER, json.dumps(ledger, indent=2) + "\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
