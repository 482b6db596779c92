"""`python -m vitexp pipeline=mae`: stages one after another, each a run of its own, and a report that compares them.

A pipeline is a YAML file: the stages' names in order, and under each the settings one would type for it. `parent` names
the stage whose weights it starts from. What a person types goes to every stage and wins over the file;
`finetune.train.epochs=5` goes to one stage. The same command again runs only what is missing: a stage has finished when
its settings, its data and its parent's weights are those it finished with.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vitexp.checks import leaves, show
from vitexp.config import RunConfig, compose_and_check, parse_overrides, pipeline_settings, request_of
from vitexp.config_paths import config_groups
from vitexp.errors import UserError, nearest
from vitexp.launch import ranks_given, run_in_processes
from vitexp.run_folder import RunLock, archive_previous, write_atomic
from vitexp.signals import StopRequest

LEDGER = "pipeline.json"
# Settings that leave no trace in a stage's weights and figures; all others make it another stage.
NO_TRACE = ("choices", "output_dir", "resume", "allow_changes", "group", "tracking")
NO_TRACE += ("train.save_every", "train.keep", "train.workers")


@dataclass(frozen=True)
class Stage:
    """One run of the pipeline: what one would type for it, and the stage whose weights it starts from."""

    name: str
    overrides: tuple[str, ...]
    parent: str | None

    def config(self, folder: Path, config_dir: str | None) -> RunConfig:
        """Its settings, init_from being the parent's folder, whether it is there by now or not. Raises UserError."""
        place = [f"output_dir={quoted(str(folder / self.name))}", f"group={quoted(folder.name)}"]
        if self.parent is not None:
            place.append("init_from='.'")  # one that is there, for the checks
        try:
            config = compose_and_check([*self.overrides, *place], config_dir)
        except UserError as error:
            raise UserError(f"stage {self.name}: {error}") from None
        if self.parent is None:
            return config
        given = {"init_from": str(folder / self.parent)}
        return replace(config, **given, resolved=config.resolved | given, raw=config.raw | given)


def main(overrides: list[str], config_dir: str | None) -> int:
    """Runs what is missing of the pipeline that the overrides choose, writes the report, and returns an exit code."""
    name, stages = plan_stages(overrides, config_dir)
    if ranks_given():
        raise UserError(f"pipeline={name}: starts the ranks of its stages itself; give runtime.processes, no launcher")
    folder = folder_of(name, stages, overrides, config_dir)
    configs = [stage.config(folder, config_dir) for stage in stages]  # the last one's mistake is said before any runs
    with StopRequest(), RunLock(folder):
        for number, (stage, config) in enumerate(zip(stages, configs, strict=True), start=1):
            say(f"\n== {number}/{len(stages)} {stage.name}: {folder / stage.name}")
            code = run_stage(stage, config, folder)
            if code:
                say(f"vitexp: {stage.name} did not finish; the same command goes on from there")
                return code
        from vitexp.pipeline_report import write_report

        print("\n" + write_report(folder, name=name, stages=[stage.name for stage in stages]), flush=True)
    return 0


def plan_stages(overrides: list[str], config_dir: str | None) -> tuple[str, list[Stage]]:
    """The pipeline's name and its stages, with a person's overrides dealt out to them. Raises UserError."""
    settings = pipeline_settings(overrides, config_dir)
    assert settings is not None
    name, table = settings.get("name"), settings.get("stages")
    if not name or not isinstance(table, dict) or not table:
        raise UserError(f"pipeline={name}: a pipeline's file has a name and, under stages, its stages in order")
    taken = {*(field.name for field in fields(RunConfig)), *config_groups(config_dir), "hydra"}
    common, own = deal_out(overrides, stages=list(table), settings=taken)
    planned: list[Stage] = []
    for stage, given in table.items():
        place = f"pipeline.stages.{stage}"
        if stage in (*taken, "plots") or not re.fullmatch(r"[A-Za-z_][\w-]*", stage, re.ASCII):
            raise UserError(f"{place}: a stage's name is a word of its own, and no setting's or group's name")
        if not isinstance(given, dict):
            raise UserError(f"{place}={show(given)}: expected settings, such as `train.epochs: 5`, or {{}} for none")
        parent, earlier = given.get("parent"), [one.name for one in planned]
        if parent is not None and parent not in earlier:
            raise UserError(f"{place}.parent={parent}: no stage before it has that name.{nearest(parent, earlier)}")
        typed = {key: f"{key}={quoted(value)}" for key, value in given.items() if key != "parent"}
        # The last word has the stage's own override, then the common one, then the file.
        for text in [*common, *own[stage], "pipeline=none"]:
            key = parse_overrides([text])[0].key_or_group
            typed.pop(key, None)
            typed[key] = text
        planned.append(Stage(name=stage, overrides=tuple(typed.values()), parent=parent))
    return str(name), planned


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


def quoted(value: Any) -> str:
    """A YAML value as Hydra's command line wants it."""
    if isinstance(value, str):  # a backslash is one there, but for those right before a quote
        return "'" + re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), value) + "'"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{quoted(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(quoted(one) for one in value) + "]"
    return json.dumps(value)


def folder_of(name: str, stages: list[Stage], overrides: list[str], config_dir: str | None) -> Path:
    """Where the stages' folders lie: output_dir, or one that the same overrides in any order find again."""
    given = [o.value() for o in parse_overrides(overrides) if o.key_or_group == "output_dir"]
    if given:
        return Path(str(given[-1])).expanduser().absolute()
    experiment = stages[0].config(Path("outputs"), config_dir).name
    digest = hashlib.sha1("\n".join(sorted(overrides)).encode()).hexdigest()[:8]
    return Path("outputs", experiment, f"pipeline_{name}-{digest}").absolute()


def run_stage(stage: Stage, config: RunConfig, folder: Path) -> int:
    """Runs it, goes on with it, or finds it finished; returns its exit code."""
    made_of, run_dir = identity(stage, config, folder), folder / stage.name
    ledger = read_ledger(folder)
    before = ledger.pop(stage.name, None)
    if before is None or before["made_of"] != made_of:
        if before is not None:
            say(f"runs anew, for this has changed: {'; '.join(differences(before['made_of'], made_of))}")
        # Whose files lie there is not known from here until they are set aside, also to who is killed in between.
        write_ledger(folder, ledger)
        with RunLock(run_dir):
            archive_previous(run_dir)
    elif before["finished"] and (run_dir / "summary.json").exists() and config.resume != "never":
        say("finished already")
        return 0
    write_ledger(folder, {**ledger, stage.name: {"finished": False, "made_of": made_of}})
    code = run_in_processes(request_of(config), processes=config.runtime.processes)
    if code == 0:
        write_ledger(folder, {**ledger, stage.name: {"finished": True, "made_of": made_of}})
    return code


def identity(stage: Stage, config: RunConfig, folder: Path) -> dict[str, Any]:
    """What decides a stage's result: its settings, the data's fingerprint, the checksum of its parent's weights."""
    from vitexp.run import open_source

    made_of: dict[str, Any] = {
        key: value
        for key, value in leaves(config.resolved)
        if not any(key == name or key.startswith(f"{name}.") for name in NO_TRACE)
    }
    made_of["pictures"] = open_source(config).fingerprint()
    if stage.parent is not None:
        del made_of["init_from"]  # the place of weights that their checksum tells better
        described = json.loads((folder / stage.parent / "model.json").read_text(encoding="utf-8"))
        made_of[f"weights of {stage.parent}"] = described["weights"]["sha256"][:12]
    return made_of


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
