"""What became of each job of a sweep: one file in its folder, whole at any moment, the truth about the queue."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vitexp.errors import UserError
from vitexp.run_folder import write_atomic

# pruned: a search ended it early because others were better by then
State = Literal["waiting", "running", "finished", "pruned", "failed", "killed", "timed out", "hung", "stopped"]

LEDGER = "sweep.json"
ENDED_BADLY: tuple[State, ...] = ("failed", "killed", "timed out", "hung")


@dataclass
class Entry:
    """One job."""

    overrides: list[str]
    state: State = "waiting"
    reason: str = ""  # why it did not finish, as it said itself or as the system did
    attempts: int = 0
    minutes: float = 0.0  # of all attempts together


@dataclass
class Ledger:
    """All jobs of a sweep in their order, by name."""

    folder: Path
    command: list[str]
    swept: list[str]
    jobs: dict[str, Entry] = field(default_factory=dict)
    metric: str | None = None  # of the jobs' summaries, by which they are judged; None: journal.JUDGED_BY
    maximize: bool = True

    def write(self) -> None:
        kept: dict[str, Any] = {"command": self.command, "swept": self.swept}
        kept |= {"metric": self.metric, "maximize": self.maximize}
        kept |= {"jobs": {name: asdict(entry) for name, entry in self.jobs.items()}}
        write_atomic(self.folder / LEDGER, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")

    def is_finished(self, name: str) -> bool:
        """Also the run itself says so: a folder that was removed is run again."""
        return self.jobs[name].state == "finished" and (self.folder / name / "summary.json").exists()


def read_ledger(folder: Path) -> Ledger | None:
    """None where no sweep has begun. Raises UserError for a file that is no ledger."""
    path = folder / LEDGER
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        jobs = {name: Entry(**entry) for name, entry in kept["jobs"].items()}
        judged = {key: kept[key] for key in ("metric", "maximize") if key in kept}
        return Ledger(folder, kept["command"], kept["swept"], jobs, **judged)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the ledger of a sweep: {error}") from None


def summary_of(folder: Path) -> dict[str, float]:
    """The finite numbers of a finished run's summary; none where it cannot be read."""
    try:
        return finite(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}
