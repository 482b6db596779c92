"""A store of label maps for CIFAR's pictures, and what token-label targets cost beside a training step.

The store is made as `python -m vitexp label` makes it, by a ResNet-18 that sees the pictures at 64 px; what it has
learned changes no time. Targets: the maps of 128 pictures read from a store and made into the labels of crops and of
their 64 tokens, as a share of ViT-Ti/4's bf16 step at 32 px (forward, backward, clip, fused AdamW). The maps of the
official shape are made up: those of one picture much alike, as a teacher's are, and as unlike as chance makes them,
which is the worst case. How many classes a map names is what decides.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measuring import Clock, classification_step, parser, start, table, take_turns

from vitexp.data.images import ArrayImages, Images, Subset
from vitexp.data.label_store import LabelStore, LabelWriter, identities, open_store
from vitexp.data.sources.parquet import parquet
from vitexp.data.token_labels import token_targets
from vitexp.labeling import Maps, check_dense, head_of, score, top_scores
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.vit import VisionTransformer
from vitexp.teachers import Teacher

SIDE, PATCH, BATCH, KEPT = 32, 4, 128, 5
SEEN = 64  # pixels that the teacher sees a side
OFFICIAL_GRID, OFFICIAL_CLASSES, OFFICIAL_PICTURES = (18, 18), 1000, 1024
GOAL = 0.10  # of a step


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--pictures", type=int, default=50_000, help="to make a store of")
    made.add_argument("--parquet", help="a table of small pictures, such as CIFAR-10's; else made-up ones")
    arguments = made.parse_args()
    clock = start(arguments)
    rounds = arguments.rounds or (2 if arguments.quick else 15)
    with tempfile.TemporaryDirectory() as place:
        images = pictures(arguments, 128 if arguments.quick else arguments.pictures)
        store, seconds = labeled(Path(place, "maps"), images, clock)
        stores = {
            "CIFAR": store,
            "the official shape": made_up(Path(place, "alike"), common=3.0, own=1.0),
            "the official shape, worst case": made_up(Path(place, "unlike"), common=0.0, own=3.0),
        }
        rows = [store_row(store, Path(place, "maps"), len(images) / seconds)]
        rows += target_rows(stores, rounds=rounds, clock=clock)
    table(["label maps", "MB or ms", "pictures/s", "share of a step", f"goal < {GOAL:.0%}"], rows)


def pictures(arguments: argparse.Namespace, number: int) -> Images:
    if arguments.parquet is not None:
        read: Images = parquet(train=arguments.parquet, val_fraction=0.0).train
        return Subset(read, np.arange(min(len(read), number)))
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (number, SIDE, SIDE, 3), dtype=np.uint8)
    return ArrayImages(pixels, draw.integers(0, 10, number), [str(i) for i in range(number)])


# ---- stores ------------------------------------------------------------------------------------------------------
def labeled(folder: Path, images: Images, clock: Clock) -> tuple[LabelStore, float]:
    """A store of ten classes, and the seconds it took to make."""
    torch.manual_seed(0)
    teacher = Teacher(
        model=TimmBackbone("resnet18", image_size=SEEN, num_classes=10).eval(),
        columns=range(10),
        image_size=(SEEN, SEEN),
        mean=[0.5],
        std=[0.5],
        channels=3,
        interpolation="bicubic",
        resizer="torch",
        facts={"name": "resnet18", "weights_sha256": ""},
    )
    grid = check_dense(teacher.model, (SEEN, SEEN), channels=3)
    head = head_of(teacher, classes=[str(i) for i in range(10)], k=KEPT, grid=grid)
    began = clock()
    # Without workers: the processor's clock does not see what other processes do.
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    write(folder, head, images, score(teacher, images, k=KEPT, batch_size=64, autocast=autocast, workers=0))
    return open_store(folder), clock() - began


def made_up(folder: Path, *, common: float, own: float) -> LabelStore:
    """Maps of the official shape: logits with a deviation that a picture's places have in common, and their own."""
    names = [str(i) for i in range(OFFICIAL_PICTURES)]
    images = ArrayImages(
        np.zeros((OFFICIAL_PICTURES, 1, 1, 3), np.uint8), np.arange(OFFICIAL_PICTURES) % OFFICIAL_CLASSES, names
    )
    head = {
        "teacher": {"name": "made up"},
        "image_size": None,
        "preprocessing": None,
        "crop": "center",
        "k": KEPT,
        "classes": [str(i) for i in range(OFFICIAL_CLASSES)],
        "grid": list(OFFICIAL_GRID),
        "missing": {"logit": 0.0, "taken_off": "nothing"},
    }
    generator = torch.Generator().manual_seed(0)

    def maps() -> Iterator[Maps]:
        for _ in range(0, OFFICIAL_PICTURES, 64):
            scores = common * torch.randn(64, 1, 1, OFFICIAL_CLASSES, generator=generator)
            scores = scores + own * torch.randn(64, *OFFICIAL_GRID, OFFICIAL_CLASSES, generator=generator)
            values, numbers = top_scores(scores, KEPT)
            yield values.numpy(), numbers.numpy()

    write(folder, head, images, maps())
    return open_store(folder)


