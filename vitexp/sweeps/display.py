"""What a person sees of a sweep: one table that changes in a terminal, else a line when something has happened."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vitexp import journal
from vitexp.sweeps.jobs import Job
from vitexp.sweeps.ledger import ENDED_BADLY, Entry, summary_of

TAIL_BYTES = 1 << 15
LINE_EVERY_S = 30.0  # a word on what runs, where no table can be drawn
WAITING_SHOWN = 3
COLOURS = {"running": "cyan", "finished": "green", "waiting": "dim", "stopped": "yellow", "pruned": "magenta"}
COLOURS |= dict.fromkeys(ENDED_BADLY, "red")


@dataclass(frozen=True)
class Standing:
    """How far a job is, as its folder tells."""

    epoch: float | None = None
    epochs: float | None = None  # of the whole run
    loss: float | None = None
    metric: tuple[str, float] | None = None

    @property
    def share(self) -> float | None:
        return None if self.epoch is None or not self.epochs else min(1.0, self.epoch / self.epochs)


def standing(folder: Path, *, metric: str | None) -> Standing:
    """Of the last rows of its journal; `metric`: of them, else what runs are judged by."""
    path = folder / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[1 if size > TAIL_BYTES else 0 : -1]
    except OSError:
        return Standing()
    last: dict[str, float] = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            last |= json.loads(line)
    wanted = journal.JUDGED_BY if metric is None else (metric,)
    return Standing(
        epoch=last.get("epoch"),
        epochs=_epochs(folder),
        loss=last.get("train/loss"),
        metric=next(((name, last[name]) for name in wanted if name in last), None),
    )


def last_row_at(folder: Path) -> float:
    """time.time() of the last row of its journal; 0 where it has none."""
    try:
        return (folder / "metrics.jsonl").stat().st_mtime
    except OSError:
        return 0.0


def _epochs(folder: Path) -> float | None:
    path = folder / "config.yaml"
    with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        return _epochs_in(path, path.stat().st_mtime_ns)
    return None


@lru_cache(maxsize=1024)  # it is asked every second, and reading YAML takes time from the jobs
def _epochs_in(config: Path, written: int) -> float | None:
    return yaml.safe_load(config.read_text(encoding="utf-8"))["train"]["epochs"]


def of_summary(folder: Path, *, metric: str | None) -> tuple[str, float] | None:
    """The metric that a finished run is judged by, None where it has none or it is not finite."""
    summary = summary_of(folder)
    names = journal.JUDGED_BY if metric is None else (metric,)
    return next(((name, summary[name]) for name in names if name in summary), None)


@dataclass
class Row:
    """A job as it is shown."""

    job: Job
    entry: Entry
    standing: Standing
    minutes: float = 0.0  # of the attempt that runs

    @property
    def left(self) -> float | None:
        """Minutes, by the pace so far."""
        share = self.standing.share
        return None if self.entry.state != "running" or not share else self.minutes * (1 - share) / share


class SweepDisplay:
    """`show` as often as there is news; `close` before anything else is printed."""

    def __init__(self, title: str, *, stream: TextIO | None = None) -> None:
        self.title = title
        self._stream = sys.stderr if stream is None else stream
        self._live: Live | None = None
        self._said: dict[str, str] = {}
        self._line_due = time.monotonic() + LINE_EVERY_S
        if self._stream.isatty():
            console = Console(file=self._stream)
            self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()

    def show(self, rows: Sequence[Row]) -> None:
        if self._live is not None:
            self._live.update(Group(table(rows, title=self.title)), refresh=True)
            return
        for row in rows:
            if self._said.get(row.job.name, "waiting") != row.entry.state:
                self._said[row.job.name] = row.entry.state
                self._say(f"{row.entry.state:<9} {label(row.job)}{_outcome(row)}")
        if time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + LINE_EVERY_S
            counts = {
                state: sum(row.entry.state == state for row in rows) for state in ("finished", "running", "waiting")
            }
            going = "; ".join(f"{label(row.job)}: {_words(row)}" for row in rows if row.entry.state == "running")
            self._say(f"{', '.join(f'{count} {state}' for state, count in counts.items())}  {going}")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # whoever read it has left: the sweep goes on
            print(text, file=self._stream, flush=True)


def table(rows: Sequence[Row], *, title: str) -> Table:
    """Every job that runs or has run; of those that wait the first and their number."""
    waiting = [row for row in rows if row.entry.state == "waiting"]
    shown = [row for row in rows if row.entry.state != "waiting"] + waiting[:WAITING_SHOWN]
    made = Table(title=title, title_justify="left", caption_justify="left")
    made.add_column("job", overflow="fold")
    for name in ("state", "epoch", "loss", "metric", "minutes", "left"):
        made.add_column(name, justify="left" if name == "state" else "right", no_wrap=name != "state")
    for row in shown:
        at, state = row.standing, row.entry.state
        said = state if not row.entry.reason else f"{state}: {row.entry.reason}"
        made.add_row(
            label(row.job),
            Text(said, style=COLOURS[state]),
            "" if at.epoch is None else f"{at.epoch:.1f}" + (f"/{at.epochs:g}" if at.epochs else ""),
            "" if at.loss is None else f"{at.loss:.4f}",
            "" if at.metric is None else _percent(*at.metric),
            f"{row.entry.minutes + row.minutes:.1f}" if state != "waiting" else "",
            "" if row.left is None else f"{row.left:.1f}",
        )
    if len(waiting) > WAITING_SHOWN:
        made.caption = f"and {len(waiting) - WAITING_SHOWN} more waiting"
    return made


def label(job: Job) -> str:
    """The job in a person's words: what it has that others have not."""
    return (
        " ".join(
            f"{key.removeprefix('optim.') if key == 'optim.lr' else key}={value}" for key, value in job.swept.items()
        )
        or job.name
    )


def _words(row: Row) -> str:
    at = row.standing
    parts = [
        "" if at.epoch is None else f"epoch {at.epoch:.1f}" + (f"/{at.epochs:g}" if at.epochs else ""),
        "" if at.metric is None else f"{at.metric[0]} {_percent(*at.metric)}",
        "" if row.left is None else f"{row.left:.1f} min left",
    ]
    return ", ".join(part for part in parts if part) or "starting"


def _outcome(row: Row) -> str:
    if row.entry.reason:
        return f"  {row.entry.reason}"
    if row.entry.state == "finished" and row.standing.metric is not None:
        return f"  {row.standing.metric[0]} {_percent(*row.standing.metric)}"
    return ""


def _percent(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if "top" in name else f"{value:.4g}"
