"""The jobs of a sweep: every combination of the values that the overrides give, each with a name and a folder."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitexp.config import parse_overrides, sweep_axes, sweep_slug

# Settings of the sweep itself: no job hears of them.
OF_THE_SWEEP = ("sweep", "output_dir")


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str  # of its folder: the swept values and a hash of all overrides, the same in any order
    overrides: tuple[str, ...]
    swept: dict[str, str]  # value of each swept key, in the order they were given


def jobs_of(overrides: Sequence[str], config_dir: str | None) -> list[Job]:
    """The grid of all values, the last key varying fastest, each job once. Raises UserError."""
    axes = sweep_axes([text for text in overrides if not of_the_sweep(text)], config_dir)
    swept = [key_of(values[0]) for values in axes if len(values) > 1]
    jobs: dict[str, Job] = {}
    for combination in itertools.product(*axes):
        name = sweep_slug(combination, swept)
        values = {key_of(text): text.partition("=")[2] for text in combination if key_of(text) in swept}
        jobs.setdefault(name, Job(name, combination, values))
    return list(jobs.values())


def folder_of(overrides: Sequence[str], *, experiment: str) -> Path:
    """Where the jobs' folders lie: output_dir, or one that the same overrides in any order find again."""
    given = [override.value() for override in parse_overrides(list(overrides)) if override.key_or_group == "output_dir"]
    if given:
        return Path(str(given[-1])).expanduser().absolute()
    counted = sorted(text for text in overrides if not of_the_sweep(text))
    digest = hashlib.sha1("\n".join(counted).encode()).hexdigest()[:8]
    return Path("outputs", experiment, f"sweep-{digest}").absolute()


def of_the_sweep(override: str) -> bool:
    return key_of(override).partition(".")[0] in OF_THE_SWEEP


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
