"""Augmentation as a function of given numbers, against slow obvious versions and torchvision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as reference

from vitexp.data.batch_transforms import normalise
from vitexp.data.transforms import PadCropFlip, ResizeCenterCrop, ResizedCropFlip, Transform, apply, resize
from vitexp.errors import UserError
from vitexp.seeding import uniforms

RNG = np.random.default_rng(0)


def pictures(count: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (count, height, width, channels), np.uint8)


TRANSFORMS = [
    ResizeCenterCrop(16),
    ResizeCenterCrop((12, 20), crop_fraction=0.8, interpolation="bilinear"),
    ResizeCenterCrop(16, resizer="pillow"),
    PadCropFlip(16),
    PadCropFlip((12, 20), padding=0.25, flip=1.0),
    PadCropFlip(16, resizer="pillow"),
    ResizedCropFlip(16),
    ResizedCropFlip((12, 20), area=(0.2, 1.0), interpolation="bilinear"),
    ResizedCropFlip(16, resizer="pillow"),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("height", "width", "channels"), [(16, 16, 3), (12, 20, 3), (8, 8, 1), (33, 21, 3), (1, 1, 3)])
def test_one_at_a_time_and_a_whole_batch_give_the_same_pixels(
    transform: Transform, height: int, width: int, channels: int
) -> None:
    images = pictures(6, height, width, channels)
    u = uniforms(0, 3, np.arange(6), transform.num_uniforms)
    whole = transform.random(np.stack([transform.fixed(image) for image in images]), u)
    assert whole.dtype == np.uint8
    assert whole.shape == (6, channels, *transform.size)
    assert np.array_equal(whole, apply(transform, images, u))


def test_pad_crop_flip_is_the_obvious_loop() -> None:
    transform = PadCropFlip(32, padding=0.125, flip=0.5)
    images, u = pictures(64, 32, 32), RNG.random((64, 3))
    u[0], u[1] = (0.0, 0.0, 0.0), np.nextafter(1.0, 0.0)  # the ends of the range
    for made, image, (top, left, mirror) in zip(apply(transform, images, u), images, u, strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        crop = padded[int(top * 9) : int(top * 9) + 32, int(left * 9) : int(left * 9) + 32]
        assert np.array_equal(made, (crop[:, ::-1] if mirror < 0.5 else crop).transpose(2, 0, 1))


def test_every_shift_is_equally_likely_and_mirroring_as_often_as_asked() -> None:
    image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) + 1
    made = apply(PadCropFlip(8, flip=0.25), [image] * 8000, uniforms(0, 0, np.arange(8000), 3))
    plain, mirrored = {}, {}
    for top in range(3):
        for left in range(3):
            crop = np.pad(image[..., 0], 1)[top : top + 8, left : left + 8]
            plain[top, left] = (made[:, 0] == crop).all((1, 2)).mean()
            mirrored[top, left] = (made[:, 0] == crop[:, ::-1]).all((1, 2)).mean()
    assert np.allclose([*plain.values()], 0.75 / 9, atol=0.01)
    assert np.allclose([*mirrored.values()], 0.25 / 9, atol=0.01)


def test_flip_zero_never_mirrors_and_one_always_does() -> None:
    images, u = pictures(32, 16, 16), RNG.random((32, 3))
    never, always = (apply(PadCropFlip(16, padding=0, flip=flip), images, u) for flip in (0.0, 1.0))
    assert np.array_equal(never, images.transpose(0, 3, 1, 2))
    assert np.array_equal(always, never[..., ::-1])


def test_a_picture_of_the_right_size_is_left_as_it_is_in_evaluation() -> None:
    images = pictures(3, 20, 24)
    made = apply(ResizeCenterCrop((20, 24), crop_fraction=0.875), images, np.empty((3, 0)))
    assert np.array_equal(made, images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 37), (20, 20), (33, 32), (31, 100)])
def test_evaluation_equals_torchvision_on_pillow_pictures(height: int, width: int) -> None:
    image = pictures(1, height, width)[0]
    short = int(32 / 0.875)
    steps = [reference.Resize(short, reference.InterpolationMode.BICUBIC), reference.CenterCrop(32)]
    expected = np.asarray(reference.Compose(steps)(Image.fromarray(image))).transpose(2, 0, 1)
    exact = apply(ResizeCenterCrop(32, crop_fraction=0.875, resizer="pillow"), [image], np.empty((1, 0)))[0]
    assert np.array_equal(exact, expected)
    fast = apply(ResizeCenterCrop(32, crop_fraction=0.875), [image], np.empty((1, 0)))[0]
    assert np.abs(fast.astype(int) - expected).max() <= 1


def test_resizing_by_torch_is_sixty_decibels_from_pillow() -> None:
    rough = Image.fromarray(pictures(1, 12, 16)[0]).resize((500, 375), Image.Resampling.BICUBIC)
    image = np.array(rough)
    for interpolation in ("bilinear", "bicubic"):
        ours = resize(image, (224, 224), interpolation=interpolation, resizer="torch").astype(float)
        exact = resize(image, (224, 224), interpolation=interpolation, resizer="pillow")
        assert 10 * np.log10(255**2 / ((ours - exact) ** 2).mean()) > 60


def test_random_boxes_are_distributed_as_torchvisions() -> None:
    height, width, count = 80, 120, 20000
    ours = ResizedCropFlip(16).boxes(height, width, uniforms(0, 0, np.arange(count), ResizedCropFlip.num_uniforms))
    torch.manual_seed(0)
    blank = torch.zeros(1, height, width)
    draws = [reference.RandomResizedCrop.get_params(blank, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)]
    theirs = np.array(draws)
    top, left, tall, wide = ours.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + tall <= height).all()
    assert (left + wide <= width).all()
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        difference = np.quantile(ours, share, axis=0) - np.quantile(theirs, share, axis=0)
        assert (np.abs(difference) <= 2).all(), share


def test_without_retry_a_crop_is_drawn_once_and_cut_to_the_picture() -> None:
    """MAE's linear probe: sides from one area and one aspect, each at most the picture's, then a uniform position."""
    crop, height, width = ResizedCropFlip(16, retry=False), 40, 100
    u = np.array([[1.0, 0.0, 0.5, 0.5, 0.0], [1.0, 1.0, 0.5, 0.5, 0.0], [0.25, 0.5, 0.999, 0.0, 0.0]])
    # All of the picture at 3:4, 73 x 55 cut to 40 x 55; at 4:3, 55 x 73 cut to 40 x 73; 31 % of it, square, 35 x 35.
    expected = [[0, 23, 40, 55], [0, 14, 40, 73], [5, 0, 35, 35]]
    assert crop.boxes(height, width, u).tolist() == expected
    assert crop.num_uniforms == u.shape[1]


def test_a_crop_that_cannot_fit_is_the_largest_central_one() -> None:
    transform, u = ResizedCropFlip(16, area=(0.9, 1.0)), uniforms(0, 0, np.arange(50), ResizedCropFlip.num_uniforms)
    assert (transform.boxes(400, 10, u) == [193, 0, 13, 10]).all()
    assert (transform.boxes(10, 400, u) == [0, 193, 10, 13]).all()
    assert transform.boxes(1, 1, u).tolist() == [[0, 0, 1, 1]] * 50


@pytest.mark.parametrize("transform", [ResizeCenterCrop(224), PadCropFlip(224)])
@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (2, 9000)])
def test_very_long_pictures_do_not_need_much_memory(transform: Transform, shape: tuple[int, int]) -> None:
    assert transform.fixed(np.full((*shape, 3), 9, np.uint8)).nbytes < 20e6  # 600 MB if all of it were enlarged


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PadCropFlip(16, flip=1.5), "flip=1.5"),
        (lambda: PadCropFlip(16, padding=-0.1), "padding=-0.1"),
        (lambda: ResizeCenterCrop(0), "image_size=0"),
        (lambda: ResizeCenterCrop((1, 2, 3)), "image_size="),
        (lambda: ResizeCenterCrop(16, crop_fraction=0), "crop_fraction=0"),
        (lambda: ResizedCropFlip(16, area=(0.5, 0.1)), r"area=\[0.5, 0.1\]"),
        (lambda: ResizedCropFlip(16, aspect=(0, 1)), r"aspect=\[0, 1\]"),
    ],
)
def test_senseless_settings_are_refused_by_name(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(("count", "side"), [(3, 32), (200, 32), (2, 300)])
def test_normalising_is_exact_to_a_millionth(count: int, side: int) -> None:
    images = torch.from_numpy(RNG.integers(0, 256, (count, 3, side, side), np.uint8))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    made = normalise(images, mean, std)
    assert made.dtype == torch.float32
    assert made.is_contiguous()
    assert (made - expected).abs().max() < 1e-6
    assert torch.equal(normalise(images[:1], mean, std), made[:1])


def test_one_mean_serves_all_channels_and_a_wrong_count_is_refused() -> None:
    gray = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    assert torch.equal(normalise(gray, [0.5], [0.5]), -torch.ones(2, 1, 4, 4))
    assert torch.equal(normalise(gray.expand(2, 3, 4, 4), [0.5], [0.5]), -torch.ones(2, 3, 4, 4))
    with pytest.raises(UserError, match=r"data\.mean=\[0.5, 0.5, 0.5\].*data\.channels=1"):
        normalise(gray, [0.5] * 3, [0.5] * 3)
    with pytest.raises(UserError, match=r"data\.std=\[0.0\]"):
        normalise(gray, [0.5], [0.0])


def tensorflows_crop(
    height: int, width: int, area: tuple[float, float], aspect: float, u: float
) -> tuple[int, int] | None:
    """Sides of one try of sample_distorted_bounding_box, step by step; None where the area is not allowed."""
    least, most = area[0] * height * width, area[1] * height * width
    tall, tallest = round(math.sqrt(least / aspect)), round(math.sqrt(most / aspect))
    while round(tallest * aspect) > width:
        tallest -= 1
    tallest = min(tallest, height)
    tall = min(tall, tallest)
    tall += int(u * (tallest - tall + 1))
    if tall * round(tall * aspect) < least:
        tall += 1
    if tall * round(tall * aspect) > most:
        tall -= 1
    wide = round(tall * aspect)
    inside = 0 < tall <= height and 0 < wide <= width
    return (tall, wide) if inside and least <= tall * wide <= most else None


@pytest.mark.parametrize(("height", "width"), [(32, 32), (375, 500), (40, 9), (7, 300)])
@pytest.mark.parametrize("area", [(0.05, 1.0), (0.4, 0.45)])
def test_tensorflows_draw_is_its_operations_step_by_step(height: int, width: int, area: tuple[float, float]) -> None:
    crop = ResizedCropFlip(16, area=area, aspect=(0.75, 1.33), draw="tensorflow")
    u = uniforms(0, 0, np.arange(300), crop.num_uniforms)
    for (top, left, tall, wide), row in zip(crop.boxes(height, width, u).tolist(), u, strict=True):
        tries = (tensorflows_crop(height, width, area, 0.75 + 0.58 * row[10 + k], row[k]) for k in range(10))
        expected = next((found for found in tries if found), (height, width))
        assert (tall, wide) == expected
        # TensorFlow draws a place below height - tall, so never the last one.
        assert (top, left) == (int(row[20] * (height - tall)), int(row[21] * (width - wide)))


def test_tensorflows_crops_are_smaller_in_the_mean() -> None:
    means = {}
    for draw in ("torchvision", "tensorflow"):
        crop = ResizedCropFlip(16, area=(0.05, 1.0), draw=draw)
        boxes = crop.boxes(375, 500, uniforms(0, 0, np.arange(20000), crop.num_uniforms))
        means[draw] = (boxes[:, 2] * boxes[:, 3]).mean() / (375 * 500)
    assert means == {"torchvision": pytest.approx(0.417, abs=0.01), "tensorflow": pytest.approx(0.342, abs=0.01)}
