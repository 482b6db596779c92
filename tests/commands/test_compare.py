"""Runs are compared on the pictures that all of them held out, and what stands in the way is said."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from vitexp import reports
from vitexp.commands.compare import main, parse
from vitexp.commands.evaluate import main as evaluate
from vitexp.comparison import short_names
from vitexp.config import compose_and_check
from vitexp.data.sources.folder import folder
from vitexp.errors import UserError
from vitexp.plots import style
from vitexp.train import train

COMMON = [
    "model=vit_debug", "data=folder", "data.val_fraction=0.5", "train.max_steps=3", "train.batch_size=16",
    "runtime.device=cpu", "runtime.precision=fp32", "tracking=none", "train.workers=0", "optim.lr=0.02",
]  # fmt: skip


def learn(*settings: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "draw_pictures", lambda *_: None)  # with the next half of a run's time
        patch.setattr(style, "save", lambda figure, path, **_: Path(path))
        train(compose_and_check([*COMMON, *settings]))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """pictures/ of three classes, and runs: a and b, which differ in seed alone; small, of another optimizer and shown
    less of each picture; and split, which holds out others."""
    place = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for number in range(90):
        file = place / "pictures" / f"class_{number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256 - 40 * (number % 3), (32, 32, 3), dtype=np.uint8)).save(file)

    def run(name: str, *settings: str) -> None:
        folders = [f"data.root={place / 'pictures'}", f"output_dir={place / name}"]
        learn(*folders, *settings)

    for seed, name in enumerate("ab"):
        run(name, f"seed={seed}")
    run("small", "optim=sgd", "optim.lr=0.001", "augment.crop_fraction=0.5")
    run("split", "data.split_seed=1", "train.max_steps=1")
    return place


def compared(place: Path, output: Path, *arguments: str) -> dict[str, list[dict[str, str]]]:
    """The rows of each CSV file; a name is one of the runs."""
    runs = [str(place / text) if (place / text).exists() else text for text in arguments]
    assert main([*runs, f"output={output}", "device=cpu"], None) == 0
    return {path.stem: list(csv.DictReader(path.open(encoding="utf-8"))) for path in output.glob("*.csv")}


def contents(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def found(place, tmp_path_factory):
    """a, b and small; and the folder that they were compared into."""
    before = contents(place)
    output = tmp_path_factory.mktemp("out") / "new"
    rows = compared(place, output, "a", "b", "small")
    assert contents(place) == before  # nothing is written into the folders of runs
    return rows, output


def test_metrics_are_those_of_evaluate_with_scipys_intervals(place, found):
    rows, _ = found
    metrics = {(row["run"], row["metric"]): row for row in rows["metrics"]}
    assert len(rows["answers"]) == 45
    for run in ("a", "small"):
        assert evaluate([f"run={place / run}", "train.workers=0"], None) == 0
        evaluated = json.loads((place / run / "evaluation.json").read_text())
        (place / run / "evaluation.json").unlink()
        for name in ("top1", "loss", "mean_class_accuracy", "ece"):
            assert float(metrics[run, name]["value"]) == pytest.approx(evaluated[f"val/{name}"], rel=1e-5), name
        right = np.array([row[f"{run}: class"] == row["class"] for row in rows["answers"]], float)
        expected = stats.bootstrap((right,), np.mean, rng=np.random.default_rng(0)).confidence_interval
        own = metrics[run, "top1"]
        assert (float(own["low"]), float(own["high"])) == pytest.approx(tuple(expected), rel=1e-9)
        assert metrics[run, "ece"]["low"] == ""


def test_each_pair_has_the_difference_and_mcnemars_test_of_its_answers(found):
    rows, _ = found
    values = {(row["run"], row["metric"]): float(row["value"]) for row in rows["metrics"]}
    pairs = {(row["first"], row["second"]): row for row in rows["mcnemar"]}
    assert set(pairs) == set(itertools.combinations(("a", "b", "small"), 2))
    for (first, second), test in pairs.items():
        right = [np.array([row[f"{run}: class"] == row["class"] for row in rows["answers"]]) for run in (first, second)]
        alone = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
        assert [int(test["first_alone"]), int(test["second_alone"])] == alone
        if sum(alone) < 25:
            assert test["method"] == "exact binomial"
            assert float(test["p"]) == pytest.approx(stats.binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1)
    for row in rows["pairs"]:
        expected = values[row["second"], row["metric"]] - values[row["first"], row["metric"]]
        assert float(row["difference"]) == pytest.approx(expected, abs=1e-12)
        if row["metric"] == "loss":
            assert float(row["low"]) < expected < float(row["high"])


def test_runs_that_differ_in_seed_alone_are_one_group(found):
    rows, _ = found
    values = [float(row["value"]) for row in rows["metrics"] if row["metric"] == "loss"]
    groups = {row["runs"]: row for row in rows["groups"] if row["metric"] == "loss"}
    assert list(groups) == ["a b", "small"]
    assert float(groups["a b"]["mean"]) == pytest.approx(np.mean(values[:2]))
    assert float(groups["a b"]["std"]) == pytest.approx(stats.tstd(values[:2]))
    assert (groups["a b"]["n"], groups["small"]["n"], groups["small"]["std"]) == ("2", "1", "")


def test_only_settings_that_differ_are_shown_choices_first(found):
    rows, _ = found
    settings = {row.pop("setting"): row for row in rows["settings"]}
    assert [key for key in settings if key.startswith("choices.")] == [next(iter(settings))] == ["choices.optim"]
    assert settings["choices.optim"] == {"a and 1 more": "adamw", "small": "sgd"}
    assert settings["optim.betas"] == {"a and 1 more": "[0.9, 0.999]", "small": "—"}
    assert settings["augment.crop_fraction"] == {"a and 1 more": "1.0", "small": "0.5"}
    assert settings.pop("seed") == {"a and 1 more": "0, 1", "small": "0"}
    assert {key.partition(".")[0] for key in settings} == {"choices", "optim", "augment"}
    assert all(len(set(row.values())) == 2 for row in settings.values())


def test_what_the_tables_say_is_printed_and_lies_in_one_page_without_network(place, found, tmp_path, capsys):
    _, output = found
    page = (output / "compare.html").read_text(encoding="utf-8")
    for text in (
        "small",
        "a and 1 more",
        "exact binomial",
        "preprocessing differs in crop_fraction",
        "<svg",
        "base64,",
    ):
        assert text in page
    for outside in ("http:", "https:", "<script", "<link", "url("):
        assert outside not in page
    assert page.count("src=") == page.count('src="data:image/png;base64,')
    compared(place, tmp_path, "a", "b")
    said = capsys.readouterr()
    for text in ("McNemar", "exact binomial", "95 % intervals", "45 validation pictures", "n - 1"):
        assert text in said.out
    assert "warning: seeds differ (0, 1), and nothing else" in said.out
    assert "data differ" not in said.out
    assert "preprocessing" not in said.out


def test_pictures_that_one_has_learned_from_are_left_out(place, tmp_path, capsys):
    rows = compared(place, tmp_path, "a", "split")
    names = {row["picture"] for row in rows["answers"]}
    splits = [folder(str(place / "pictures"), val_fraction=0.5, split_seed=seed) for seed in (0, 1)]
    assert names == set(splits[0].val.names) & set(splits[1].val.names)
    assert 0 < len(names) < 45
    said = capsys.readouterr().out
    assert f"warning: split holds out {len(names)} of the 45 pictures of a" in said
    assert f"compared on the {len(names)} pictures that all hold out" in said
    assert "data differ, by the fingerprints" in said


@pytest.mark.slow
def test_runs_of_other_classes_or_pictures_are_refused_by_name(place, tmp_path):
    two, pictures = str(tmp_path / "two"), f"data.root={place / 'pictures'}"
    learn("train.classes=[class_2,class_0]", "train.max_steps=1", pictures, f"output_dir={two}")
    with pytest.raises(UserError, match=r"two knows other classes than a and cannot be .*: it lacks class_1"):
        compared(place, tmp_path, "a", two)
    unknown = r"classes that the runs do not know: class_1\ntrain.classes=\[class_2,class_0\]"
    with pytest.raises(UserError, match=unknown):
        compared(place, tmp_path / "out", two, f"{two}/model_best.safetensors", "data=folder", pictures)
    other = tmp_path / "other"
    shutil.copytree(place / "pictures", other / "pictures")
    for number, file in enumerate(sorted((other / "pictures").rglob("*.png"))):
        file.rename(file.with_name(f"new_{number}.png"))
    folders = [f"data.root={other / 'pictures'}", f"output_dir={other / 'run'}"]
    learn(*folders, "train.max_steps=1")
    with pytest.raises(UserError, match="holds out other pictures than a: none has the same"):
        compared(place, tmp_path / "out", "a", str(other / "run"))
    chosen = compared(place, tmp_path / "out", "a", str(other / "run"), f"data.root={other / 'pictures'}")
    assert all("new_" in row["picture"] for row in chosen["answers"])
    shutil.rmtree(other / "pictures")
    with pytest.raises(UserError, match="run: has other pictures than a, and which it holds out cannot be told"):
        compared(place, tmp_path / "out", "a", str(other / "run"))


@pytest.mark.slow
def test_copied_weights_are_compared_with_what_is_not_known_said(place, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    for name in ("model.safetensors", "model.json"):
        shutil.copy(place / "b" / name, tmp_path / "bare")
    bare = str(tmp_path / "bare" / "model.safetensors")
    data = ["data=folder", f"data.root={place / 'pictures'}", "data.val_fraction=0.5"]
    with pytest.raises(UserError, match="no settings beside its weights"):
        compared(place, tmp_path / "out", bare, "a")
    rows = compared(place, tmp_path / "out", bare, "a", *data)
    assert len(rows["answers"]) == 45
    assert {row["n"] for row in rows["groups"]} == {"1"}
    assert "whether a run has learned from them is not told" in capsys.readouterr().out
    compared(place, tmp_path / "out", "a", bare)
    assert "what it has learned from is not known here" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_without_a_classifier_show_what_training_recorded(place, tmp_path, capsys):
    mae = ["method.decoder_depth=1", "method.decoder_dim=16", "method.decoder_num_heads=2", "train.max_steps=1"]
    folders = [f"data.root={place / 'pictures'}", f"output_dir={tmp_path / 'mae'}"]
    learn("method=mae", "evaluators=reconstruction", *mae, *folders)
    rows = compared(place, tmp_path / "out", "a", str(tmp_path / "mae"))
    assert "answers" not in rows
    recorded = json.loads((tmp_path / "mae" / "summary.json").read_text())
    shown = {row["metric"]: row for row in rows["metrics"] if row["run"] == "mae"}
    assert float(shown["val/loss"]["value"]) == pytest.approx(recorded["val/loss"])
    assert shown["val/loss"]["low"] == ""
    assert "mae is no classifier" in capsys.readouterr().out


def test_bad_input_is_answered_with_what_is_allowed(place, tmp_path):
    a, b = str(place / "a"), str(place / "b")
    for arguments, said in (
        ([a], "needs two runs or more, 1 given"),
        ([a, b, "outptu=x"], "no such key, or no value. Did you mean 'output'"),
        ([a, b, "batch_size=0"], "batch_size=0: expected a whole number"),
        ([a, str(place / "a" / "model.safetensors")], "is given twice"),
        ([a, str(place / "bb")], "bb: there is no such run. Did you mean 'b'"),
        ([a, b, f"output={place / 'a' / 'compared'}"], "lies in the folder of a"),
        ([a, b, "uri=sqlite:///x.db"], "says where mlflow"),
    ):
        with pytest.raises(UserError, match=said):
            main(arguments, None)
    assert not (place / "a" / "compared").exists()


def test_names_are_the_shortest_that_tell_runs_apart(tmp_path, monkeypatch):
    files = [Path(text) / "model.safetensors" for text in ("x/1/run", "x/2/run", "y/other")]
    assert short_names(files) == ["1/run", "2/run", "other"]
    assert short_names([Path("x/run/model.safetensors"), Path("x/run/model_best.safetensors")]) == [
        "run",
        "run/model_best",
    ]
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1").mkdir()  # a folder may have a name like an override's
    runs, given, overrides = parse(["lr=0.1", "b", "output=o", "data=digits", "data.channels=1"])
    assert (runs, given, overrides) == (["lr=0.1", "b"], {"output": "o"}, ["data=digits", "data.channels=1"])
