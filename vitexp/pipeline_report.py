"""What a pipeline's stages reached, side by side: report.md; report.html, one file with its charts inside; report.json.

All that depends on the clock stands under "perf" in report.json: the rest repeats, however often a run was stopped."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from vitexp import journal, plots
from vitexp.config import CONFIG_NAME
from vitexp.data.label_store import SPEED, open_store
from vitexp.errors import UserError
from vitexp.run_folder import make_folder, write_atomic

REPORT = "report.json"
# What a stage is judged by, best first: a classifier's accuracy, else a probe's, else that of nearest neighbours.
ALSO_SHOWN = ("val/loss", "val_ema/top1", "val/effective_rank")
# The last of these files in a stage's plots/ is shown.
PICTURES = (
    ("reconstructions/*.png", "what the decoder restores"),
    ("token_labels/*.png", "what its tokens are taught, and say"),
    ("attention.png", "where the encoder looks"),
)


@dataclass(frozen=True)
class Part:
    """Where one stage lies, and what it took from which others."""

    name: str
    folder: Path
    parent: str | None  # whose weights
    teacher: str | None  # whose word
    token_labels: str | None  # whose label maps
    store: Path | None  # of its own label maps, where it made some


@dataclass(frozen=True)
class StageResult:
    """One finished stage, as its folder tells."""

    name: str
    folder: Path
    kind: str  # of stage and method
    parent: str | None
    teacher: str | None
    token_labels: str | None
    pictures: str  # of the training split: "all", "10 %", or "none" where nothing was trained
    epochs: float | None  # None for a stage that is no run
    metrics: dict[str, float]
    curve: list[tuple[float, float]]  # (epoch, accuracy) of every evaluation
    losses: list[tuple[float, float]]  # (epoch, training loss)
    perf: dict[str, float]  # images_per_s and minutes, of the updates alone, over all its starts; empty if it made none
    maps: str | None = None  # what label maps it made
    store: Path | None = None  # where those lie

    @property
    def accuracy(self) -> tuple[str, float] | None:
        """(metric, value) that it is judged by; None for a stage that classifies nothing."""
        return next(((name, self.metrics[name]) for name in journal.JUDGED_BY if name in self.metrics), None)

    def points_over(self, baseline: StageResult | None) -> float | None:
        """Percentage points of accuracy above the baseline's; None where they are not judged by the same metric."""
        if baseline is None or baseline is self or self.accuracy is None or baseline.accuracy is None:
            return None
        (name, value), (measured, usual) = self.accuracy, baseline.accuracy
        return 100 * (value - usual) if name == measured else None


def write_report(folder: Path, *, name: str, parts: list[Part], baseline: str | None = None) -> str:
    """Writes the files and the charts into the pipeline's folder; returns lines for a person.

    `baseline` names the part with whose accuracy the others' are compared."""
    results = [read_run(part) if part.store is None else read_labeling(part, part.store) for part in parts]
    usual = next((result for result in results if result.name == baseline), None)
    charts = draw_charts(results, folder / "plots")
    seen = [(path, f"{result.name}: {words}") for result in results for path, words in _pictures(result)]
    write_atomic(folder / "report.md", markdown(name, results, [*charts, *seen], folder, baseline=usual))
    write_atomic(folder / "report.html", page(name, results, [*charts, *seen], baseline=usual))
    write_atomic(folder / REPORT, as_json(name, results, folder, baseline=usual))
    lines = [f"{result.name:<14}{result.maps or _accuracy(result)}{_compared(result, usual)}" for result in results]
    return "\n".join([*lines, f"report      {folder / 'report.html'}", f"            {folder / 'report.md'}"])


def write_again(folder: Path) -> str:
    """Writes the report of a finished pipeline anew, from its folder alone; returns lines for a person.

    Which stages there are says the report that the pipeline wrote itself. Raises UserError where it cannot be read, or
    a stage is not there any more."""
    name, parts, baseline = _as_reported(folder)
    try:
        return write_report(folder, name=name, parts=parts, baseline=baseline)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: a stage of this pipeline is not whole any more, {error.filename} is gone") from None


