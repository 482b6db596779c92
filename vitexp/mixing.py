"""What is done to a training batch on its device, between normalisation and the method: erasing, mixup, cutmix.

The order of a step: uint8 pictures → normalised floats (data/batch_transforms.py) → `augment.batch` → method. Erasing
stands before mixing in DeiT's recipes, whose noise is mixed like the pictures, and after it in those of LV-ViT and
T2T-ViT, whose pictures are mixed while a batch is put together. Decisions are drawn on the CPU from a seed that depends
on (seed, micro-batch, rank) only; the pictures never leave their device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from vitexp.errors import UserError
from vitexp.seeding import derive_seed
from vitexp.types import Batch

Box = tuple[int, int, int, int]  # top, bottom, left, right: rows top to bottom - 1 and columns left to right - 1
Mode = Literal["batch", "pair", "elem"]
_TRIES = 10  # boxes drawn before a picture is left unerased


class BatchStep(Protocol):
    """What `augment.batch` holds: a function of the batch and its position's seed, applied in training only."""

    def __call__(self, batch: Batch, *, num_classes: int, seed: int) -> Batch:
        """The batch to train on. num_classes: width of the targets that mixing makes, 0 for data without labels."""
        ...


class InTurn:
    """Several steps, one after the other, each with random numbers of its own."""

    def __init__(self, steps: Sequence[BatchStep]) -> None:
        self.steps = list(steps)

    def __call__(self, batch: Batch, *, num_classes: int, seed: int) -> Batch:
        for place, step in enumerate(self.steps):
            batch = step(batch, num_classes=num_classes, seed=derive_seed(seed, place))
        return batch


# ---- Mixing: plain functions of given decisions ----------------------------------------------------------------------


def mixup(images: Tensor, targets: Tensor, *, lam: float) -> tuple[Tensor, Tensor]:
    """lam of each picture and 1 - lam of its partner, and the same of (b, k) targets. mixup, arXiv:1710.09412.

    The partner of picture i is b - 1 - i, as in timm; the middle one of an odd batch is its own and stays as it is."""
    return torch.lerp(images.flip(0), images, lam), torch.lerp(targets.flip(0), targets, lam)


def mixup_rolled(images: Tensor, targets: Tensor, *, lam: float) -> tuple[Tensor, Tensor]:
    """As mixup, but the partner of picture i is i - 1, as in big_vision; the first one's is the last."""
    return torch.lerp(images.roll(1, 0), images, lam), torch.lerp(targets.roll(1, 0), targets, lam)


def cutmix(images: Tensor, targets: Tensor, *, box: Box) -> tuple[Tensor, Tensor]:
    """Each picture with its partner's pixels inside the box; (b, k) targets by area. CutMix, arXiv:1905.04899.

    Partners are mixup's. The targets' share is the box's true area, not the one that was drawn before clipping."""
    top, bottom, left, right = box
    height, width = images.shape[-2:]
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[..., top:bottom, left:right].flip(0)
    return mixed, torch.lerp(targets.flip(0), targets, share_outside(box, height, width))


def share_outside(box: Box, height: int, width: int) -> float:
    """Of a picture's area, the part that is its own."""
    top, bottom, left, right = box
    return 1 - (bottom - top) * (right - left) / (height * width)


def mix_each(images: Tensor, targets: Tensor, *, lam: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """mixup by lam (b,) outside each picture's box and its partner alone inside; boxes (b, 4), empty where equal.

    lam 1 and a box is cutmix, lam below 1 and an empty box is mixup. Partners are mixup's."""
    height, width = images.shape[-2:]
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    top, bottom, left, right = boxes.T[..., None]
    inside = ((rows >= top) & (rows < bottom))[:, None, :, None] & ((columns >= left) & (columns < right))[
        :, None, None
    ]
    share = torch.where(inside, 0.0, lam.to(images.dtype)[:, None, None, None])
    area = ((bottom - top) * (right - left))[:, 0].to(targets.dtype) / (height * width)
    kept = (lam.to(targets.dtype) * (1 - area))[:, None]
    return torch.lerp(images.flip(0), images, share), torch.lerp(targets.flip(0), targets, kept)


def one_hot(labels: Tensor, num_classes: int, *, smoothing: float) -> Tensor:
    """(b, k) probabilities: smoothing / k everywhere, and 1 - smoothing more at the class. timm's and torch's way."""
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)


