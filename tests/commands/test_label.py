"""A person makes a store of label maps: from a run, from weights, from official files; stopped, given again, grown."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitexp import load_run, reports
from vitexp.commands.label import main
from vitexp.config import compose_and_check
from vitexp.data import label_store
from vitexp.data.batch_transforms import normalise
from vitexp.data.label_store import SPEED, LabelStore, open_store
from vitexp.data.sources.folder import folder
from vitexp.errors import UserError
from vitexp.run import open_source
from vitexp.train import train

COMMON = [
    "train.max_steps=1", "train.batch_size=16", "runtime.device=cpu", "runtime.precision=fp32", "tracking=none",
    "evaluators=none", "train.workers=0",
]  # fmt: skip
FAKE = ["data=fake", "data.num_train=40", "data.num_val=12", "data.num_classes=6"]
NET = ["model=timm", "model.name=test_resnet", "model.image_size=64"]
FILES = ("head.json", "pictures.txt", "values.f16", "classes.i32")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with two teachers of fake pictures: net, a timm network, and vit."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patched:  # pictures would take longer than the training
        patched.setattr(reports, "draw_pictures", lambda run, folder: None)
        patched.setattr(reports.plots, "curves", lambda rows, path: None)
        train(compose_and_check([*NET, *FAKE, *COMMON, f"output_dir={place}/net"]))
        train(compose_and_check(["model=vit_debug", *FAKE, *COMMON, f"output_dir={place}/vit"]))
    return place


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ten oblong pictures of two classes, as files."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(10):
        file = root / ("class_0" if number % 2 else "class_1") / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + number, 60, 3), dtype=np.uint8)).save(file)
    return root


def of_files(root: Path) -> list[str]:
    return ["data=folder", f"data.root={root}", "data.val_fraction=0"]


def content(place: Path) -> dict[str, bytes]:
    """All but what depends on the clock."""
    return {path.name: path.read_bytes() for path in sorted(place.iterdir()) if path.name not in (".lock", SPEED)}


def label(*arguments: str) -> None:
    assert main([*arguments, "train.workers=0", "runtime.precision=fp32"], None) == 0


def assert_scored_by(store: LabelStore, run: Path, images, *, squashed: tuple[int, int]) -> None:
    """The slow way: picture by picture, place by place, class by class."""
    loaded = load_run(run)
    net, shown = loaded.model.timm_model, loaded.preprocessing
    columns = [loaded.classes.index(name) for name in store.head["classes"]]
    for name, values, numbers in zip(store.names, store.values, store.numbers, strict=True):
        pixels = torch.from_numpy(images.read(images.names.index(name))).permute(2, 0, 1)[None]
        seen = torch.nn.functional.interpolate(pixels, squashed, mode=shown["interpolation"], antialias=True)
        with torch.no_grad():
            features = net.forward_features(normalise(seen, shown["mean"], shown["std"]))[0]
        for row in range(features.shape[1]):
            for column in range(features.shape[2]):
                cell = (net.fc.weight @ features[:, row, column] + net.fc.bias)[columns].tolist()
                best = sorted(range(len(cell)), key=lambda i: -cell[i])[: len(values)]
                others = [cell[i] for i in range(len(cell)) if i not in best] or cell
                wanted = [cell[i] - sum(others) / len(others) for i in best]
                assert numbers[:, row, column].tolist() == best
                np.testing.assert_allclose(values[:, row, column], wanted, rtol=2e-3, atol=2e-3)


def test_a_run_labels_its_own_pictures_and_says_so_when_it_has(runs, tmp_path, capsys):
    label(f"teacher={runs / 'net'}", f"output={tmp_path / 'maps'}")
    assert "train: 40 pictures, 5 of 6 classes at 2x2 places" in capsys.readouterr().out
    store = open_store(tmp_path / "maps")
    source = open_source(compose_and_check([*FAKE, "model.image_size=64"]))
    assert_scored_by(store, runs / "net", source.train, squashed=(64, 64))
    assert store.rows_for(source.train, classes=source.classes).tolist() == list(range(40))
    before = content(tmp_path / "maps")
    label(f"teacher={runs / 'net'}", f"output={tmp_path / 'maps'}")
    assert "train: finished already: 40 pictures" in capsys.readouterr().out
    assert content(tmp_path / "maps") == before


def test_all_splits_get_a_store_each(runs, tmp_path):
    label(f"teacher={runs / 'net'}", f"output={tmp_path}", "split=all", "k=all")
    assert [len(open_store(tmp_path / name).names) for name in ("train", "val")] == [40, 12]
    assert open_store(tmp_path / "val").head["k"] == 6


def test_oblong_pictures_are_squashed_and_other_classes_of_the_teacher_left_out(runs, pictures, tmp_path):
    label(f"teacher={runs / 'net'}", *of_files(pictures), f"output={tmp_path / 'maps'}", "image_size=[96, 64]", "k=1")
    store = open_store(tmp_path / "maps")
    assert store.head["classes"] == ["class_0", "class_1"]
    assert store.head["grid"] == [3, 2]
    assert_scored_by(store, runs / "net", folder(str(pictures), val_fraction=0).train, squashed=(96, 64))


def test_a_vit_sees_larger_pictures_with_its_positions_interpolated(runs, tmp_path):
    own = load_run(runs / "vit").model
    size = 2 * own.image_size[0]
    label(f"teacher={runs / 'vit'}", f"output={tmp_path / 'maps'}", f"image_size={size}")
    assert open_store(tmp_path / "maps").head["grid"] == [2 * side for side in own.grid_size]


def test_killed_it_goes_on_where_it_stood_and_ends_with_the_same_bytes(runs, tmp_path):
    command = [f"teacher={runs / 'net'}", *FAKE, "data.num_train=80", "batch_size=4"]
    label(*command, f"output={tmp_path / 'whole'}")
    unfinished, before = tmp_path / "killed" / "unfinished.json", 0
    for _ in range(2):
        child = os.fork()  # a process of its own, without the seconds that its imports would take
        if child == 0:
            _label_and_leave(*command, f"output={tmp_path / 'killed'}")
        while not (unfinished.exists() and done(unfinished) > before):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert before < done(unfinished) < 80
        before = done(unfinished)
        with pytest.raises(UserError, match="the label store is unfinished"):
            open_store(tmp_path / "killed")
    label(*command, f"output={tmp_path / 'killed'}")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert set(content(tmp_path / "whole")) == set(FILES)


def _label_and_leave(*arguments: str) -> None:
    """Commits every batch, and leaves time to be killed while rows lie in the files that no commit counts yet."""
    commit = label_store.LabelWriter.commit

    def slowly(self: label_store.LabelWriter) -> None:
        for file in self._files.values():
            file.flush()
        time.sleep(0.05)
        commit(self)

    label_store.COMMIT_S, label_store.LabelWriter.commit = 0.0, slowly
    try:
        label(*arguments)
    finally:
        os._exit(1)  # it was to be killed before


def done(unfinished: Path) -> int:
    return json.loads(unfinished.read_text())["pictures"]


def test_only_added_pictures_are_scored(runs, pictures, tmp_path, capsys):
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    command = [f"teacher={runs / 'net'}", *of_files(root), f"output={tmp_path / 'maps'}"]
    label(*command)
    before = content(tmp_path / "maps")
    (root / "class_0" / "1.png").unlink()
    for number in (20, 21, 22):
        Image.new("RGB", (30, 30), (number, 0, 0)).save(root / "class_0" / f"{number}.png")
    for file in (root / "class_1").iterdir():  # were they read again, this would be an error
        file.write_bytes(b"x" * file.stat().st_size)
    label(*command)
    assert "12 pictures, 2 of 2 classes at 2x2 places, 3 of them now" in capsys.readouterr().out
    after, store = content(tmp_path / "maps"), open_store(tmp_path / "maps")
    for name in FILES[1:]:
        assert after[name].startswith(before[name])
        assert len(after[name]) > len(before[name])
    assert len(store.names) == 13
    rows = store.rows_for(folder(str(root), val_fraction=0).train, classes=["class_0", "class_1"])
    assert rows.tolist() == [10, 11, 12, *range(1, 10)]


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("made") / "maps"
    label(f"teacher={runs / 'net'}", f"output={place}")
    return place


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["teacher={runs}/net", "output={made}", "k=3"], "made with k=5, not 3\ngive another output="),
        (["teacher={runs}/net", "output={made}", "image_size=96"], r"made with image_size=\[64, 64\], not \[96, 96\]"),
        (["teacher={runs}/vit", "output={made}"], "made by the teacher .*/net, not by .*/vit"),
        (["teacher={runs}/net", "output={made}", "train.classes=[class_0,class_1]"], "it also has class_2"),
        (["teacher={runs}/net", "output={runs}/net"], "holds .* and no label store"),
        (["teacher={runs}/nte", "output=x"], "teacher=.*there is no such run. Did you mean 'net'?"),
        (["output=x"], "label: teacher= is missing"),
        (["teacher={runs}/net"], "label: output= is missing"),
        (["teecher={runs}/net", "output=x"], "Did you mean 'teacher'?"),
        (["teacher={runs}/net", "output=x", "k=7"], "k=7: the data has 6 classes"),
        (["teacher={runs}/net", "output=x", "k=0"], "k=0: a whole number of at least 1"),
        (["teacher={runs}/net", "output=x", "split=valid"], "Did you mean 'val'?"),
        (["teacher={runs}/net", "output=x", "image_size=big"], "image_size='big'"),
        (["teacher={runs}/vit", "output=x", "image_size=33"], "model.patch_size=.* does not divide"),
        (["teacher={runs}/net", "output=x", "data=fake", "data.num_classes=9"], "it lacks class_6, class_7, class_8"),
        (["teacher=timm:resnet18", "output=x"], "label: data= is missing"),
        (["teacher=timm:resnet18", "output=x", *FAKE], "timm's weights know 1,000 classes, the data has 6\nteach it"),
        (["teacher=timm:resnet81", "output=x", *FAKE], "timm has no such model. Did you mean 'resnet18'?"),
        (["from={runs}", "output=x", *FAKE, "k=3"], "k=3: from=.* takes maps as they are"),
        (["from={runs}/none", "output=x", *FAKE], "there is no such folder"),
        (["from={runs}", "output=x", *FAKE], "40 of 40 pictures have no file of label maps"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(runs, made, workdir, arguments, said):
    before = content(made)
    with pytest.raises(UserError, match=said) as error:
        label(*(text.format(runs=runs, made=made) for text in arguments))
    assert len(str(error.value).splitlines()) <= 3
    assert content(made) == before
    assert not list(workdir.iterdir()), "nothing was begun"


def test_bare_weights_need_a_model_and_give_the_same_maps(runs, made, tmp_path):
    torch.save(load_run(runs / "net").model.state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError, match="say what model they are of"):
        label(f"teacher={tmp_path / 'net.pth'}", *FAKE, f"output={tmp_path / 'maps'}")
    label(f"teacher={tmp_path / 'net.pth'}", *FAKE, *NET, f"output={tmp_path / 'maps'}")
    for name in FILES[1:]:
        assert content(tmp_path / "maps")[name] == content(made)[name]


def test_a_timm_name_takes_timms_weights_or_a_file_and_says_where_there_is_no_network(
    runs, pictures, tmp_path, monkeypatch
):
    real, asked = timm.create_model, []

    def create(name, *, pretrained=False, **arguments):
        asked.append(pretrained)
        if pretrained and not (tmp_path / "network").exists():
            raise ConnectionError("the hub cannot be reached")
        torch.manual_seed(3)
        return real(name, **arguments)

    monkeypatch.setattr(timm, "create_model", create)
    every = ["data=fake", "data.num_train=4", "data.num_val=4", "data.num_classes=1000"]
    command = ["teacher=timm:test_resnet", *every, f"output={tmp_path / 'maps'}"]
    with pytest.raises(UserError, match=r"timm:test_resnet: the weights cannot be had: .*\n.*: weights=<file>"):
        label(*command)
    (tmp_path / "network").touch()
    label(*command)
    head = open_store(tmp_path / "maps").head
    assert head["image_size"] == list(timm.get_pretrained_cfg("test_resnet").input_size[1:])
    assert head["preprocessing"]["mean"] == list(timm.get_pretrained_cfg("test_resnet").mean)
    asked.clear()
    weights = runs / "net" / "model.safetensors"
    label("teacher=timm:test_resnet", f"weights={weights}", *FAKE, f"output={tmp_path / 'file'}", "image_size=64")
    assert not any(asked)
    assert open_store(tmp_path / "file").head["classes"] == [f"class_{i}" for i in range(6)]


def test_official_files_become_a_store_as_they_are(pictures, tmp_path):
    images, tree = folder(str(pictures), val_fraction=0).train, tmp_path / "tree"
    generator, maps = torch.Generator().manual_seed(0), {}
    for name in images.names:
        values = torch.randn(2, 3, 4, generator=generator).half().sort(dim=0, descending=True).values
        maps[name] = torch.stack([values, torch.randint(2, (2, 3, 4), generator=generator).half()])
        file = (tree / name).with_suffix(".pt")
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(maps[name], file)
    command = [f"from={tree}", *of_files(pictures), f"output={tmp_path / 'maps'}"]
    lost = next(tree.rglob("*.pt"))
    lost.rename(tmp_path / "kept.pt")
    with pytest.raises(UserError, match=rf"1 of 10 pictures have no file .* first: .*{lost.name}"):
        main(command, None)
    (tmp_path / "kept.pt").rename(lost)
    assert main(command, None) == 0
    store = open_store(tmp_path / "maps")
    rows = store.rows_for(images, classes=["class_0", "class_1"])
    for name, row in zip(images.names, rows, strict=True):
        np.testing.assert_array_equal(store.values[row], maps[name][0].numpy())
        np.testing.assert_array_equal(store.numbers[row], maps[name][1].numpy())
    assert store.head["crop"] == "center"
    assert store.head["missing"]["taken_off"] == "nothing"
    before = content(tmp_path / "maps")
    assert main(command, None) == 0
    assert content(tmp_path / "maps") == before


def test_pictures_without_classes_cannot_be_labeled(runs, tmp_path):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    with pytest.raises(UserError, match="has no classes"):
        label(f"teacher={runs / 'net'}", *of_files(tmp_path / "flat"), f"output={tmp_path / 'maps'}")


def test_a_picture_that_cannot_be_read_is_named_and_the_others_are_kept(runs, pictures, tmp_path):
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    (root / "class_1" / "8.png").write_text("no picture")
    command = [f"teacher={runs / 'net'}", *of_files(root), f"output={tmp_path / 'maps'}", "batch_size=2"]
    with pytest.raises(UserError, match=r"class_1/8\.png: holds text"):
        label(*command)
    assert done(tmp_path / "maps" / "unfinished.json") == 8
