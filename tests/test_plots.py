from __future__ import annotations

import math
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitexp.plots import (
    attention,
    by_epoch,
    confusion_matrix,
    curves,
    picture_grid,
    position_similarity,
    reliability,
)


def journal(count: int) -> list[dict]:
    rows = []
    for step in range(1, count + 1):
        row = {"step": step, "epoch": step / 10, "train/loss": 2 / step, "train/lr": 1e-3, "perf/images_per_s": 50.0}
        if step % 5 == 0:
            row |= {"val/loss": 2.5 / step, "val/top1": 1 - 1 / step, "val/top5": 1.0, "val/ece": 0.1}
        rows.append(row)
    return rows


def shown(path: Path) -> np.ndarray:
    picture = np.asarray(Image.open(path).convert("RGB"))
    height, width, _ = picture.shape
    assert 60 <= width <= 1600, width
    assert 60 <= height <= 1400, height
    assert path.stat().st_size < 400_000
    assert picture.std() > 5  # something is drawn
    return picture


def counts(classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.int64) * 90 + np.roll(np.eye(classes, dtype=np.int64), 1, axis=1) * 10


@pytest.mark.parametrize("classes", [2, 10, 40, 200])
def test_a_confusion_matrix_is_of_sane_size_for_any_number_of_classes(tmp_path, classes):
    shown(confusion_matrix(counts(classes), [f"class {c}" for c in range(classes)], tmp_path / "confusion.png"))


def test_a_confusion_matrix_of_1000_classes_loses_no_cell(tmp_path):
    nothing, one = np.zeros((1000, 1000), np.int64), np.zeros((1000, 1000), np.int64)
    one[501, 333] = 3
    names = [str(c) for c in range(1000)]
    empty = shown(confusion_matrix(nothing, names, tmp_path / "empty.png"))
    marked = shown(confusion_matrix(one, names, tmp_path / "one.png"))
    square = (slice(100, 700), slice(150, 700))  # inside the axes of both: their outer margins differ
    assert marked[square].min() < 60 < empty[square].min()


def test_class_names_are_shown_as_they_are(tmp_path, recwarn):
    names = [
        "$\\frac{$",
        "two\nlines",
        "金鱼",
        "great white shark, white shark, man-eater, man-eating shark",
        "",
    ]
    shown(confusion_matrix(counts(5), names, tmp_path / "names.png"))
    assert not [str(w.message) for w in recwarn if "Glyph" in str(w.message)]


def test_a_class_without_pictures_is_no_error(tmp_path):
    matrix = counts(4)
    matrix[2] = 0
    with np.errstate(all="raise"):
        shown(confusion_matrix(matrix, list("abcd"), tmp_path / "absent.png"))
        shown(confusion_matrix(np.zeros((4, 4), np.int64), list("abcd"), tmp_path / "zero.png"))


