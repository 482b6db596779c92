"""A row a picture, whatever the pictures are; a run in MLflow is used as its folder would be."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vitexp import cli, load_run, reports, serving, tracking
from vitexp.commands import evaluate, predict
from vitexp.config import compose_and_check
from vitexp.data.loader import train_batches
from vitexp.errors import BadImage, UserError
from vitexp.run import build_run
from vitexp.train import train

SETTINGS = [
    "model=vit_debug",
    "data=fake",
    "data.num_train=64",
    "data.num_val=20",
    "data.num_classes=6",
    "train.max_steps=2",
    "train.batch_size=32",
    "runtime.device=cpu",
    "runtime.precision=fp32",
    "optim.lr=0.01",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, mlflow_template):
    """A folder with outputs/run, trained for two steps, and outputs/mlflow.db, which has it too."""
    place = tmp_path_factory.mktemp("place")
    (place / "outputs").mkdir()
    shutil.copyfile(mlflow_template, place / "outputs" / "mlflow.db")
    folder, uri = place / "outputs" / "run", f"sqlite:///{place}/outputs/mlflow.db"
    train(compose_and_check([*SETTINGS, f"output_dir={folder}", f"tracking.uri={uri}"]))
    return place


@pytest.fixture
def run(place, monkeypatch):
    """The run folder, from the folder that training was started in."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return place / "outputs" / "run"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve good ones of all kinds, nested, and four that cannot be read in between, with what is no picture."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)

    def make(name: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **how) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rough = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(size)
        rough.convert(mode).save(path, **how)

    for number in range(6):
        make(f"a/{number}.jpg", size=(30 + 7 * number, 50))
    make("b/cmyk.jpg", "CMYK")
    make("b/alpha.png", "RGBA")
    make("b/deep/gray.png", "L")
    make("b/deep/palette.gif", "P")
    make("b/exact.png", size=(32, 32))
    make("c, with a comma.JPEG")
    (root / "a" / "0b-text.jpg").write_text("not a picture at all")
    (root / "a" / "1b-cut.jpg").write_bytes((root / "a" / "1.jpg").read_bytes()[:300])
    (root / "b" / "empty.png").write_bytes(b"")
    (root / "b" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "readme.txt").write_text("nothing to see")
    (root / ".hidden.jpg").write_bytes(b"")
    (root / "b" / "circle").symlink_to(root)
    return root


BAD = {"a/0b-text.jpg": "text", "a/1b-cut.jpg": "cut short", "b/empty.png": "empty", "b/gone.png": "cannot be opened"}


def rows_of(path: Path) -> list[dict]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_tree(root: Path) -> list[str]:
    suffixes = {".jpg", ".jpeg", ".png", ".gif"}
    found = [root / "b" / "gone.png", *(p for p in root.rglob("*") if p.suffix.lower() in suffixes)]
    return sorted({str(p) for p in found if "circle" not in str(p) and not p.name.startswith(".")})


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_each_picture_has_its_row_and_a_bad_one_its_reason(run, pictures, tmp_path, suffix, capsys):
    output = tmp_path / "new" / f"found{suffix}"
    code = predict.main([f"run={run}", f"input={pictures}", f"output={output}", "batch_size=5", "topk=3"], None)
    assert code == 1  # some could not be read
    rows = rows_of(output)
    names = of_tree(pictures)
    assert [row["file"] for row in rows] == names
    assert len(rows) == 16
    assert list(rows[0]) == [
        "file", "class", "probability", "top1_class", "top1_probability", "top2_class", "top2_probability",
        "top3_class", "top3_probability", "error",
    ]  # fmt: skip
    loaded = load_run(run)
    good = [row for row in rows if row["error"] is None]
    expected = loaded.predict([row["file"] for row in good], topk=3)
    assert len(good) == 12
    for row, prediction in zip(good, expected, strict=True):
        assert row["class"] == row["top1_class"] == prediction.class_name
        assert float(row["probability"]) == pytest.approx(prediction.probability, rel=1e-4)
        for number, (name, share) in enumerate(prediction.top, start=1):
            assert row[f"top{number}_class"] == name
            assert float(row[f"top{number}_probability"]) == pytest.approx(share, rel=1e-4)
    assert len({row["probability"] for row in good}) == 12  # no row is another's
    for row in rows:
        if row["error"] is not None:
            reason = BAD[str(Path(row["file"]).relative_to(pictures))]
            assert reason in row["error"]
            assert all(value is None for name, value in row.items() if name not in ("file", "error"))
    said = capsys.readouterr()
    assert "16 pictures" in said.out
    assert "2 files of the folder are no pictures" in said.out
    assert "4 of them could not be read" in said.err
    assert "0b-text.jpg: holds text" in said.err
    assert os.listdir(output.parent) == [output.name]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 4), (64, 2)])
