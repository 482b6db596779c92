"""What a sweep found: report.html in one file, report.md, report.json. Made when it ends, and by `vitexp report`.

Runs that differ in the seed alone are one setting, shown by mean and standard deviation. Only finished runs with a
finite metric count; the others are listed with what became of them."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitexp import journal, plots
from vitexp.pipeline_report import html_figures, html_page, html_table
from vitexp.run_folder import make_folder, write_atomic
from vitexp.statistics import Effect, Spread, marginal_effects, mean_std
from vitexp.sweeps.display import of_summary
from vitexp.sweeps.ledger import Entry, Ledger

SEED = "seed"
CURVES_SHOWN = 6  # settings, the best ones: more lines than that are no picture


@dataclass(frozen=True)
class Outcome:
    """One job."""

    name: str
    entry: Entry
    swept: dict[str, Any]  # numbers as numbers
    metric: float | None  # None: not finished, or not finite
    curve: list[tuple[float, float]]  # (epoch, metric) of every evaluation

    @property
    def setting(self) -> str:
        """What it has in common with its repetitions."""
        return " ".join(f"{key}={value}" for key, value in self.swept.items() if key != SEED) or "all"


@dataclass(frozen=True)
class Setting:
    """Runs that differ in the seed alone."""

    name: str
    runs: list[Outcome]
    spread: Spread
    minutes: float  # of a run, on average


@dataclass(frozen=True)
class Findings:
    """All that the three files say."""

    sweep: str
    metric: str | None
    maximize: bool
    outcomes: list[Outcome]
    settings: list[Setting]  # best first
    effects: dict[str, list[Effect]]  # by swept key, but for the seed

    @property
    def best(self) -> Outcome | None:
        judged = [(one.metric, one) for one in self.outcomes if one.metric is not None]
        return (max if self.maximize else min)(judged, key=lambda pair: pair[0])[1] if judged else None

    @property
    def unfinished(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.metric is None]


def write_report(ledger: Ledger, *, metric: str | None, maximize: bool) -> str:
    """Writes the three files into the sweep's folder and returns the report as short text."""
    found = find(ledger, metric=metric, maximize=maximize)
    pictures = draw(found, ledger.folder / "plots")
    write_atomic(ledger.folder / "report.json", as_json(found))
    write_atomic(ledger.folder / "report.md", markdown(found, pictures, ledger.folder))
    write_atomic(ledger.folder / "report.html", page(found, pictures))
    return f"report      {ledger.folder / 'report.html'}"


def find(ledger: Ledger, *, metric: str | None, maximize: bool) -> Findings:
    """Reads what the jobs left. `metric` None: what they are judged by, the same for all."""
    done = [name for name in ledger.jobs if ledger.is_finished(name)]
    if metric is None:
        named = [found[0] for name in done if (found := of_summary(ledger.folder / name, metric=None)) is not None]
        metric = next((one for one in journal.JUDGED_BY if one in named), None)
    outcomes = [_outcome(ledger, name, entry, metric) for name, entry in ledger.jobs.items()]
    judged = [one for one in outcomes if one.metric is not None]
    groups: dict[str, list[Outcome]] = {}
    for one in judged:
        groups.setdefault(one.setting, []).append(one)
    settings = [
        Setting(
            name,
            runs,
            mean_std([one.metric for one in runs if one.metric is not None]),
            sum(one.entry.minutes for one in runs) / len(runs),
        )
        for name, runs in groups.items()
    ]
    settings.sort(key=lambda one: one.spread.mean, reverse=maximize)
    rows = [one.swept | {"metric": one.metric} for one in judged]
    axes = [key for key in ledger.swept if len({str(one.swept.get(key)) for one in outcomes}) > 1]
    effects = {key: marginal_effects(rows, key, "metric", axes=axes) for key in axes if key != SEED}
    return Findings(ledger.folder.name, metric, maximize, outcomes, settings, effects)


def _outcome(ledger: Ledger, name: str, entry: Entry, metric: str | None) -> Outcome:
    values = {text.partition("=")[0].lstrip("+~"): text.partition("=")[2] for text in entry.overrides}
    found = of_summary(ledger.folder / name, metric=metric) if metric and ledger.is_finished(name) else None
    rows = journal.read(ledger.folder / name / "metrics.jsonl") if found is not None else []
    return Outcome(
        name=name,
        entry=entry,
        swept={key: _number(values[key]) for key in ledger.swept if key in values},
        metric=None if found is None else found[1],
        curve=[(row["epoch"], row[metric]) for row in rows if metric in row],
    )


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# ---- what is shown ---------------------------------------------------------------------------------------------------


