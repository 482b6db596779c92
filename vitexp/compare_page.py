"""A comparison for a person and for programs: tables in the terminal, compare.html as one file, CSV."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitexp import plots
from vitexp.comparison import Comparison, Measured
from vitexp.pipeline_report import html_figures, html_page, html_table
from vitexp.run_folder import make_folder, write_atomic
from vitexp.statistics import Interval, Spread

SHARES = ("top1", "top5", "mean_class_accuracy", "ece")  # shown in percent
CHARTED = "top1"
BRIEF = ("top1", "loss")
LONGEST = 48  # letters of a setting in the terminal


@dataclass(frozen=True)
class Table:
    """As it is shown: text, numbers rounded."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def tables(found: Comparison, *, brief: bool = False) -> list[Table]:
    """Runs, settings that differ, metrics, pairs, and groups of seeds; those that have something to show.

    brief: pairs with the differences of few metrics, to fit a terminal."""
    shown = [_runs(found), _settings(found)]
    if found.measured is not None:
        shown += [_metrics(found, found.measured), _pairs(found, found.measured, brief=brief)]
    if any(not entry.classes for entry in found.entries) or found.measured is None:
        shown.append(_recorded(found))
    if any(len(group) > 1 for group in found.groups):
        shown.append(_seeds(found))
    return [table for table in shown if table.rows]


def _runs(found: Comparison) -> Table:
    columns = ["run", "model", "stage", "seed", "epochs", "parameters", "GFLOPs", "images/s", "weights"]
    rows = []
    for entry in found.entries:
        told = entry.summary
        rows.append(
            [
                entry.name,
                entry.settings.get("choices.model", ""),
                entry.settings.get("choices.stage", ""),
                entry.seed or "",
                _number(told.get("epoch")),
                f"{told['parameters']:,}" if "parameters" in told else "",
                _number(told.get("gflops")),
                _number(told.get("perf/images_per_s")),
                str(entry.weights),
            ]
        )
    return Table("Runs", columns, rows)


def _settings(found: Comparison) -> Table:
    columns = ["setting", *(found.group_name(group) for group in found.groups)]
    rows = [[key, *values] for key, values in found.differing_settings()]
    return Table("Settings that differ", columns, rows, "— is a setting that a run does not have.")


def _metrics(found: Comparison, measured: Measured) -> Table:
    names = list(next(iter(measured.metrics.values())))
    rows = [
        [found.entries[i].name, *(_interval(name, metrics[name]) for name in names)]
        for i, metrics in measured.metrics.items()
    ]
    note = (
        f"On {measured.pictures.where}, measured anew in float32. In brackets 95 % intervals (BCa bootstrap over the "
        "pictures, the same draws for all)."
    )
    return Table("Metrics", ["run", *map(_heading, names)], rows, note)


def _pairs(found: Comparison, measured: Measured, *, brief: bool) -> Table:
    names = [name for name in next(iter(measured.metrics.values())) if not brief or name in BRIEF]
    columns = ["first", "second", *(f"Δ {_heading(name)}" for name in names)]
    columns += ["both right", "first alone", "second alone", "neither", "p", "McNemar's test"]
    rows = []
    for (i, j), pair in measured.pairs.items():
        test = pair.mcnemar
        rows.append(
            [
                found.entries[i].name,
                found.entries[j].name,
                *(_interval(name, pair.differences[name], sign="+") for name in names),
                *(f"{count:,}" for count in (test.both, test.first, test.second, test.neither)),
                f"{test.p:.2g}" if test.p >= 1e-4 else "< 0.0001",
                test.method if test.chi2 is None else f"χ² = {test.chi2:.1f}, continuity correction",
            ]
        )
    note = "Second less first on the same pictures; p: of so uneven errors, or more so, if both err equally often."
    return Table("Pairs", columns, rows, note)


def _recorded(found: Comparison) -> Table:
    names = list(dict.fromkeys(name for entry in found.entries for name in entry.recorded))
    rows = [[entry.name, *(_number(entry.recorded.get(name)) for name in names)] for entry in found.entries]
    return Table("Recorded by training", ["run", *names], rows if names else [], "Without intervals.")