def _as_reported(folder: Path) -> tuple[str, list[Part], str | None]:
    """Name, stages and baseline of the pipeline, from report.json."""

    def place(path: str) -> Path:
        return Path(os.path.normpath(folder / path))

    path, taken = folder / REPORT, ("name", "parent", "teacher", "token_labels")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        parts = [
            Part(
                **{key: stage[key] for key in taken},
                folder=place(stage["folder"]),
                store=None if stage["store"] is None else place(stage["store"]),
            )
            for stage in said["stages"]
        ]
        return said["pipeline"], parts, next(iter(said.get("points_over", {})), None)
    except FileNotFoundError:
        raise UserError(
            f"{folder}: this pipeline has not finished; its own command goes on, and ends with a report"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as the report of a pipeline ({error!r}); the pipeline's own command writes it anew"
        ) from None


def read_run(part: Part) -> StageResult:
    summary = json.loads((part.folder / "summary.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((part.folder / CONFIG_NAME).read_text(encoding="utf-8"))
    rows = journal.read(part.folder / "metrics.jsonl")
    metrics = {key: value for key, value in summary.items() if key.startswith(("val/", "val_ema/", "train/"))}
    judged = next((key for key in journal.JUDGED_BY if key in metrics), None)
    trained, share = summary["step"] > 0, config["train"]["fraction"]
    seconds = trained_s(rows, summary["global_batch"])
    speed = {"images_per_s": summary["step"] * summary["global_batch"] / seconds} if seconds else {}
    return StageResult(
        name=part.name,
        folder=part.folder,
        kind=f"{config['stage']['name']}, {config['choices']['method']}" if trained else config["stage"]["name"],
        parent=part.parent,
        teacher=part.teacher,
        token_labels=part.token_labels,
        pictures=("all" if share == 1 else f"{100 * share:g} %") if trained else "none",
        epochs=summary["epoch"],
        metrics=metrics,
        curve=_by_epoch(rows, judged),
        losses=_by_epoch(rows, "train/loss"),
        perf=speed | {"minutes": seconds / 60} if trained else {},
    )


def read_labeling(part: Part, store: Path) -> StageResult:
    """A stage that made label maps; its minutes are those of all pictures at the speed of its last start."""
    found = open_store(store)
    pictures, kept, height, width = found.values.shape
    perf = {}
    if (store / SPEED).exists():  # it is not where one was killed between the last picture and this file
        last = json.loads((store / SPEED).read_text(encoding="utf-8"))
        speed = last["pictures"] / last["seconds"]
        perf = {"images_per_s": speed, "minutes": pictures / speed / 60}
    size = (found.values.nbytes + found.numbers.nbytes) / 1e6
    classes = len(found.head["classes"])
    return StageResult(
        name=part.name,
        folder=part.folder,
        kind="label",
        parent=part.parent or found.head["teacher"].get("name"),
        teacher=None,
        token_labels=None,
        pictures=f"{pictures:,}",
        epochs=None,
        metrics={},
        curve=[],
        losses=[],
        perf=perf,
        store=store,
        maps=f"{kept} of {classes:,} classes at {height}x{width} places, {size:,.1f} MB",
    )


def _by_epoch(rows: list[dict[str, Any]], key: str | None) -> list[tuple[float, float]]:
    return [(row["epoch"], row[key]) for row in rows if key in row]


def trained_s(rows: list[dict[str, Any]], global_batch: int) -> float:
    """Seconds of the updates alone, from each row's speed: the same however often the run was stopped and resumed."""
    seconds, before = 0.0, 0
    for row in rows:
        if row.get("perf/images_per_s"):
            seconds += (row["step"] - before) * global_batch / row["perf/images_per_s"]
            before = row["step"]
    return seconds


def draw_charts(results: list[StageResult], folder: Path) -> list[tuple[Path, str]]:
    """(picture, words) of accuracy by epoch of all stages with a classifier, and of the loss of those without."""
    make_folder(folder)
    charts = []
    learned = {f"{r.name}{_measured(r)}": [r.curve] for r in results if len(r.curve) > 1}
    if learned:
        path = plots.by_epoch(learned, folder / "accuracy.png", title="accuracy on the validation split by epoch")
        charts.append((path, "Accuracy by epoch"))
    for result in results:
        if "val/top1" not in result.metrics and len(result.losses) > 1:
            title, path = f"training loss of {result.name}", folder / f"loss_{result.name}.png"
            plots.by_epoch({result.name: [result.losses]}, path, title=title, percent=False)
            charts.append((path, f"Loss of {result.name}"))
    return charts


def table(results: list[StageResult], *, baseline: StageResult | None) -> list[tuple[str, ...]]:
    """The heads of the columns, and a row a stage."""
    rows: list[tuple[str, ...]] = [
        (
            "stage",
            "what it does",
            "starts from",
            "labels or pictures",
            "accuracy",
            *([] if baseline is None else [f"points over {baseline.name}"]),
            "other",
            "epochs",
            "images/s",
            "minutes",
        )
    ]
    for result in results:
        others = [f"{key} {result.metrics[key]:.4g}" for key in ALSO_SHOWN if key in result.metrics]
        points = result.points_over(baseline)
        rows.append(
            (
                result.name,
                result.kind,
                ", ".join(filter(None, [result.parent or "random weights", result.teacher, result.token_labels])),
                result.pictures,
                _accuracy(result),
                *([] if baseline is None else ["" if points is None else f"{points:+.2f}"]),
                ", ".join([result.maps] if result.maps else others),
                "" if result.epochs is None else f"{result.epochs:g}",
                f"{result.perf['images_per_s']:.0f}" if "images_per_s" in result.perf else "",
                f"{result.perf['minutes']:.1f}" if "minutes" in result.perf else "",
            )
        )
    return rows


def as_json(name: str, results: list[StageResult], folder: Path, *, baseline: StageResult | None) -> str:
    def place(path: Path | None) -> str | None:
        """Seen from the pipeline's folder: the report is the same wherever that lies."""
        return None if path is None else Path(os.path.relpath(path, folder)).as_posix()

    stages = [asdict(one) | {"folder": place(one.folder), "store": place(one.store)} for one in results]
    tree: dict[str, Any] = {"pipeline": name, "stages": stages}
    if baseline is not None:
        points = {result.name: result.points_over(baseline) for result in results}
        tree["points_over"] = {baseline.name: {key: value for key, value in points.items() if value is not None}}
    return json.dumps(tree, indent=2) + "\n"


def markdown(
    name: str,
    results: list[StageResult],
    pictures: list[tuple[Path, str]],
    folder: Path,
    *,
    baseline: StageResult | None,
) -> str:
    columns, *rows = table(results, baseline=baseline)
    lines = [f"# Pipeline {name}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    lines += ["", _reading(), ""]
    for path, words in pictures:
        place = Path(os.path.relpath(path, folder)).as_posix()  # that of a finished run lies elsewhere
        lines += [f"## {words}", "", f"![{words}]({place})", ""]
    return "\n".join(lines)


def page(
    name: str, results: list[StageResult], pictures: list[tuple[Path, str]], *, baseline: StageResult | None
) -> str:
    """The same as one HTML file that needs nothing beside it and no network."""
    columns, *rows = table(results, baseline=baseline)
    title = f"Pipeline {name}"
    body = f"<h1>{html.escape(title)}</h1>{html_table(columns, rows)}<p>{html.escape(_reading())}</p>"
    return html_page(title, body + html_figures(pictures))


def html_page(title: str, body: str) -> str:
    """One file of a body that is HTML already and names nothing outside of it."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def html_figures(pictures: Iterable[tuple[Path, str]]) -> str:
    """Pictures (PNG, caption), the files' bytes in the text."""
    return "".join(
        f'<figure><figcaption>{html.escape(words)}</figcaption><img alt="{html.escape(words)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for path, words in pictures
    )


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;width:100%}th,td{padding:.35em .7em;border-bottom:1px solid #ddd;text-align:left}"
    "th{font-weight:600;color:#555}figure{margin:2em 0}figcaption{font-weight:600;margin-bottom:.5em}"
    "img{max-width:100%}pre{white-space:pre-wrap;overflow-wrap:anywhere}"
)


def _reading() -> str:
    return (
        "Accuracy is of the validation split after the last epoch; nothing was chosen on it. Minutes are of the "
        "updates alone, over all starts of the stage; of a labeling, of its scoring."
    )


def _accuracy(result: StageResult) -> str:
    if result.accuracy is None:
        return ""
    return f"{100 * result.accuracy[1]:.2f} %{_measured(result)}"


def _measured(result: StageResult) -> str:
    """` (knn)` where not the stage's own classifier is judged."""
    kind = "top1" if result.accuracy is None else result.accuracy[0].partition("/")[2]
    return "" if kind == "top1" else f" ({kind.removesuffix('_top1')})"


def _compared(result: StageResult, baseline: StageResult | None) -> str:
    points = result.points_over(baseline)
    return "" if baseline is None or points is None else f"   {points:+.2f} points over {baseline.name}"


def _pictures(result: StageResult) -> list[tuple[Path, str]]:
    found = [(sorted((result.folder / "plots").glob(pattern)), words) for pattern, words in PICTURES]
    return [(files[-1], words) for files, words in found if files]
