"""Data sets through Hugging Face's `datasets`, from folders made here: no network."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.pictures import CLASSES, library, picture, write_folder, write_parquet
from vitexp.data.images import decode
from vitexp.data.sources.hf import hf
from vitexp.errors import BadImage, UserError


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    package = pytest.importorskip("datasets", reason="pip install 'vitexp[hf]'")
    package.disable_progress_bars()
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(package.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache" / "downloads"))
    return package


def table_set(root: Path, **splits: dict[str, bytes]) -> str:
    root.mkdir(exist_ok=True)
    for name, files in splits.items():
        write_parquet(root / f"{name}-00000-of-00001.parquet", files)
    return str(root)


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'vitexp\[hf\]'") as caught:
        hf("some/set")
    assert len(str(caught.value).splitlines()) == 1


def test_tables_give_official_classes_names_and_pixels(datasets: object, tmp_path: Path) -> None:
    source = hf(table_set(tmp_path / "set", train=library(4), validation=library(2, first=50), test=library(1)))
    assert source.classes == CLASSES
    assert list(source.train.names) == list(library(4))  # in the order of the rows
    assert source.train.labels.tolist() == [CLASSES.index(name.split("/")[0]) for name in library(4)]
    assert len(source.val) == 6  # validation before test
    for split, files in ((source.train, library(4)), (source.val, library(2, first=50))):
        for i, data in enumerate(files.values()):
            assert split.sizes[i] == len(data)
            assert np.array_equal(split.read(i), decode(data, "a"))
    assert source.fingerprint() == hf(str(tmp_path / "set")).fingerprint()


def test_splits_can_be_named_sliced_and_held_out(datasets: object, tmp_path: Path) -> None:
    root = table_set(tmp_path / "set", train=library(10), test=library(2, first=50))
    assert len(hf(root, train_split="train[:20]", val_split="train[20:]").val) == 10
    only = table_set(tmp_path / "only", train=library(10))
    assert (len(hf(only).train), len(hf(only).val)) == (27, 3)
    with pytest.raises(UserError, match=r"data\.val_split=tset: .* no such split; it has: .* Did you mean 'test'"):
        hf(root, val_split="tset")
    with pytest.raises(UserError, match=r"data\.train_split=train\[:x\]"):
        hf(root, train_split="train[:x]")


def test_a_folder_of_files_is_read_from_its_files(datasets: object, tmp_path: Path) -> None:
    write_folder(tmp_path / "set" / "train", library(3))
    write_folder(tmp_path / "set" / "test", library(2, first=50))
    source = hf(str(tmp_path / "set"))
    assert source.classes == CLASSES
    assert source.train.names[0] == "00000000"  # where the files lie is no name: it differs between machines
    shown = {source.train.read(i).tobytes() for i in range(9)}
    assert shown == {decode(data, "a").tobytes() for data in library(3).values()}
    assert sorted(source.train.sizes.tolist()) == sorted(len(data) for data in library(3).values())


def test_a_picture_that_cannot_be_read_is_named(datasets: object, tmp_path: Path) -> None:
    files = library(3)
    files["cat/0.jpg"] = picture(0)[:200]
    source = hf(table_set(tmp_path / "set", train=files), val_fraction=0.0)
    row = list(files).index("cat/0.jpg")
    with pytest.raises(BadImage, match=rf"row {row} \(cat/0\.jpg\): cut short or damaged"):
        source.train.read(row)


def test_of_several_label_columns_one_must_be_named(datasets: object, tmp_path: Path) -> None:
    package = pytest.importorskip("datasets")
    features = package.Features(
        {
            "img": package.Image(),
            "fine": package.ClassLabel(names=["a", "b"]),
            "coarse": package.ClassLabel(names=["c"]),
            "word": package.Value("string"),
            "number": package.Value("int64"),
            "share": package.Value("float64"),
        }
    )
    rows = {
        "img": [{"bytes": picture(k), "path": None} for k in range(4)], "fine": [0, 1, 1, 0], "coarse": [0] * 4,
        "word": ["y", "x", "y", "x"], "number": [2, 0, 0, 1], "share": [0.5] * 4,
    }  # fmt: skip
    (tmp_path / "set").mkdir()
    package.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "set" / "train.parquet"))
    root = str(tmp_path / "set")
    with pytest.raises(UserError, match=r"several columns are ClassLabel: fine, coarse; data\.label_column names"):
        hf(root)
    for column, classes, labels in (
        ("fine", ["a", "b"], [0, 1, 1, 0]), ("word", ["x", "y"], [1, 0, 1, 0]),
        ("number", ["0", "1", "2"], [2, 0, 0, 1]),
    ):  # fmt: skip
        source = hf(root, label_column=column, val_fraction=0.0)
        assert (source.classes, source.train.labels.tolist()) == (classes, labels)
    with pytest.raises(UserError, match=r"share.*is double; a label is a ClassLabel, a whole number or a string"):
        hf(root, label_column="share")
    with pytest.raises(UserError, match=r"data\.label_column=wrd: .* Did you mean 'word'"):
        hf(root, label_column="wrd")
    with pytest.raises(UserError, match=r"data\.image_column=word: .*not as Image"):
        hf(root, image_column="word", label_column="fine")


def test_a_validation_split_of_other_classes_is_refused(datasets: object, tmp_path: Path) -> None:
    package = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for name, words in (("train", ["x", "y"]), ("test", ["x", "z"])):
        rows = {"image": [{"bytes": picture(k), "path": None} for k in range(2)], "label": words}
        features = package.Features({"image": package.Image(), "label": package.Value("string")})
        package.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "set" / f"{name}.parquet"))
    with pytest.raises(UserError, match=r"different classes\nonly in test: z\nonly in train: y"):
        hf(str(tmp_path / "set"))


def test_a_set_without_pictures_is_refused(datasets: object, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "set" / "train.parquet")
    with pytest.raises(UserError, match=r"no column of pictures; it has: text"):
        hf(str(tmp_path / "set"))


def test_an_unknown_name_offline_is_one_clear_error(datasets: object, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"data\.name=nobody/nothing: cannot be loaded .*\n.*HF_HOME") as caught:
        hf("nobody/nothing")
    assert len(str(caught.value).splitlines()) <= 2
