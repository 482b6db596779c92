"""Operations on single pictures after their crop: RandAugment, 3-Augment, colour jitter.

They work on Pillow pictures, so they cost a millisecond a picture where the crops of transforms.py cost some tens of
microseconds. All they draw comes from the picture's own uniform numbers, so they keep what transforms.py promises: the
same pixels cached or streamed, whatever the number of workers. Pictures of one channel pass through as gray RGB.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data.auto_augment import AugmentOp, rand_augment_ops, rand_augment_transform

from vitexp.data.geometry import MOVES, WHOLE, Places, cropped, recut, with_moves
from vitexp.data.transforms import (
    Box,
    DrawnInterpolation,
    Interpolation,
    PadCropFlip,
    ResizedCropFlip,
    Resizer,
    TrackedTransform,
    covering,
)
from vitexp.errors import UserError

_POLICY = re.compile(r"rand(-(m\d+|n[1-9]\d*|p[01](\.\d+)?|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3a|3aw)))*")
# The set of the TPU models' AutoAugment, as big_vision/pp/autoaugment.py has it; Cutout is added below.
_TPU_OPERATIONS = [
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness"),
    *("Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "SolarizeAdd"),
]


class PictureStep(Protocol):
    """A function of one RGB picture and its random numbers; the size stays.

    One that may move places also has `tracked(image, u)`, which returns the same picture and its Moves: without, label
    maps would not follow it."""

    num_uniforms: int

    def __call__(self, image: Image.Image, u: np.ndarray) -> Image.Image: ...


Moves = list[np.ndarray]  # (2, 3) each, of one picture, in order: geometry.MOVES


class Augmented:
    """A crop, and then steps on each picture it gives: a Transform as those of transforms.py."""

    def __init__(self, crop: TrackedTransform, *, steps: Sequence[PictureStep]) -> None:
        self.crop, self.steps = crop, list(steps)
        self.num_uniforms = crop.num_uniforms + sum(step.num_uniforms for step in self.steps)

    def fixed(self, image: np.ndarray) -> np.ndarray:
        """What the crop does once."""
        return self.crop.fixed(image)

    def view(self, height: int, width: int) -> Box:
        return self.crop.view(height, width)

    def random(self, stack: np.ndarray, u: np.ndarray) -> np.ndarray:
        out = self.crop.random(stack, u[:, : self.crop.num_uniforms])
        return self._stepped(out, u, given=stack)

    def tracked(self, stack: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, Places]:
        out, places = self.crop.tracked(stack, u[:, : self.crop.num_uniforms])
        moves: list[Moves] = []
        return self._stepped(out, u, given=stack, moves=moves), with_moves(places, moves)

    def _stepped(
        self, out: np.ndarray, u: np.ndarray, *, given: np.ndarray, moves: list[Moves] | None = None
    ) -> np.ndarray:
        out = np.array(out) if out is given else out  # a crop without randomness hands the cached pictures through
        with global_generators_kept():
            for pixels, row in zip(out, u[:, self.crop.num_uniforms :], strict=True):
                image = stepped(_to_rgb(pixels), row, self.steps, moves=moves)
                pixels[...] = _to_planar(image, channels=len(pixels))
        return out


class AugmentedWhole:
    """A flip, steps on the whole picture, and then a crop: LV-ViT's official order (arXiv:2104.10858).

    It costs more than `Augmented` the larger the pictures are, and crops may show what moved in from outside."""

    def __init__(self, crop: ResizedCropFlip, *, steps: Sequence[PictureStep], flip: float = 0.5) -> None:
        if not 0 <= flip <= 1:
            raise UserError(f"flip={flip} is not a probability between 0 and 1")
        if crop.flip:
            raise UserError(f"crop.flip={crop.flip}: the flip stands before the steps here; crop.flip=0")
        self.crop, self.steps, self.flip = crop, list(steps), flip
        self.num_uniforms = crop.num_uniforms + 1 + sum(step.num_uniforms for step in self.steps)

    @property
    def size(self) -> tuple[int, int]:
        return self.crop.size

    def fixed(self, image: np.ndarray) -> np.ndarray:
        return self.crop.fixed(image)

    def view(self, height: int, width: int) -> Box:
        return self.crop.view(height, width)

    def random(self, stack: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self.crop.random(self._stepped(stack, u), u[:, : self.crop.num_uniforms])

    def tracked(self, stack: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, Places]:
        moves: list[Moves] = []
        out, last = self.crop.tracked(self._stepped(stack, u, moves=moves), u[:, : self.crop.num_uniforms])
        whole = cropped(np.tile(WHOLE, (len(stack), 1)), self._mirrored(u))
        return out, recut(with_moves(whole, moves), last.cut)

    def _mirrored(self, u: np.ndarray) -> np.ndarray:
        return u[:, self.crop.num_uniforms] < self.flip

    def _stepped(self, stack: np.ndarray, u: np.ndarray, *, moves: list[Moves] | None = None) -> np.ndarray:
        out = np.empty_like(stack)  # (b, h, w, c)
        mirrored, rows = self._mirrored(u), u[:, self.crop.num_uniforms + 1 :]
        with global_generators_kept():
            for k, row in enumerate(rows):
                pixels = (stack[k, :, ::-1] if mirrored[k] else stack[k]).transpose(2, 0, 1)
                image = stepped(_to_rgb(pixels), row, self.steps, moves=moves)
                out[k] = _to_planar(image, channels=len(pixels)).transpose(1, 2, 0)
        return out


def stepped(
    image: Image.Image, u: np.ndarray, steps: Sequence[PictureStep], *, moves: list[Moves] | None = None
) -> Image.Image:
    """The picture after all steps, which share its random numbers out in turn; its moves are added to `moves`."""
    used, made = 0, []
    for step in steps:
        drawn = u[used : used + step.num_uniforms]
        used += step.num_uniforms
        # Not by isinstance: a protocol's takes 35 us, more than some steps themselves.
        tracked = None if moves is None else getattr(step, "tracked", None)
        if tracked is None:
            image = step(image, drawn)
        else:
            image, of_step = tracked(image, drawn)
            made += of_step
    if moves is not None:
        moves.append(made)
    return image


class RandAugment:
    """timm's RandAugment by its policy string, such as rand-m9-mstd0.5-inc1. RandAugment, arXiv:1909.13719.

    The string's parts: m magnitude of 10, n operations a picture (2), p chance of each (0.5), mstd its magnitude's
    standard deviation, mmax the largest magnitude, inc1 the set whose strength grows with magnitude, t another set.
    `fill`, of [0, 1] and one a channel, is what moves in from outside: the mean, as in DeiT. Posterizing keeps at
    least one bit: timm asks for none at magnitude 10, which is a black picture, and an error since Pillow 13."""

    num_uniforms = 1

    def __init__(
        self, policy: str, *, fill: Sequence[float] = (0.5, 0.5, 0.5), interpolation: DrawnInterpolation = "bicubic"
    ) -> None:
        if not _POLICY.fullmatch(policy):
            raise UserError(f"policy={policy} is not a RandAugment of timm such as rand-m9-mstd0.5-inc1")
        settings: dict[str, Any] = {"img_mean": _rgb(fill)}
        if interpolation != "random":  # timm's own way: bilinear or bicubic, drawn for each operation
            settings["interpolation"] = Image.Resampling[interpolation.upper()]
        self._augment = rand_augment_transform(policy, settings)
        _keep_a_bit(self._augment.ops)

    def __call__(self, image: Image.Image, u: np.ndarray) -> Image.Image:
        _seed_globals(u[0])
        return self._augment(image)

    def tracked(self, image: Image.Image, u: np.ndarray) -> tuple[Image.Image, Moves]:
        with noted(self._augment.ops) as moves:
            return self(image, u), moves


class RandAugmentTPU:
    """`num_ops` operations of the TPU set of 16 at one magnitude, as big_vision's randaug(num_ops, magnitude).

    Each chosen operation is applied: the probability that big_vision draws beside it is not used there. `translate`
    and `cutout` are shares of the picture: 100 and 40 of 224 pixels at magnitude 10; a cutout reaches that far to all
    sides of its centre. `fill` of [0, 1] fills both. Differs from the original: contrast fades to the picture's mean
    gray (there to a constant, by a slip), solarize-add stops at 128, and rotation rounds as Pillow does."""

    num_uniforms = 1

    def __init__(
        self,
        *,
        num_ops: int = 2,
        magnitude: int = 10,
        translate: float = 100 / 224,
        cutout: float = 40 / 224,
        fill: float = 0.5,
    ) -> None:
        if num_ops < 0 or magnitude < 0:
            raise UserError(f"num_ops={num_ops}, magnitude={magnitude}: neither may be negative")
        settings = {
            "img_mean": _rgb([fill]),
            "interpolation": Image.Resampling.NEAREST,
            "translate_pct": translate,
            "magnitude_max": max(magnitude, 1),
        }
        operations = rand_augment_ops(magnitude=magnitude, prob=1.0, hparams=settings, transforms=_TPU_OPERATIONS)
        _keep_a_bit(operations)
        reach = cutout * magnitude / 10
        self.operations = [*operations, partial(_cut_out, reach=reach, fill=settings["img_mean"])]
        self.num_ops = num_ops

    def __call__(self, image: Image.Image, u: np.ndarray) -> Image.Image:
        _seed_globals(u[0])
        for _ in range(self.num_ops):
            image = random.choice(self.operations)(image)
        return image

    def tracked(self, image: Image.Image, u: np.ndarray) -> tuple[Image.Image, Moves]:
        with noted([one for one in self.operations if isinstance(one, AugmentOp)]) as moves:
            return self(image, u), moves


class ThreeAugment:
    """One of grayscale, solarization and Gaussian blur, each as likely. DeiT III, arXiv:2204.07118, section 3.2."""

    num_uniforms = 2

    def __init__(self, *, threshold: int = 128, radius: Sequence[float] = (0.1, 2.0)) -> None:
        if len(radius) != 2 or not 0 <= radius[0] <= radius[1]:
            raise UserError(f"radius={list(radius)} is not [least, most] pixels")
        self.threshold, self.radius = threshold, radius

    def __call__(self, image: Image.Image, u: np.ndarray) -> Image.Image:
        match int(u[0] * 3):
            case 0:
                return image.convert("L").convert("RGB")
            case 1:
                return ImageOps.solarize(image, self.threshold)
            case _:
                return image.filter(ImageFilter.GaussianBlur(_between(self.radius, u[1])))


class ColorJitter:
    """Brightness, contrast and saturation times a factor within 1 ± strength, in random order, as torchvision's."""

    num_uniforms = 6

    def __init__(self, *, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0) -> None:
        strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, strength in strengths.items():
            if strength < 0:
                raise UserError(f"{name}={strength} is negative")
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        self.parts = list(zip(enhancers, strengths.values(), strict=True))

    def __call__(self, image: Image.Image, u: np.ndarray) -> Image.Image:
        for part in np.argsort(u[:3]):
            enhancer, strength = self.parts[part]
            if strength > 0:
                image = enhancer(image).enhance(_between((max(0.0, 1 - strength), 1 + strength), u[3 + part]))
        return image


