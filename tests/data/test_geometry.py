"""Label maps go where the pixels go: pictures that show their own coordinates, against where the map's cells went."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp

from vitexp.data.augmentations import Augmented, AugmentedWhole, RandAugment, RandAugmentTPU, SimpleRandomCrop
from vitexp.data.geometry import MOVES, STILL, Followed, Places, follow, joined, seen_through
from vitexp.data.images import ArrayImages, Images
from vitexp.data.loader import CachedSplit, open_split, train_batches
from vitexp.data.sources.fake import FakeImages
from vitexp.data.transforms import PadCropFlip, ResizeCenterCrop, ResizedCropFlip, TrackedTransform
from vitexp.errors import UserError
from vitexp.seeding import uniforms
from vitexp.types import Batch

CELLS = 100  # of the fine maps, down and across
POLICY = "rand-m9-n3-mstd0.5-inc1"


def moving(step: Any) -> Any:
    """Its geometric operations alone: pictures that show coordinates keep their colours."""
    if isinstance(step, RandAugment):
        step._augment.ops = [one for one in step._augment.ops if one.name in MOVES]
    else:
        step.operations = [one for one in step.operations if isinstance(one, AugmentOp) and one.name in MOVES]
    return step


def rand_augment(**settings: Any) -> RandAugment:
    return moving(RandAugment(POLICY, fill=[0.0], **settings))


TRANSFORMS = {
    "center": ResizeCenterCrop((24, 32), crop_fraction=0.8),
    "pad": PadCropFlip((24, 32), padding=0.2),
    "resized": ResizedCropFlip((24, 32), area=(0.2, 1.0), interpolation="random"),
    "simple": SimpleRandomCrop((24, 32)),
    "pad, moved": Augmented(PadCropFlip((24, 32), padding=0.2), steps=[rand_augment()]),
    "resized, moved": Augmented(ResizedCropFlip((32, 24), area=(0.2, 1.0)), steps=[rand_augment()]),
    "resized, moved as on TPUs": Augmented(ResizedCropFlip((32, 24)), steps=[moving(RandAugmentTPU(fill=0.0))]),
    "moved twice": Augmented(ResizedCropFlip(28, area=(0.5, 1.0)), steps=[rand_augment(), rand_augment()]),
    "moved, cut": AugmentedWhole(
        ResizedCropFlip((24, 32), area=(0.2, 1.0), flip=0.0), steps=[rand_augment(interpolation="random")]
    ),
}
SIZES = [(24, 32), (64, 48), (40, 97)]


def picture_of_places(height: int, width: int) -> np.ndarray:
    """uint8 (h, w, 3): 20 + 200 times the row and the column in fractions, and 255 where there is a picture at all."""
    rows, columns = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    planes = [20 + 200 * rows, 20 + 200 * columns, np.full((height, width), 255)]
    return np.rint(np.stack(planes, axis=2)).astype(np.uint8)


def map_of_places(count: int, cells: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Of each cell its number, with logit 1."""
    numbers = np.arange(cells[0] * cells[1], dtype=np.int32).reshape(1, 1, *cells)
    return np.ones((count, 1, *cells), np.float16), np.tile(numbers, (count, 1, 1, 1))


