"""The jobs of a sweep: every combination of the values that the overrides give, each with a name and a folder."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vitexp.config import given_folder, sweep_axes, sweep_slug
from vitexp.sweeps.ledger import Ledger

# Settings of the sweep itself: no job hears of them.
OF_THE_SWEEP = ("sweep", "output_dir")


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str  # of its folder: the swept values and a hash of all overrides, the same in any order
    overrides: tuple[str, ...]
    swept: dict[str, str]  # value of each swept key, in the order they were given


class Source(Protocol):
    """Where the jobs of a sweep come from. What has finished is never given again: the ledger knows."""

    def next(self) -> Job | None:
        """A job to start now; None where there is none, at the moment or at all."""

    @property
    def is_over(self) -> bool:
        """No job will come any more, whatever becomes of those that run."""

    def verdict(self, job: Job) -> str | None:
        """Asked now and then while it runs: why it should end early, None to let it go on."""

    def tell(self, job: Job) -> None:
        """It has ended; the ledger says how, its folder with what."""


class Grid:
    """The jobs of a list that have not finished, in its order."""

    def __init__(self, jobs: Sequence[Job], ledger: Ledger) -> None:
        self._waiting = [job for job in jobs if not ledger.is_finished(job.name)]

    def next(self) -> Job | None:
        return self._waiting.pop(0) if self._waiting else None

    @property
    def is_over(self) -> bool:
        return not self._waiting

    def verdict(self, job: Job) -> str | None:
        return None

    def tell(self, job: Job) -> None:
        pass


def jobs_of(overrides: Sequence[str], config_dir: str | None) -> list[Job]:
    """The grid of all values, the last key varying fastest, each job once. Raises UserError."""
    axes = sweep_axes(without_the_sweeps(overrides), config_dir)
    swept = [key_of(values[0]) for values in axes if len(values) > 1]
    jobs: dict[str, Job] = {}
    for combination in itertools.product(*axes):
        name = sweep_slug(combination, swept)
        values = {key_of(text): text.partition("=")[2] for text in combination if key_of(text) in swept}
        jobs.setdefault(name, Job(name, combination, values))
    return list(jobs.values())


def folder_of(overrides: Sequence[str], *, experiment: str) -> Path:
    """Where the jobs' folders lie: output_dir, or one that the same overrides in any order find again."""
    if (given := given_folder(overrides)) is not None:
        return given
    counted = sorted(without_the_sweeps(overrides))
    digest = hashlib.sha1("\n".join(counted).encode()).hexdigest()[:8]
    return Path("outputs", experiment, f"sweep-{digest}").absolute()


def without_the_sweeps(overrides: Sequence[str]) -> list[str]:
    """Those that jobs hear of."""
    return [text for text in overrides if re.split(r"[./]", key_of(text))[0] not in OF_THE_SWEEP]


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