def write(folder: Path, head: dict, images: Images, maps: Iterator[Maps]) -> None:
    lines, at = identities(images), 0
    with LabelWriter(folder, head) as writer:
        for values, numbers in maps:
            writer.append(lines[at : at + len(values)], values, numbers)
            at += len(values)
        writer.finish()


def store_row(store: LabelStore, folder: Path, rate: float) -> list[str]:
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return [f"store of {len(store.names):,} pictures, {shape(store)}", f"{size:.1f}", f"{rate:,.0f}", "", ""]


# ---- targets -----------------------------------------------------------------------------------------------------
def target_rows(stores: dict[str, LabelStore], *, rounds: int, clock: Clock) -> list[list[str]]:
    contenders: dict[str, Callable[[], object]] = {"step": training_step()}
    contenders |= {name: targets_of(store) for name, store in stores.items()}
    times = take_turns(contenders, rounds=rounds, clock=clock)
    rows = [
        [f"a step of ViT-Ti/4, {BATCH} pictures", *cells(statistics.median(times["step"])), "", ""],
    ]
    for name, store in stores.items():
        shares = [ours / step for ours, step in zip(times[name], times["step"], strict=True)]
        share = statistics.median(shares)
        rows.append(
            [
                f"targets from maps of {name}, {shape(store)}, {named(store):.0f} a map",
                *cells(statistics.median(times[name])),
                f"{share:.1%}",
                "reached" if share < GOAL else "missed",
            ]
        )
    return rows


def cells(seconds: float) -> list[str]:
    return [f"{1000 * seconds:.1f}", f"{BATCH / seconds:,.0f}"]


def shape(store: LabelStore) -> str:
    grid = "x".join(map(str, store.head["grid"]))
    return f"{store.head['k']} of {len(store.head['classes']):,} classes at {grid} places"


def named(store: LabelStore) -> float:
    """Classes that a picture's map names, on average of some."""
    return statistics.mean(len(np.unique(numbers)) for numbers in store.numbers[:100])


def targets_of(store: LabelStore) -> Callable[[], object]:
    """Rows anywhere in the store, as an epoch's order takes them, and random crops of half the picture's sides."""
    draw = np.random.default_rng(0)
    tokens = (SIDE // PATCH, SIDE // PATCH)

    def make() -> object:
        rows = draw.integers(0, len(store.names), BATCH)
        corner = draw.random((BATCH, 2), np.float32) / 2
        boxes = torch.from_numpy(np.concatenate([corner, np.full_like(corner, 0.5)], axis=1))
        return token_targets(
            torch.from_numpy(store.values[rows]),
            torch.from_numpy(store.numbers[rows]),
            boxes,
            torch.from_numpy(draw.random(BATCH) < 0.5),
            torch.from_numpy(store.labels[rows]),
            num_classes=len(store.head["classes"]),
            grid=tokens,
            smoothing=0.1,
        )

    return make


def training_step() -> Callable[[], None]:
    torch.manual_seed(0)
    images, classes = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(10, (BATCH,))
    model = VisionTransformer(image_size=SIDE, patch_size=PATCH, embed_dim=192, depth=12, num_heads=3, num_classes=10)
    return classification_step(model, images, classes)


if __name__ == "__main__":
    main()
