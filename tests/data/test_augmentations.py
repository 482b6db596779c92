"""Operations on single pictures: against timm, torchvision and slow obvious versions, and as functions of position."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import functional as reference

from vitexp.config import build, compose_and_check
from vitexp.data.augmentations import (
    Augmented,
    ColorJitter,
    RandAugment,
    RandAugmentTPU,
    SimpleRandomCrop,
    ThreeAugment,
    _cut_out,
)
from vitexp.data.loader import open_split, train_batches
from vitexp.data.transforms import PadCropFlip, ResizeCenterCrop, ResizedCropFlip, Transform, apply
from vitexp.errors import UserError
from vitexp.seeding import uniforms

RNG = np.random.default_rng(0)
JITTER = ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)


def pictures(count: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (count, height, width, channels), np.uint8)


def smooth(height: int = 48, width: int = 56) -> Image.Image:
    return Image.fromarray(pictures(1, 6, 7)[0]).resize((width, height), Image.Resampling.BICUBIC)


TRANSFORMS = [
    Augmented(ResizedCropFlip(16), steps=[RandAugment("rand-m9-mstd0.5-inc1")]),
    Augmented(ResizedCropFlip((12, 20)), steps=[RandAugmentTPU()]),
    Augmented(PadCropFlip(16), steps=[ThreeAugment(), JITTER]),
    Augmented(ResizeCenterCrop(16), steps=[JITTER]),
    SimpleRandomCrop((12, 20)),
    Augmented(SimpleRandomCrop(16), steps=[ThreeAugment(), RandAugment("rand-m9-n3-mstd0.5", fill=[0.2])]),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("height", "width", "channels"), [(16, 16, 3), (12, 20, 3), (16, 16, 1), (33, 21, 3)])
def test_one_at_a_time_and_a_whole_batch_give_the_same_pixels(
    transform: Transform, height: int, width: int, channels: int
) -> None:
    images = pictures(12, height, width, channels)
    given = images.copy()
    u = uniforms(0, 3, np.arange(12), transform.num_uniforms)
    kept = np.stack([transform.fixed(image) for image in images])
    cached = kept.copy()
    whole = transform.random(kept, u)
    assert np.array_equal(kept, cached), "pictures in memory are not changed"
    assert whole.dtype == np.uint8
    assert whole.shape[:2] == (12, channels)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002  what was drawn before does not matter
    assert np.array_equal(whole, apply(transform, images, u))
    assert np.array_equal(images, given)
    shifted = uniforms(0, 4, np.arange(12), transform.num_uniforms)
    assert not np.array_equal(whole, apply(transform, images, shifted)), "another epoch, other pixels"


def test_global_generators_are_afterwards_as_they_were() -> None:
    states = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    apply(TRANSFORMS[0], pictures(3, 20, 20), uniforms(0, 0, np.arange(3), TRANSFORMS[0].num_uniforms))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002


def test_each_step_has_random_numbers_of_its_own() -> None:
    seen = []

    class Note:
        num_uniforms = 2

        def __call__(self, image: Image.Image, u: np.ndarray) -> Image.Image:
            seen.append(u.tolist())
            return image

    transform = Augmented(PadCropFlip(16), steps=[Note(), Note()])
    u = np.arange(7)[None] / 8
    apply(transform, pictures(1, 16, 16), u)
    assert transform.num_uniforms == 7
    assert seen == [[3 / 8, 4 / 8], [5 / 8, 6 / 8]]


@pytest.mark.parametrize("policy", ["rand-m6-mstd0.5-inc1", "rand-m9-n3-mstd0.5", "rand-m5-p0.3-t3aw"])
def test_rand_augment_is_timms(policy: str) -> None:
    image = smooth()
    settings = {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    theirs = rand_augment_transform(policy, settings)
    ours = RandAugment(policy, fill=(0.485, 0.456, 0.406))
    for u in RNG.random(60):
        seed = int(u * 2**53)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        assert np.array_equal(np.asarray(theirs(image)), np.asarray(ours(image, np.array([u]))))


@pytest.mark.parametrize("policy", ["rand-m10-n3-p1-inc1", "rand-m0-n3-p1", "rand-m9-mstd0.5-inc1"])
def test_posterizing_keeps_a_bit(policy: str) -> None:
    step = RandAugment(policy)
    (posterize,) = [operation for operation in step._augment.ops if operation.name.startswith("Posterize")]
    bits = [posterize.level_fn(level, {})[0] for level in np.linspace(0, 10, 50)]
    assert min(bits) == 1
    assert max(bits) == 4
    for u in RNG.random(200):
        step(smooth(8, 8), np.array([u]))  # timm's own raises on Pillow 13


def test_rand_augment_draws_every_operation_equally_often() -> None:
    for step, name, each in ((RandAugment("rand-m9-n1-p1"), "_augment", 15), (RandAugmentTPU(num_ops=1), "", 16)):
        drawn: Counter[int] = Counter()

        def note(image: Image.Image, *, number: int, drawn: Counter[int] = drawn) -> Image.Image:
            drawn[number] += 1
            return image

        owner = getattr(step, name) if name else step
        operations = [partial(note, number=number) for number in range(each)]
        setattr(owner, "ops" if name else "operations", operations)
        image = smooth(2, 2)
        for u in uniforms(0, 0, np.arange(10_000), 1):
            step(image, u)
        assert len(drawn) == each
        assert np.allclose(np.array([*drawn.values()]) * each / 10_000, 1, atol=0.15)


def test_half_of_timms_operations_are_applied_and_all_of_the_tpu_ones() -> None:
    calls: list[str] = []

    def count(image: Image.Image, *args: Any, **settings: Any) -> Image.Image:
        calls.append("applied")
        return image

    step = RandAugment("rand-m9-mstd0.5-inc1")
    for operation in step._augment.ops:
        operation.aug_fn = count
    for u in uniforms(0, 0, np.arange(5000), 1):
        step(smooth(2, 2), u)
    assert len(calls) / 10_000 == pytest.approx(0.5, abs=0.02)
    assert all(operation.prob == 1 for operation in RandAugmentTPU().operations[:-1])


def test_the_tpu_operations_at_magnitude_10_are_the_originals() -> None:
    image = smooth(224, 224)
    step = RandAugmentTPU(magnitude=10)
    operations = {operation.name: operation for operation in step.operations[:-1]}
    assert len(step.operations) == 16
    pixels = np.asarray(image)
    assert np.array_equal(operations["Solarize"](image), pixels)  # threshold 256
    assert np.array_equal(operations["Posterize"](image), pixels & 0xF0)
    assert np.array_equal(operations["Invert"](image), 255 - pixels)
    added = np.where(pixels < 128, np.minimum(pixels.astype(int) + 110, 255), pixels)
    assert np.array_equal(operations["SolarizeAdd"](image), added)
    random.seed(0)
    moved = [np.asarray(operations["TranslateXRel"](image)) for _ in range(20)]
    left = np.concatenate([pixels[:, 100:], np.full((224, 100, 3), 128)], 1)
    right = np.concatenate([np.full((224, 100, 3), 128), pixels[:, :-100]], 1)
    assert {"left" if np.array_equal(m, left) else "right" if np.array_equal(m, right) else "?" for m in moved} == {
        "left",
        "right",
    }
    brighter = np.clip(pixels * 1.9, 0, 255)
    assert np.abs(np.asarray(operations["Brightness"](image)) - brighter).max() <= 1
    random.seed(0)
    cut = np.asarray(step.operations[-1](image))
    random.seed(0)
    x, y = random.randrange(224), random.randrange(224)
    expected = pixels.copy()
    expected[max(0, y - 40) : y + 40, max(0, x - 40) : x + 40] = 128
    assert np.array_equal(cut, expected)


def test_a_cutout_of_no_size_cuts_nothing() -> None:
    image = smooth(8, 8)
    assert np.array_equal(_cut_out(image, reach=0.0, fill=(1, 1, 1)), image)


def test_three_augment_is_one_of_three_each_a_third_of_the_time() -> None:
    image = smooth()
    gray, inverted = np.asarray(image.convert("L").convert("RGB")), np.asarray(ImageOps.solarize(image))
    found: Counter[str] = Counter()
    for u in uniforms(0, 0, np.arange(3000), 2):
        made = np.asarray(ThreeAugment()(image, u))
        blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * float(u[1]))))
        kinds = {"gray": gray, "solarized": inverted, "blurred": blurred}
        (kind,) = [name for name, expected in kinds.items() if np.array_equal(made, expected)]
        found[kind] += 1
    assert np.allclose([found[kind] / 3000 for kind in ("gray", "solarized", "blurred")], 1 / 3, atol=0.03)


def test_colour_jitter_is_torchvisions_with_the_same_order_and_factors() -> None:
    image = smooth()
    functions = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation)
    orders: Counter[tuple[int, ...]] = Counter()
    for u in RNG.random((60, 6)):
        expected = image
        order = tuple(np.argsort(u[:3]).tolist())
        orders[order] += 1
        for part in order:
            expected = functions[part](expected, 0.7 + 0.6 * u[3 + part])
        assert np.array_equal(np.asarray(JITTER(image, u)), np.asarray(expected))
    assert len(orders) == 6
    assert np.array_equal(np.asarray(ColorJitter()(image, RNG.random(6))), np.asarray(image))


def test_simple_random_crop_is_the_obvious_loop() -> None:
    transform, images, u = SimpleRandomCrop(32, padding=4, flip=0.5), pictures(40, 32, 32), RNG.random((40, 3))
    u[0], u[1] = (0.0, 0.0, 0.0), np.nextafter(1.0, 0.0)
    for made, image, (top, left, mirror) in zip(apply(transform, images, u), images, u, strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        crop = padded[int(top * 9) : int(top * 9) + 32, int(left * 9) : int(left * 9) + 32]
        assert np.array_equal(made, (crop[:, ::-1] if mirror < 0.5 else crop).transpose(2, 0, 1))
    assert transform.fixed(pictures(1, 40, 100)[0]).shape == (3, 40, 88), "the short side fits, the long side is kept"


@pytest.mark.parametrize("augment", ["deit", "big_vision", "three_augment", "three_augment_src"])
def test_batches_are_the_same_cached_streamed_and_from_workers(augment: str) -> None:
    config = compose_and_check([f"augment={augment}", "data=fake", "data.num_train=30", "data.flip=0.5"])
    transform, source = build(config.augment["train"]), build(config.data["source"])
    found = []
    for cache, workers, start in (("none", 0, 0), ("none", 2, 0), ("none", 2, 3), ("memory", 0, 3)):
        if cache == "memory" and augment == "three_augment_src":
            cache = "auto"
        split = open_split(source.train, transform, cache=cache, progress=False)
        batches = train_batches(split, batch_size=8, seed=1, start=start, workers=workers)
        found.append([next(batches).images.numpy() for _ in range(6 - start)])
        batches.close()
    for other in found[1:]:
        for one, two in zip(found[0][-len(other) :], other, strict=True):
            assert np.array_equal(one, two)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandAugment("rand-m9-mst0.5"), "policy=rand-m9-mst0.5"),
        (lambda: RandAugment("augmix-m5"), "policy=augmix-m5"),
        (lambda: RandAugment("rand-m9-inc1", fill=[0.5, 2, 0.5]), r"fill=\[0.5, 2, 0.5\]"),
        (lambda: RandAugmentTPU(num_ops=-1), "num_ops=-1"),
        (lambda: ThreeAugment(radius=(2, 1)), r"radius=\[2, 1\]"),
        (lambda: ColorJitter(contrast=-0.5), "contrast=-0.5"),
        (lambda: SimpleRandomCrop(16, padding=16), "padding=16"),
        (lambda: SimpleRandomCrop(16, flip=2), "flip=2"),
    ],
)
def test_senseless_settings_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
