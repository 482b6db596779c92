"""The doctor's report: a table in the terminal, doctor.html in one file with thumbnails, findings.csv with names."""

from __future__ import annotations

import base64
import csv
import html
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vitexp.data.doctor import Check, Seen, Shown, mean_std, suggest_size
from vitexp.data.images import Source
from vitexp.errors import BadImage
from vitexp.pipeline_report import html_page, html_table
from vitexp.run_folder import make_folder, write_atomic

WIDTH = 118  # of the terminal's table
NAMED = 3  # pictures that the terminal names of a finding
GROUPS, MEMBERS = 24, 6  # shown in the page of a finding; findings.csv has all
CLASSES, OF_EACH = 20, 8  # shown of the training split
SIDE = 96  # of a thumbnail


@dataclass(frozen=True, eq=False)
class Report:
    source: Source
    seen: dict[str, Seen]
    checks: list[Check]


def suggestions(report: Report) -> list[tuple[str, str]]:
    """(why, overrides to paste), quoted for a shell."""
    train = report.seen["train"]
    sides = train.short_sides[train.good]
    if not len(sides):
        return []
    gray = bool(train.table["gray"][train.good].all())
    image, patch = suggest_size(sides)
    tokens = (image // patch) ** 2
    why = f"half of the pictures have {np.median(sides):,.0f} pixels or more on their shorter side; {tokens} tokens"
    made = [(why, f"model.image_size={image} model.patch_size={patch}")]
    if (found := mean_std(train)) is not None and min(found[1]) > 0:
        mean, std = (",".join(f"{value:.4f}" for value in values[: 1 if gray else None]) for values in found)
        made.insert(0, ("mean and std of train", f"'data.mean=[{mean}]' 'data.std=[{std}]'"))
    if gray and train.channels == 3:
        made.append(("all pictures of train are gray", "data.channels=1 model.in_channels=1"))
    return made


# ---- the terminal


def as_text(report: Report) -> str:
    source = report.source
    names = {split: images.names for split, images in source.splits().items()}
    counts = ", ".join(f"{split} {len(images):,}" for split, images in source.splits().items())
    lines = [f"data {source.name} ({source.location}): {counts} pictures, {len(source.classes):,} classes"]
    lines += [f"note: {notice}" for notice in source.notices]
    lines.append("")
    wide = max(len(check.name) for check in report.checks) + 2
    indent = " " * (8 + wide)
    for check in report.checks:
        said = check.says + (f" ({_named(check, names)})" if check.groups else "")
        text = f"{said}. {check.advice[:1].upper()}{check.advice[1:]}" if check.advice else said
        first = f"{check.verdict:<8}{check.name:<{wide}}"
        lines.append(
            textwrap.fill(
                text, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False,
                break_long_words=False,
            )
        )  # fmt: skip
    pasted = [f"  {overrides}    # {why}" for why, overrides in suggestions(report)]
    lines += ["", "to paste:", *pasted] if pasted else []
    return "\n".join(lines)


def _named(check: Check, names: dict[str, Sequence[str]]) -> str:
    shown = [
        (" ~ " if check.name.startswith("nearly") else " = ").join(
            f"{one.split}: {names[one.split][one.index]}" for one in group[:2]
        )
        + (f" ({group[0].note})" if group[0].note and len(group) == 1 else "")
        for group in check.groups[:NAMED]
    ]
    return "; ".join(shown) + (f"; and {len(check.groups) - NAMED:,} more" if len(check.groups) > NAMED else "")


# ---- files


def write_files(report: Report, folder: Path) -> Path:
    """doctor.html and findings.csv; returns the path of the page. Raises UserError naming the folder."""
    make_folder(folder)
    write_atomic(folder / "findings.csv", findings_csv(report))
    path = folder / "doctor.html"
    write_atomic(path, page(report))
    return path


def findings_csv(report: Report) -> str:
    """A row for every picture of every finding; pictures of one group belong together."""
    splits = report.source.splits()
    names = {split: images.names for split, images in splits.items()}
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["check", "verdict", "group", "split", "picture", "class", "note"])
    for check in report.checks:
        for number, group in enumerate(check.groups):
            for one in group:
                label = _class(report.source, one)
                out.writerow(
                    [check.name, check.verdict, number, one.split, names[one.split][one.index], label, one.note]
                )
    return text.getvalue()


