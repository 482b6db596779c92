"""Pictures a processor second from memory and from a folder of JPEGs, beside torchvision's pipeline on PIL pictures.

Both sides end in normalised float batches. vitexp's randomness is that of a run: a function of (seed, epoch, picture),
in an order that is a function of (seed, epoch), so that a resumed run sees the same pictures.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Clock, Times, parser, ratio, spread, start, table, take_turns, verdict
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import (
    Compose,
    InterpolationMode,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToTensor,
)

from vitexp.data.batch_transforms import normalise
from vitexp.data.images import ArrayImages, Images, Subset
from vitexp.data.loader import Split, open_split, train_batches
from vitexp.data.sampler import train_positions
from vitexp.data.sources.folder import folder
from vitexp.data.sources.parquet import parquet
from vitexp.data.transforms import PadCropFlip, ResizedCropFlip
from vitexp.mixing import InTurn, Mix, RandomErasing
from vitexp.seeding import derive_seed
from vitexp.types import Batch

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]
SMALL_BATCH, PHOTO_BATCH = 128, 20
MOST_PHOTOS = 200
GOALS = {"small": 15.0, "mixed": 6.0, "folder": 1.3, "psnr": 60.0}


class PilPictures(Dataset):
    """Files or arrays, one by one through PIL, as torchvision's ImageFolder and CIFAR10 give them."""

    def __init__(
        self, pictures: Sequence[str] | np.ndarray, labels: np.ndarray, transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.pictures, self.labels, self.transform = pictures, labels, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture = self.pictures[i]
        image = pil_loader(picture) if isinstance(picture, str) else Image.fromarray(picture)
        return self.transform(image), int(self.labels[i])


def endless(loader: DataLoader) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


def take(batches: Iterator[Any], number: int, *, finish: Callable[[Any], object] = id) -> Callable[[], None]:
    """One turn: the next `number` batches, each made ready for the model by `finish`."""

    def turn() -> None:
        for batch in islice(batches, number):
            finish(batch)

    return turn


def floats(batch: Batch) -> Tensor:
    return normalise(batch.images, MEAN, STD)


def small_pictures(arguments: argparse.Namespace) -> ArrayImages:
    """CIFAR's shape: 32 px, ten classes; from a table, or made up."""
    if arguments.parquet is None:
        draw = np.random.default_rng(0)
        number = 10_000
        pixels = draw.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
        return ArrayImages(pixels, draw.integers(0, 10, number), [str(i) for i in range(number)])
    read: Images = parquet(train=arguments.parquet, val_fraction=0.0).train
    read = Subset(read, np.arange(min(len(read), 10_000)))
    return ArrayImages(np.stack([read.read(i) for i in range(len(read))]), read.labels, read.names)


def measure_small(arguments: argparse.Namespace, clock: Clock, rounds: int) -> list[list[str]]:
    images = small_pictures(arguments)
    split = open_split(images, PadCropFlip(32), cache="memory", progress=False)
    mix = InTurn([RandomErasing(prob=0.25), Mix(mixup_alpha=0.8, cutmix_alpha=0.0)])
    seeds = count()

    def mixed(batch: Batch) -> Batch:
        return mix(replace(batch, images=floats(batch)), num_classes=10, seed=derive_seed(0, next(seeds)))

    pipeline = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), ToTensor(), Normalize(MEAN, STD)])
    theirs = DataLoader(
        PilPictures(images.pixels, images.labels, pipeline), batch_size=SMALL_BATCH, shuffle=True, drop_last=True
    )
    # About equal times: vitexp's batches would be too short to read the clock around.
    batches = {"vitexp": 150, "vitexp, erasing and mixup": 60, "torchvision": 10}
    if arguments.quick:
        batches = {name: number // 10 for name, number in batches.items()}
    contenders = {
        name: take(train_batches(split, batch_size=SMALL_BATCH, seed=0, workers=0), batches[name], finish=finish)
        for name, finish in (("vitexp", floats), ("vitexp, erasing and mixup", mixed))
    }
    contenders["torchvision"] = take(endless(theirs), batches["torchvision"])
    times = take_turns(contenders, rounds=rounds, clock=clock)
    pictures = {name: number * SMALL_BATCH for name, number in batches.items()}
    goals = {"vitexp": GOALS["small"], "vitexp, erasing and mixup": GOALS["mixed"]}
    return compared("32 px in memory, crop and flip", times, pictures, goals)


def photographs(place: Path, number: int) -> None:
    """JPEGs of photographs' size and entropy: noise whose amplitude falls with its frequency, about 110 kB each."""
    draw = np.random.default_rng(0)
    for k in range(number):
        height, width = (375, 500) if k % 3 else (500, 375)
        pixels = np.full((height, width, 3), 128.0, np.float32)
        for octave in range(9):
            rows, columns = math.ceil(height / 2**octave), math.ceil(width / 2**octave)
            grain = torch.from_numpy(draw.standard_normal((1, 3, rows, columns), dtype=np.float32))
            # Photographs are mostly gray: colours share three quarters of each octave.
            grain = 0.75 * grain.mean(1, keepdim=True) * math.sqrt(3) + 0.25 * grain
            smooth = torch.nn.functional.interpolate(grain, size=(height, width), mode="bicubic")[0]
            pixels += 3.5 * 1.55**octave * smooth.permute(1, 2, 0).numpy()
        class_folder = place / f"class{k % 10}"
        class_folder.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(class_folder / f"{k:04}.jpg", quality=90)


def measure_folder(root: Path, arguments: argparse.Namespace, clock: Clock, rounds: int) -> list[list[str]]:
    images: Images = folder(str(root), val_fraction=0.0).train
    images = Subset(images, np.linspace(0, len(images) - 1, min(len(images), MOST_PHOTOS)).astype(np.int64))
    batch_size = min(PHOTO_BATCH, len(images))
    pipeline = Compose(
        [
            RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC),
            RandomHorizontalFlip(),
            ToTensor(),
            Normalize(MEAN, STD),
        ]
    )
    paths = [str(root / name) for name in images.names]
    theirs = DataLoader(
        PilPictures(paths, images.labels, pipeline), batch_size=batch_size, shuffle=True, drop_last=True
    )
    splits = {
        name: open_split(images, ResizedCropFlip(224, resizer=resizer), cache="none")
        for name, resizer in (("vitexp", "torch"), ("vitexp, resizer=pillow", "pillow"))
    }
    # A turn is an epoch: every side decodes the same pictures.
    batches = 1 if arguments.quick else len(images) // batch_size
    contenders = {
        name: take(train_batches(split, batch_size=batch_size, seed=0, workers=0), batches, finish=floats)
        for name, split in splits.items()
    }
    contenders["torchvision"] = take(endless(theirs), batches)
    times = take_turns(contenders, rounds=rounds, clock=clock)
    what = f"{len(images)} JPEGs to 224 px"
    pictures = dict.fromkeys(contenders, batches * batch_size)
    rows = compared(what, times, pictures, {"vitexp": GOALS["folder"]})
    quality = psnr(splits["vitexp"], splits["vitexp, resizer=pillow"], batch_size=batch_size, batches=batches)
    return [*rows, [f"{what}: vitexp to the exact resizer", "", f"{quality:.1f} dB", verdict(quality, GOALS["psnr"])]]


