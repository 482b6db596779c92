"""What a pipeline's stages reached, side by side: report.md; report.html, one file with its charts inside; report.json.

All that depends on the clock stands under "perf" in report.json: the rest repeats, however often a run was stopped."""

from __future__ import annotations

import base64
import html
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from vitexp import journal, plots
from vitexp.config import CONFIG_NAME
from vitexp.run_folder import make_folder, write_atomic

# What a stage is judged by, best first: a classifier's accuracy, else a probe's, else that of nearest neighbours.
JUDGED_BY = ("val/top1", "val/probe_top1", "val/knn_top1")
ALSO_SHOWN = ("val/loss", "val_ema/top1", "val/effective_rank")
# The last of these files in a stage's plots/ is shown.
PICTURES = (("reconstructions/*.png", "what the decoder restores"), ("attention.png", "where the encoder looks"))


@dataclass(frozen=True)
class StageResult:
    """One finished stage, as its folder tells."""

    name: str
    folder: Path
    kind: str  # of stage and method
    parent: str | None
    pictures: str  # of the training split: "all", "10 %", or "none" where nothing was trained
    epochs: float
    metrics: dict[str, float]
    curve: list[tuple[float, float]]  # (epoch, accuracy) of every evaluation
    losses: list[tuple[float, float]]  # (epoch, training loss)
    perf: dict[str, float]  # images_per_s and minutes, of the updates alone, over all its starts; empty if it made none

    @property
    def accuracy(self) -> tuple[str, float] | None:
        """(metric, value) that it is judged by; None for a stage that classifies nothing."""
        return next(((name, self.metrics[name]) for name in JUDGED_BY if name in self.metrics), None)


def write_report(folder: Path, *, name: str, stages: list[str]) -> str:
    """Writes the files and the charts into the pipeline's folder; returns lines for a person."""
    results = [read_stage(folder / stage) for stage in stages]
    charts = draw_charts(results, folder / "plots")
    seen = [(path, f"{result.name}: {words}") for result in results for path, words in _pictures(result)]
    write_atomic(folder / "report.md", markdown(name, results, [*charts, *seen], folder))
    write_atomic(folder / "report.html", page(name, results, [*charts, *seen]))
    write_atomic(folder / "report.json", as_json(name, results))
    lines = [f"{result.name:<14}{_accuracy(result)}" for result in results]
    return "\n".join([*lines, f"report      {folder / 'report.html'}", f"            {folder / 'report.md'}"])


def read_stage(folder: Path) -> StageResult:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    rows = journal.read(folder / "metrics.jsonl")
    metrics = {key: value for key, value in summary.items() if key.startswith(("val/", "val_ema/", "train/"))}
    judged = next((key for key in JUDGED_BY if key in metrics), None)
    trained, share = summary["step"] > 0, config["train"]["fraction"]
    seconds = trained_s(rows, summary["global_batch"])
    speed = {"images_per_s": summary["step"] * summary["global_batch"] / seconds} if seconds else {}
    return StageResult(
        name=folder.name,
        folder=folder,
        kind=f"{config['stage']['name']}, {config['choices']['method']}" if trained else config["stage"]["name"],
        parent=None if config["init_from"] is None else Path(config["init_from"]).name,
        pictures=("all" if share == 1 else f"{100 * share:g} %") if trained else "none",
        epochs=summary["epoch"],
        metrics=metrics,
        curve=_by_epoch(rows, judged),
        losses=_by_epoch(rows, "train/loss"),
        perf=speed | {"minutes": seconds / 60} if trained else {},
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
    learned = {r.name: [r.curve] for r in results if len(r.curve) > 1}
    if learned:
        path = plots.by_epoch(learned, folder / "accuracy.png", title="accuracy on the validation split by epoch")
        charts.append((path, "Accuracy by epoch"))
    for result in results:
        if "val/top1" not in result.metrics and len(result.losses) > 1:
            title, path = f"training loss of {result.name}", folder / f"loss_{result.name}.png"
            plots.by_epoch({result.name: [result.losses]}, path, title=title, percent=False)
            charts.append((path, f"Loss of {result.name}"))
    return charts


COLUMNS = (
    "stage",
    "what it does",
    "starts from",
    "labels or pictures",
    "accuracy",
    "other",
    "epochs",
    "images/s",
    "minutes",
)


def table(results: list[StageResult]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for result in results:
        others = [f"{key} {result.metrics[key]:.4g}" for key in ALSO_SHOWN if key in result.metrics]
        rows.append(
            (
                result.name,
                result.kind,
                result.parent or "random weights",
                result.pictures,
                _accuracy(result),
                ", ".join(others),
                f"{result.epochs:g}",
                f"{result.perf['images_per_s']:.0f}" if "images_per_s" in result.perf else "",
                f"{result.perf['minutes']:.1f}" if "minutes" in result.perf else "",
            )
        )
    return rows


def as_json(name: str, results: list[StageResult]) -> str:
    stages = [{key: value for key, value in asdict(result).items() if key != "folder"} for result in results]
    return json.dumps({"pipeline": name, "stages": stages}, indent=2) + "\n"


def markdown(name: str, results: list[StageResult], pictures: list[tuple[Path, str]], folder: Path) -> str:
    lines = [f"# Pipeline {name}", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells) + " |" for cells in table(results)]
    lines += ["", _reading(), ""]
    for path, words in pictures:
        lines += [f"## {words}", "", f"![{words}]({path.relative_to(folder).as_posix()})", ""]
    return "\n".join(lines)


def page(name: str, results: list[StageResult], pictures: list[tuple[Path, str]]) -> str:
    """The same as one HTML file that needs nothing beside it and no network."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>" for cells in table(results)
    )
    figures = "".join(
        f'<figure><figcaption>{html.escape(words)}</figcaption><img alt="{html.escape(words)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for path, words in pictures
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Pipeline {html.escape(name)}</title>'
        f"<style>{STYLE}</style></head><body><h1>Pipeline {html.escape(name)}</h1>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{html.escape(_reading())}</p>{figures}"
        "</body></html>\n"
    )


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;width:100%}th,td{padding:.35em .7em;border-bottom:1px solid #ddd;text-align:left}"
    "th{font-weight:600;color:#555}figure{margin:2em 0}figcaption{font-weight:600;margin-bottom:.5em}"
    "img{max-width:100%}"
)


def _reading() -> str:
    return (
        "Accuracy is of the validation split after the last epoch; nothing was chosen on it. Minutes are of the "
        "updates alone, over all starts of the stage."
    )


def _accuracy(result: StageResult) -> str:
    if result.accuracy is None:
        return ""
    name, value = result.accuracy
    kind = name.partition("/")[2]
    return f"{100 * value:.2f} %" + ("" if kind == "top1" else f" ({kind.removesuffix('_top1')})")


def _pictures(result: StageResult) -> list[tuple[Path, str]]:
    found = [(sorted((result.folder / "plots").glob(pattern)), words) for pattern, words in PICTURES]
    return [(files[-1], words) for files, words in found if files]