def boxes_of(lam: np.ndarray, height: int, width: int, *, centre: np.ndarray) -> np.ndarray:
    """(n, 4) boxes of about the share 1 - lam of a picture, around centres given in [0, 1), clipped at the border."""
    ratio = np.sqrt(1 - lam)
    boxes = []
    for side, place in ((height, centre[:, 0]), (width, centre[:, 1])):
        half, middle = (side * ratio).astype(np.int64) // 2, (side * place).astype(np.int64)
        boxes += [np.clip(middle - half, 0, side), np.clip(middle + half, 0, side)]
    return np.stack(boxes, axis=1)


# ---- Mixing: components that draw the decisions ----------------------------------------------------------------------


class Mix:
    """mixup or cutmix, as timm 0.3.2's Mixup, which DeiT and MAE use. Targets become (b, k) probabilities, smoothed.

    An alpha of 0 turns that one off; with both off only the smoothing is left. `prob` is the chance that anything is
    mixed and `switch_prob` that it is cutmix where both are on: drawn once a batch, once a pair of partners, or once
    a picture (mode elem), as are the shares and boxes. Odd batches work: the middle picture stays alone.

    A batch with label maps keeps in them the share that was drawn for it: their targets are mixed as a whole, as in
    the official LV-ViT code, and not in space. That needs one share a batch. Raises UserError for other modes."""

    def __init__(
        self,
        *,
        mixup_alpha: float,
        cutmix_alpha: float,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: Mode = "batch",
        label_smoothing: float = 0.0,
    ) -> None:
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if alpha < 0:
                raise UserError(f"{name}={alpha} is negative; 0 turns it off")
        if mode not in ("batch", "pair", "elem"):
            raise UserError(f"mode={mode} is not one of batch, pair, elem")
        self.mixup_alpha, self.cutmix_alpha, self.mode = mixup_alpha, cutmix_alpha, mode
        self.prob, self.switch_prob = _probability("prob", prob), _probability("switch_prob", switch_prob)
        self.label_smoothing = _probability("label_smoothing", label_smoothing)

    def draw(self, rng: np.random.Generator, count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """lam (count,), 1 where mixup has no part, and boxes (count, 4), empty where cutmix has none."""
        mixes, switch, centre = rng.random(count) < self.prob, rng.random(count), rng.random((count, 2))
        cuts = switch < self.switch_prob if self.mixup_alpha and self.cutmix_alpha else switch < (self.cutmix_alpha > 0)
        alpha = np.where(cuts, self.cutmix_alpha, self.mixup_alpha)
        mixes &= alpha > 0
        lam = np.where(mixes, rng.beta(*[np.where(alpha > 0, alpha, 1.0)] * 2), 1.0)
        boxes = boxes_of(np.where(cuts, lam, 1.0), height, width, centre=centre)
        return np.where(cuts, 1.0, lam), boxes

    def __call__(self, batch: Batch, *, num_classes: int, seed: int) -> Batch:
        images, targets = batch.images, _probabilities(batch.targets, num_classes, smoothing=self.label_smoothing)
        count, (height, width) = len(images), images.shape[-2:]
        rng = np.random.default_rng(seed)
        if self.mode == "batch":
            (lam,), (box,) = self.draw(rng, 1, height, width)
            top, bottom, left, right = box.tolist()
            kept = float(lam)
            if top < bottom and left < right:
                kept = share_outside((top, bottom, left, right), height, width)
                images, targets = cutmix(images, targets, box=(top, bottom, left, right))
            elif lam < 1:
                images, targets = mixup(images, targets, lam=kept)
            maps = None if batch.maps is None else replace(batch.maps, lam=kept)
            return replace(batch, images=images, targets=targets, maps=maps)
        if batch.maps is not None and (self.mixup_alpha or self.cutmix_alpha):
            raise UserError(
                f"augment.batch: mode={self.mode} cannot mix token labels, which need one share a batch: batch"
            )
        if self.mode == "elem":
            lam, boxes = self.draw(rng, count, height, width)
        else:
            half, boxes_half = self.draw(rng, count // 2, height, width)
            alone = count % 2  # the middle one
            lam = np.concatenate([half, np.ones(alone), half[::-1]])
            boxes = np.concatenate([boxes_half, np.zeros((alone, 4), np.int64), boxes_half[::-1]])
        images, targets = mix_each(
            images,
            targets,
            lam=torch.from_numpy(lam.astype(np.float32)).to(images.device, non_blocking=True),
            boxes=torch.from_numpy(boxes).to(images.device, non_blocking=True),
        )
        return replace(batch, images=images, targets=targets)


class RolledMixup:
    """big_vision's mixup: one lam a batch, at least 1/2, each picture with the one before it. arXiv:2205.01580.

    lam is max(a, 1 - a) of a drawn from Beta(alpha, alpha). Targets become (b, k) probabilities."""

    def __init__(self, *, alpha: float, label_smoothing: float = 0.0) -> None:
        if alpha <= 0:
            raise UserError(f"alpha={alpha} is not above 0")
        self.alpha, self.label_smoothing = alpha, _probability("label_smoothing", label_smoothing)

    def __call__(self, batch: Batch, *, num_classes: int, seed: int) -> Batch:
        if batch.maps is not None:
            raise UserError("augment.batch: RolledMixup cannot mix token labels; vitexp.mixing.Mix with mode=batch can")
        targets = _probabilities(batch.targets, num_classes, smoothing=self.label_smoothing)
        share = np.random.default_rng(seed).beta(self.alpha, self.alpha)
        images, targets = mixup_rolled(batch.images, targets, lam=float(max(share, 1 - share)))
        return replace(batch, images=images, targets=targets)


# ---- Erasing ---------------------------------------------------------------------------------------------------------


class RandomErasing:
    """A box of each picture replaced by noise N(0, 1) a pixel and channel, with probability `prob`. arXiv:1708.04896.

    timm's mode `pixel`, count 1: area uniform in a share of the picture, aspect (height over width) log-uniform; of
    ten tries the first that is smaller than the picture in both directions, else nothing. Wants normalised pictures
    and changes them in place."""

    def __init__(
        self, *, prob: float, area: Sequence[float] = (0.02, 1 / 3), aspect: Sequence[float] = (0.3, 10 / 3)
    ) -> None:
        if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
            raise UserError(f"area={list(area)} is not [least, most] with 0 < least <= most <= 1")
        if len(aspect) != 2 or not 0 < aspect[0] <= aspect[1]:
            raise UserError(f"aspect={list(aspect)} is not [least, most] with 0 < least <= most")
        self.prob, self.area, self.aspect = _probability("prob", prob), area, aspect

    def draw(self, rng: np.random.Generator, count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the pictures to erase (n,), and their boxes (n, 4)."""
        chosen, place = rng.random(count) < self.prob, rng.random((count, 2))
        area = height * width * rng.uniform(self.area[0], self.area[1], (count, _TRIES))
        low, high = np.log(self.aspect)
        aspect = np.exp(rng.uniform(low, high, (count, _TRIES)))
        tall, wide = (np.rint(np.sqrt(size)).astype(np.int64) for size in (area * aspect, area / aspect))
        fits = (tall < height) & (wide < width)
        first, rows = fits.argmax(axis=1), np.arange(count)
        tall, wide = tall[rows, first], wide[rows, first]
        top, left = (place * (np.stack([height - tall, width - wide], axis=1) + 1)).astype(np.int64).T
        (erased,) = np.nonzero(chosen & fits.any(axis=1))
        return erased, np.stack([top, top + tall, left, left + wide], axis=1)[erased]

    def __call__(self, batch: Batch, *, num_classes: int, seed: int) -> Batch:
        images = batch.images
        assert images.is_floating_point(), "erased before they are normalised"
        count, channels, height, width = images.shape
        erased, boxes = self.draw(np.random.default_rng(seed), count, height, width)
        picture, row, column = pixels_of(erased, boxes)
        if len(picture):
            generator = torch.Generator(images.device).manual_seed(derive_seed(seed, 1))
            noise = torch.randn(len(picture), channels, generator=generator, device=images.device)
            at = [torch.from_numpy(part).to(images.device, non_blocking=True) for part in (picture, row, column)]
            images[at[0], :, at[1], at[2]] = noise.to(images.dtype)
        return batch


def pixels_of(pictures: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture, row and column of every pixel inside the boxes, box after box, so that one scatter erases them all."""
    top, bottom, left, right = boxes.T
    area = (bottom - top) * (right - left)
    box = np.repeat(np.arange(len(boxes)), area)
    within = np.arange(len(box)) - np.repeat(np.cumsum(area) - area, area)
    wide = (right - left)[box]
    return pictures[box], top[box] + within // wide, left[box] + within % wide


def _probabilities(targets: Tensor, num_classes: int, *, smoothing: float) -> Tensor:
    if num_classes == 0:
        raise UserError("augment.batch mixes labels, and the data has none; use augment.batch=null")
    if targets.ndim != 1:
        raise UserError("augment.batch mixes labels twice; keep one of its steps that do")
    return one_hot(targets, num_classes, smoothing=smoothing)


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"{name}={value} is not a probability between 0 and 1")
    return value
