"""Whether the disk can hold what many runs leave, such as a sweep's or a pipeline's: looked at before the first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitexp.checks import leaves
from vitexp.commands.plan import Planned, disk_of, held_by, prepare, size
from vitexp.config import RunConfig, build, compose_and_check, sweep_axes, sweep_settings
from vitexp.costs import DiskBytes, disk_needed, free_disk
from vitexp.errors import UserError
from vitexp.sweeps.jobs import folder_of, jobs_of, key_of, without_the_sweeps
from vitexp.sweeps.search import with_space
from vitexp.teachers import Onlooker, Teacher

# Settings that change neither how long an update takes nor how large what is kept of it is.
ALIKE = ("seed", "name", "group", "output_dir", "resume", "allow_changes", "init_from", "schedule", "choices", "debug")
ALIKE += ("optim.lr", "optim.base_lr", "optim.weight_decay", "optim.layer_decay", "model.drop_path", "model.dropout")


@dataclass(frozen=True)
class Member:
    """One run of many, or as many as have settings that cost the same."""

    name: str
    config: RunConfig
    folder: Path
    teacher: Member | None = None  # another of them, whose word it learns


class Costs:
    """What members cost, those that are alike looked at once."""

    def __init__(self) -> None:
        self._planned: dict[str, Planned] = {}

    def planned(self, member: Member) -> Planned:
        key = alike(member.config)
        if key not in self._planned:
            teacher = None if member.teacher is None else _stand_in(self.planned(member.teacher))
            self._planned[key] = prepare(member.config, teacher=teacher)
        return self._planned[key]

    def disk(self, member: Member) -> DiskBytes:
        planned = self.planned(member)
        return disk_of(planned, held_by(planned))


def alike(config: RunConfig, *, besides: Sequence[str] = ()) -> str:
    """The same text for settings that cost the same; `besides`: more keys that make no difference."""
    same = (*ALIKE, *besides)
    return json.dumps([(key, value) for key, value in leaves(config.resolved) if not below(key, same)], default=str)


def below(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith((f"{name}.", f"{name}/")) for name in names)


def check_room(members: Sequence[Member], *, at_a_time: int = 1, costs: Costs | None = None) -> None:
    """Raises UserError where the disk cannot hold what the members will leave, so many of them side by side.

    What those that have begun have there already counts, and those that have finished need nothing. Takes seconds, for
    torch and the data, and some more for each model: no picture is read."""
    costs = costs or Costs()
    to_come = [one for one in members if not (one.folder / "summary.json").exists()]
    if not to_come:
        return
    there = sum(path.stat().st_size for one in to_come for path in one.folder.rglob("*") if path.is_file())
    needed = disk_needed([costs.disk(one) for one in to_come], at_a_time=at_a_time) - there
    place = to_come[0].folder.parent
    free = free_disk(place)
    if needed > free:
        raise UserError(
            f"{place}: {len(to_come)} runs leave {size(needed)} of checkpoints and weights there, {size(free)} are free"
            "\nfree some, lower train.keep, or give another output_dir"
        )


def _stand_in(planned: Planned) -> Onlooker:
    """A teacher that is yet to be trained, with weights at random: it costs what the trained one will."""
    data, classes = planned.config.data, planned.num_classes
    teacher = Teacher(
        model=build({**planned.architecture, "num_classes": classes}),
        columns=range(classes),
        image_size=planned.image_size,
        mean=data["mean"],
        std=data["std"],
        channels=planned.in_channels,
        interpolation="bicubic",
        resizer="torch",
        facts={"name": "to be trained", "weights_sha256": ""},
    )
    return Onlooker(teacher, mean=data["mean"], std=data["std"])


# ---- a sweep's runs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """What the overrides of a sweep say."""

    overrides: list[str]  # with those of a space to search
    axes: list[list[str]]  # of settings of jobs; an interval by its ends
    jobs: int  # at a time
    trials: int | None  # of a search

    @classmethod
    def of(cls, overrides: list[str], config_dir: str | None) -> Sweep:
        settings = sweep_settings(overrides, config_dir)
        overrides = with_space(overrides, settings.get("space"))
        of_jobs = without_the_sweeps(overrides)
        if settings.get("search"):
            axes = sweep_axes(of_jobs, config_dir, ends=True)
            return cls(overrides, axes, settings["jobs"], settings["search"]["trials"])
        return cls(overrides, sweep_axes(of_jobs, config_dir), settings["jobs"], None)

    @property
    def is_many(self) -> bool:
        return self.trials is not None or any(len(axis) > 1 for axis in self.axes)


def members_of_sweep(sweep: Sweep, config_dir: str | None) -> list[Member]:
    """All combinations; of a search, as many trials, which take the values of each axis in turn.

    Settings are composed once where jobs differ in nothing that costs."""
    if sweep.trials is None:
        jobs = {job.name: list(job.overrides) for job in jobs_of(sweep.overrides, config_dir)}
    else:
        jobs = {f"trial {n}": [axis[n % len(axis)] for axis in sweep.axes] for n in range(sweep.trials)}
    differ = [key_of(axis[0]) for axis in sweep.axes if len(axis) > 1 and not below(key_of(axis[0]), ALIKE)]
    composed: dict[str, RunConfig] = {}
    for job in jobs.values():
        if (words := _words(job, differ)) not in composed:
            composed[words] = compose_and_check(job, config_dir)
    folder = folder_of(sweep.overrides, experiment=next(iter(composed.values())).name)
    return [Member(_words(job, differ), composed[_words(job, differ)], folder / name) for name, job in jobs.items()]


def _words(job: Sequence[str], differ: Sequence[str]) -> str:
    return " ".join(text for text in job if key_of(text) in differ) or "all"