def test_neither_batch_size_nor_workers_change_a_row(run, pictures, tmp_path, batch_size, workers):
    found = []
    for name, how in (("one.csv", []), ("two.csv", [f"batch_size={batch_size}", f"workers={workers}"])):
        predict.main([f"run={run}", f"input={pictures}", f"output={tmp_path / name}", *how], None)
        found.append(rows_of(tmp_path / name))
    for one, other in zip(*found, strict=True):
        numbers = [name for name in one if name.endswith("probability")]
        assert {k: v for k, v in one.items() if k not in numbers} == {
            k: v for k, v in other.items() if k not in numbers
        }
        for name in numbers:
            assert (one[name] is None) == (other[name] is None)
            assert one[name] is None or float(one[name]) == pytest.approx(float(other[name]), rel=1e-4)


def test_no_more_than_a_few_batches_are_read_ahead(run, pictures, tmp_path, monkeypatch):
    loaded = load_run(run)
    reads, at_compute = [], []
    prepare, compute = type(loaded).prepare, type(loaded).predict
    monkeypatch.setattr(
        type(loaded), "prepare", lambda *a, **k: (isinstance(a[1], str) and reads.append(a[1])) or prepare(*a, **k)
    )
    monkeypatch.setattr(type(loaded), "predict", lambda *a, **k: at_compute.append(len(reads)) or compute(*a, **k))
    files = [str(pictures / "a" / f"{number % 6}.jpg") for number in range(60)]
    done = predict.predict(loaded, files, tmp_path / "many.csv", batch_size=4, workers=2)
    assert (done.pictures, done.unreadable) == (60, 0)
    assert len(reads) == 60
    assert len(at_compute) == 15
    for number, read in enumerate(at_compute):
        assert read <= 4 * (number + 1 + predict.BATCHES_AHEAD)


def test_exported_weights_alone_are_enough(run, pictures, tmp_path):
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    for name in ("model.safetensors", "model.json"):
        shutil.copy(run / name, alone / name)
    code = predict.main([f"run={alone}", f"input={pictures}/a/[0-9].jpg", f"output={tmp_path / 'p.jsonl'}"], None)
    assert code == 0
    assert [Path(row["file"]).name for row in rows_of(tmp_path / "p.jsonl")] == [f"{n}.jpg" for n in range(6)]
    with pytest.raises(UserError, match=r"weights=model_best\.safetensors: .* has model\.safetensors"):
        predict.main(
            [f"run={alone}", f"input={pictures}", f"output={tmp_path / 'x.csv'}", "weights=model_best.safetensors"],
            None,
        )