def shown_at(followed: Followed, k: int, row: float, column: float) -> int | None:
    """The number of the cell that picture k shows there, None where it shows nothing: from a slow look-up."""
    top, left, tall, wide = followed.boxes[k]
    height, width = followed.values.shape[2:]
    row, column = top + tall * row, left + wide * (1 - column if followed.mirrored[k] else column)
    if not (0 <= row < 1 and 0 <= column < 1):
        return None
    cell = int(row * height), int(column * width)
    return int(followed.numbers[k, 0][cell]) if followed.values[k, 0][cell] else None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_map_shows_at_every_place_what_the_picture_shows(name: str, size: tuple[int, int]) -> None:
    transform, count = TRANSFORMS[name], 12
    stack = np.stack([transform.fixed(picture_of_places(*size))] * count)
    pixels, places = transform.tracked(stack, uniforms(0, 0, np.arange(count), transform.num_uniforms))
    places = seen_through(places, np.tile(transform.view(*size), (count, 1)))
    assert ("moved" in name) == bool(places.moved.any())
    followed = follow(*map_of_places(count, (CELLS, CELLS)), places)
    compared = disagreed = 0
    errors = []
    for k in range(count):
        height, width = pixels.shape[2:]
        for i, j in itertools.product(range(2, height - 2, 3), range(2, width - 2, 3)):
            cell = shown_at(followed, k, (i + 0.5) / height, (j + 0.5) / width)
            around = pixels[k, 2, i - 2 : i + 3, j - 2 : j + 3]
            if name == "simple" and cell is None:  # the picture is mirrored at its border, its labels are not
                continue
            if around.min() < 250 <= around.max():
                continue  # an edge, interpolated
            compared += 1
            if cell is None or around.max() < 250:
                disagreed += (cell is None) != (around.max() < 250)
                continue
            shown = (pixels[k, :2, i, j].astype(float) - 20) / 200
            cells = (np.array(divmod(cell, CELLS)) + 0.5) / CELLS
            errors.append(np.abs(shown - cells).max())
    assert compared > 300
    # A cell, a pixel of the given picture and one of that shown are each some hundredths of it.
    assert max(errors) < 0.01 + 0.7 / min(size) + 0.5 / min(pixels.shape[2:])
    assert np.mean(errors) < 0.015
    assert disagreed <= 0.02 * compared, "content from outside has no label, and other content has one"


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("size", [(24, 24), (18, 31)])
def test_a_move_takes_each_cell_from_where_pillow_takes_each_pixel(name: str, size: tuple[int, int]) -> None:
    settings = {"img_mean": (255, 255, 255), "interpolation": Image.Resampling.NEAREST, "translate_const": 7}
    operation = AugmentOp(name, prob=1.0, hparams=settings | {"magnitude_std": 3.0}, magnitude=6)
    step = RandAugment("rand-n1-p1", fill=[1.0])
    step._augment.ops, step._augment.num_layers = [operation], 1
    transform, count = Augmented(ResizeCenterCrop(size), steps=[step]), 25
    picture = np.zeros((*size, 3), np.uint8)
    picture[..., 0], picture[..., 1] = np.mgrid[: size[0], : size[1]]
    stack = np.stack([transform.fixed(picture)] * count)
    pixels, places = transform.tracked(stack, uniforms(1, 0, np.arange(count), transform.num_uniforms))
    assert places.moved.all()
    followed = follow(*map_of_places(count, size), places)
    theirs = np.where(pixels[:, 2] == 255, -1, pixels[:, 0].astype(int) * size[1] + pixels[:, 1])
    ours = np.where(followed.values[:, 0] == 0, -1, followed.numbers[:, 0])
    # Pillow reckons in 1/65536 of a pixel, so that a few fall to the other side of an edge.
    assert (ours != theirs).mean() < 2e-3


def test_following_equals_a_walk_back_through_every_step() -> None:
    rng, count, cells = np.random.default_rng(0), 40, (6, 9)
    values, numbers = (
        rng.standard_normal((count, 3, *cells)).astype(np.float16),
        rng.integers(0, 99, (count, 3, *cells)),
    )
    places = some_places(rng, count)
    given = values.copy()
    followed = follow(values, numbers, places)
    assert np.array_equal(values, given), "nothing given is changed"
    assert 0 < places.moved.sum() < count
    for k in range(count):
        if not places.moved[k]:
            assert np.array_equal(followed.values[k], values[k])
            middle = np.array([0.3, 0.8])  # a point of the crop, walked back to the map in both ways
            back = walked_back(middle, places, k)
            box = followed.boxes[k]
            column = 1 - middle[1] if followed.mirrored[k] else middle[1]
            np.testing.assert_allclose(box[:2] + box[2:] * [middle[0], column], back, atol=1e-6)
            continue
        assert not followed.mirrored[k]
        np.testing.assert_allclose(followed.boxes[k], places.shown[k], atol=1e-7)
        for i, j in itertools.product(range(cells[0]), range(cells[1])):
            back, there = walked_back(np.array([(i + 0.5) / cells[0], (j + 0.5) / cells[1]]), places, k, moved=True)
            row, column = (min(max(int(np.floor(at * n)), 0), n - 1) for at, n in zip(back, cells, strict=True))
            assert np.array_equal(followed.numbers[k, :, i, j], numbers[k, :, row, column])
            assert np.array_equal(followed.values[k, :, i, j], values[k, :, row, column] * there)


