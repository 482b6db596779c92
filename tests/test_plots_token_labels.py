from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitexp.plots import LabelledPicture, PlaceLabels, token_labels

OWN, SECOND, OTHERS = (0, 114, 178), (213, 94, 0), (170, 170, 170)
WHOLE = np.array([(0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0)])


def places(classes: list[list[int]], share: float) -> PlaceLabels:
    return PlaceLabels(np.array(classes), np.full(np.shape(classes), share))


def shares(count: int, **given: float) -> np.ndarray:
    found = np.zeros(count)
    for name, share in given.items():
        found[int(name[1:])] = share
    return found


def row(count: int = 10, *, size: tuple[int, int, int] = (3, 32, 32), **changed: Any) -> LabelledPicture:
    """Of class 3: its map says 3 and 7."""
    given = {
        "own": 3, "original": np.full(size, 90, np.uint8), "corners": WHOLE, "map": places([[3, 7], [7, 7]], 1.0),
        "crop": np.zeros(size), "tokens": places([[3, 3], [3, 7]], 0.25), "mixed": np.zeros(size),
        "box": (0.0, 0.5, 0.5, 1.0), "said": places([[7, 7], [7, 7]], 0.5),
        "label": shares(count, c3=0.7, c7=0.3), "answer": shares(count, c3=0.2, c7=0.8),
    }  # fmt: skip
    return LabelledPicture(**given | changed)


def drawn(path: Path, rows: list[LabelledPicture], names: list[str] | None = None) -> np.ndarray:
    names = [f"class {n}" for n in range(len(rows[0].label))] if names is None else names
    token_labels(rows, names, path, pixel_mean=(0.5,), pixel_std=(0.25,))
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def share_of(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(picture - np.array(colour)).max(axis=2) <= 2).mean())


def cell(picture: np.ndarray, column: int) -> np.ndarray:
    """The inside of a cell of the first row, of a single row of square cells: 1.25 inch each, 0.1 between."""
    left, top = round((0.1 + column * 1.35) * 110), 42
    return picture[top + 4 : top + 110, left + 4 : left + 132]


def test_colours_say_the_class_and_areas_the_probability(tmp_path):
    picture = drawn(tmp_path / "t.png", [row()])
    on_map, on_tokens, said = (cell(picture, column) for column in (1, 3, 5))
    assert share_of(on_map, SECOND) == pytest.approx(2.6 * share_of(on_map, OWN), rel=0.35)
    assert share_of(on_map, OWN) + share_of(on_map, SECOND) > 0.8
    assert share_of(on_tokens, OWN) == pytest.approx(0.25 * 0.75, rel=0.3)
    assert share_of(said, SECOND) == pytest.approx(0.5, abs=0.12)
    assert share_of(said, OWN) == 0
    unsure = drawn(tmp_path / "u.png", [row(said=places([[7, 7], [7, 7]], float("nan")))])
    assert share_of(cell(unsure, 5), SECOND) == 0


def test_what_is_rare_in_a_row_is_grey(tmp_path):
    many = PlaceLabels(np.arange(16).reshape(4, 4), np.full((4, 4), 0.9))
    picture = drawn(tmp_path / "t.png", [row(20, tokens=many)])
    assert share_of(cell(picture, 3), OTHERS) > 0.4


@pytest.fixture
def said(monkeypatch) -> list[str]:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    words: list[str] = []
    for kind in (Axes, Figure):
        monkeypatch.setattr(kind, "text", _noting(kind.text, words))
    return words


def _noting(true: Any, words: list[str]) -> Any:
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        words.extend(arg.replace("\n", " ") for arg in args if isinstance(arg, str))
        return true(self, *args, **kwargs)

    return noted


@pytest.mark.parametrize("count", [10, 1000])
def test_the_legend_names_what_occurs_however_many_classes_there_are(tmp_path, said, count):
    drawn(tmp_path / "t.png", [row(count)])
    assert [word for word in said if word.startswith("class ")] == ["class 3", "class 7"]
    at = said.index("class 3")
    assert said[at : at + 3] == ["class 3", "70 %", "20 %"]
    at = said.index("others")
    assert said[at : at + 3] == ["others", "0.0 %", "0.0 %"]


def test_a_column_that_says_nothing_is_left_out(tmp_path, said):
    full = drawn(tmp_path / "full.png", [row()]).shape[1]
    assert said[: said.index("label")] == [
        "picture, and where its crop is from", "its label map", "the crop, augmented", "labels of its tokens",
        "with MixToken's box", "what the tokens say",
    ]  # fmt: skip
    said.clear()
    bare = drawn(tmp_path / "bare.png", [row(tokens=None, mixed=None, said=None)]).shape[1]
    assert said[: said.index("label")] == [
        "picture, and where its crop is from",
        "its label map",
        "the crop, augmented",
    ]
    assert full - bare == pytest.approx(3 * 1.35 * 110, abs=2)


@pytest.mark.parametrize(
    ("size", "grid", "rows"), [((1, 28, 28), (7, 7), 1), ((3, 224, 224), (28, 28), 6), ((3, 32, 96), (4, 12), 6)]
)
def test_it_is_of_sane_size(tmp_path, size, grid, rows):
    rng = np.random.default_rng(0)
    some = PlaceLabels(rng.integers(0, 50, grid), rng.random(grid))
    far = np.array([(-0.4, 0.1), (-0.2, 1.3), (0.8, 1.2), (0.6, 0.0)])
    every = {"tokens": some, "said": some, "map": some, "corners": far, "own": -1}
    original = rng.integers(0, 256, (size[0], 300, 100), dtype=np.uint8)
    names = ["a very long name of a class, with commas", *[f"class {n}" for n in range(999)]]
    picture = drawn(tmp_path / "t.png", [row(1000, size=size, original=original, **every)] * rows, names)
    height, width = picture.shape[:2]
    assert 900 <= width <= 1300
    assert 150 <= height <= 1300
    assert (tmp_path / "t.png").stat().st_size < 700_000
    assert share_of(picture, OWN) == 0, "a picture without a class has no colour of its own"
