"""What many runs found: report.html in one file, report.md, report.json. Made when a sweep ends, and by `report`.

Runs that differ in the seed alone are one setting, shown by mean and standard deviation. Only finished runs with a
finite metric count; the others are listed with what became of them."""

from __future__ import annotations

import html
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitexp import journal, plots
from vitexp.pipeline_report import html_figures, html_page, html_table
from vitexp.run_folder import make_folder, write_atomic
from vitexp.statistics import Effect, Spread, marginal_effects, mean_std
from vitexp.sweeps.ledger import Entry, Ledger, summary_of

SEED = "seed"
CURVES_SHOWN = 6  # settings, the best ones: more lines than that are no picture
AXES_SHOWN = 8  # in pictures, those that matter most
VALUES_SHOWN, RANGES = 12, 5  # of an axis: where there are more values they are put together in so many ranges


@dataclass(frozen=True)
class Outcome:
    """One run."""

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

    kind: Literal["sweep", "experiment"]
    name: str
    metric: str | None
    maximize: bool
    outcomes: list[Outcome]
    settings: list[Setting]  # best first
    axes: list[str]  # keys that differ among runs with a metric, but for the seed
    effects: dict[str, list[Effect]]  # by axis

    @property
    def title(self) -> str:
        return f"{self.kind.capitalize()} {self.name}"

    @property
    def best(self) -> Outcome | None:
        judged = [(one.metric, one) for one in self.outcomes if one.metric is not None]
        return (max if self.maximize else min)(judged, key=lambda pair: pair[0])[1] if judged else None

    @property
    def left_out(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.metric is None]


def write_report(ledger: Ledger, *, metric: str | None, maximize: bool) -> str:
    """Writes the three files into the sweep's folder and returns the report as short text."""
    return write_files(find(ledger, metric=metric, maximize=maximize), ledger.folder)


def write_files(found: Findings, folder: Path) -> str:
    """Writes the three files and their pictures; returns where, as a line for a person."""
    pictures = draw(found, folder / "plots")
    write_atomic(folder / "report.json", as_json(found))
    write_atomic(folder / "report.md", markdown(found, pictures, folder))
    write_atomic(folder / "report.html", page(found, pictures))
    return f"report      {folder / 'report.html'}"


# ---- what is found ---------------------------------------------------------------------------------------------------


def find(ledger: Ledger, *, metric: str | None, maximize: bool) -> Findings:
    """What the jobs of a sweep left. `metric` None: what they are judged by, the same for all."""
    measured = {name: summary_of(ledger.folder / name) for name in ledger.jobs if ledger.is_finished(name)}
    metric = metric or judged_by(measured.values())
    outcomes = []
    for name, entry in ledger.jobs.items():
        values = {text.partition("=")[0].lstrip("+~"): text.partition("=")[2] for text in entry.overrides}
        swept = {key: number(values[key]) for key in ledger.swept if key in values}
        value = measured.get(name, {}).get(metric or "")
        rows = journal.read(ledger.folder / name / "metrics.jsonl") if value is not None else []
        curve = [(row["epoch"], row[metric]) for row in rows if metric in row]
        outcomes.append(Outcome(name, entry, swept, value, curve))
    return findings("sweep", ledger.folder.name, outcomes, ledger.swept, metric=metric, maximize=maximize)


def judged_by(measured: Iterable[Mapping[str, float]]) -> str | None:
    """By which metric runs with these are judged, one for all; None where none of them has one."""
    named = set().union(*measured)
    return next((one for one in journal.JUDGED_BY if one in named), None)


def findings(
    kind: Literal["sweep", "experiment"],
    name: str,
    outcomes: list[Outcome],
    swept: Sequence[str],
    *,
    metric: str | None,
    maximize: bool,
) -> Findings:
    """Settings with means over their seeds, and what each swept key does."""
    judged = [one for one in outcomes if one.metric is not None]
    groups: dict[str, list[Outcome]] = {}
    for one in judged:
        groups.setdefault(one.setting, []).append(one)
    settings = [
        Setting(
            setting,
            runs,
            mean_std([one.metric for one in runs if one.metric is not None]),
            sum(one.entry.minutes for one in runs) / len(runs),
        )
        for setting, runs in groups.items()
    ]
    settings.sort(key=lambda one: one.spread.mean, reverse=maximize)
    rows = [one.swept | {"metric": one.metric} for one in judged]
    differing = [key for key in swept if len({str(one.swept.get(key)) for one in judged}) > 1]
    axes = [key for key in differing if key != SEED]
    effects = {key: marginal_effects(in_ranges(rows, key), key, "metric", axes=differing) for key in axes}
    return Findings(kind, name, metric, maximize, outcomes, settings, axes, effects)


