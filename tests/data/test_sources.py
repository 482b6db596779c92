"""Where pictures come from: digits, folders, Parquet, made up."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.pictures import CLASSES, library, picture, write_folder, write_parquet
from vitexp.data.images import Source, decode, keep_classes, keep_share, stratified_split
from vitexp.data.sources.digits import digits
from vitexp.data.sources.fake import fake
from vitexp.data.sources.folder import folder
from vitexp.data.sources.parquet import parquet
from vitexp.errors import BadImage, UserError


def same_pictures(a: Source, b: Source) -> None:
    for split_a, split_b in ((a.train, b.train), (a.val, b.val)):
        assert list(split_a.names) == list(split_b.names)
        assert np.array_equal(split_a.labels, split_b.labels)
        assert np.array_equal(split_a.sizes, split_b.sizes)
        assert all(np.array_equal(split_a.read(i), split_b.read(i)) for i in range(len(split_a)))


# ---- digits ----------------------------------------------------------------------------------------------------------


def test_the_digits_split_never_changes() -> None:
    source = digits()
    assert (len(source.train), len(source.val)) == (1438, 359)
    assert source.fingerprint() == "3f3bf4f32409"
    counts = source.profile()
    assert sum(counts["val"].values()) == 359
    assert all(35 <= counts["val"][str(d)] <= 37 for d in range(10))
    assert not set(source.train.names) & set(source.val.names)


def test_digits_use_the_whole_range_and_as_many_channels_as_asked() -> None:
    for channels in (1, 3):
        pixels = np.stack([digits(channels=channels).train.read(i) for i in range(20)])
        assert pixels.shape == (20, 8, 8, channels)
        assert (pixels.min(), pixels.max()) == (0, 255)
    with pytest.raises(UserError, match=r"data\.channels=4"):
        digits(channels=4)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_train_and_val_folders_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", library(12))
    write_folder(tmp_path / "val", library(3))
    source = folder(str(tmp_path))
    assert source.classes == CLASSES
    assert list(source.train.names) == sorted(library(12))
    assert list(source.train.names)[:4] == ["bird/0.jpg", "bird/1.jpg", "bird/10.jpg", "bird/11.jpg"]
    assert source.train.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert np.array_equal(source.val.read(4), decode(picture(101), "a"))


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_the_usual_names_of_a_validation_folder_are_known(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "train", library(3))
    write_folder(tmp_path / name, library(1))
    assert len(folder(str(tmp_path)).val) == 3


def test_of_two_validation_folders_the_unused_one_is_said(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        write_folder(tmp_path / name, library(2))
    assert any("test/ is not used" in notice for notice in folder(str(tmp_path)).notices)


def test_without_a_val_folder_a_share_of_each_class_is_held_out_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path, library(10))
    source = folder(str(tmp_path), val_fraction=0.2)
    assert source.profile()["val"] == {"bird": 2, "cat": 2, "dog": 2}
    assert not set(source.train.names) & set(source.val.names)
    assert list(folder(str(tmp_path), val_fraction=0.2, split_seed=1).val.names) != list(source.val.names)
    write_folder(
        tmp_path, library(2, first=50)
    )  # more pictures: those in val before that stay near the front stay in val
    before, after = set(source.val.names), set(folder(str(tmp_path), val_fraction=0.2).val.names)
    assert len(before & after) >= len(before) - 2
    assert folder(str(tmp_path), val_fraction=0).val is None


def test_a_class_with_two_pictures_or_more_is_on_both_sides() -> None:
    source = fake(num_train=23, num_classes=10)  # three classes of 3, seven of 2
    train, val = stratified_split(source.train, val_fraction=0.1, split_seed=0)
    assert sorted(np.concatenate([train, val]).tolist()) == list(range(23))
    assert set(source.train.labels[train]) == set(source.train.labels[val]) == set(range(10))


def test_a_class_called_train_among_others_is_a_class(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        write_folder(tmp_path, {f"{name}/{n}.jpg": picture(n) for n in range(4)})
    assert folder(str(tmp_path)).classes == ["bus", "train"]


def test_nested_pictures_count_for_their_class(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat/a.jpg": picture(1), "cat/2024/may/b.jpg": picture(2), "dog/c.jpg": picture(3)})
    source = folder(str(tmp_path), val_fraction=0)
    assert list(source.train.names) == ["cat/2024/may/b.jpg", "cat/a.jpg", "dog/c.jpg"]
    assert source.train.labels.tolist() == [0, 0, 1]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{n}.JPEG": picture(n) for n in range(10)})
    source = folder(str(tmp_path))
    assert source.classes == []
    assert set(source.train.labels.tolist()) == {-1}
    assert (len(source.train), len(source.val)) == (9, 1)
    with pytest.raises(UserError, match="9 of 9 pictures of train have no label"):
        source.require_labels()


def test_a_class_missing_or_extra_in_val_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", library(2))
    write_folder(tmp_path / "val", {name.replace("dog", "fox"): data for name, data in library(2).items()})
    with pytest.raises(UserError) as caught:
        folder(str(tmp_path))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[1].endswith("val: fox")
    assert lines[2].endswith("train: dog")


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, library(2) | {"cow/readme.txt": b"soon"})
    with pytest.raises(UserError, match=r"cow: a class folder without a picture \(\.txt 1\)"):
        folder(str(tmp_path))


def test_a_folder_without_pictures_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"holds no pictures \(\.txt 1\)"):
        folder(str(tmp_path))


def test_stray_files_are_left_out_counted_and_said(tmp_path: Path) -> None:
    write_folder(
        tmp_path,
        library(2)
        | {
            "cat/Thumbs.db": b"",
            "dog/notes.txt": b"",
            "dog/more.txt": b"",
            "cat/._0.jpg": b"junk",
            "top.jpg": picture(1),
        }
        | {".ipynb_checkpoints/x.jpg": b"", "__MACOSX/cat/0.jpg": b""},
    )
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")  # opening it would wait for ever
    source = folder(str(tmp_path), val_fraction=0)
    assert source.classes == CLASSES
    assert len(source.train) == 6
    said = "\n".join(source.notices)
    assert ".txt 2" in said
    assert "1 pictures are in no class folder and left out (top.jpg)" in said


def test_links_are_followed_and_broken_or_circular_ones_named(tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere", library(2))
    root = tmp_path / "root"
    root.mkdir()
    (root / "kitten").symlink_to(elsewhere / "cat")
    assert list(folder(str(root), val_fraction=0).train.names) == ["kitten/0.jpg", "kitten/1.jpg"]
    (elsewhere / "cat" / "9.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match=r"9\.jpg: a broken symbolic link"):
        folder(str(root))
    (elsewhere / "cat" / "9.jpg").unlink()
    (elsewhere / "cat" / "again").symlink_to(elsewhere / "cat")
    with pytest.raises(UserError, match="again: a symbolic link to a folder that it lies in"):
        folder(str(root))
    (elsewhere / "cat" / "again").unlink()
    (elsewhere / "cat" / "self").symlink_to(elsewhere / "cat" / "self")
    with pytest.raises(UserError, match="self: a broken symbolic link"):
        folder(str(root))


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, library(2))
    scandir = os.scandir

    def refusing(path: str) -> object:  # chmod would not stop root
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="cat: the folder cannot be listed: Permission denied"):
        folder(str(tmp_path))


def test_odd_file_names_are_read_and_shown_on_one_line(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat/line\nbreak.jpg": picture(1), "cat/ä ö.jpg": picture(2)})
    with open(os.path.join(os.fsencode(tmp_path), b"cat", b"caf\xe9.jpg"), "wb") as file:
        file.write(b"broken")
    source = folder(str(tmp_path), val_fraction=0)
    names = list(source.train.names)
    assert names == ["cat/caf\\udce9.jpg", "cat/line\\nbreak.jpg", "cat/ä ö.jpg"]
    assert source.train.read(names.index("cat/line\\nbreak.jpg")).shape == (12, 10, 3)
    with pytest.raises(BadImage) as caught:
        source.train.read(names.index("cat/caf\\udce9.jpg"))
    assert str(caught.value).encode()  # can be printed
    assert str(caught.value).startswith(str(tmp_path))


def test_a_missing_root_names_the_nearest_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    with pytest.raises(
        UserError, match=r"data\.root=.*/flower does not exist: no 'flower' in .* Did you mean 'flowers'"
    ):
        folder(str(tmp_path / "flower"))
    with pytest.raises(UserError, match="no 'mars' in"):
        folder(str(tmp_path / "mars" / "rover" / "pictures"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        folder(str(tmp_path / "file"))


def test_val_without_train_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", library(2))
    with pytest.raises(UserError, match=r"has val/ but no train/"):
        folder(str(tmp_path))


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def test_parquet_and_folder_of_the_same_pictures_are_the_same_source(tmp_path: Path) -> None:
    write_folder(tmp_path / "f" / "train", library(12))
    write_folder(tmp_path / "f" / "val", library(3))
    train, val = (
        write_parquet(tmp_path / "train.parquet", library(12)),
        write_parquet(tmp_path / "val.parquet", library(3)),
    )
    ours, theirs = folder(str(tmp_path / "f")), parquet(str(train), str(val))
    same_pictures(ours, theirs)
    assert ours.fingerprint() == theirs.fingerprint()
    assert ours.classes == theirs.classes


def test_a_split_taken_from_train_is_the_same_from_parquet_and_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", library(12))
    write_parquet(tmp_path / "all.parquet", library(12))
    same_pictures(folder(str(tmp_path / "f")), parquet(str(tmp_path / "all.parquet")))


def test_several_files_a_pattern_and_a_folder_are_one_table(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    rows = list(library(4).items())
    parts = [dict(rows[:5]), dict(rows[5:])]
    files = [str(write_parquet(tmp_path / "shards" / f"train-{n}.parquet", part)) for n, part in enumerate(parts)]
    whole = parquet(str(write_parquet(tmp_path / "whole.parquet", library(4))))
    for given in (files, str(tmp_path / "shards" / "train-*.parquet"), str(tmp_path / "shards")):
        same_pictures(parquet(given), whole)


def test_validation_labels_are_mapped_through_the_names_of_train(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train.parquet", library(2))
    val = write_parquet(tmp_path / "val.parquet", library(2), classes=CLASSES[::-1])
    source = parquet(str(train), str(val))
    assert source.classes == CLASSES
    assert [CLASSES[label] for label in source.val.labels] == [name.split("/")[0] for name in source.val.names]
    other = write_parquet(tmp_path / "other.parquet", library(2), classes=[*CLASSES, "eel"])
    with pytest.raises(UserError, match=r"only in data\.val: eel"):
        parquet(str(train), str(other))


def test_rows_without_paths_keep_their_order_and_plain_bytes_are_read(tmp_path: Path) -> None:
    data = list(library(2).values())
    pq.write_table(pa.table({"image": data, "label": [1, 0, 2, 0, 1, 2]}), tmp_path / "a.parquet")
    source = parquet(str(tmp_path / "a.parquet"), val_fraction=0)
    assert source.train.labels.tolist() == [1, 0, 2, 0, 1, 2]
    assert source.classes == ["0", "1", "2"]
    assert np.array_equal(source.train.read(3), decode(data[3], "a"))


def test_words_as_labels_become_sorted_classes(tmp_path: Path) -> None:
    data = list(library(1).values())
    for column in (pa.array(["cat", "ant", "cat"]), pa.array(["cat", "ant", "cat"]).dictionary_encode()):
        pq.write_table(pa.table({"image": data, "label": column}), tmp_path / "a.parquet")
        source = parquet(str(tmp_path / "a.parquet"), val_fraction=0)
        assert source.classes == ["ant", "cat"]
        assert source.train.labels.tolist() == [1, 0, 1]


def test_a_table_without_labels_is_read_and_it_is_said(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": list(library(2).values()), "fine": [0] * 6}), tmp_path / "a.parquet")
    source = parquet(str(tmp_path / "a.parquet"))
    assert source.classes == []
    assert "no column 'label' (there are: image, fine)" in source.notices[0]


def table_with(**columns: object) -> pa.Table:
    return pa.table({"image": list(library(1).values()), "label": [0, 1, 2]} | columns)


BROKEN_TABLES = {
    "not Parquet": (b"PAR1 no", {}, r"data\.train=.*a\.parquet: not a Parquet file"),
    "empty file": (b"", {}, "not a Parquet file"),
    "no image column": (table_with(), {"image_column": "img"}, "no column 'img'; it has: image, label.*mean 'image'"),
    "no label column": (table_with(), {"label_column": "fine"}, "no column 'fine'; it has: image, label"),
    "image of numbers": (table_with(image=[1, 2, 3]), {}, "column 'image' is int64"),
    "struct without bytes": (table_with(image=[{"path": "x"}] * 3), {}, "has the fields path"),
    "float label": (table_with(label=[0.0, float("nan"), 1.0]), {}, "row 0: column 'label' is double"),
    "null label": (table_with(label=[0, None, 1]), {}, r"row 1: column 'label' is empty \(1 rows in all\)"),
    "label below -1": (table_with(label=[0, -2, 1]), {}, "row 1: label=-2, but the 2 classes are numbered 0 to 1"),
    "no rows": (table_with().slice(0, 0), {}, "holds no rows"),
}


@pytest.mark.parametrize("case", BROKEN_TABLES)
def test_what_is_wrong_with_a_table_is_named(case: str, tmp_path: Path) -> None:
    content, options, message = BROKEN_TABLES[case]
    path = tmp_path / "a.parquet"
    path.write_bytes(content) if isinstance(content, bytes) else pq.write_table(content, path)
    with pytest.raises(UserError, match=message) as caught:
        parquet(str(path), **options)
    assert len(str(caught.value).splitlines()) <= 3
    assert "a.parquet" in str(caught.value)


def test_labels_beyond_the_class_names_and_doubled_names_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", library(1), labels=[0, 1, 3])
    with pytest.raises(UserError, match="row 2: label=3, but the 3 classes are numbered 0 to 2"):
        parquet(str(path))
    data = pa.array(list(library(1).values()), pa.binary())
    pq.write_table(pa.table({"image": data, "label": [0, 1, 10**9]}), tmp_path / "far.parquet")
    with pytest.raises(UserError, match=r"far\.parquet: row 2: label=1000000000, but there are only 3 pictures"):
        parquet(str(tmp_path / "far.parquet"))
    path = write_parquet(tmp_path / "a.parquet", library(1), classes=[*CLASSES, "cat"])
    with pytest.raises(UserError, match="two classes of 'label' are called 'cat'"):
        parquet(str(path))


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", library(1))
    with pytest.raises(UserError, match=r"data\.train=.*trian\.parquet does not exist.*Did you mean 'train\.parquet'"):
        parquet(str(tmp_path / "trian.parquet"))
    with pytest.raises(UserError, match=r"data\.val=.* does not exist"):
        parquet(str(tmp_path / "train.parquet"), str(tmp_path / "val.parquet"))
    with pytest.raises(UserError, match="no file matches"):
        parquet(str(tmp_path / "train-*.parquet"))


def test_a_bad_picture_in_a_table_names_the_file_and_row(tmp_path: Path) -> None:
    files = dict(library(2)) | {"cat/1.jpg": b"oops", "dog/0.jpg": None}
    path = write_parquet(tmp_path / "a.parquet", files)
    train = parquet(str(path), val_fraction=0).train
    names, rows = list(train.names), list(files)
    for name, reason in (("cat/1.jpg", "holds text"), ("dog/0.jpg", "holds no bytes")):
        with pytest.raises(BadImage, match=rf"a\.parquet: row {rows.index(name)} \({name}\): .*{reason}"):
            train.read(names.index(name))
    assert train.read(names.index("cat/0.jpg")).shape == (12, 10, 3)


# ---- made up, and what all share -------------------------------------------------------------------------------------


def test_fake_pictures_can_be_told_apart_by_class_and_are_never_in_both_splits() -> None:
    source = fake(num_train=200, num_val=50, num_classes=5, image_size=(8, 12))
    train = np.stack([source.train.read(i) for i in range(200)]).reshape(200, -1).astype(float)
    val = np.stack([source.val.read(i) for i in range(50)]).reshape(50, -1).astype(float)
    centres = np.stack([train[source.train.labels == k].mean(0) for k in range(5)])
    nearest = ((val[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == source.val.labels).mean() == 1
    assert len(np.unique(np.concatenate([train, val]), axis=0)) == 250
    assert source.train.read(3).shape == (8, 12, 3)


def test_the_fingerprint_sees_names_labels_sizes_and_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, library(4))
    seen = [folder(str(tmp_path)).fingerprint()]
    assert folder(str(tmp_path)).fingerprint() == seen[0]
    (tmp_path / "cat" / "0.jpg").write_bytes(picture(5) + b"more")
    seen.append(folder(str(tmp_path)).fingerprint())
    write_folder(tmp_path, {"cat/new.jpg": picture(9)})
    seen.append(folder(str(tmp_path)).fingerprint())
    (tmp_path / "cat").rename(tmp_path / "kit")
    seen.append(folder(str(tmp_path)).fingerprint())
    assert len(set(seen)) == 4


def test_a_share_of_the_training_pictures_is_the_same_of_every_class_and_nested():
    whole = digits()
    tenth, fifth = keep_share(whole, 0.1), keep_share(whole, 0.2)
    per_class = np.bincount(whole.train.labels)
    assert np.bincount(tenth.train.labels).tolist() == [round(0.1 * count) for count in per_class]
    assert set(tenth.train.names) < set(fifth.train.names) < set(whole.train.names)
    assert tenth.val is whole.val
    assert len({source.fingerprint() for source in (whole, tenth, fifth)}) == 3
    assert any(str(len(tenth.train)) in note for note in tenth.notices)
    assert keep_share(whole, 1.0) is whole
    with pytest.raises(UserError, match=r"train\.fraction=0"):
        keep_share(whole, 0)


def test_made_up_pictures_have_sides():
    assert fake(num_train=1, num_val=1, image_size=[4, 6]).train.read(0).shape == (4, 6, 3)
    for wrong in ([], [4, 4, 4], 0, [4, -1]):
        with pytest.raises(UserError, match=r"image_size=.*: expected one number or \[height, width\]"):
            fake(image_size=wrong)


def test_some_classes_alone_are_numbered_anew_in_both_splits():
    whole = digits()
    some = keep_classes(whole, ["7", "2"])
    assert some.classes == ["7", "2"]
    for kept, of in ((some.train, whole.train), (some.val, whole.val)):
        sevens = [name for name, label in zip(of.names, of.labels, strict=True) if label == 7]
        assert [n for n, label in zip(kept.names, kept.labels, strict=True) if label == 0] == sevens
        assert len(kept) == int(np.isin(of.labels, [2, 7]).sum())
        where = list(of.names).index(kept.names[5])
        np.testing.assert_array_equal(kept.read(5), of.read(where))
    assert keep_classes(whole, [7, 2]).classes == ["7", "2"]  # as the command line reads train.classes=[7,2]
    with pytest.raises(UserError, match="no class '77'"):
        keep_classes(whole, ["7", 77])
    with pytest.raises(UserError, match="two classes"):
        keep_classes(whole, ["7"])