def draw(found: Findings, folder: Path) -> list[tuple[Path, str]]:
    """(picture, words) of the accuracy by epoch, of each axis, and of all runs at once."""
    make_folder(folder)
    percent, pictures = _is_share(found.metric), []
    learned = {
        one.name: [run.curve for run in one.runs] for one in found.settings[:CURVES_SHOWN]
        if all(len(run.curve) > 1 for run in one.runs)
    }  # fmt: skip
    if learned:
        best = "" if len(found.settings) <= CURVES_SHOWN else f", the best {CURVES_SHOWN} settings"
        title = f"{found.metric} by epoch{best}"
        pictures.append((plots.by_epoch(learned, folder / "curves.png", title=title, percent=percent), "By epoch"))
    if found.effects:
        effects = {
            key: [(str(one.value), one.all.mean, one.all.std, one.all.n) for one in of_axis]
            for key, of_axis in found.effects.items()
        }
        title = f"{found.metric} at each value, mean and standard deviation"
        path = plots.effects(effects, folder / "effects.png", title=title, percent=percent)
        pictures.append((path, "Effect of each setting"))
    judged = [one for one in found.outcomes if one.metric is not None]
    if len(found.effects) > 1 and len(judged) > 2:
        columns = {key: [one.swept.get(key) for one in judged] for key in found.effects}
        columns[str(found.metric)] = [one.metric for one in judged]
        path = plots.parallel_coordinates(columns, folder / "parallel.png", title="all finished runs")
        pictures.append((path, "All runs"))
    return pictures


def tables(found: Findings) -> list[tuple[str, list[str], list[list[str]]]]:
    """(heading, heads of the columns, rows)."""
    made = [
        (
            "Settings",
            ["setting", str(found.metric), "runs", "minutes a run"],
            [
                [one.name, _spread(one.spread, found.metric), str(one.spread.n), f"{one.minutes:.1f}"]
                for one in found.settings
            ],
        )
    ]
    for key, of_axis in found.effects.items():
        rows = [
            [
                str(one.value),
                _spread(one.all, found.metric),
                str(one.all.n),
                _spread(one.balanced, found.metric) if one.balanced.n else "",
            ]
            for one in of_axis
        ]
        made.append((f"Effect of {key}", [key, str(found.metric), "runs", "balanced"], rows))
    if found.unfinished:
        rows = [[one.name, one.entry.state, one.entry.reason, str(one.entry.attempts)] for one in found.unfinished]
        made.append(("Not finished", ["job", "state", "reason", "attempts"], rows))
    return made


def words(found: Findings) -> list[str]:
    """Sentences: how to read the tables, and the best run as a command."""
    said = [
        "Runs that differ in the seed alone are one setting: mean ± sample standard deviation. Balanced: over those "
        "settings of the others that finished at every value of this one."
    ]
    best = found.best
    if best is not None and best.metric is not None:
        said.append(
            f"Best run: {_value(best.metric, found.metric)}, chosen among all on the validation split, so it flatters."
        )
    return said


def command_of(found: Findings) -> str | None:
    return None if found.best is None else f"python -m vitexp {shlex.join(found.best.entry.overrides)}"


def markdown(found: Findings, pictures: Sequence[tuple[Path, str]], folder: Path) -> str:
    lines = [f"# Sweep {found.sweep}", "", *words(found), ""]
    if (command := command_of(found)) is not None:
        lines += ["```", command, "```", ""]
    for heading, columns, rows in tables(found):
        lines += [f"## {heading}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows] + [""]
    for path, caption in pictures:
        lines += [f"## {caption}", "", f"![{caption}]({path.relative_to(folder).as_posix()})", ""]
    return "\n".join(lines)


def page(found: Findings, pictures: Sequence[tuple[Path, str]]) -> str:
    parts = [f"<h1>Sweep {html.escape(found.sweep)}</h1>", *(f"<p>{html.escape(one)}</p>" for one in words(found))]
    if (command := command_of(found)) is not None:
        parts.append(f"<pre>{html.escape(command)}</pre>")
    for heading, columns, rows in tables(found):
        parts.append(f"<h2>{html.escape(heading)}</h2>{html_table(columns, rows)}")
    return html_page(f"Sweep {found.sweep}", "".join(parts) + html_figures(pictures))


def as_json(found: Findings) -> str:
    def spread(one: Spread) -> dict[str, Any]:
        return {"mean": _finite(one.mean), "std": _finite(one.std), "n": one.n}

    tree = {
        "sweep": found.sweep,
        "metric": found.metric,
        "jobs": [
            {"job": one.name, **one.swept, "state": one.entry.state, "reason": one.entry.reason, "metric": one.metric}
            for one in found.outcomes
        ],
        "settings": [{"setting": one.name, **spread(one.spread), "minutes": one.minutes} for one in found.settings],
        "effects": {
            key: [{"value": one.value, "all": spread(one.all), "balanced": spread(one.balanced)} for one in of_axis]
            for key, of_axis in found.effects.items()
        },
        "best": None if found.best is None else found.best.name,
        "command": command_of(found),
    }
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


def _is_share(metric: str | None) -> bool:
    return metric is not None and ("top" in metric or "accuracy" in metric)


def _value(value: float, metric: str | None) -> str:
    return f"{100 * value:.2f} %" if _is_share(metric) else f"{value:.4g}"


def _spread(spread: Spread, metric: str | None) -> str:
    mean = _value(spread.mean, metric)
    if spread.n < 2:
        return mean
    return f"{mean} ± {100 * spread.std:.2f}" if _is_share(metric) else f"{mean} ± {spread.std:.2g}"
