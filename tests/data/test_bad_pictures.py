"""Odd and bad pictures in a folder among good ones: each decoded right or refused by name, no other one harmed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.pictures import CLASSES, library, write_folder
from tests.data.test_images import REFUSED, TWO_HALVES
from vitexp.data.images import decode
from vitexp.data.loader import eval_batches, open_split
from vitexp.data.sources.folder import folder
from vitexp.data.transforms import ResizeCenterCrop
from vitexp.errors import BadImage

SIDE = 24
GOOD = library(4)
SUFFIX = {"PNG": ".png", "JPEG": ".jpg", "TIFF": ".tif", "GIF": ".gif", "WebP": ".webp", "BMP": ".bmp"}


def walked(root: Path, cache: str) -> dict[str, tuple[np.ndarray, str]]:
    """name: (picture as evaluation sees it, name of its class) of all pictures of a folder, through the loader."""
    source = folder(str(root), val_fraction=0)
    split = open_split(source.train, ResizeCenterCrop(SIDE), cache=cache)
    found = {}
    for batch in eval_batches(split, batch_size=5, workers=0):
        for image, target, index in zip(batch.images, batch.targets, batch.index, strict=True):
            found[source.train.names[int(index)]] = image.numpy(), source.classes[int(target)]
    return found


def as_it_should_be(name: str, data: bytes) -> tuple[np.ndarray, str]:
    return ResizeCenterCrop(SIDE).fixed(decode(data, name)), name.partition("/")[0]


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_every_odd_picture_keeps_its_place_its_colours_and_its_class(tmp_path: Path, cache: str) -> None:
    odd = {}
    for number, (case, make) in enumerate(TWO_HALVES.items()):
        suffix = next((suffix for kind, suffix in SUFFIX.items() if kind in case), ".ppm")
        odd[f"{CLASSES[number % 3]}/odd {number}{suffix}"] = make()
    assert len(odd) >= 25
    files = GOOD | {name: data for name, (data, _, _) in odd.items()}
    found = walked(write_folder(tmp_path, files), cache)
    assert found.keys() == files.keys(), "none is lost, none comes twice"
    for name, data in files.items():
        pixels, label = as_it_should_be(name, data)
        np.testing.assert_array_equal(found[name][0], pixels, err_msg=name)
        assert found[name][1] == label
    for name, (_, left, right) in odd.items():
        image = found[name][0].astype(int)
        for columns, colour in ((slice(0, 6), left), (slice(18, 24), right)):
            assert np.abs(image[:, :, columns] - np.reshape(colour, (3, 1, 1))).max() <= 4, name


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_picture_is_named_in_one_line_and_the_others_are_read_right(case: str, tmp_path: Path) -> None:
    bad = "cat/2b.jpg"
    root = write_folder(tmp_path, GOOD | {bad: REFUSED[case]()[0]})
    source = folder(str(root), val_fraction=0)
    assert bad in source.train.names
    for cache in ("memory", "none"):
        with pytest.raises(BadImage) as caught:
            walked(root, cache)
        assert str(caught.value).startswith(f"{root}/{bad}: ")
        assert "\n" not in str(caught.value)
    (root / bad).unlink()
    found = walked(root, "none")
    assert found.keys() == GOOD.keys()
    for name, data in GOOD.items():
        pixels, label = as_it_should_be(name, data)
        np.testing.assert_array_equal(found[name][0], pixels)
        assert found[name][1] == label