@pytest.mark.parametrize("bins", [1, 10, 15, 40])
def test_a_calibration_picture_is_of_sane_size_also_with_empty_bins(tmp_path, bins):
    count = np.arange(bins) * 700
    confidence = np.where(count > 0, (np.arange(bins) + 0.5) / bins, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown(reliability(np.stack([count, count // 2, confidence]), tmp_path / "calibration.png"))
        nothing = np.zeros(bins)
        shown(reliability(np.stack([nothing, nothing, nothing * np.nan]), tmp_path / "none.png"))


def test_the_bars_of_a_calibration_picture_are_as_tall_as_the_accuracy(tmp_path):
    count, confidence = np.full(10, 200), (np.arange(10) + 0.5) / 10

    def blue(right: int) -> int:
        bins = np.stack([count, np.full(10, right), confidence])
        picture = shown(reliability(bins, tmp_path / f"{right}.png")).astype(int)
        return (picture[..., 2] - picture[..., 0] > 60).sum()

    assert blue(0) < 100
    assert blue(100) / blue(200) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("count", [1, 12, 5000])
def test_curves_of_short_and_long_journals(tmp_path, count):
    shown(curves(journal(count), tmp_path / "curves.png"))


def test_curves_leave_out_what_is_not_there_and_bear_nan(tmp_path):
    bare = shown(curves([{"step": 3, "epoch": 0.1, "train/loss": 1.0}], tmp_path / "bare.png"))
    full = shown(curves(journal(30), tmp_path / "full.png"))
    assert full.shape[0] > 2 * bare.shape[0]  # three panels against one
    broken = journal(30)
    broken[7]["train/loss"] = math.nan
    broken[8]["train/loss"] = math.inf
    shown(curves(broken, tmp_path / "nan.png"))
    curves([], tmp_path / "none.png")
    assert (tmp_path / "none.png").stat().st_size > 1000


def test_a_picture_grid_shows_the_pixels_as_they_are(tmp_path):
    images = np.zeros((6, 3, 8, 8), np.uint8)
    images[0, 0], images[5, 2] = 255, 255  # one red, one blue
    picture = shown(picture_grid(images, [f"{i}" for i in range(6)], tmp_path / "grid.png"))
    areas = [(picture == colour).all(axis=2).sum() for colour in ([255, 0, 0], [0, 0, 255], [0, 0, 0])]
    assert areas[0] == pytest.approx(areas[1], rel=0.05)
    assert areas[2] == pytest.approx(4 * areas[0], rel=0.1)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (30, 3, 32, 32), (5, 4, 24, 72), (4, 3, 224, 224)])
def test_a_picture_grid_is_of_sane_size(tmp_path, shape):
    images = np.full(shape, 90, np.uint8)
    shown(picture_grid(images, ["a long class name, with more words"] * shape[0], tmp_path / "grid.png"))


@pytest.mark.parametrize("grid", [(2, 2), (14, 14), (4, 16), (40, 40)])
def test_position_similarity_is_of_sane_size(tmp_path, grid):
    table = np.random.default_rng(0).standard_normal((grid[0] * grid[1], 16))
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    shown(position_similarity((unit @ unit.T).reshape(*grid, *grid), tmp_path / "positions.png"))


def test_position_similarity_shows_each_patch_its_own_place(tmp_path):
    alike = np.eye(16).reshape(4, 4, 4, 4) * 2 - 1  # 1 with itself, -1 with all others
    picture = shown(position_similarity(alike, tmp_path / "positions.png"))
    yellow = (np.abs(picture.astype(int) - [253, 231, 37]) < 6).all(axis=2)[:, :-60]  # without the scale at the right
    rows, columns = np.nonzero(yellow)
    assert len(rows) > 16 * 50
    # Patch (i, j) lights cell (i, j) of tile (i, j): sixteen blocks, in four distinct stretches of rows and columns.
    for places in (rows, columns):
        assert (np.diff(np.unique(places)) > 1).sum() == 3


@pytest.mark.parametrize(
    ("shape", "grid", "heads"),
    [
        ((1, 3, 8, 8), (2, 2), 1),
        ((5, 3, 224, 224), (14, 14), 16),
        ((3, 1, 32, 64), (4, 8), 3),
        ((2, 3, 96, 32), (6, 2), 6),
    ],
)
def test_attention_is_of_sane_size(tmp_path, shape, grid, heads):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, shape, dtype=np.uint8)
    titles = ["a class with a long name", "金鱼", "$x$", "", "ship"][: shape[0]]
    maps, rollout = rng.random((shape[0], heads, *grid)), rng.random((shape[0], *grid))
    shown(attention(images, maps, rollout, titles, tmp_path / "attention.png"))
    shown(attention(images, maps * 0, rollout * 0, titles, tmp_path / "nothing.png"))


def test_a_rollout_lights_the_patches_it_is_of(tmp_path):
    red = np.zeros((1, 3, 64, 64), np.uint8)
    red[:, 0] = 255
    rollout = np.zeros((1, 4, 4))
    rollout[0, 0, 3] = 1
    picture = shown(attention(red, np.ones((1, 1, 4, 4)), rollout, ["x"], tmp_path / "attention.png")).astype(int)
    pure = (picture[..., 1] < 10) & (picture[..., 2] < 10)
    picture[..., 0][~pure] = 0
    columns = np.flatnonzero(pure.sum(axis=0) > 50)  # of the picture and of its lit copy
    rows = np.flatnonzero(pure[:, columns[0]])
    gap = np.flatnonzero(np.diff(columns) > 1)
    assert len(gap) == 1
    lit = picture[rows[0] : rows[-1] + 1, columns[gap[0] + 1] : columns[-1] + 1, 0]
    half = lit.shape[0] // 2
    assert lit[:half, half:].max() > 240
    assert max(lit[half:].max(), lit[:, : half - 5].max()) < 60


def test_pictures_can_be_drawn_in_threads(tmp_path):
    failures = []

    def draw(name: int) -> None:
        try:
            shown(curves(journal(20), tmp_path / f"c{name}.png"))
            shown(confusion_matrix(counts(6), list("abcdef"), tmp_path / f"m{name}.png"))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=draw, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len({(tmp_path / f"m{n}.png").read_bytes() for n in range(4)}) == 1
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_drawing_leaves_pyplot_and_the_settings_alone(tmp_path):
    code = (
        "import sys, vitexp.plots as plots; assert 'matplotlib' not in sys.modules;"
        "import matplotlib; before = matplotlib.rcParams.copy();"
        f"plots.curves([{{'step': 1, 'epoch': 1.0, 'train/loss': 2.0}}], {str(tmp_path / 'c.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules; assert matplotlib.rcParams.copy() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_runs_that_differ_in_the_seed_have_a_band_as_wide_as_they_are_apart(tmp_path):
    def coloured(*seeds: list[tuple[float, float]]) -> int:
        picture = shown(by_epoch({"a": seeds, "b": [[(1, 0), (9, 1)]]}, tmp_path / "seeds.png", title="by epoch"))
        return int((np.ptp(picture.astype(int), axis=2) > 8).sum())  # neither paper nor ink nor grid

    def seed(off: float) -> list[tuple[float, float]]:
        return [(epoch, 0.5 + off) for epoch in range(1, 10)]

    alike, near, apart = coloured(seed(0), seed(0)), coloured(seed(-0.1), seed(0.1)), coloured(seed(-0.3), seed(0.3))
    assert near > 2 * alike
    assert (apart - alike) / (near - alike) == pytest.approx(3, rel=0.15)