def page(report: Report) -> str:
    """One HTML file that needs nothing beside it and no network."""
    source = report.source
    title = f"Doctor: {source.name}"
    names = {split: images.names for split, images in source.splits().items()}
    counts = ", ".join(f"{split} {len(images):,}" for split, images in source.splits().items())
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(source.location)}: {counts} pictures, fingerprint "]
    parts.append(f"{source.fingerprint()}</p>" + "".join(f"<p>{html.escape(note)}</p>" for note in source.notices))
    parts.append(html_table(["", "check", "found", "what to do"], [_row(check) for check in report.checks]))
    rows = [[overrides, why] for why, overrides in suggestions(report)]
    parts.append("<h2>To paste</h2>" + html_table(["overrides", "why"], rows))
    for check in report.checks:
        if check.groups:
            parts.append(_finding(report, check, names))
    if source.classes:
        profile = source.profile()
        words = list(dict.fromkeys(word for split in profile.values() for word in split))
        rows = [[word, *(f"{split.get(word, 0):,}" for split in profile.values())] for word in words]
        parts.append("<h2>Pictures of each class</h2>" + html_table(["class", *profile], rows))
    parts.append(_samples(report, names))
    return html_page(title, "".join(parts))


def _row(check: Check) -> list[str]:
    return [check.verdict, check.name, check.says, check.advice]


def _finding(report: Report, check: Check, names: dict[str, Sequence[str]]) -> str:
    shown = [_strip(report, group[:MEMBERS], names, more=len(group) - MEMBERS) for group in check.groups[:GROUPS]]
    more = len(check.groups) - GROUPS
    rest = f"<p>and {more:,} more: see findings.csv</p>" if more > 0 else ""
    return f"<h2>{html.escape(check.name)}</h2><p>{html.escape(check.says)}</p>{_flow(shown)}{rest}"


def _samples(report: Report, names: dict[str, Sequence[str]]) -> str:
    """The first pictures of each class that can be read, for an eye that knows what they should show."""
    labels, readable = np.asarray(report.source.train.labels), report.seen["train"].table["readable"]
    parts = []
    for k, word in list(enumerate(report.source.classes))[:CLASSES] or [(-1, "train")]:
        at = np.flatnonzero((labels == k) & readable)[:OF_EACH].tolist()
        strip = _strip(report, [Shown("train", i) for i in at], names, words=False)
        parts.append(f"<h3>{html.escape(word)}</h3>{_flow([strip])}")
    return "<h2>What train shows</h2>" + "".join(parts)


def _flow(strips: list[str]) -> str:
    return f'<div style="display:flex;flex-wrap:wrap;gap:14px">{"".join(strips)}</div>'


def _strip(
    report: Report, group: list[Shown], names: dict[str, Sequence[str]], *, more: int = 0, words: bool = True
) -> str:
    """Pictures that belong together, in one frame."""
    tiles = []
    for one in group:
        name, label = names[one.split][one.index], _class(report.source, one)
        told = ": ".join(part for part in (one.split, label) if part)
        lines = [told, name, one.note] if words else []
        text = "<br>".join(html.escape(line) for line in lines if line)
        tiles.append(
            f'<div style="width:{SIDE + 24}px;font-size:11px;line-height:1.3;overflow-wrap:anywhere" '
            f'title="{html.escape(name)}">{_thumbnail(report.source, one)}<br>{text}</div>'
        )
    if more > 0:
        tiles.append(f"<div>and {more:,} more</div>")
    return f'<div style="display:flex;gap:8px;border:1px solid #ddd;padding:8px">{"".join(tiles)}</div>'


def _thumbnail(source: Source, one: Shown) -> str:
    try:
        pixels = source.splits()[one.split].read(one.index)
    except BadImage:
        return f'<div style="height:{SIDE}px;background:#eee;padding:4px">cannot be read</div>'
    image = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG" if max(image.size) < SIDE else "JPEG")  # a small picture as it is
    kind = "png" if max(image.size) < SIDE else "jpeg"
    return (
        f'<img alt="" style="height:{SIDE}px;max-width:100%;object-fit:contain;image-rendering:'
        f'{"pixelated" if kind == "png" else "auto"}" src="data:image/{kind};base64,'
        f'{base64.b64encode(file.getvalue()).decode()}">'
    )


def _class(source: Source, one: Shown) -> str:
    label = int(source.splits()[one.split].labels[one.index])
    return source.classes[label] if label >= 0 else ""
