"""A store of label maps is whole at every moment, whatever its writer's end, and gives no picture another's map."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from vitexp.data import label_store
from vitexp.data.images import ArrayImages, Subset
from vitexp.data.label_store import LabelWriter, identities, open_store
from vitexp.errors import UserError

CLASSES = ["cat", "dog", "eel"]
FILES = ("head.json", "pictures.txt", "values.f16", "classes.i32")
HEAD = {
    "teacher": {"name": "here/run", "weights_sha256": "ab"},
    "preprocessing": {"mean": [0.5], "std": [0.5], "channels": 1, "interpolation": "bicubic", "resizer": "torch"},
    "image_size": [8, 8],
    "crop": "whole",
    "k": 2,
    "classes": CLASSES,
    "grid": [2, 3],
    "missing": {"logit": 0.0, "taken_off": "mean of the dropped"},
}


def some_pictures(count: int) -> ArrayImages:
    names = [f"cat/a {i}.png" for i in range(count)]
    return ArrayImages(np.zeros((count, 2, 2, 1), np.uint8), np.arange(count) % 3, names)


def maps_of(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps that tell which picture they are of."""
    values = np.broadcast_to(numbers[:, None, None, None], (len(numbers), 2, 2, 3))
    return values.astype(np.float16), (values % 3).astype(np.int32)


def write(folder: Path, images: ArrayImages, *, batch: int = 4, head: dict = HEAD, stop_after: int = 10**9) -> None:
    with LabelWriter(folder, head) as writer:
        todo = writer.lacking(identities(images))
        for begin in range(0, len(todo), batch):
            if begin >= stop_after:
                raise UserError("stopped")
            of_batch = todo[begin : begin + batch]
            writer.append(identities(Subset(images, of_batch)), *maps_of(of_batch))
        writer.finish()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def test_each_picture_finds_its_own_map_in_any_order(tmp_path):
    images = some_pictures(10)
    write(tmp_path / "store", images)
    store = open_store(tmp_path / "store")
    shuffled = Subset(images, np.array([7, 2, 9]))
    rows = store.rows_for(shuffled, classes=CLASSES)
    values, numbers = maps_of(np.array([7, 2, 9]))
    np.testing.assert_array_equal(store.values[rows], values)
    np.testing.assert_array_equal(store.numbers[rows], numbers)
    assert store.values.dtype == np.float16
    assert store.numbers.dtype == np.int32
    assert isinstance(store.values, np.memmap)
    assert store.head["pictures"] == 10


def test_a_picture_without_a_map_or_changed_since_is_refused_by_name(tmp_path):
    write(tmp_path / "store", some_pictures(3))
    store = open_store(tmp_path / "store")
    with pytest.raises(UserError, match=r"2 of 5 pictures have no label map.*first: cat/a 3\.png\)"):
        store.rows_for(some_pictures(5), classes=CLASSES)
    moved, grown = some_pictures(3), some_pictures(3)
    moved.labels[1] = 2
    with pytest.raises(UserError, match=r"cat/a 1\.png, which was class 1, 4 bytes and is class 2, 4 bytes"):
        store.rows_for(moved, classes=CLASSES)
    grown = ArrayImages(np.zeros((3, 2, 3, 1), np.uint8), grown.labels, grown.names)
    with pytest.raises(UserError, match=r"cat/a 0\.png, which was class 0, 4 bytes and is class 0, 6 bytes"):
        store.rows_for(grown, classes=CLASSES)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["cat", "dog"], "it also has eel"),
        (["cat", "dog", "emu"], "it lacks emu; it also has eel"),
        (["dog", "cat", "eel"], "the same in another order"),
    ],
)
def test_other_classes_are_refused_by_name(tmp_path, classes, said):
    write(tmp_path / "store", some_pictures(3))
    with pytest.raises(UserError, match=said):
        open_store(tmp_path / "store").rows_for(some_pictures(3), classes=classes)


def test_a_writer_that_fails_goes_on_at_its_last_whole_row_with_the_same_bytes(tmp_path):
    images = some_pictures(11)
    write(tmp_path / "whole", images)
    for stop in (0, 4, 4):
        with pytest.raises(UserError, match="stopped"):
            write(tmp_path / "cut", images, stop_after=stop)
    with pytest.raises(UserError, match="unfinished, 8 pictures done"):
        open_store(tmp_path / "cut")
    write(tmp_path / "cut", images)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert set(content(tmp_path / "cut")) == set(FILES)


def test_killed_at_any_call_it_ends_with_the_same_bytes_and_never_loses_what_was_finished(tmp_path):
    write(tmp_path / "seven", some_pictures(7))
    write(tmp_path / "grown", some_pictures(7))
    write(tmp_path / "grown", some_pictures(11))
    wanted, place = content(tmp_path / "grown"), tmp_path / "killed"
    code = 1
    for left in range(1, 60):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(tmp_path / "seven", place)
        child = os.fork()
        if child == 0:
            _die_at(left, place)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        store = open_store(place)  # at every moment
        rows = store.rows_for(some_pictures(7), classes=CLASSES)
        np.testing.assert_array_equal(store.values[rows], maps_of(np.arange(7))[0])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        write(place, some_pictures(11))
        assert content(place) == wanted
    assert code == 0, "every call was struck once"
    assert left > 10