def psnr(split: Split, exact: Split, *, batch_size: int, batches: int) -> float:
    """Decibels between the same crops of two splits, over all their pixels."""
    positions = islice(train_positions(len(split), batch_size=batch_size, seed=0), batches)
    errors = [
        np.square(split.fetch(at)[0].astype(np.float64) - exact.fetch(at)[0].astype(np.float64)).mean()
        for at in positions
    ]
    mean = sum(errors) / len(errors)
    return 10 * math.log10(255**2 / mean) if mean else math.inf


def compared(what: str, times: Times, pictures: dict[str, int], goals: dict[str, float]) -> list[list[str]]:
    """A row a contender; turns may hold different numbers of pictures."""
    each = {name: [seconds / pictures[name] for seconds in turns] for name, turns in times.items()}
    rows = []
    for name in each:
        ours = name != "torchvision"
        rows.append(
            [
                f"{what}: {name}",
                f"{1 / statistics.median(each[name]):,.0f}",
                spread(each, ours=name, theirs="torchvision") if ours else "",
                verdict(ratio(each, ours=name, theirs="torchvision"), goals[name]) if name in goals else "",
            ]
        )
    return rows


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--parquet", help="a table of small pictures, such as CIFAR-10's; else made-up ones")
    arguments.add_argument("--folder", type=Path, help="a folder of JPEGs; else 200 made-up ones")
    arguments = arguments.parse_args()
    clock = start(arguments)
    rounds = arguments.rounds or (2 if arguments.quick else 15)
    rows = measure_small(arguments, clock, rounds)
    if arguments.folder is not None:
        rows += measure_folder(arguments.folder, arguments, clock, rounds)
    else:
        with tempfile.TemporaryDirectory() as made:
            photographs(Path(made), 20 if arguments.quick else 200)
            rows += measure_folder(Path(made), arguments, clock, rounds)
    table(["input", "pictures/s", "x torchvision", "goal"], rows)


if __name__ == "__main__":
    main()