def _seeds(found: Comparison) -> Table:
    spreads = found.spreads()
    names = list(dict.fromkeys(name for _, metrics in spreads for name in metrics))
    rows = [
        [found.group_name(group), str(len(group)), *(_spread(name, metrics.get(name)) for name in names)]
        for group, metrics in spreads
    ]
    note = "Mean ± standard deviation of the sample (n - 1) over n runs that differ in seed alone."
    return Table("Seeds", ["runs", "n", *map(_heading, names)], rows, note)


def _heading(name: str) -> str:
    return f"{name} %" if name in SHARES else name


def _interval(name: str, found: Interval, *, sign: str = "") -> str:
    scale, form = (100, f"{sign}.2f") if name in SHARES else (1, f"{sign}.4f")
    value = f"{scale * found.value:{form}}"
    if math.isnan(found.low) or found.low == found.high:  # of all or none right every resample says the same
        return value
    return f"{value} [{scale * found.low:{form}}, {scale * found.high:{form}}]"


def _spread(name: str, found: Spread | None) -> str:
    if found is None:
        return ""
    scale, form = (100, ".2f") if name in SHARES else (1, ".4f")
    return f"{scale * found.mean:{form}}" + (f" ± {scale * found.std:{form}}" if found.n > 1 else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


# ---- the terminal


def as_text(found: Comparison) -> str:
    """The tables for a terminal, and what is to be read with them, last."""
    blocks = []
    for table in tables(found, brief=True):
        rows = [table.columns, *([_short(cell) for cell in row] for row in table.rows)]
        widths = [max(len(row[k]) for row in rows) for k in range(len(table.columns))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        blocks.append("\n".join([table.title, *(f"  {line}".rstrip() for line in lines)]))
        if table.note:
            blocks[-1] += f"\n  {table.note}"
    said = [f"warning: {text}" for text in found.warnings] + [f"note: {text}" for text in found.notes]
    return "\n\n".join([*blocks, *(["\n".join(said)] if said else [])])


def _short(cell: str) -> str:
    return cell if len(cell) <= LONGEST or "/" in cell else cell[: LONGEST - 1] + "…"


# ---- files


def write_files(found: Comparison, folder: Path) -> Path:
    """compare.html and the CSV files, plots/accuracy.png where the runs have curves; returns the path of the page."""
    make_folder(folder)
    for name, rows in csv_tables(found).items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_atomic(folder / name, text.getvalue())
    pictures = []
    curves = {
        found.group_name(group): [found.entries[i].curve for i in group]
        for group in found.groups
        if all(len(found.entries[i].curve) > 1 for i in group)
    }
    if curves:
        path = make_folder(folder / "plots") / "accuracy.png"
        plots.by_epoch(curves, path, title="accuracy that each run measured, by epoch")
        pictures.append((path, "Accuracy by epoch, each on its own validation split"))
    path = folder / "compare.html"
    write_atomic(path, page(found, pictures))
    return path


def page(found: Comparison, pictures: Sequence[tuple[Path, str]]) -> str:
    """One HTML file that needs nothing beside it and no network."""
    said = [f"<p><strong>Warning:</strong> {html.escape(text)}</p>" for text in found.warnings]
    said += [f"<p>{html.escape(text)}</p>" for text in found.notes]
    parts = ["<h1>Comparison</h1>", *said]
    for table in tables(found):
        parts += [f"<h2>{html.escape(table.title)}</h2>", html_table(table.columns, table.rows)]
        if table.title == "Metrics" and found.measured is not None:
            parts.append(intervals_svg(found, found.measured))
        if table.note:
            parts.append(f"<p>{html.escape(table.note)}</p>")
    return html_page("Comparison", "".join([*parts, html_figures(pictures)]))


def intervals_svg(found: Comparison, measured: Measured) -> str:
    """Accuracy of each run as a dot on the line of its interval."""
    rows = [(found.entries[i].name, metrics[CHARTED]) for i, metrics in measured.metrics.items()]
    ends = [100 * v for _, one in rows for v in (one.value, one.low, one.high) if not math.isnan(v)]
    low, high = min(ends), max(ends)
    spare = 0.05 * (high - low) or 1
    low, high = low - spare, high + spare
    left, right, step = 230, 960, 24

    def x(percent: float) -> float:
        return left + (right - left) * (percent - low) / (high - low)

    parts = []
    for number, (name, one) in enumerate(rows):
        y = step * number + 18
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{html.escape(name[-32:])}</text>')
        if not math.isnan(one.low):
            ends = f'x1="{x(100 * one.low):.1f}" x2="{x(100 * one.high):.1f}"'
            parts.append(f'<line {ends} y1="{y}" y2="{y}" stroke="#3465a4" stroke-width="2"/>')
        parts.append(
            f'<circle cx="{x(100 * one.value):.1f}" cy="{y}" r="4.5" fill="#3465a4">'
            f"<title>{_interval(CHARTED, one)} %</title></circle>"
        )
    y = step * len(rows) + 12
    for share in range(5):
        tick = low + (high - low) * share / 4
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="6" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{y + 16}" text-anchor="middle" fill="#666">{tick:.2f} %</text>')
    grid_first = [part for part in parts if 'stroke="#ddd"' in part]
    rest = [part for part in parts if 'stroke="#ddd"' not in part]
    return (
        f'<svg viewBox="0 0 1000 {y + 24}" role="img" aria-label="top1 with 95 % intervals" font-size="13">'
        + "".join([*grid_first, *rest])
        + "</svg>"
    )


Rows = list[list[Any]]


def csv_tables(found: Comparison) -> dict[str, Rows]:
    """File names and rows, heads first. Shares are fractions 0..1, what does not exist is empty."""
    settings: Rows = [["setting", *(found.group_name(group) for group in found.groups)]]
    settings += [[key, *values] for key, values in found.differing_settings()]
    runs: Rows = [["run", "weights", "group", "seed", "metric", "value", "low", "high"]]
    for number, group in enumerate(found.groups):
        for i in group:
            entry = found.entries[i]
            for name, value in found.figures(i).items():
                own = found.measured.metrics.get(i) if found.measured else None
                limits = ["", ""] if own is None else [_plain(own[name].low), _plain(own[name].high)]
                runs.append([entry.name, entry.weights, number, entry.seed or "", name, _plain(value), *limits])
    groups: Rows = [["group", "runs", "metric", "mean", "std", "n"]]
    for number, (group, metrics) in enumerate(found.spreads()):
        names = " ".join(found.entries[i].name for i in group)
        groups += [[number, names, name, _plain(one.mean), _plain(one.std), one.n] for name, one in metrics.items()]
    files = {"settings.csv": settings, "metrics.csv": runs, "groups.csv": groups}
    return files | (_measured_csv(found, found.measured) if found.measured else {})


def _measured_csv(found: Comparison, measured: Measured) -> dict[str, Rows]:
    pairs: Rows = [["first", "second", "metric", "difference", "low", "high"]]
    tests: Rows = [["first", "second", "both_right", "first_alone", "second_alone", "neither", "p", "chi2", "method"]]
    for (i, j), pair in measured.pairs.items():
        names, test = [found.entries[i].name, found.entries[j].name], pair.mcnemar
        for name, one in pair.differences.items():
            pairs.append([*names, name, _plain(one.value), _plain(one.low), _plain(one.high)])
        chi2 = "" if test.chi2 is None else test.chi2
        tests.append([*names, test.both, test.first, test.second, test.neither, test.p, chi2, test.method])
    classes, pictures = measured.pictures.classes, measured.pictures
    own = [(found.entries[i].name, answers) for i, answers in measured.answers.items()]
    heads = [head for name, _ in own for head in (f"{name}: class", f"{name}: probability")]
    answers: Rows = [["picture", "class", *heads]]
    for k, (name, label) in enumerate(zip(pictures.images.names, pictures.labels.tolist(), strict=True)):
        said = [(classes[one.predicted[k]], f"{one.probability[k]:.6g}") for _, one in own]
        answers.append([name, classes[label], *(cell for pair in said for cell in pair)])
    return {"pairs.csv": pairs, "mcnemar.csv": tests, "answers.csv": answers}


def _plain(value: float) -> float | str:
    return "" if math.isnan(value) else float(value)