class SimpleRandomCrop:
    """The short side resized to image_size, mirrored at the border, a random crop, a flip: DeiT III's SRC, section 3.2.

    `padding` is in pixels on each side: 4 whatever the size."""

    num_uniforms = 3

    def __init__(
        self,
        image_size: int | Sequence[int],
        *,
        padding: int = 4,
        flip: float = 0.5,
        interpolation: Interpolation = "bicubic",
        resizer: Resizer = "torch",
    ) -> None:
        self._crop = PadCropFlip(image_size, padding=0, flip=flip, interpolation=interpolation, resizer=resizer)
        self.size, self.padding = self._crop.size, padding
        if not 0 <= padding < min(self.size):
            raise UserError(f"padding={padding}: from 0 to less than image_size, {min(self.size)} pixels")

    def fixed(self, image: np.ndarray) -> np.ndarray:
        """Resized, padded and planar, uint8 (c, h, w)."""
        pad = [self.padding] * 2
        return np.pad(self._crop.fixed(image), ([0, 0], pad, pad), mode="reflect")

    def view(self, height: int, width: int) -> Box:
        top, left, tall, wide = self._crop.view(height, width)
        _, (resized_h, resized_w) = covering(height, width, self.size)
        pad_h, pad_w = self.padding * tall / resized_h, self.padding * wide / resized_w
        return top - pad_h, left - pad_w, tall + 2 * pad_h, wide + 2 * pad_w

    def random(self, stack: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self._crop.random(stack, u)

    def tracked(self, stack: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, Places]:
        return self._crop.tracked(stack, u)


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Python's and numpy's global generators are afterwards as they were: timm's operations draw from them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def noted(operations: Sequence[AugmentOp]) -> Iterator[Moves]:
    """Of those operations that move places, the moves they make meanwhile, in order, as they are really applied.

    timm's operations draw for themselves whether and how far they move, so their function is watched, not their draws;
    it is the same that is called when nobody watches."""
    moves: Moves = []
    moving = [(operation, operation.aug_fn) for operation in operations if operation.name in MOVES]
    try:
        for operation, function in moving:
            operation.aug_fn = partial(_noting, function, MOVES[operation.name], moves)
        yield moves
    finally:
        for operation, function in moving:
            operation.aug_fn = function


def _noting(
    function: Callable[..., Image.Image],
    move: Callable[[int, int, float], np.ndarray],
    moves: Moves,
    image: Image.Image,
    argument: float,
    **settings: Any,
) -> Image.Image:
    moves.append(move(image.height, image.width, argument))
    return function(image, argument, **settings)


def _seed_globals(u: float) -> None:
    seed = int(u * 2**53)  # all the bits of a uniform number of seeding.py
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def _keep_a_bit(operations: Sequence[AugmentOp]) -> None:
    for operation in operations:
        if operation.name.startswith("Posterize") and operation.level_fn is not None:
            operation.level_fn = partial(_at_least_one_bit, operation.level_fn)


def _at_least_one_bit(bits_of: Callable[..., Any], level: float, settings: dict[str, Any]) -> tuple[int]:
    bits = bits_of(level, settings)
    return (max(1, bits[0] if isinstance(bits, tuple) else bits),)


def _cut_out(image: Image.Image, *, reach: float, fill: tuple[int, int, int]) -> Image.Image:
    width, height = image.size
    across, down = round(reach * width), round(reach * height)
    x, y = random.randrange(width), random.randrange(height)
    left, top = max(0, x - across), max(0, y - down)
    box = (left, top, max(left, min(width, x + across)), max(top, min(height, y + down)))
    cut = image.copy()
    cut.paste(fill, box)
    return cut


def _between(ends: Sequence[float], u: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * float(u)


def _rgb(fill: Sequence[float]) -> tuple[int, int, int]:
    if len(fill) not in (1, 3) or not all(0 <= value <= 1 for value in fill):
        raise UserError(f"fill={list(fill)}: one number or three, from 0 to 1")
    red, green, blue = (min(255, round(255 * value)) for value in (list(fill) * 3)[:3])
    return red, green, blue


def _to_rgb(pixels: np.ndarray) -> Image.Image:
    if len(pixels) == 1:
        return Image.fromarray(pixels[0]).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _to_planar(image: Image.Image, *, channels: int) -> np.ndarray:
    """uint8 (c, h, w)."""
    if channels == 1:
        return np.asarray(image.convert("L"))[None]
    return np.asarray(image).transpose(2, 0, 1)
