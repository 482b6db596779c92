"""Augmentation and resizing of uint8 pictures, as functions of given uniform numbers.

A transform has two parts. `fixed` needs no randomness and is done once for pictures kept in memory; `random` works on
a stack of its results. Both paths of the loader call the same two, so cached and streamed pictures are equal bit for
bit. Both also tell what they did to the places of a picture (geometry.py), for label maps that have to follow it:
`view` of `fixed`, and `tracked` in the place of `random`, of which that is the first half. Resizing is torch's
antialiased one for uint8, at least 60 dB from Pillow's and 2.5 times as fast; `resizer: pillow` is the exact one of the
papers' pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from vitexp.data.geometry import WHOLE, Places, cropped
from vitexp.errors import UserError

Interpolation = Literal["bilinear", "bicubic"]
DrawnInterpolation = Literal["bilinear", "bicubic", "random"]  # random: one of the two for each picture
Box = tuple[float, float, float, float]  # top, left, height, width, in fractions of what it is cut from
Resizer = Literal["torch", "pillow"]
Draw = Literal["torchvision", "tensorflow"]
_LONGEST = 16  # times the short side; of a longer picture the middle is taken before resizing: 4000x1 would be 600 MB
_TRIES = 10  # random crops drawn before the central one is taken


class Transform(Protocol):
    """What the loader needs of an augmentation."""

    num_uniforms: int  # random numbers in [0, 1) that a picture takes

    def fixed(self, image: np.ndarray) -> np.ndarray:
        """The part without randomness: uint8 (h, w, c) to an array of the transform's own layout."""
        ...

    def random(self, stack: np.ndarray, u: np.ndarray) -> np.ndarray:
        """uint8 (b, c, H, W) from b results of `fixed` that have one shape, and (b, num_uniforms) numbers."""
        ...


class TrackedTransform(Transform, Protocol):
    """What the loader needs of an augmentation that label maps can follow."""

    def view(self, height: int, width: int) -> Box:
        """What of a picture of that size `fixed` hands on; beyond 0 and 1 where it pads."""
        ...

    def tracked(self, stack: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, Places]:
        """As `random`, and where in the results of `fixed` each picture was taken from."""
        ...


def apply(transform: Transform, images: Iterable[np.ndarray], u: np.ndarray) -> np.ndarray:
    """uint8 (b, c, H, W) from uint8 (h, w, c) pictures of any sizes and (b, num_uniforms) numbers in [0, 1)."""
    made = [transform.random(transform.fixed(image)[None], row[None]) for image, row in zip(images, u, strict=True)]
    return np.concatenate(made)


class ResizeCenterCrop:
    """The middle of the picture, as timm and torchvision evaluate: short side to image_size / crop_fraction, then crop.

    A picture that has image_size already stays as it is."""

    num_uniforms = 0

    def __init__(
        self,
        image_size: int | Sequence[int],
        *,
        crop_fraction: float = 1.0,
        interpolation: Interpolation = "bicubic",
        resizer: Resizer = "torch",
    ) -> None:
        if not 0 < crop_fraction <= 1:
            raise UserError(f"crop_fraction={crop_fraction} is not above 0 and at most 1")
        self.size, self.crop_fraction = _height_width(image_size), crop_fraction
        self.resized = {"interpolation": interpolation, "resizer": resizer}

    def fixed(self, image: np.ndarray) -> np.ndarray:
        """Planar uint8 (c, H, W): all there is to do."""
        height, width = self.size
        if image.shape[:2] != self.size:
            covered = math.floor(height / self.crop_fraction), math.floor(width / self.crop_fraction)
            image = resize_to_cover(image, covered, **self.resized)
            top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
            image = image[top : top + height, left : left + width]
        return np.ascontiguousarray(image.transpose(2, 0, 1))

    def view(self, height: int, width: int) -> Box:
        if (height, width) == self.size:
            return WHOLE
        crop_h, crop_w = self.size
        covered = math.floor(crop_h / self.crop_fraction), math.floor(crop_w / self.crop_fraction)
        middle, (tall, wide) = covering(height, width, covered)
        top, left = round((tall - crop_h) / 2), round((wide - crop_w) / 2)
        return box_in(middle, (top / tall, left / wide, crop_h / tall, crop_w / wide), height, width)

    def random(self, stack: np.ndarray, u: np.ndarray) -> np.ndarray:
        return stack

    def tracked(self, stack: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, Places]:
        return stack, cropped(np.tile(WHOLE, (len(stack), 1)), np.zeros(len(stack), bool))