def test_input_may_be_a_file_a_glob_or_have_a_globs_letters_in_its_name(pictures, tmp_path):
    shutil.copytree(pictures / "a", tmp_path / "[a]*")
    assert len(predict.find_pictures(str(tmp_path / "[a]*"))[0]) == 8
    assert predict.find_pictures(str(pictures / "readme.txt")) == ([str(pictures / "readme.txt")], 0)
    files, _ = predict.find_pictures(f"{pictures}/b/**/*.png")
    assert {Path(file).name for file in files} >= {"alpha.png", "exact.png", "gray.png"}
    files, _ = predict.find_pictures(f"{pictures}/*")  # the output of an earlier time is no picture
    assert str(pictures / "readme.txt") in files
    assert (
        str(pictures / "readme.txt") not in predict.find_pictures(f"{pictures}/*", besides=pictures / "readme.txt")[0]
    )
    (tmp_path / "bare").mkdir()
    for nothing in ("bare", "missing", "*.tif"):
        with pytest.raises(UserError, match=r"input=.*no"):
            predict.find_pictures(str(tmp_path / nothing))


def test_the_output_is_whole_or_the_one_before(run, pictures, tmp_path, monkeypatch):
    output = tmp_path / "p.csv"
    output.write_text("the one before")
    loaded = load_run(run)
    compute, calls = type(loaded).predict, []

    def stopped(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*arguments, **keywords)

    monkeypatch.setattr(type(loaded), "predict", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict.predict(loaded, of_tree(pictures), output, batch_size=2)
    assert output.read_text() == "the one before"
    assert os.listdir(tmp_path) == ["p.csv"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run=r", "inptu=x", "output=p.csv"], r"no such key 'inptu'. Did you mean 'input'\?"),
        (["run=r", "input=x", "output=p.csv", "batch_size=0"], "batch_size=0: expected a whole number of at least 1"),
        (["run=r", "input=x", "output=p.csv", "topk=five"], "topk=five"),
        (["run=r", "input=x", "output=p.xlsx"], r"known are .csv, .parquet, .jsonl"),
        (["run=r", "input=x", "output=p"], r"known are .csv"),
        (["run=r", "output=p.csv"], "input= is missing"),
        (["run=r", "input=.", "output=p.csv"], "no pictures there"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(workdir, arguments, said, monkeypatch):
    monkeypatch.setattr(predict, "open_run", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(UserError, match=said) as caught:
        predict.main(arguments, None)
    assert len(str(caught.value).splitlines()) <= 2
    assert not list(workdir.iterdir())


def test_the_command_line_knows_predict(run, pictures, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["predict", f"run={run}", f"input={pictures}/a/2.jpg", f"output={tmp_path / 'p.csv'}"])
    assert end.value.code == 0
    with pytest.raises(SystemExit) as end:
        cli.main(["predict", f"run={run / 'nothing'}", f"input={pictures}/a/2.jpg", f"output={tmp_path / 'q.csv'}"])
    assert end.value.code == 2
    assert "nothing: there is no such run." in capsys.readouterr().err


# ---- a run in MLflow


def run_id(run: Path) -> str:
    stores = json.loads((run / tracking.RECORD_NAME).read_text())["stores"]
    return next(iter(stores.values()))["run_id"]


def test_a_finished_run_leaves_its_pictures_and_settings_in_mlflow(run, place):
    from mlflow import MlflowClient

    pictures = {"attention.png", "calibration.png", "confusion.png", "curves.png", "inputs.png", "positions.png"}
    assert {path.name for path in (run / "plots").iterdir()} == pictures
    client = MlflowClient(f"sqlite:///{place}/outputs/mlflow.db")
    assert {Path(entry.path).name for entry in client.list_artifacts(run_id(run), "plots")} == pictures
    there = {entry.path for entry in client.list_artifacts(run_id(run))}
    assert {"config.yaml", "config.interpolated.yaml"} <= there
    weights = {"model_best.safetensors", "model_best.json"}
    assert weights == serving.model_of(client, client.get_run(run_id(run))).keys()
    assert not weights & there  # large: they are kept once


def test_a_picture_that_cannot_be_drawn_does_not_make_a_finished_run_fail(workdir, monkeypatch):
    def unreadable(*_, **__):
        raise BadImage("cat.jpg", "gone since it was trained on")

    monkeypatch.setattr(reports.plots, "picture_grid", unreadable)
    summary = train(compose_and_check([*SETTINGS, f"output_dir={workdir}", "tracking=none"]))
    assert summary["step"] == 2
    assert "cat.jpg: gone" in (workdir / "train.log").read_text()
    assert (workdir / "plots" / "curves.png").exists()


def test_the_inputs_drawn_are_the_runs_first_as_the_model_gets_them(workdir, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        reports.plots, "picture_grid", lambda images, titles, path: shown.update({path.parent: (images, titles)})
    )
    for augment in ("light", "deit"):
        run = build_run(compose_and_check([*SETTINGS, f"augment={augment}", "tracking=none", "data.cache=none"]))
        reports.draw_pictures(run, workdir / augment)
        first = next(train_batches(run.train_data, batch_size=32, seed=run.config.seed, workers=0))
        images, titles = shown[workdir / augment]
        assert images.shape == (24, 3, 32, 32)
        assert images.dtype == torch.uint8
        if augment == "light":
            assert torch.equal(images, first.images[:24])
            assert titles == [run.source.classes[target] for target in first.targets[:24]]
        else:
            assert not torch.equal(images, first.images[:24])
            assert any(" + " in title for title in titles)


@pytest.mark.parametrize("form", ["mlflow:{}", "runs:/{}"])
def test_a_run_in_mlflow_predicts_as_its_best_weights_do(run, pictures, tmp_path, form, monkeypatch):
    which = form.format(run_id(run))
    uri = f"uri=sqlite:///{Path.cwd()}/outputs/mlflow.db"
    given = [f"input={pictures}/b/*.png", "topk=2"]
    predict.main([f"run={run}", *given, f"output={tmp_path / 'folder.csv'}", "weights=model_best.safetensors"], None)
    predict.main([f"run={which}", *given, f"output={tmp_path / 'default.csv'}"], None)  # the store that training has
    monkeypatch.chdir(tmp_path)
    predict.main([f"run={which}", *given, f"output={tmp_path / 'elsewhere.csv'}", uri], None)
    expected = (tmp_path / "folder.csv").read_text()
    assert expected.count("\n") == 5
    assert (tmp_path / "default.csv").read_text() == (tmp_path / "elsewhere.csv").read_text() == expected


def test_a_run_in_mlflow_is_evaluated_as_its_folder_is(run, capsys):
    assert evaluate.main([f"run={run}", "weights=model_best.safetensors"], None) == 0
    expected = json.loads((run / "evaluation.json").read_text())
    assert evaluate.main([f"run=mlflow:{run_id(run)}"], None) == 0
    fetched = Path("outputs") / "from_mlflow" / run_id(run)
    found = json.loads((fetched / "evaluation.json").read_text())
    assert found == expected
    assert found["val/loss"] > 0
    assert sorted(path.name for path in fetched.iterdir()) == [
        "config.interpolated.yaml", "config.yaml", "evaluation.json", "model_best.json", "model_best.safetensors",
        "summary.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("which", "more", "said"),
    [
        ("mlflow:0123456789abcdef", [], "has no such run"),
        ("runs:/{}", ["weights=other.safetensors"], "no artifact other.safetensors; it has config.interpolated.yaml"),
        ("mlflow:{}", ["uri=sqlite:///nowhere/mlflow.db"], "there is no MLflow store .*nowhere/mlflow.db"),
        ("mlflow:{}", ["tracking.uri=somewhere"], "is not a store"),
        ("mlflow:{}", ["uri=http://127.0.0.1:9"], "cannot be fetched from MLflow at http://127.0.0.1:9"),
    ],
)
@pytest.mark.parametrize("command", [predict, evaluate])
def test_what_mlflow_lacks_is_one_clear_error(run, pictures, tmp_path, command, which, more, said):
    given = [f"run={which.format(run_id(run))}", *more]
    if command is predict:
        given += [f"input={pictures}/a", f"output={tmp_path / 'p.csv'}"]
    with pytest.raises(UserError, match=said) as caught:
        command.main(given, None)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("nowhere").exists()
    assert not (tmp_path / "p.csv").exists()
