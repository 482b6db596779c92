"""What pictures have in common: inks, sizes, quiet axes, text in fonts that the machine has, files that appear whole.

matplotlib is imported when the first picture is drawn. Only its Figure objects are used and every setting is made on
them: pyplot and rcParams are global, and would make two threads or a person's notebook disturb each other.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitexp.run_folder import atomic_file, make_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK, SOFT, LINE = "#222222", "#666666", "#d9d9d9"
COLOURS = ("#3465a4", "#c4572e", "#4e8f3a", "#7c5aa6", "#8a7340", "#3b8f94")
DPI = 110
SMALL, NORMAL, TITLE = 7.5, 8.5, 10.0
# Fonts with Chinese, Japanese, Korean letters, for class names; the first that the machine has.
_WIDE_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
)
MAP = "viridis"  # of what is a map over a picture


def compact(number: float) -> str:
    """A count in at most four letters."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.0f}{unit}" if not unit or number >= 9.95 else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.0f}G"


def formatter(function: Any) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(function)


def legend(ax: Axes) -> None:
    drawn = ax.legend(loc="best", frameon=False, fontsize=SMALL, handlelength=1.3, borderaxespad=0.2, labelspacing=0.25)
    for label in drawn.get_texts():
        text(label, size=SMALL)


def share_bar(figure: Figure, left: float, bottom: float, width: float, height: float) -> None:
    """The colour scale of confusion_matrix: drawn by hand because the colours follow the square root."""
    ax = figure.add_axes((left, bottom, width, height))
    ax.imshow(
        np.linspace(0, 1, 256)[:, None],
        cmap="Blues",
        vmin=0,
        vmax=1,
        aspect="auto",
        origin="lower",
        extent=(0, 1, 0, 1),
    )
    marks = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)
    ax.set_xticks([])
    ax.yaxis.tick_right()
    ax.set_yticks([math.sqrt(mark) for mark in marks], [f"{100 * mark:.0f} %" for mark in marks])
    ax.tick_params(length=2, pad=2, color=SOFT, labelsize=SMALL, labelcolor=SOFT)
    for spine in ax.spines.values():
        spine.set_color(LINE)


def percent(value: float) -> str:
    if value >= 99.95:
        return "100"
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def width(text: str) -> int:
    """Columns that text takes: Chinese and such letters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def short(name: object, columns: int) -> str:
    """At most so many columns on one line, the cut marked."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in str(name)).split())
    if width(text) <= columns:
        return text
    while text and width(text) > columns - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def quiet(ax: Axes) -> None:
    ax.grid(color=LINE, lw=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(LINE)
    ax.tick_params(length=2, color=SOFT, labelsize=SMALL, labelcolor=INK)


def text(text: Any, *, size: float = NORMAL, colour: str = INK) -> None:
    """The one style of all words. Names are shown as they are: a dollar sign starts no formula."""
    text.set_fontsize(size)
    text.set_color(colour)
    text.set_parse_math(False)
    text.set_fontfamily(list(_fonts()))


@cache
def _fonts() -> tuple[str, ...]:
    from matplotlib import font_manager

    have = set(font_manager.get_font_names())
    return ("DejaVu Sans", *[name for name in _WIDE_FONTS if name in have][:1])


def save(figure: Figure, path: str | Path, *, cut: bool = True) -> Path:
    """Writes the file; `cut` fits its edges to what is drawn, which draws twice: not where the layout leaves none."""
    path = Path(path)
    warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box stands for the letter
    with atomic_file(make_folder(path.parent) / path.name) as beside:
        edges = "tight" if cut else None
        figure.savefig(beside, format="png", dpi=DPI, bbox_inches=edges, pad_inches=0.09, metadata={"Software": None})
    return path


def shade(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps[MAP](0.9 * share)
