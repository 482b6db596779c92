from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitexp.plots import curves, reconstructions

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def case(*, shape=(2, 3, 8, 8), grid=(2, 2)) -> dict:
    """Smooth pictures, a prediction a little off, the first patch seen and the others hidden."""
    number, channels, height, width = shape
    rows, columns = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    originals = np.stack([np.stack([rows + 0.2 * i, columns, rows * columns][:channels]) for i in range(number)])
    masks = np.ones((number, *grid), np.float32)
    masks[:, 0, 0] = 0
    losses = np.linspace(0, 2, masks.size).reshape(masks.shape)
    given = {"originals": originals, "predictions": originals + 0.1, "masks": masks, "losses": losses}
    return {**given, "pixel_mean": MEAN[:channels], "pixel_std": STD[:channels]}


def cells(path: Path, count: int = 5) -> list[np.ndarray]:
    """The cells of the single row, left to right: between columns of pixels that are white from top to bottom."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    picture = picture[picture.shape[0] - 90 : -20]  # below the words, inside the row
    filled = np.flatnonzero((picture != 255).any(axis=(0, 2)))
    parts = np.split(filled, np.flatnonzero(np.diff(filled) > 1) + 1)
    assert len(parts) == count
    return [picture[:, part[2:-2]] for part in parts]


def colours(cell: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(int(v) for v in colour) for colour in np.unique(cell.reshape(-1, 3), axis=0)}


def flat(colour: tuple[int, ...], size: int = 8) -> np.ndarray:
    """A normalised picture of one colour."""
    pixel = (np.array(colour) / 255 - np.array(MEAN)) / np.array(STD)
    return np.broadcast_to(pixel.reshape(1, 3, 1, 1), (1, 3, size, size))


RED, BLUE, HIDDEN = (250, 20, 10), (10, 40, 240), (203, 213, 226)


def test_each_column_shows_what_it_says(tmp_path):
    """A red picture, restored as blue: the left half seen, the right half hidden."""
    masks = np.array([[[0, 1], [0, 1]]])
    path = reconstructions(
        tmp_path / "r.png",
        originals=flat(RED),
        predictions=flat(BLUE),
        masks=masks,
        losses=np.array([[[0, 1], [0, 1]]]),
        pixel_mean=MEAN,
        pixel_std=STD,
    )
    original, masked, restored, pasted, losses = cells(path)
    half = original.shape[1] // 2
    assert colours(original) == {RED}
    assert colours(restored) == {BLUE}
    assert colours(masked[:, : half - 3]) == colours(pasted[:, : half - 3]) == {RED}
    assert colours(masked[:, half + 3 :]) == {HIDDEN}
    assert colours(pasted[:, half + 3 :]) == {BLUE}
    (low,), (high,) = (colours(part) for part in (losses[:, : half - 3], losses[:, half + 3 :]))
    assert high[0] > low[0] + 100  # viridis: from violet to yellow


def test_a_prediction_in_units_of_its_patch_gets_the_patches_mean_and_std_back(tmp_path):
    arrays = case(shape=(1, 3, 8, 8))
    plain = cells(reconstructions(tmp_path / "plain.png", **{**arrays, "predictions": arrays["originals"]}))
    means, stds = np.array([[[0.3, -0.2], [0.1, 0.4]]]), np.array([[[0.5, 2.0], [0.1, 1.5]]])
    up = lambda v: v.repeat(4, axis=1).repeat(4, axis=2)[:, None]  # noqa: E731
    arrays["predictions"] = (arrays["originals"] - up(means)) / up(stds)
    told = cells(reconstructions(tmp_path / "told.png", **arrays, means=means, stds=stds))
    for one, other in zip(plain, told, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_words_say_when_the_truth_was_used(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", _spy(said))
    arrays = case()
    reconstructions(tmp_path / "plain.png", **arrays)
    assert said == ["original", "masked", "reconstruction", "pasted", "loss of a patch: 0 to 2"]
    said.clear()
    reconstructions(tmp_path / "told.png", **arrays, means=np.zeros((2, 2, 2)), stds=np.ones((2, 2, 2)))
    assert said[2] == "reconstruction (with the patches' true mean and std)"
    assert said[3] == "pasted (with the patches' true mean and std)"


def _spy(said: list[str]):
    from matplotlib.axes import Axes

    true = Axes.set_title

    def set_title(self, label, *args, **kwargs):
        said.append(label.replace("\n", " "))
        return true(self, label, *args, **kwargs)

    return set_title


def test_what_no_pixel_can_be_is_cut_off(tmp_path):
    arrays = case(shape=(1, 3, 8, 8))
    arrays["predictions"] = flat((300, 128, -60))
    assert colours(cells(reconstructions(tmp_path / "cut.png", **arrays))[2]) == {(255, 128, 0)}
    arrays["predictions"] = np.full((1, 3, 8, 8), np.nan)
    arrays["losses"][0, 0, 0] = np.inf
    with np.errstate(all="raise"):
        found = cells(reconstructions(tmp_path / "nan.png", **arrays))
    assert colours(found[2]) == {(0, 0, 0)}


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((1, 1, 28, 28), (7, 7)),
        ((8, 3, 224, 224), (14, 14)),
        ((3, 1, 32, 96), (4, 12)),
        ((2, 3, 96, 32), (6, 2)),
        ((12, 3, 32, 32), (8, 8)),
    ],
)
def test_it_is_of_sane_size(tmp_path, shape, grid):
    path = reconstructions(tmp_path / "r.png", **case(shape=shape, grid=grid))
    width, height = Image.open(path).size
    assert 300 <= width <= 1100
    assert 100 <= height <= 2000
    assert path.stat().st_size < 500_000


def test_accuracies_of_a_knn_are_drawn_as_accuracies(tmp_path):
    rows = [{"step": s, "epoch": s / 10, "val/loss": 1 / s} for s in range(1, 9)]
    bare = Image.open(curves(rows, tmp_path / "bare.png")).size
    rows = [{**row, "val/knn_top1": 0.5} for row in rows]
    assert Image.open(curves(rows, tmp_path / "knn.png")).size[1] > 1.5 * bare[1]