def in_ranges(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows, where a search drew many numbers for the key with ranges of them, equally many rows in each."""
    drawn = {row.get(key) for row in rows}
    if len(drawn) <= VALUES_SHOWN or not all(isinstance(value, int | float) for value in drawn):
        return rows
    ordered = sorted(rows, key=lambda row: row[key])
    parts = [ordered[len(rows) * n // RANGES : len(rows) * (n + 1) // RANGES] for n in range(RANGES)]
    return [row | {key: f"{part[0][key]:.3g} to {part[-1][key]:.3g}"} for part in parts for row in part]


def number(text: str) -> Any:
    """An int or a float where the text is one, else the text."""
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
    if axes := _most_important(found):
        effects = {
            key: [(str(one.value), one.all.mean, one.all.std, one.all.n) for one in found.effects[key]] for key in axes
        }
        title = f"{found.metric} at each value, mean and standard deviation"
        path = plots.effects(effects, folder / "effects.png", title=title, percent=percent)
        pictures.append((path, "Effect of each setting"))
    judged = [one for one in found.outcomes if one.metric is not None]
    if len(axes) > 1 and len(judged) > 2:
        columns = {key: [one.swept.get(key) for one in judged] for key in axes}
        columns[str(found.metric)] = [one.metric for one in judged]
        path = plots.parallel_coordinates(columns, folder / "parallel.png", title="all finished runs")
        pictures.append((path, "All runs"))
    return pictures


def _most_important(found: Findings) -> list[str]:
    """Axes by how far apart the means at their values are, at most AXES_SHOWN, in their own order."""
    means = {key: [one.all.mean for one in of_axis] for key, of_axis in found.effects.items() if of_axis}
    ranked = sorted(means, key=lambda key: max(means[key]) - min(means[key]), reverse=True)[:AXES_SHOWN]
    return [key for key in found.axes if key in ranked]


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
    if found.left_out:
        rows = [
            [one.name, one.setting, one.entry.state, _why(one, found.metric), str(one.entry.attempts)]
            for one in found.left_out
        ]
        made.append(("Not counted", ["run", "setting", "state", "reason", "attempts"], rows))
    return made


def _why(left_out: Outcome, metric: str | None) -> str:
    if left_out.entry.state != "finished":
        return left_out.entry.reason
    return f"has no {metric}, or none that is finite" if metric else "has nothing that runs are judged by"


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
    best = found.best
    return f"python -m vitexp {shlex.join(best.entry.overrides)}" if best is not None and best.entry.overrides else None


def markdown(found: Findings, pictures: Sequence[tuple[Path, str]], folder: Path) -> str:
    lines = [f"# {found.title}", "", *words(found), ""]
    if (command := command_of(found)) is not None:
        lines += ["```", command, "```", ""]
    for heading, columns, rows in tables(found):
        lines += [f"## {heading}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows] + [""]
    for path, caption in pictures:
        lines += [f"## {caption}", "", f"![{caption}]({path.relative_to(folder).as_posix()})", ""]
    return "\n".join(lines)


def page(found: Findings, pictures: Sequence[tuple[Path, str]]) -> str:
    parts = [f"<h1>{html.escape(found.title)}</h1>", *(f"<p>{html.escape(one)}</p>" for one in words(found))]
    if (command := command_of(found)) is not None:
        parts.append(f"<pre>{html.escape(command)}</pre>")
    shown = [f"<h2>{html.escape(heading)}</h2>{html_table(columns, rows)}" for heading, columns, rows in tables(found)]
    # Settings, best first, then what a person would rather look at than read.
    return html_page(found.title, "".join([*parts, *shown[:1], html_figures(pictures), *shown[1:]]))


def as_json(found: Findings) -> str:
    def spread(one: Spread) -> dict[str, Any]:
        return {"mean": _finite(one.mean), "std": _finite(one.std), "n": one.n}

    tree = {
        found.kind: found.name,
        "metric": found.metric,
        "maximize": found.maximize,
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
    return value if math.isfinite(value) else None


def _is_share(metric: str | None) -> bool:
    return metric is not None and ("top" in metric or "accuracy" in metric)


def _value(value: float, metric: str | None) -> str:
    return f"{100 * value:.2f} %" if _is_share(metric) else f"{value:.4g}"


def _spread(spread: Spread, metric: str | None) -> str:
    mean = _value(spread.mean, metric)
    if spread.n < 2:
        return mean
    return f"{mean} ± {100 * spread.std:.2f}" if _is_share(metric) else f"{mean} ± {spread.std:.2g}"
