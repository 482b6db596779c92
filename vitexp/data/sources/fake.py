"""Made-up pictures that a model can learn: a pattern of waves for each class, with noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitexp.data.images import Source, check_channels
from vitexp.errors import UserError
from vitexp.seeding import derive_seed


class FakeImages:
    """Pictures computed when read, so that any number of any size costs no memory. Label = number modulo classes."""

    def __init__(
        self, *, first: int, count: int, num_classes: int, image_size: tuple[int, int], channels: int, seed: int
    ) -> None:
        self.first, self.image_size, self.channels, self.seed = first, image_size, channels, seed
        self.labels = (np.arange(count) % num_classes).astype(np.int64)
        self.names = [f"{first + i:08d}" for i in range(count)]
        self.sizes = np.full(count, image_size[0] * image_size[1] * channels, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> np.ndarray:
        height, width = self.image_size
        of_class = np.random.default_rng(derive_seed(self.seed, 1, int(self.labels[i])))
        frequency, phase = of_class.uniform(-3, 3, (self.channels, 2)), of_class.uniform(0, 1, self.channels)
        y, x = np.arange(height)[:, None, None] / height, np.arange(width)[None, :, None] / width
        wave = np.cos(2 * np.pi * (y * frequency[:, 0] + x * frequency[:, 1] + phase))
        noise = np.random.default_rng(derive_seed(self.seed, 2, self.first + i)).standard_normal(wave.shape)
        return np.clip(128 + 60 * wave + 30 * noise, 0, 255).astype(np.uint8)

    def stored(self, i: int) -> None:
        return None


def fake(
    *,
    num_train: int = 512,
    num_val: int = 128,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    channels: int = 3,
    seed: int = 0,
) -> Source:
    """`num_train` + `num_val` pictures of `num_classes` classes; no picture is in both splits."""
    check_channels(channels)
    if min(num_train, num_val, num_classes) < 1:
        raise UserError(
            f"data=fake: num_train={num_train}, num_val={num_val}, num_classes={num_classes}: all at least 1"
        )
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or min(sides) < 1:
        raise UserError(f"data.source.image_size={image_size}: expected one number or [height, width], all at least 1")
    height, width = sides
    shape = {"num_classes": num_classes, "image_size": (height, width), "channels": channels, "seed": seed}
    return Source(
        "fake",
        FakeImages(first=0, count=num_train, **shape),
        FakeImages(first=num_train, count=num_val, **shape),
        [f"class_{k}" for k in range(num_classes)],
        "vitexp.data.sources.fake",
    )
