"""`python -m vitexp label teacher=<run | timm:<name> | weights> data=… output=<store>`: a teacher's label maps.

Of every picture the `k` best classes at each place, in a store that train.token_labels takes; `split=all` makes one a
split, in output/train and output/val. `teacher` is what run= is elsewhere: a run folder, weights it exported, or
mlflow:<run id> with `uri=`, with `weights` naming one of its files; then without data= the run's own pictures are
scored. timm:<name> takes timm's pretrained weights (`weights=<file>`: these). Any other weights file needs model=….
`image_size` shows the teacher pictures of another size than its own, for a finer map. Given again it goes on where it
was stopped, and scores only pictures that were added.

`python -m vitexp label from=<folder> data=folder data.root=… output=<store>` reads official files of maps instead, one
a picture, <class>/<name>.pt."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vitexp.config import RunConfig, compose_and_check
from vitexp.config_paths import config_groups
from vitexp.errors import UserError, nearest
from vitexp.locate import names_data, own_settings, take_uri
from vitexp.models.checks import height_width, one_of
from vitexp.run_folder import write_atomic

if TYPE_CHECKING:
    from vitexp.data.images import Images, Source
    from vitexp.labeling import Maps

Size = tuple[int, int]  # height and width in pixels

KEYS = ("teacher", "from", "output", "k", "image_size", "batch_size", "split", "weights", "uri")
USAGE = "python -m vitexp label teacher=<run, timm:<name> or weights> data=<option> output=<store>"
SPLITS = ("train", "val", "all")
KEPT = 5  # classes a place: the official number


def main(arguments: list[str], config_dir: str | None) -> int:
    from vitexp.signals import StopRequest

    uri, arguments = take_uri(arguments)
    given, overrides = parse(arguments, config_dir)
    output = Path(given["output"]).expanduser()
    with StopRequest():  # a signal ends it as an error does: what is whole is kept
        if "from" in given:
            import_official(given, overrides, output, config_dir=config_dir)
        else:
            label(given, overrides, output, uri=uri, config_dir=config_dir)
    return 0


def label(
    given: dict[str, str], overrides: list[str], output: Path, *, uri: str | None, config_dir: str | None
) -> None:
    """Scores the pictures that the settings name with the teacher that `given` names. Raises UserError."""
    from vitexp import teachers
    from vitexp.labeling import check_dense, head_of, score
    from vitexp.run import model_arguments, open_source
    from vitexp.runtime import make_accelerator

    size, batch_size = _image_size(given.get("image_size")), _whole(given, "batch_size", 64)
    name, found = given["teacher"], None
    if not name.startswith(teachers.TIMM) and not teachers.is_bare(Path(name).expanduser()):
        found = teachers.locate_teacher(name, uri=uri, weights=given.get("weights"))
    elif uri is not None:
        raise UserError(f"uri={uri}: says where teacher=mlflow:<run id> is; teacher={name} is none")
    # A teacher that learned from a share of its pictures scores all of them.
    own = None if found is None else own_settings(found, ["train.fraction=1.0", *overrides], config_dir)
    config = _settings(overrides, config_dir) if own is None else own
    source = open_source(config)
    splits = _splits(source, given.get("split", "train"), output)
    k = _kept(given.get("k"), len(source.classes))
    runtime = config.runtime
    accelerator = make_accelerator(precision=runtime.precision, device=runtime.device, threads=runtime.threads)
    try:
        if found is not None:
            teacher = teachers.exported_teacher(name, found, source.classes, size)
        elif name.startswith(teachers.TIMM):
            teacher = teachers.timm_teacher(name, source.classes, size, weights=given.get("weights"))
        else:
            if not any(text.startswith("model=") for text in overrides):
                raise UserError(
                    f"teacher={name}: weights that no run of vitexp exported; say what model they are of, "
                    "such as model=timm model.name=resnet18"
                )
            architecture = model_arguments(config, num_classes=len(source.classes))
            teacher = teachers.bare_teacher(name, config, architecture, source.classes, size)
        teacher.model.to(accelerator.device).eval()
        grid = check_dense(teacher.model, teacher.image_size, channels=teacher.channels)
        if grid == (1, 1):
            pixels = "x".join(map(str, teacher.image_size))
            print(f"a picture of {pixels} is one place to this teacher; a larger image_size= makes it more")
        head = head_of(teacher, classes=source.classes, k=k, grid=grid)
        how = {"k": k, "batch_size": batch_size, "autocast": accelerator.autocast, "workers": config.train.workers}
        for split, place in splits.items():
            fill(place, head, source.splits()[split], partial(score, teacher, **how), name=split)
    finally:
        accelerator.end_training()


def import_official(given: dict[str, str], overrides: list[str], output: Path, *, config_dir: str | None) -> None:
    """Brings official files of maps into a store as they are. Raises UserError."""
    from vitexp.labeling import official_head, official_maps, official_paths, read_official_file
    from vitexp.run import open_source

    root = Path(given["from"]).expanduser()
    if not root.is_dir():
        beside = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"from={root}: there is no such folder.{nearest(root.name, beside)}")
    source = open_source(_settings(overrides, config_dir))
    for split, place in _splits(source, given.get("split", "train"), output).items():
        images = source.splits()[split]
        official_paths(root, images.names)  # what is missing is said before anything is written
        first = official_paths(root, images.names[:1])[0]
        shape = read_official_file(first, num_classes=len(source.classes))[0].shape

        def maps(lacking: Images, like: tuple[int, ...] = shape) -> Iterator[Maps]:
            return official_maps(official_paths(root, lacking.names), classes=source.classes, like=like)

        fill(place, official_head(root, classes=source.classes, shape=shape), images, maps, name=split)


def fill(
    folder: Path, head: Mapping[str, Any], images: Images, maps: Callable[[Images], Iterator[Maps]], *, name: str
) -> None:
    """A finished store in `folder`: `maps` makes those of the pictures that it lacks. Says what it did."""
    from tqdm import tqdm

    from vitexp.data.images import Subset
    from vitexp.data.label_store import SPEED, LabelWriter, identities

    pictures = identities(images)
    with LabelWriter(folder, head) as writer:
        lacking = writer.lacking(pictures)
        had, began = writer.finished, time.monotonic()
        with tqdm(
            total=len(pictures), initial=len(pictures) - len(lacking), desc=f"labeling {name}", unit=" pictures",
            delay=2, miniters=1, mininterval=0.2 if sys.stderr.isatty() else 2,
        ) as bar:  # fmt: skip
            at = 0
            for values, numbers in maps(Subset(images, lacking)) if lacking.size else ():
                done = lacking[at : at + len(values)].tolist()
                writer.append([pictures[i] for i in done], values, numbers)
                at += len(done)
                bar.update(len(done))
        took = time.monotonic() - began
        if lacking.size:
            write_atomic(folder / SPEED, json.dumps({"pictures": len(lacking), "seconds": took}))
        writer.finish()
    size = sum(path.stat().st_size for path in folder.iterdir())
    grid, k = "x".join(map(str, head["grid"])), head["k"]
    what = f"{len(pictures):,} pictures, {k} of {len(head['classes']):,} classes at {grid} places"
    if not lacking.size and had == writer.rows:
        print(f"{name}: finished already: {what}, in {folder}")
        return
    added = f", {len(lacking):,} of them now" if len(lacking) < len(pictures) else ""
    rate = f"{len(lacking) / took:,.0f} pictures/s" if lacking.size else "nothing left to score"
    print(f"{name}: {what}{added} ({rate}, {size / 1e6:,.1f} MB), in {folder}")


# ---- what was given --------------------------------------------------------------------------------------------------


def parse(arguments: list[str], config_dir: str | None) -> tuple[dict[str, str], list[str]]:
    """What this command takes itself, and the settings. Raises UserError for what is missing, unknown or too much."""
    pairs = [text.partition("=")[::2] for text in arguments]
    given = {key: value for key, value in pairs if key in KEYS}
    known = [*KEYS, *(field.name for field in fields(RunConfig)), *config_groups(config_dir)]
    for key, _ in pairs:
        if "." not in key and key.lstrip("+~") not in known:
            raise UserError(f"{key}: no such key.{nearest(key, known)}\nlabel takes {', '.join(KEYS)}, and settings")
    for key in ("teacher", "output"):
        if not given.get(key) and not (key == "teacher" and given.get("from")):
            raise UserError(f"label: {key}= is missing\nusage: {USAGE}")
    if "from" in given:
        for key in ("teacher", "k", "image_size", "batch_size", "weights"):
            if key in given:
                raise UserError(
                    f"{key}={given[key]}: from={given['from']} takes maps as they are, no teacher makes them"
                )
    _image_size(given.get("image_size"))
    _whole(given, "batch_size", 1)
    if given.get("k") != "all":
        _whole(given, "k", 1)
    one_of("split", given.get("split", "train"), SPLITS)
    return given, [text for text, (key, _) in zip(arguments, pairs, strict=True) if key not in KEYS]


def _settings(overrides: list[str], config_dir: str | None) -> RunConfig:
    if not names_data(overrides):
        raise UserError(f"label: data= is missing\nusage: {USAGE}")
    return compose_and_check(overrides, config_dir)


def _splits(source: Source, split: str, output: Path) -> dict[str, Path]:
    """The folder of each split's store. Raises UserError."""
    from vitexp.data.label_store import HEAD

    there = source.splits()
    if not source.classes:
        raise UserError(f"data={source.name}: has no classes, so there is nothing to label places with")
    if split != "all":
        if split not in there:
            raise UserError(f"split={split}: data={source.name} has {', '.join(there)}")
        return {split: output}
    if (output / HEAD).exists():
        raise UserError(f"output={output}: is a label store itself; split=all makes one a split below a folder")
    return {key: output / key for key in there}


def _kept(text: str | None, num_classes: int) -> int:
    if text == "all":
        return num_classes
    k = _whole({"k": text} if text is not None else {}, "k", min(KEPT, num_classes))
    if k > num_classes:
        raise UserError(f"k={k}: the data has {num_classes} classes; k=all keeps every one")
    return k


def _whole(given: Mapping[str, str], key: str, default: int) -> int:
    text = given.get(key, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{key}={text}: a whole number of at least 1 is needed")
    return int(text)


def _image_size(text: str | None) -> Size | None:
    if text is None:
        return None
    try:
        return height_width("image_size", yaml.safe_load(text))
    except yaml.YAMLError:
        raise UserError(f"image_size={text}: one number or [height, width] is needed") from None
