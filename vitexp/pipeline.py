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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitexp.config import (
    CONFIG_NAME,
    RunConfig,
    compose_and_check,
    parse_overrides,
    pipeline_settings,
    request_of,
)
from vitexp.errors import UserError, nearest
from vitexp.launch import run_in_processes

LEDGER = "pipeline.json"


@dataclass(frozen=True)
class Stage:
    """One run of the pipeline: what one would type for it, and the stage whose weights it starts from."""

    name: str
    overrides: tuple[str, ...]
    parent: str | None

    def config(self, folder: Path, config_dir: str | None, *, exists: bool) -> RunConfig:
        """Its settings. Before its parent has run (not `exists`) a folder that is there stands for the parent's."""
        place = [f"output_dir={quoted(str(folder / self.name))}", f"group={quoted(folder.name)}"]
        if self.parent is not None:
            place.append(f"init_from={quoted(str(folder / self.parent) if exists else '.')}")
        return compose_and_check([*self.overrides, *place], config_dir)


def main(overrides: list[str], config_dir: str | None) -> int:
    """Runs what is missing of the pipeline that the overrides choose, writes the report, and returns an exit code."""
    name, stages = plan_stages(overrides, config_dir)
    folder = folder_of(name, stages, overrides, config_dir)
    for stage in stages:  # a mistake in the last stage is said before the first one runs
        stage.config(folder, config_dir, exists=False)
    folder.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(stages, start=1):
        print(f"\n== {number}/{len(stages)} {stage.name}: {folder / stage.name}", file=sys.stderr, flush=True)
        code = run_stage(stage, folder, config_dir)
        if code:
            print(f"vitexp: {stage.name} did not finish; the same command goes on from there", file=sys.stderr)
            return code
    from vitexp.pipeline_report import write_report

    print("\n" + write_report(folder, name=name, stages=[stage.name for stage in stages]), flush=True)
    return 0


def plan_stages(overrides: list[str], config_dir: str | None) -> tuple[str, list[Stage]]:
    """The pipeline's name and its stages, with a person's overrides dealt out to them. Raises UserError."""
    settings = pipeline_settings(overrides, config_dir)
    assert settings is not None
    table = settings["stages"]
    if not isinstance(table, dict) or not table:
        raise UserError(f"pipeline={settings.get('name')}: names no stages")
    common, own = deal_out(overrides, list(table))
    stages: list[Stage] = []
    for name, given in table.items():
        given = dict(given or {})
        parent = given.pop("parent", None)
        earlier = [stage.name for stage in stages]
        if parent is not None and parent not in earlier:
            raise UserError(
                f"pipeline.stages.{name}.parent={parent}: no stage before it has that name.{nearest(parent, earlier)}"
            )
        typed = {key: f"{key}={quoted(value)}" for key, value in given.items()}
        # The last word has the stage's own override, then the common one, then the file.
        for text in [*common, *own[name]]:
            typed[text.partition("=")[0].lstrip("+~")] = text
        typed["pipeline"] = "pipeline=none"
        stages.append(Stage(name=name, overrides=tuple(typed.values()), parent=parent))
    return str(settings["name"]), stages


def deal_out(overrides: list[str], names: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """(overrides of all stages, those of each): `finetune.train.epochs=5` is `train.epochs=5` of one stage."""
    common: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in names}
    for text in overrides:
        first, dot, rest = text.partition(".")
        if dot and first in own:
            own[first].append(rest)
        elif not text.startswith(("pipeline=", "pipeline.", "output_dir=")):
            common.append(text)
    return common, own


def quoted(value: Any) -> str:
    """A YAML value as Hydra's command line wants it."""
    if isinstance(value, str):
        return (
            value if re.fullmatch(r"[\w./:-]+", value) else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
        )
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{quoted(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(quoted(one) for one in value) + "]"
    return json.dumps(value)


def folder_of(name: str, stages: list[Stage], overrides: list[str], config_dir: str | None) -> Path:
    """Where the stages' folders lie: output_dir, or one that the same overrides in any order find again."""
    given = [o.value() for o in parse_overrides([t for t in overrides if t.startswith("output_dir=")])]
    if given:
        return Path(str(given[-1])).expanduser().absolute()
    experiment = stages[0].config(Path("outputs"), config_dir, exists=False).name
    digest = hashlib.sha1("\n".join(sorted(overrides)).encode()).hexdigest()[:8]
    return Path("outputs", experiment, f"pipeline_{name}-{digest}").absolute()


def run_stage(stage: Stage, folder: Path, config_dir: str | None) -> int:
    """Runs it, goes on with it, or finds it finished; returns its exit code."""
    config = stage.config(folder, config_dir, exists=True)
    made_of = origin(stage, config, folder)
    ledger = read_ledger(folder)
    before = ledger.get(stage.name)
    if before is not None and before["origin"] == made_of and not changed(config, folder / stage.name):
        if before["finished"] and (folder / stage.name / "summary.json").exists():
            print(f"finished already: {folder / stage.name}", file=sys.stderr)
            return 0
    elif before is not None:
        print("its settings, data or parent have changed: it starts anew", file=sys.stderr)
        config = stage_anew(stage, folder, config_dir)
    write_ledger(folder, {**ledger, stage.name: {"origin": made_of, "finished": False}})
    code = run_in_processes(request_of(config), processes=config.runtime.processes)
    if code == 0:
        write_ledger(folder, {**ledger, stage.name: {"origin": made_of, "finished": True}})
    return code


def stage_anew(stage: Stage, folder: Path, config_dir: str | None) -> RunConfig:
    anew = Stage(name=stage.name, overrides=(*stage.overrides, "resume=never"), parent=stage.parent)
    return anew.config(folder, config_dir, exists=True)


def origin(stage: Stage, config: RunConfig, folder: Path) -> dict[str, str | None]:
    """What a stage is made of besides its settings: the data's fingerprint, the checksum of its parent's weights."""
    from vitexp.run import open_source

    parent = None
    if stage.parent is not None:
        described = json.loads((folder / stage.parent / "model.json").read_text(encoding="utf-8"))
        parent = described["weights"]["sha256"]
    return {"data": open_source(config).fingerprint(), "parent": parent}


def changed(config: RunConfig, run_dir: Path) -> list[str]:
    """What differs from the settings that the stage's folder was made with."""
    from vitexp.checkpoint import changed_config

    try:
        before = yaml.safe_load((run_dir / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return []  # killed before it wrote them: it has nothing that could differ
    return changed_config(
        {**before, "choices": None, "resume": None}, {**config.resolved, "choices": None, "resume": None}
    )


def read_ledger(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads((folder / LEDGER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{folder / LEDGER} cannot be read: {error}") from None


def write_ledger(folder: Path, ledger: dict[str, dict[str, Any]]) -> None:
    from vitexp.run_folder import write_atomic

    write_atomic(folder / LEDGER, json.dumps(ledger, indent=2) + "\n")
