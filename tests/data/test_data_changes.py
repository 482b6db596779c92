"""A run that goes on says when its pictures are no longer those it started with."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.pictures import library, picture, write_folder
from vitexp.config import compose_and_check
from vitexp.data.images import changes
from vitexp.data.sources.folder import folder
from vitexp.train import train


def test_added_gone_and_changed_pictures_are_counted_for_each_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", library(5))
    write_folder(tmp_path / "val", library(2))
    before = folder(str(tmp_path)).digests()
    assert {key: len(value) for key, value in before.items()} == {"train": 15, "val": 6}
    assert changes(before, folder(str(tmp_path)).digests()) == ""

    (tmp_path / "train/cat/0.jpg").unlink()
    write_folder(tmp_path / "train", {"dog/new.jpg": picture(900), "dog/newer.jpg": picture(901)})
    assert changes(before, folder(str(tmp_path)).digests()) == "train: 2 added, 1 gone"
    with (tmp_path / "val/dog/1.jpg").open("ab") as grown:
        grown.write(b"more")
    assert changes(before, folder(str(tmp_path)).digests()).endswith("; val: 1 added, 1 gone")
    os.replace(tmp_path / "val/cat/0.jpg", tmp_path / "val/dog/9.jpg")
    assert changes(before, folder(str(tmp_path)).digests()).endswith("; val: 2 added, 2 gone")


def test_a_split_that_came_or_went_is_counted_whole() -> None:
    some, none = np.arange(3), np.empty(0, np.int64)
    assert changes({"train": some}, {"train": some, "val": some}) == "val: 3 added, 0 gone"
    assert changes({"train": some, "val": some}, {"train": some}) == "val: 0 added, 3 gone"
    assert changes({"train": none}, {"train": none}) == ""


def test_a_resumed_run_says_what_changed(workdir: Path) -> None:
    write_folder(workdir / "pictures/train", library(8))
    write_folder(workdir / "pictures/val", library(2))
    arguments = [
        "model=vit_debug", "data=folder", "data.root=pictures", "tracking=none", "runtime.device=cpu", "output_dir=run",
        "train.batch_size=8", "train.save_every=1", "train.workers=0", "data.cache=none",
    ]  # fmt: skip
    train(compose_and_check([*arguments, "train.epochs=1"]))
    train(compose_and_check([*arguments, "train.epochs=2", "allow_changes=true"]))
    assert "the data has changed" not in Path("run/train.log").read_text()

    (workdir / "pictures/train/cat/0.jpg").unlink()
    out = io.BytesIO()
    Image.new("RGB", (12, 12)).save(out, "JPEG")
    write_folder(workdir / "pictures/train", {"dog/new.jpg": out.getvalue(), "dog/newer.jpg": out.getvalue()})
    train(compose_and_check([*arguments, "train.epochs=3", "allow_changes=true"]))
    assert (
        "the data has changed since this run's checkpoint (train: 2 added, 1 gone)" in Path("run/train.log").read_text()
    )
