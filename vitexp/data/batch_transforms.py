"""What is done to a whole batch on the device it is on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from vitexp.errors import UserError
from vitexp.types import Batch

_SLICE = 1 << 18  # numbers: 1 MiB of floats, which stays in a core's cache through the three passes (1.8 times as fast)


def on_device(batch: Batch, device: torch.device, *, mean: Sequence[float], std: Sequence[float]) -> Batch:
    """A loader's batch on the device, its uint8 pictures normalised there: a quarter of the bytes travel."""
    images = normalise(batch.images.to(device, non_blocking=True), mean, std)
    maps = batch.maps
    if maps is not None:  # boxes stay: token_labels.py begins with them on the CPU
        values, numbers = (part.to(device, non_blocking=True) for part in (maps.values, maps.numbers))
        maps = replace(maps, values=values, numbers=numbers)
    return replace(batch, images=images, targets=batch.targets.to(device, non_blocking=True), maps=maps)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 (x / 255 - mean) / std of uint8 (b, c, h, w). mean and std: one number, or one a channel, of [0, 1]."""
    channels = images.shape[1]
    if not {len(mean), len(std)} <= {1, channels}:
        raise UserError(
            f"data.mean={list(mean)}, data.std={list(std)}: one number or {channels}, as data.channels={channels}"
        )
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    if images.device.type != "cpu":
        return images.to(torch.float32).mul_(scale).add_(shift)
    out = torch.empty(images.shape, dtype=torch.float32)
    rows = max(1, _SLICE // max(images[:1].numel(), 1))
    for k in range(0, len(images), rows):
        out[k : k + rows].copy_(images[k : k + rows]).mul_(scale).add_(shift)
    return out


@lru_cache(maxsize=8)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    if not all(value > 0 for value in std):
        raise UserError(f"data.std={list(std)} is not positive")
    means, stds = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    return (1 / (255 * stds)).float().to(device), (-means / stds).float().to(device)