def some_places(rng: np.random.Generator, count: int) -> Places:
    boxes = np.concatenate([rng.random((2, count, 2)) * 0.6 - 0.1, 0.3 + 0.5 * rng.random((2, count, 2))], axis=2)
    moves = np.tile(STILL, (count, 2, 1, 1))
    moves[: count // 2] += 0.2 * rng.standard_normal((count // 2, 2, 2, 3))
    moves[::4, 1] = moves[1::4, 0] = STILL
    return Places(boxes[0], rng.random(count) < 0.5, moves, boxes[1])


def walked_back(point: np.ndarray, places: Places, k: int, *, moved: bool = False) -> Any:
    """The place of the whole picture that a point of the one shown came from; of the moved one, and if from within."""
    there = True
    if not moved:
        point = places.shown[k, :2] + places.shown[k, 2:] * point
    else:
        for move in places.moves[k][::-1]:
            point = move[:, :2] @ point + move[:, 2]
            there = there and bool(((point >= 0) & (point < 1)).all())
    if places.mirrored[k]:
        point = np.array([point[0], 1 - point[1]])
    point = places.cut[k, :2] + places.cut[k, 2:] * point
    return (point, there and bool(((point >= 0) & (point < 1)).all())) if moved else point


def test_batches_of_places_are_joined_in_order() -> None:
    places = some_places(np.random.default_rng(1), 8)
    parts = [
        Places(*(getattr(places, key)[k : k + 1] for key in ("cut", "mirrored", "moves", "shown"))) for k in range(8)
    ]
    parts[1] = Places(parts[1].cut, parts[1].mirrored, np.empty((1, 0, 2, 3)), parts[1].shown)
    whole = joined(parts)
    assert np.array_equal(whole.moves[2:], places.moves[2:])
    assert np.array_equal(whole.moves[1], [STILL, STILL])
    assert np.array_equal(whole.cut, places.cut)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_to_track_a_picture_changes_no_pixel_and_leaves_nothing_behind(name: str) -> None:
    transform: TrackedTransform = TRANSFORMS[name]
    picture = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    stack, u = np.stack([transform.fixed(picture)] * 9), uniforms(3, 1, np.arange(9), transform.num_uniforms)
    before = transform.random(stack, u)
    assert np.array_equal(transform.tracked(stack, u)[0], before)
    assert np.array_equal(transform.random(stack, u), before)
    for step in getattr(transform, "steps", []):
        operations = step._augment.ops if isinstance(step, RandAugment) else step.operations
        assert all("_noting" not in str(one.aug_fn) for one in operations)


def test_the_official_order_is_a_flip_the_steps_and_then_the_crop() -> None:
    crop = ResizedCropFlip(16, flip=0.0, interpolation="random")
    step = RandAugment("rand-m9-mstd0.5-inc1", interpolation="random")
    transform = AugmentedWhole(crop, steps=[step], flip=0.5)
    pictures = np.random.default_rng(0).integers(0, 256, (12, 30, 41, 3), np.uint8)
    u = uniforms(0, 0, np.arange(12), transform.num_uniforms)
    assert transform.num_uniforms == 24 + 1 + 1
    found = transform.random(pictures, u)
    assert {row[24] < 0.5 for row in u} == {row[23] < 0.5 for row in u} == {True, False}
    for k, row in enumerate(u):
        image = Image.fromarray(pictures[k])
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if row[24] < 0.5 else image
        plain = ResizedCropFlip(16, flip=0.0, interpolation="bilinear" if row[23] < 0.5 else "bicubic")
        expected = plain.random(np.array(step(image, row[25:]))[None], row[None, :23])
        assert np.array_equal(found[k], expected[0])
    with pytest.raises(UserError, match=r"crop\.flip=0\.5"):
        AugmentedWhole(ResizedCropFlip(16), steps=[step])


# ---- through the loader ----------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Maps:
    """A store as the loader sees it."""

    values: np.ndarray
    numbers: np.ndarray
    head: dict[str, Any] = field(default_factory=lambda: {"crop": "whole"})


def some_maps(count: int) -> tuple[Maps, np.ndarray]:
    """Maps of more pictures than there are, in another order."""
    rng = np.random.default_rng(0)
    values, numbers = (
        rng.standard_normal((count + 5, 3, 4, 6)).astype(np.float16),
        rng.integers(0, 5000, (count + 5, 3, 4, 6)),
    )
    return Maps(values, numbers.astype(np.int32)), rng.permutation(count + 5)[:count]


def equal(a: Batch, b: Batch) -> bool:
    assert a.maps is not None
    assert b.maps is not None
    pairs = [(getattr(a, key), getattr(b, key)) for key in ("images", "targets", "index")]
    pairs += [(getattr(a.maps, key), getattr(b.maps, key)) for key in ("values", "numbers", "boxes", "mirrored")]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", ["pad, moved", "moved, cut", "center"])
def test_cached_streamed_and_from_workers_the_maps_are_the_same(name: str) -> None:
    images = FakeImages(first=0, count=11, num_classes=5, image_size=(30, 41), channels=3, seed=0)
    how: dict[str, Any] = {"batch_size": 5, "seed": 3}
    transform, maps = TRANSFORMS[name], some_maps(11)
    cached, streamed = (open_split(images, transform, cache=cache, maps=maps) for cache in ("memory", "none"))
    assert isinstance(cached, CachedSplit)
    runs = [
        list(itertools.islice(train_batches(split, workers=workers, **how), 4))
        for split, workers in ((cached, 0), (streamed, 0), (streamed, 2))
    ]
    for run in runs[1:]:
        assert all(equal(a, b) for a, b in zip(runs[0], run, strict=True))
    plain = open_split(images, transform, cache="memory")
    for with_maps, without in zip(runs[0], train_batches(plain, workers=0, **how), strict=False):
        assert torch.equal(with_maps.images, without.images)
        assert without.maps is None
    first = runs[0][0]
    assert first.maps is not None
    assert (first.maps.values.dtype, first.maps.numbers.dtype) == (torch.float16, torch.int32)
    assert (first.maps.boxes.dtype, first.maps.mirrored.dtype, first.maps.lam) == (torch.float32, torch.bool, 1.0)
    if name == "center":  # nothing moves, so each picture has its own row's map
        store, rows = maps
        assert np.array_equal(first.maps.values.numpy(), store.values[rows[first.index.numpy()]])


def test_pictures_of_many_sizes_have_boxes_of_their_own() -> None:
    """Kept in memory, where their own sizes are forgotten, as decoded when needed."""
    images, maps = Sizes(), some_maps(3)
    boxes = []
    for cache in ("memory", "none"):
        split = open_split(images, ResizeCenterCrop(16), cache=cache, maps=maps)
        (batch, *_) = itertools.islice(train_batches(split, batch_size=3, seed=0, workers=0), 1)
        assert batch.maps is not None
        boxes.append(batch.maps.boxes[batch.index.argsort()].tolist())
    assert boxes[0] == boxes[1]
    np.testing.assert_allclose(boxes[0][0], [0, 0, 1, 1])
    np.testing.assert_allclose(boxes[0][1], [0.25, 0, 0.5, 1])
    np.testing.assert_allclose(boxes[0][2], [0, (600 // 2 - 10) / 600, 1, 20 / 600], atol=0.03 / 600 * 20)


class Sizes:
    """A square, a tall one and one so wide that only its middle is resized."""

    labels, sizes, names = np.zeros(3, np.int64), np.ones(3, np.int64), ("a", "b", "c")
    shapes = ((20, 20), (40, 20), (20, 600))

    def __len__(self) -> int:
        return 3

    def read(self, i: int) -> np.ndarray:
        return picture_of_places(*self.shapes[i])


def test_a_map_of_the_middle_square_is_found_in_the_middle() -> None:
    images = ArrayImages(np.zeros((2, 20, 40, 3), np.uint8), np.zeros(2, np.int64), ("a", "b"))
    store, rows = some_maps(2)
    of_middle = Maps(store.values, store.numbers, {"crop": "center"})
    for transform, box in ((ResizeCenterCrop(20), [0, 0, 1, 1]), (ResizeCenterCrop((20, 40)), [0, -0.5, 1, 2])):
        split = open_split(images, transform, maps=(of_middle, rows))
        batch = next(train_batches(split, batch_size=2, seed=0, workers=0))
        assert batch.maps is not None
        np.testing.assert_allclose(batch.maps.boxes, [box, box], atol=1e-6)


def test_a_transform_that_does_not_tell_places_is_refused() -> None:
    class Whole:
        num_uniforms = 0

        def fixed(self, image: np.ndarray) -> np.ndarray:
            return image.transpose(2, 0, 1)

        def random(self, stack: np.ndarray, u: np.ndarray) -> np.ndarray:
            return stack

    images: Images = Sizes()
    with pytest.raises(UserError, match="Whole does not tell where"):
        open_split(images, Whole(), maps=some_maps(3))