def _die_at(left: int, place: Path) -> None:
    """In a forked child: the writer's `left`-th call that changes a file is its last. Exit code 0 when it has less."""
    calls = 0

    def struck(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == left:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    label_store.COMMIT_S = 0.0
    os.fsync, os.replace = struck(os.fsync), struck(os.replace)
    Path.write_bytes, Path.unlink = struck(Path.write_bytes), struck(Path.unlink)
    try:
        write(place, some_pictures(11))
    except BaseException:
        os._exit(1)
    os._exit(0)


def test_added_pictures_are_appended_and_removed_ones_not_looked_up(tmp_path):
    images = some_pictures(9)
    write(tmp_path / "store", Subset(images, np.array([0, 2, 4])))
    before = content(tmp_path / "store")
    write(tmp_path / "store", Subset(images, np.array([0, 1, 4, 5])))
    store, after = open_store(tmp_path / "store"), content(tmp_path / "store")
    assert len(store.names) == 5
    for name in FILES[1:]:
        assert after[name].startswith(before[name])
    np.testing.assert_array_equal(store.rows_for(Subset(images, np.array([5, 0, 2])), classes=CLASSES), [4, 0, 1])


def test_a_changed_picture_gets_a_new_row(tmp_path):
    write(tmp_path / "store", some_pictures(3))
    changed = some_pictures(3)
    changed.labels[1] = 2
    write(tmp_path / "store", changed)
    store = open_store(tmp_path / "store")
    np.testing.assert_array_equal(store.rows_for(changed, classes=CLASSES), [0, 3, 2])
    np.testing.assert_array_equal(store.rows_for(some_pictures(3), classes=CLASSES), [0, 1, 2])


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": {"name": "there", "weights_sha256": "cd"}}, "by the teacher here/run, not by there"),
        ({"k": 3}, "with k=2, not 3"),
        ({"image_size": [16, 16]}, "with image_size="),
        ({"classes": ["cat", "dog", "emu"]}, "for other classes: it lacks emu"),
        ({"crop": "center"}, "with crop=whole, not center"),
    ],
)
def test_going_on_with_another_teacher_or_setting_is_refused_by_name(tmp_path, change, said, unfinished):
    if unfinished:
        with pytest.raises(UserError, match="stopped"):
            write(tmp_path / "store", some_pictures(8), stop_after=4)
    else:
        write(tmp_path / "store", some_pictures(8))
    before = content(tmp_path / "store")
    with pytest.raises(UserError, match=said):
        write(tmp_path / "store", some_pictures(9), head=HEAD | change)
    assert content(tmp_path / "store") == before


def test_the_same_teacher_elsewhere_is_the_same_teacher(tmp_path):
    write(tmp_path / "store", some_pictures(3))
    print_before = open_store(tmp_path / "store").fingerprint()
    write(tmp_path / "store", some_pictures(3), head=HEAD | {"teacher": {"name": "moved", "weights_sha256": "ab"}})
    assert open_store(tmp_path / "store").fingerprint() == print_before
    write(tmp_path / "other", some_pictures(3), head=HEAD | {"teacher": {"name": "here/run", "weights_sha256": "cd"}})
    assert open_store(tmp_path / "other").fingerprint() != print_before
    write(tmp_path / "store", some_pictures(4))
    assert open_store(tmp_path / "store").fingerprint() != print_before


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds photo\.jpg and no label store"):
        write(tmp_path, some_pictures(3))


def test_two_writers_do_not_write_at_once(tmp_path):
    with LabelWriter(tmp_path / "store", HEAD), pytest.raises(UserError, match="in use by process"):
        write(tmp_path / "store", some_pictures(3))


def test_what_is_missing_or_damaged_is_said(tmp_path):
    store = tmp_path / "maps" / "train"
    write(store, some_pictures(3))
    with pytest.raises(UserError, match=r"there is no such label store\. Did you mean 'train'"):
        open_store(tmp_path / "maps" / "trian")
    with pytest.raises(UserError, match=r"is no label store.*there are train in it"):
        open_store(tmp_path / "maps")
    for name, damage in (("values.f16", b"x"), ("classes.i32", b""), ("pictures.txt", b"4 0 cat/a 0.png\n")):
        whole = (store / name).read_bytes()
        (store / name).write_bytes(damage)
        with pytest.raises(UserError, match=f"{name}: the label store is damaged"):
            open_store(store)
        (store / name).write_bytes(whole)
    head = json.loads((store / "head.json").read_text())
    for changed, said in ((head | {"format": 9}, "format 9"), (head | {"k": "2"}, "'k'"), ([], "'format'")):
        (store / "head.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=said):
            open_store(store)