class PadCropFlip:
    """A crop of the zero-padded picture, mirrored with probability `flip`: the usual one for CIFAR.

    `padding` is a fraction of image_size on each side: 0.125 is 4 of 32 pixels. A picture of another size is resized
    first so that it just covers image_size, and the crop then also moves along its longer side."""

    num_uniforms = 3

    def __init__(
        self,
        image_size: int | Sequence[int],
        *,
        padding: float = 0.125,
        flip: float = 0.5,
        interpolation: Interpolation = "bicubic",
        resizer: Resizer = "torch",
    ) -> None:
        if not 0 <= padding <= 1:
            raise UserError(f"padding={padding} is not between 0 and 1, a fraction of image_size")
        self.size, self.padding, self.flip = _height_width(image_size), padding, _probability(flip)
        self.resized = {"interpolation": interpolation, "resizer": resizer}

    def fixed(self, image: np.ndarray) -> np.ndarray:
        """Resized, padded and planar, uint8 (c, h, w), so that `random` is one gather."""
        if image.shape[:2] != self.size:
            image = resize_to_cover(image, self.size, **self.resized)
        pad_h, pad_w = (round(self.padding * side) for side in self.size)
        height, width, channels = image.shape
        padded = np.zeros((channels, height + 2 * pad_h, width + 2 * pad_w), np.uint8)
        padded[:, pad_h : pad_h + height, pad_w : pad_w + width] = image.transpose(2, 0, 1)
        return padded

    def view(self, height: int, width: int) -> Box:
        middle, (tall, wide) = covering(height, width, self.size)
        pad_h, pad_w = (round(self.padding * side) for side in self.size)
        padded = (-pad_h / tall, -pad_w / wide, 1 + 2 * pad_h / tall, 1 + 2 * pad_w / wide)
        return box_in(middle, padded, height, width)

    def random(self, stack: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self._taken(stack, *self._drawn(stack, u))

    def tracked(self, stack: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, Places]:
        top, left, mirrored = self._drawn(stack, u)
        height, width = (np.full(len(stack), side) for side in self.size)
        boxes = np.stack([top, left, height, width], axis=1) / np.tile(stack.shape[2:], 2)
        return self._taken(stack, top, left, mirrored), cropped(boxes, mirrored)

    def _drawn(self, stack: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First row and column of each crop, and whether it is mirrored."""
        height, width = self.size
        top = (u[:, 0] * (stack.shape[2] - height + 1)).astype(np.int64)
        left = (u[:, 1] * (stack.shape[3] - width + 1)).astype(np.int64)
        return top, left, u[:, 2] < self.flip

    def _taken(self, stack: np.ndarray, top: np.ndarray, left: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        windows = sliding_window_view(stack, self.size, axis=(2, 3))
        crops = windows[np.arange(len(stack)), :, top, left]
        crops[mirrored] = crops[mirrored][..., ::-1]
        return crops


class ResizedCropFlip:
    """A crop of random area and aspect, resized to image_size, mirrored with probability `flip`: Szegedy et al. 2015.

    The draw is torchvision's RandomResizedCrop: area uniform in a share of the picture, aspect log-uniform; of ten
    tries the first that fits, else the largest central crop within the aspect range. MAE pretrains with
    area=[0.2, 1]. `retry=False`: one try, its sides cut to the picture's, as MAE's linear probe draws it.
    `draw="tensorflow"` is sample_distorted_bounding_box, by which ViT and big_vision train: aspect uniform, and the
    height uniform among those that the areas allow, so that small crops are more frequent; else the whole picture.
    `interpolation="random"` draws bilinear or bicubic for each picture, as timm does unless told otherwise."""

    num_uniforms = 2 * _TRIES + 3

    def __init__(
        self,
        image_size: int | Sequence[int],
        *,
        area: Sequence[float] = (0.08, 1.0),
        aspect: Sequence[float] = (3 / 4, 4 / 3),
        retry: bool = True,
        draw: Draw = "torchvision",
        flip: float = 0.5,
        interpolation: DrawnInterpolation = "bicubic",
        resizer: Resizer = "torch",
    ) -> None:
        if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
            raise UserError(f"area={list(area)} is not [least, most] with 0 < least <= most <= 1")
        if len(aspect) != 2 or not 0 < aspect[0] <= aspect[1]:
            raise UserError(f"aspect={list(aspect)} is not [least, most] with 0 < least <= most")
        self.size, self.area, self.aspect, self.flip = _height_width(image_size), area, aspect, _probability(flip)
        self.retry, self.draw, self.tries = retry, draw, _TRIES if retry else 1
        self.interpolation: DrawnInterpolation = interpolation
        self.resizer: Resizer = resizer
        self.num_uniforms = 2 * self.tries + 3 + (interpolation == "random")

    def boxes(self, height: int, width: int, u: np.ndarray) -> np.ndarray:
        """(b, 4) whole numbers top, left, height, width within a picture of that size."""
        of_size, of_aspect, place = np.split(u, [self.tries, 2 * self.tries], axis=1)
        tensorflow = self.draw == "tensorflow"
        if tensorflow:
            tall, wide, fits = self._sides_of_tensorflow(height, width, of_size, of_aspect)
        else:
            area = height * width * (self.area[0] + (self.area[1] - self.area[0]) * of_size)
            low, high = np.log(self.aspect[0]), np.log(self.aspect[1])
            aspect = np.exp(low + (high - low) * of_aspect)
            tall, wide = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
            if not self.retry:
                tall, wide = np.minimum(tall, height), np.minimum(wide, width)
            fits = (tall > 0) & (wide > 0) & (tall <= height) & (wide <= width)
        first, rows = fits.argmax(axis=1), np.arange(len(u))
        crop_h, crop_w = tall[rows, first], wide[rows, first]
        places = 0 if tensorflow else 1  # which never takes the last place of several
        top = np.floor(place[:, 0] * (height - crop_h + places))
        left = np.floor(place[:, 1] * (width - crop_w + places))
        boxes = np.stack([top, left, crop_h, crop_w], axis=1).astype(np.int64)
        fitted = fits.any(axis=1)
        if tensorflow:
            boxes[~fitted] = 0, 0, height, width
        elif not fitted.all():
            central_h = min(height, max(round(width / self.aspect[0]), 1))
            central_w = min(width, max(round(height * self.aspect[1]), 1))
            boxes[~fitted] = (height - central_h) // 2, (width - central_w) // 2, central_h, central_w
        return boxes

    def _sides_of_tensorflow(
        self, height: int, width: int, of_size: np.ndarray, of_aspect: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(b, tries) heights, widths and whether the area is one allowed; as GenerateRandomCrop of TensorFlow."""
        least, most = (share * height * width for share in self.area)
        aspect = self.aspect[0] + (self.aspect[1] - self.aspect[0]) * of_aspect
        low, high = np.rint(np.sqrt(least / aspect)), np.rint(np.sqrt(most / aspect))
        widest = np.floor((width + 0.5 - 1e-7) / aspect)
        widest -= np.rint(widest * aspect) > width
        high = np.minimum(np.where(np.rint(high * aspect) > width, widest, high), height)
        low = np.minimum(low, high)
        tall = low + np.floor(of_size * (high - low + 1))
        tall += tall * np.rint(tall * aspect) < least  # what rounding made too small or too large
        tall -= tall * np.rint(tall * aspect) > most
        wide = np.rint(tall * aspect)
        area = tall * wide
        allowed = (area >= least) & (area <= most) & (tall > 0) & (wide > 0) & (tall <= height) & (wide <= width)
        return tall, wide, allowed

    def fixed(self, image: np.ndarray) -> np.ndarray:
        """The picture itself, (h, w, c): every crop is of another size."""
        return image

    def view(self, height: int, width: int) -> Box:
        return WHOLE

    def random(self, stack: np.ndarray, u: np.ndarray) -> np.ndarray:
        return self._taken(stack, u, *self._drawn(stack, u))

    def tracked(self, stack: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, Places]:
        boxes, mirrored = self._drawn(stack, u)
        return self._taken(stack, u, boxes, mirrored), cropped(boxes / np.tile(stack.shape[1:3], 2), mirrored)

    def _drawn(self, stack: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes in pixels, and whether each is mirrored."""
        return self.boxes(stack.shape[1], stack.shape[2], u), u[:, 2 * self.tries + 2] < self.flip

    def _taken(self, stack: np.ndarray, u: np.ndarray, boxes: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        out = np.empty((len(stack), stack.shape[3], *self.size), np.uint8)
        for k, (top, left, height, width) in enumerate(boxes.tolist()):
            crop = resize(
                stack[k, top : top + height, left : left + width],
                self.size,
                interpolation=self._interpolation(u[k]),
                resizer=self.resizer,
            )
            out[k] = (crop[:, ::-1] if mirrored[k] else crop).transpose(2, 0, 1)
        return out

    def _interpolation(self, u: np.ndarray) -> Interpolation:
        if self.interpolation != "random":
            return self.interpolation
        return "bilinear" if u[-1] < 0.5 else "bicubic"


def resize(image: np.ndarray, size: tuple[int, int], *, interpolation: Interpolation, resizer: Resizer) -> np.ndarray:
    """uint8 (h, w, c) to (*size, c), antialiased when it shrinks."""
    if image.shape[:2] == size:
        return image
    if resizer == "pillow":
        squeezed = image[..., 0] if image.shape[2] == 1 else image
        resized = Image.fromarray(squeezed).resize(size[::-1], Image.Resampling[interpolation.upper()])
        return np.array(resized).reshape(*size, image.shape[2])
    # A channels-last view: 2 times as fast as planar for three channels, and the same numbers.
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return F.interpolate(pixels, size=size, mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()


def resize_to_cover(
    image: np.ndarray, size: tuple[int, int], *, interpolation: Interpolation, resizer: Resizer
) -> np.ndarray:
    """The whole picture, resized so that one side fits `size` and the other covers it; rounded as torchvision does."""
    (top, left, height, width), target = covering(image.shape[0], image.shape[1], size)
    middle = image[top : top + height, left : left + width]
    return resize(middle, target, interpolation=interpolation, resizer=resizer)


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """What `resize_to_cover` resizes of a picture: top, left, height, width in pixels, and the size it gets."""
    longest_h, longest_w = (
        math.ceil(_LONGEST * width * size[0] / size[1]),
        math.ceil(_LONGEST * height * size[1] / size[0]),
    )
    top = left = 0
    if height > longest_h:
        top, height = (height - longest_h) // 2, longest_h
    elif width > longest_w:
        left, width = (width - longest_w) // 2, longest_w
    if height * size[1] <= width * size[0]:  # the height is what must be reached
        target = size[0], max(size[1], size[0] * width // height)
    else:
        target = max(size[0], size[1] * height // width), size[1]
    return (top, left, height, width), target


def box_in(middle: tuple[int, int, int, int], box: Box, height: int, width: int) -> Box:
    """A box of a part of a picture as one of the picture, the part given in pixels."""
    top, left, tall, wide = middle
    return (top + box[0] * tall) / height, (left + box[1] * wide) / width, box[2] * tall / height, box[3] * wide / width


def _height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    sides = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
    if len(sides) != 2 or min(sides) < 1:
        raise UserError(f"image_size={image_size}: one side or [height, width], in pixels")
    return sides[0], sides[1]


def _probability(flip: float) -> float:
    if not 0 <= flip <= 1:
        raise UserError(f"flip={flip} is not a probability between 0 and 1")
    return flip
