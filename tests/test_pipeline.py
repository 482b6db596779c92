"""Stages one after another: only what is missing runs, whatever stopped it, and the report is the same."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from vitexp import pipeline, pipeline_report, plots, reports
from vitexp.checks import leaves
from vitexp.config import RunConfig, compose_and_check
from vitexp.config_paths import conf_dir, config_groups
from vitexp.data.label_store import open_store
from vitexp.errors import UserError

DRIVER = Path(__file__).parent / "drivers" / "killed_pipelines.py"
TINY = {
    "name": "tiny",
    "stages": {
        "first": {
            "method": "mae",
            "evaluators": "mae",
            "method.decoder_dim": 16,
            "method.decoder_depth": 1,
            "method.decoder_num_heads": 2,
            "schedule.warmup_epochs": 0.5,
        },
        "features": {"parent": "first", "stage": "evaluate", "evaluators": "knn"},
        "tuned": {"parent": "first", "stage": "finetune", "train.epochs": 1},
    },
}
A_LABELING = {"command": "label", "teacher": "timm:resnet18"}
COMMON = [
    "data=fake",
    "data.num_train=24",
    "data.num_val=8",
    "train.batch_size=8",
    "train.log_every=1",
    "train.save_every=2",
    "train.workers=0",
    "runtime.device=cpu",
    "tracking=none",
]
SETTINGS = ["pipeline=tiny", "model=vit_debug", "first.train.epochs=2", *COMMON]  # 6 updates, none, and 3
# Its stages learn on 3 updates each.
LABELED = ["pipeline=token_labeling", "train.epochs=1", "teacher.model.image_size=32", "label.batch_size=8"]
LABELED += [f"{stage}.{key}" for stage in ("tokens", "plain") for key in ("model.depth=1", "model.embed_dim=32")]
LABELED += ["runtime.precision=fp32", *COMMON]


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a person's own with the pipeline `tiny` in it."""
    return own_pipeline(tmp_path_factory.mktemp("own"), TINY)


def own_pipeline(place: Path, content: Any) -> str:
    file = place / "conf" / "pipeline" / "tiny.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(place / "conf")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes stages cost nothing, each leaving weights that depend on its settings and its parent's weights alone.

    Holds the names of those run."""
    names: list[str] = []

    def pretend(request: str, *, processes: int) -> int:
        resolved = yaml.safe_load(request)["resolved"]
        folder = Path(resolved["output_dir"])
        names.append(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        assert not (folder / "summary.json").exists() or resolved["resume"] == "never", "another stage's results"
        made_of = [resolved["train"], resolved["model"], resolved["data"]]
        if resolved["init_from"]:
            made_of.append(json.loads((Path(resolved["init_from"]) / "model.json").read_text()))
        checksum = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        (folder / "model.json").write_text(json.dumps({"weights": {"sha256": checksum}}))
        (folder / "summary.json").write_text("{}")
        return 0

    monkeypatch.setattr(pipeline, "run_in_processes", pretend)
    monkeypatch.setattr(pipeline, "compose_and_check", composed_once)
    monkeypatch.setattr(pipeline_report, "write_report", lambda folder, **of: "")
    return names


def composed_once(overrides: list[str], config_dir: str | None) -> RunConfig:
    """compose_and_check, which takes a quarter of a second, with the folder's keys put in afterwards."""
    placed = [text for text in overrides if text.startswith(("output_dir=", "group="))]
    config = _composed(tuple(text for text in overrides if text not in placed), config_dir)
    given = {override.key_or_group: override.value() for override in pipeline.parse_overrides(placed)}
    return replace(config, **given, resolved=config.resolved | given, raw=config.raw | given)


@functools.cache
def _composed(overrides: tuple[str, ...], config_dir: str | None) -> RunConfig:
    return compose_and_check(list(overrides), config_dir)


def stages_of(overrides: list[str], config_dir: str | None = None) -> dict[str, Any]:
    """The settings of each stage, as they would run in the folder `here`."""
    stages = pipeline.plan(overrides, config_dir).stages
    return {stage.name: stage.config(Path("here"), config_dir) for stage in stages}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes stages run in this process, without their pictures. Holds the names of those run."""
    from accelerate.state import AcceleratorState, GradientState

    from vitexp.commands import label
    from vitexp.config import from_request
    from vitexp.train import train

    names: list[str] = []

    def begin(folder: Path) -> None:
        names.append(folder.name)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    def run(request: str, *, processes: int) -> int:
        file = tmp_path / "request.yaml"
        file.write_text(request)
        config = from_request(file)
        begin(Path(config.output_dir))
        train(config)
        return 0

    def command(arguments: list[str], *, config_dir: str | None) -> int:
        assert arguments[0] == "label"
        (store,) = (Path(text.partition("=")[2]) for text in arguments if text.startswith("output="))
        begin(store.parent)
        return label.main(arguments[1:], config_dir)

    monkeypatch.setattr(pipeline, "run_in_processes", run)
    monkeypatch.setattr(pipeline, "run_command", command)
    monkeypatch.setattr(reports, "draw_pictures", lambda run, folder: None)
    monkeypatch.setattr(reports, "draw_token_labels", lambda run, folder, *, epoch: None)
    for name in ("curves", "confusion_matrix", "reliability"):
        monkeypatch.setattr(plots, name, lambda *given, **how: None)
    return names


# ---- What runs -------------------------------------------------------------------------------------------------------


def test_weights_pass_on_a_report_is_made_and_the_same_command_runs_nothing(
    tmp_path: Path, config_dir: str, here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ran, folder = here, tmp_path / "run"
    command = [*SETTINGS, f"output_dir={folder}"]
    assert pipeline.main(command, config_dir) == 0
    assert ran == ["first", "features", "tuned"]
    first, features = (load_file(folder / name / "model.safetensors") for name in ("first", "features"))
    passed_on = [name for name in first if name in features]
    assert len(passed_on) > 20
    assert all(first[name].equal(features[name]) for name in passed_on)

    found = json.loads((folder / "report.json").read_text())
    assert [stage["name"] for stage in found["stages"]] == ran
    assert [stage["parent"] for stage in found["stages"]] == [None, "first", "first"]
    assert [stage["epochs"] for stage in found["stages"]] == [2, 0, 1]
    for stage in found["stages"]:
        summary = json.loads((folder / stage["name"] / "summary.json").read_text())
        assert stage["metrics"]
        assert stage["metrics"].items() <= summary.items()
        assert bool(stage["perf"]) == (stage["epochs"] > 0)
    tuned = found["stages"][2]["metrics"]["val/top1"]
    markdown, page = ((folder / f"report.{kind}").read_text() for kind in ("md", "html"))
    for text in (markdown, page):
        assert f"{100 * tuned:.2f} %" in text
        assert all(name in text for name in ran)
    linked = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert all((folder / path).is_file() for path in linked)
    sources = re.findall(r'src="(.{22})', page)
    assert len(sources) == len(linked) >= 2, "the loss of `first` and its reconstructions"
    assert set(sources) == {"data:image/png;base64,"}
    assert not re.search(r"https?:|<link|<script|url\(|@import", page)

    before = {path: path.read_bytes() for path in [*folder.glob("report.*"), folder / pipeline.LEDGER]}
    assert len(before) == 4
    capsys.readouterr()
    assert pipeline.main(command, config_dir) == 0
    assert ran == ["first", "features", "tuned"]
    assert capsys.readouterr().err.count("finished already") == 3
    assert {path: path.read_bytes() for path in before} == before


def test_label_maps_pass_on_and_another_teacher_makes_others(
    tmp_path: Path, here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, everything = tmp_path / "run", ["teacher", "label", "tokens", "plain"]
    command = [*LABELED, f"output_dir={folder}"]
    assert pipeline.main(command, None) == 0
    assert here == everything
    store = open_store(folder / "label" / "store")
    assert store.head["teacher"]["weights_sha256"] == weights_of(folder / "teacher")
    assert store.values.shape == (24, 5, 2, 2)
    summaries = {name: json.loads((folder / name / "summary.json").read_text()) for name in ("tokens", "plain")}
    assert summaries["tokens"]["token_labels"] == store.fingerprint()
    assert "token_labels" not in summaries["plain"]

    found = json.loads((folder / "report.json").read_text())
    teacher, labeling, tokens, plain = found["stages"]
    assert [stage["parent"] for stage in found["stages"]] == [None, "teacher", None, None]
    assert (tokens["token_labels"], plain["token_labels"]) == ("label", None)
    assert labeling["maps"] == "5 of 10 classes at 2x2 places, 0.0 MB"
    assert labeling["perf"]["minutes"] == pytest.approx(24 / labeling["perf"]["images_per_s"] / 60)
    tops = {stage["name"]: 100 * stage["metrics"]["val/top1"] for stage in (teacher, tokens, plain)}
    over = found["points_over"]["plain"]
    assert over == {name: pytest.approx(tops[name] - tops["plain"]) for name in ("teacher", "tokens")}
    for text in [(folder / f"report.{kind}").read_text() for kind in ("md", "html")]:
        assert "points over plain" in text
        assert f"{over['tokens']:+.2f}" in text
    assert f"{over['tokens']:+.2f} points over plain" in capsys.readouterr().out

    for change, anew, said in [
        ([], [], "finished already"),
        (["seed=0", "label.train.workers=0"], [], "finished already"),
        (["label.k=3"], ["label", "tokens"], "has changed: k: 5 -> 3"),
        (["teacher.train.max_steps=2"], ["teacher", "label", "tokens"], "changed: token labels of label: "),
        (["plain.resume=never", "label.resume=never"], ["label", "plain"], "== 4/4 plain"),
    ]:
        command += change
        here.clear()
        assert pipeline.main(command, None) == 0
        assert here == anew
        assert said in capsys.readouterr().err
    assert open_store(folder / "label" / "store").fingerprint() != store.fingerprint()
    assert len(list((folder / "label" / "previous").iterdir())) == 3, "the former maps are set aside"


def test_a_teacher_passes_on_and_another_one_teaches_anew(
    tmp_path: Path, here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = ["pipeline=distillation", "train.epochs=1", "teacher.model.image_size=32", f"output_dir={folder}"]
    command += [f"{stage}.{key}" for stage in ("distilled", "plain") for key in ("model.depth=1", "model.embed_dim=32")]
    command += ["runtime.precision=fp32", *COMMON]
    assert pipeline.main(command, None) == 0
    assert here == ["teacher", "distilled", "plain"]
    found = json.loads((folder / "report.json").read_text())
    assert [stage["teacher"] for stage in found["stages"]] == [None, "teacher", None]
    assert set(found["points_over"]["plain"]) == {"teacher", "distilled"}
    summary = json.loads((folder / "distilled" / "summary.json").read_text())
    assert summary["teacher"] == f"{folder / 'teacher'} {weights_of(folder / 'teacher')[:12]}"
    for change, anew in (([], []), (["teacher.train.max_steps=2"], ["teacher", "distilled"]), ([], [])):
        command += change
        here.clear()
        assert pipeline.main(command, None) == 0
        assert here == anew
    one, other = (stage.config(folder, None) for stage in pipeline.plan(command, None).stages[1:])
    unlike = {key for key, value in leaves(one.resolved) if dict(leaves(other.resolved)).get(key) != value}
    assert unlike <= {"choices.method", "output_dir"} | {f"method.{key}" for key in one.resolved["method"]}


def test_a_finished_run_stands_in_for_a_stage(
    tmp_path: Path, here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ready = tmp_path / "elsewhere"
    only = ["pipeline=token_labeling", *(f"~pipeline.stages.{name}" for name in ("label", "tokens", "plain"))]
    taught = [text for text in LABELED if not text.startswith(("pipeline", "label.", "tokens.", "plain."))]
    assert pipeline.main([*only, "~pipeline.baseline", *taught, f"output_dir={ready}"], None) == 0
    here.clear()
    rest = [text for text in LABELED if not text.startswith("teacher.")]
    folder = tmp_path / "run"
    command = [*rest, f"teacher.run={ready / 'teacher'}", f"output_dir={folder}"]
    for anew in (["label", "tokens", "plain"], []):
        here.clear()
        assert pipeline.main(command, None) == 0
        assert here == anew
        assert f"== 1/4 teacher: {ready / 'teacher'}\na finished run\n" in capsys.readouterr().err
    assert not (folder / "teacher").exists()
    assert open_store(folder / "label" / "store").head["teacher"]["weights_sha256"] == weights_of(ready / "teacher")
    teacher, *_ = json.loads((folder / "report.json").read_text())["stages"]
    summary = json.loads((ready / "teacher" / "summary.json").read_text())
    assert (teacher["name"], teacher["metrics"]["val/top1"]) == ("teacher", summary["val/top1"])

    here.clear()
    named = [text for text in command if not text.startswith("teacher.run")]
    named += ["~pipeline.stages.teacher", f"label.teacher={ready / 'teacher'}"]
    assert pipeline.main(named, None) == 0
    assert here == ["label"], "and what it leaves is the same"


def weights_of(run: Path) -> str:
    return json.loads((run / "model.json").read_text())["weights"]["sha256"]


def test_a_changed_setting_runs_its_stage_and_those_after_it_anew(
    tmp_path: Path, config_dir: str, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*SETTINGS, f"output_dir={tmp_path / 'run'}"]
    for change, anew, said in [
        ([], ["first", "features", "tuned"], "== 3/3 tuned"),
        (["tuned.train.epochs=3"], ["tuned"], "has changed: train.epochs: 1 -> 3"),
        (["first.train.epochs=3"], ["first", "features", "tuned"], "has changed: weights of first: "),
        (["tuned.train.max_steps=2"], ["tuned"], "has changed: train.max_steps: null -> 2"),
        (["train.log_every=2"], ["first", "features", "tuned"], "has changed: train.log_every: 1 -> 2"),
        (["train.save_every=1", "train.keep=0"], [], "finished already"),
        (["features.resume=never"], ["features"], "== 2/3 features"),
    ]:
        command += change
        ran.clear()
        assert pipeline.main(command, config_dir) == 0
        assert ran == anew
        assert said in capsys.readouterr().err
    kept = sorted(path.parts[-4] for path in (tmp_path / "run").glob("*/previous/*/model.json"))
    assert kept == sorted(["tuned"] * 4 + ["first", "features"] * 2), "the former results are set aside"


def test_changed_pictures_run_everything_anew(
    tmp_path: Path, config_dir: str, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def add(name: str) -> None:
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(tmp_path / "pictures" / name[0] / f"{name}.png")

    for letter in "ab":
        (tmp_path / "pictures" / letter).mkdir(parents=True)
        for number in range(4):
            add(f"{letter}{number}")
    kept = [text for text in SETTINGS if not text.startswith("data")]
    command = [*kept, "data=folder", f"data.root={tmp_path / 'pictures'}", f"output_dir={tmp_path / 'run'}"]
    for _ in range(2):
        assert pipeline.main(command, config_dir) == 0
    assert ran == ["first", "features", "tuned"]
    add("b-late")
    assert pipeline.main(command, config_dir) == 0
    assert ran == ["first", "features", "tuned"] * 2
    assert "runs anew, for this has changed: pictures: " in capsys.readouterr().err


def test_a_failing_stage_stops_the_pipeline_and_the_same_command_goes_on(
    tmp_path: Path,
    config_dir: str,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend = pipeline.run_in_processes
    command = [*SETTINGS, f"output_dir={tmp_path / 'run'}"]
    for code in (2, 143):

        def fail(request: str, *, processes: int, code: int = code) -> int:
            of_features = Path(yaml.safe_load(request)["resolved"]["output_dir"]).name == "features"
            return code if of_features else pretend(request, processes=processes)

        monkeypatch.setattr(pipeline, "run_in_processes", fail)
        assert pipeline.main(command, config_dir) == code
        assert ran == ["first"], "what comes later has not run, what was finished not again"
        assert "features did not finish; the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(pipeline, "run_in_processes", pretend)
    assert pipeline.main(command, config_dir) == 0
    assert ran == ["first", "features", "tuned"]


@pytest.mark.parametrize(
    ("moment", "then"), [("archive_previous", []), ("archive_previous", ["tuned.seed=7"]), ("run_in_processes", [])]
)
def test_killed_where_a_changed_stage_begins_it_never_takes_old_results_for_new(
    tmp_path: Path, config_dir: str, ran: list[str], monkeypatch: pytest.MonkeyPatch, moment: str, then: list[str]
) -> None:
    command = [*SETTINGS, f"output_dir={tmp_path / 'run'}"]
    assert pipeline.main(command, config_dir) == 0
    ran.clear()

    def die(*given: Any, **how: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, moment, die)
        with pytest.raises(KeyboardInterrupt):
            pipeline.main([*command, "tuned.seed=7"], config_dir)
    assert pipeline.main([*command, *then], config_dir) == 0  # with the change, or with the change taken back
    assert ran == ["tuned"]


def test_a_second_pipeline_in_the_same_folder_is_refused(tmp_path: Path, config_dir: str, ran: list[str]) -> None:
    from vitexp.run_folder import RunLock

    with RunLock(tmp_path / "run"), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        pipeline.main([*SETTINGS, f"output_dir={tmp_path / 'run'}"], config_dir)
    assert ran == []


# ---- What is typed ---------------------------------------------------------------------------------------------------


def test_overrides_go_to_all_stages_or_to_one_and_win_over_the_file(config_dir: str) -> None:
    file = stages_of(["pipeline=tiny"], config_dir)
    assert [one.train.epochs for one in file.values()] == [60, 60, 1]
    given = ["pipeline=tiny", "train.epochs=5", "tuned.train.epochs=7", "model=vit_debug", "features.model=vit_tiny"]
    typed = stages_of(given, config_dir)
    assert [one.train.epochs for one in typed.values()] == [5, 5, 7]
    assert [one.choices["model"] for one in typed.values()] == ["vit_debug", "vit_tiny", "vit_debug"]
    assert [one.stage.name for one in typed.values()] == ["pretrain", "evaluate", "finetune"]
    *_, tuned = pipeline.plan(["tuned.train.epochs=7", "train.epochs=5", "pipeline=tiny"], config_dir).stages
    assert "train.epochs=7" in tuned.overrides, "in any order"
    more = ["train.epochs=3", "train={epochs:4}", "++tuned.train.epochs=8", "~tuned.group"]
    *_, tuned = pipeline.plan(["pipeline=tiny", *more], config_dir).stages
    assert tuned.overrides[-4:] == ("train={epochs:4}", "++train.epochs=8", "~group", "pipeline=none")


def test_labeling_hears_of_data_and_devices_and_of_what_is_said_to_it() -> None:
    given = ["pipeline=token_labeling", "data=fake", "data.num_train=24", "seed=3", "train.batch_size=8", "name=mine"]
    given += ["runtime.device=cpu", "label.runtime.threads=1", "label.k=3", "label.image_size=[64,32]"]
    _, labeling, tokens, plain = pipeline.plan(given, None).stages
    assert isinstance(labeling, pipeline.LabelStage)
    assert labeling.arguments(labeling.config(Path("/here"), None), Path("/here")) == [
        "teacher=/here/teacher",
        "k=3",
        "image_size=[64, 32]",
        "output=/here/label/store",
        "data=fake",
        "data.num_train=24",
        "runtime.device=cpu",
        "runtime.threads=1",
        "pipeline=none",
    ]
    one, other = (stage.config(Path("/here"), None) for stage in (tokens, plain))
    assert (one.seed, one.train.batch_size, one.train.token_labels) == (3, 8, "/here/label/store")
    assert other.train.token_labels is None
    unlike = {key for key, value in leaves(one.resolved) if dict(leaves(other.resolved)).get(key) != value}
    assert unlike == {"method.labels", "train.token_labels", "output_dir"}, "they are compared for nothing else"
    _, labeling, tokens, _ = pipeline.plan(["pipeline=token_labeling", "label.split=all"], None).stages
    assert tokens.config(Path("/here"), None).train.token_labels == "/here/label/store/train"
    assert "data=digits" in labeling.arguments(labeling.config(Path("/here"), None), Path("/here")), "not the teacher's"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["label.k=0"], ["stage label: k=0: a whole number"]),
        (["label.kk=3"], ["stage label: kk=3: no such key 'kk'"]),
        (["label.split=tset"], ["stage label: split='tset': one of train, val, all"]),
        (["label.from=maps"], ["stage label: k=5: from=maps takes maps as they are"]),
        (["teacher.run=nowhere"], ["teacher.run=nowhere: not the folder of a finished run, it has no summary.json"]),
        (["tokens.token_labels=lable"], ["token_labels=lable: no stage before it", "Did you mean 'label'?"]),
        (["tokens.token_labels=null"], ["stage tokens: method.labels=tokens: needs train.token_labels="]),
    ],
)
def test_a_mistake_about_labels_is_said_before_anything_runs(
    tmp_path: Path, ran: list[str], arguments: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        pipeline.main(["pipeline=token_labeling", *arguments, f"output_dir={tmp_path / 'run'}"], None)
    for word in words:
        assert word in str(error.value)
    assert ran == []
    assert not (tmp_path / "run").exists()


def test_a_value_of_the_file_reaches_its_stage_as_it_is(tmp_path: Path) -> None:
    plain = [None, True, 3, 1.0e-8, "word", "${seed}", "ä {b: [c]}", "a b, c=d", ""]
    otherwise_read = ["null", "true", "12", "1e-3", "it's", '"', "C:\\new\\", "\\'", "\\\\"]
    for value in [*plain, *otherwise_read, [*plain, *otherwise_read, ["a", None]], {"a": 1.5, "b": "x y"}]:
        (override,) = pipeline.parse_overrides([f"key={pipeline.quoted(value)}"])
        assert override.value() == value
        assert type(override.value()) is type(value)
    given = {"name": "it's a, b", "train.classes": None, "train": {"clip_norm": None}, "optim.betas": [0.9, 0.95]}
    place = own_pipeline(tmp_path, {"name": "tiny", "stages": {"one": given}})
    one = stages_of(["pipeline=tiny"], place)["one"]
    assert (one.name, one.train.classes, one.train.clip_norm) == ("it's a, b", None, None)
    assert one.optim["betas"] == [0.9, 0.95]


def test_folders_and_typed_values_may_hold_spaces_commas_and_quotes(
    tmp_path: Path, config_dir: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "compose_and_check", compose_and_check)  # all of it by Hydra
    folder = tmp_path / "my runs, 'the first'"
    text = str(folder).replace("'", "\\'")
    command = [
        *SETTINGS,
        f"output_dir='{text}'",
        "tuned.train.classes=[class_0,'class_1']",
        "tuned.train.clip_norm=null",
    ]
    assert pipeline.main(command, config_dir) == 0
    assert ran == ["first", "features", "tuned"]
    assert {path.name for path in folder.iterdir()} >= {*ran, pipeline.LEDGER}
    made_of = pipeline.read_ledger(folder)["tuned"]["made_of"]
    assert made_of["train.classes"] == ["class_0", "class_1"]
    assert made_of["train.clip_norm"] is None
    assert pipeline.main(command, config_dir) == 0
    assert len(ran) == 3


def test_without_a_folder_the_same_settings_in_any_order_find_their_own(workdir: Path, config_dir: str) -> None:
    def found(*overrides: str) -> Path:
        planned = pipeline.plan(list(overrides), config_dir)
        return pipeline.folder_of(planned, list(overrides), config_dir)

    one = found("pipeline=tiny", "seed=1", "name=mine")
    assert one.parent == workdir / "outputs" / "mine"
    assert one == found("name=mine", "seed=1", "pipeline=tiny")
    assert one != found("pipeline=tiny", "seed=2", "name=mine")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tunde.train.epochs=5"], ["tunde.train.epochs=5", "Did you mean 'tuned'?", "stages: first, features, tuned"]),
        (["tuned.train.epoch=5"], ["stage tuned: train.epoch=5: no such key", "Did you mean 'train.epochs'?"]),
        (["optim.lrr=1"], ["optim.lrr=1: no such key", "Did you mean 'optim.lr'?"]),
        (["lerning=1"], ["lerning=1: no such key"]),
        (["tuned.model=vit_deb"], ["stage tuned: model=vit_deb: no such option", "vit_debug"]),
        (["tuned.train.epochs=-5"], ["stage tuned: train.epochs=-5"]),
        (["tuned"], ["'tuned': expected key=value"]),
        (["seed=0,1"], ["seed=0,1: stands for several values", "start pipeline=tiny once for each"]),
        (["pipeline=tyni"], ["pipeline=tyni: no such option", "Did you mean 'tiny'?"]),
    ],
)
def test_a_mistake_is_one_clear_error_before_anything_runs(
    tmp_path: Path, config_dir: str, ran: list[str], arguments: list[str], words: list[str]
) -> None:
    chosen = [] if arguments[0].startswith("pipeline") else ["pipeline=tiny"]
    with pytest.raises(UserError) as error:
        pipeline.main([*chosen, *arguments, f"output_dir={tmp_path / 'run'}"], config_dir)
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
    assert ran == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"name": "tiny", "stages": {"a": {"parent": "b"}, "b": {}}}, "pipeline.stages.a.parent=b: no stage before it"),
        ({"name": "tiny", "stages": {"a": {}, "b": {"parent": ["a"]}}}, "pipeline.stages.b.parent=['a']: no stage"),
        ({"name": "tiny", "stages": {"train": {}}}, "pipeline.stages.train: a stage's name"),
        ({"name": "tiny", "stages": {"plots": {}}}, "pipeline.stages.plots: a stage's name"),
        ({"name": "tiny", "stages": {"a/b": {}}}, "pipeline.stages.a/b: a stage's name"),
        ({"name": "tiny", "stages": {"a": "finetune"}}, "pipeline.stages.a=finetune: expected settings"),
        ({"name": "tiny", "stages": {}}, "under stages, its stages in order"),
        ({"stages": {"a": {}}}, "pipeline=None: a pipeline's file has a name"),
        ({"name": "tiny", "stages": {"a": {}}, "baseline": "b"}, "pipeline.baseline=b: no stage has that name"),
        ({"name": "tiny", "stages": {"a": {"command": "lable"}}}, "a.command=lable: expected train or label"),
        ({"name": "tiny", "stages": {"a": {"token_labels": "b"}}}, "a.token_labels=b: no stage before it"),
        ({"name": "tiny", "stages": {"a": {}, "b": {"token_labels": "a"}}}, "b.token_labels=a: is no stage with"),
        ({"name": "tiny", "stages": {"a": A_LABELING, "b": {"parent": "a"}}}, "b.parent=a: labels pictures"),
        (
            {"name": "tiny", "stages": {"a": A_LABELING, "b": {"command": "label", "parent": "a"}}},
            "it can be no teacher",
        ),
        ({"name": "tiny", "stages": {"a": {**A_LABELING, "output": "maps"}}}, "a.output=maps: the store lies in"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        pipeline.plan(["pipeline=tiny"], own_pipeline(tmp_path, content))


@pytest.mark.parametrize("arguments", [["--multirun", "seed=0,1"], ["lr_finder"], ["--multirun", "pipeline=mae,none"]])
def test_a_pipeline_is_no_single_run(workdir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    from vitexp import cli

    chosen = [] if any("pipeline" in text for text in arguments) else ["pipeline=mae"]
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, *chosen])
    assert end.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("vitexp: pipeline=mae: --multirun and the commands take one run")
    assert not list(workdir.iterdir())


# ---- Whose pipelines -------------------------------------------------------------------------------------------------


def test_a_preset_of_ones_own_chooses_and_changes_a_pipeline(tmp_path: Path) -> None:
    config_dir = own_pipeline(tmp_path, TINY)
    preset = Path(config_dir) / "experiment" / "mine.yaml"
    preset.parent.mkdir()
    preset.write_text(
        "# @package _global_\nname: mine\ndefaults: [override /pipeline: tiny, override /model: vit_debug]\nseed: 3\n"
        "pipeline: {stages: {tuned: {train.epochs: 4}, again: {parent: tuned, stage: evaluate}}}\n"
    )
    stages = stages_of(["experiment=mine", "again.train.epochs=9"], config_dir)
    assert list(stages) == ["first", "features", "tuned", "again"]
    assert {one.name for one in stages.values()} == {"mine"}
    assert {one.choices["model"] for one in stages.values()} == {"vit_debug"}
    assert {one.seed for one in stages.values()} == {3}
    assert (stages["tuned"].train.epochs, stages["again"].train.epochs) == (4, 9)
    assert compose_and_check(["experiment=mine", "pipeline=none"], config_dir).seed == 3


SHIPPED = [f"pipeline={name}" for name in config_groups()["pipeline"] if name != "none"] + [
    f"experiment={path.stem}" for path in conf_dir().glob("experiment/*.yaml") if "/pipeline:" in path.read_text()
]


@pytest.mark.parametrize("option", SHIPPED)
def test_a_shipped_pipeline_composes_stage_by_stage(option: str) -> None:
    stages = stages_of([option])
    assert len(stages) > 2
    assert any(stage.parent or stage.teacher for stage in pipeline.plan([option], None).stages)
    for name, one in stages.items():
        assert Path(one.output_dir) == Path("here") / name
        assert one.group == "here"
        assert one.stage.needs_init <= (one.init_from is not None)


# ---- Killed ----------------------------------------------------------------------------------------------------------


def killed_pipelines(
    place: Path, plan: dict[str, Any], config_dir: str, settings: list[str] = SETTINGS
) -> dict[str, dict[str, Any]]:
    command = [sys.executable, str(DRIVER), str(place), json.dumps(plan), config_dir, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}
    assert list(found) == list(plan), done.stderr[-3000:]
    for report in found.values():
        assert report["last"] == 0, (report, done.stderr[-3000:])
    return found


def without_clock(folder: Path) -> tuple[Any, list[str], bytes]:
    """The report's figures, its table and its charts, but for images/s and minutes."""
    figures = json.loads((folder / "report.json").read_text())
    for stage in figures["stages"]:
        # A labeling killed right after its last picture has left no speed.
        stage["perf"] = None if stage["maps"] else sorted(stage["perf"])
    lines = (folder / "report.md").read_text().splitlines()
    lines = [" | ".join(line.split(" | ")[:-2]) if line.startswith("|") else line for line in lines]
    page = re.sub(rb"<td>[\d.]*</td><td>[\d.]*</td></tr>", b"", (folder / "report.html").read_bytes())
    return figures, lines, page


def test_killed_in_any_stage_or_between_it_ends_with_the_same_report(tmp_path: Path, config_dir: str) -> None:
    killed = [
        ("first", "step", 3),  # one update after its checkpoint
        ("pipeline", "replace", 3),  # first has finished, features is about to begin
        ("tuned", "step", 2),
    ]
    plan = {"whole": [], "killed": killed}
    found = killed_pipelines(tmp_path / "runs", plan, config_dir)
    assert all(all(report["killed"]) for report in found.values()), found
    assert without_clock(tmp_path / "runs" / "killed") == without_clock(tmp_path / "runs" / "whole")


@pytest.mark.slow
def test_killed_while_it_labels_or_right_after_it_ends_with_the_same_report(tmp_path: Path, config_dir: str) -> None:
    killed = [
        ("label", "replace", 3),  # two of three batches are whole
        ("pipeline", "replace", 3),  # label has finished, which the ledger does not know
        ("tokens", "step", 2),
    ]
    plan = {"whole": [], "killed": killed}
    found = killed_pipelines(tmp_path / "runs", plan, config_dir, LABELED)
    assert all(all(report["killed"]) for report in found.values()), found
    assert without_clock(tmp_path / "runs" / "killed") == without_clock(tmp_path / "runs" / "whole")
    stores = [open_store(tmp_path / "runs" / name / "label" / "store") for name in plan]
    assert stores[0].fingerprint() == stores[1].fingerprint()
    assert stores[0].values.tobytes() == stores[1].values.tobytes()


@pytest.mark.slow
def test_killed_at_random_moments_of_token_labeling_it_ends_with_the_same_report(
    tmp_path: Path, config_dir: str
) -> None:
    draw, stages = random.Random(1), ("teacher", "label", "tokens", "plain")
    points = [("label", call, n) for call in ("replace", "fsync") for n in range(1, 7)]
    points += [(stage, "step", n) for stage in ("teacher", "tokens", "plain") for n in (1, 3)]
    points += [("pipeline", "replace", n) for n in range(1, 13)]
    plan: dict[str, Any] = {"whole": []}
    plan |= {
        f"{n}": sorted(draw.sample(points, 4), key=lambda point: (*stages, "pipeline").index(point[0]))
        for n in range(10)
    }
    found = killed_pipelines(tmp_path / "runs", plan, config_dir, LABELED)
    assert sum(sum(report["killed"]) for report in found.values()) >= 25, found
    for name in plan:
        assert without_clock(tmp_path / "runs" / name) == without_clock(tmp_path / "runs" / "whole"), plan[name]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_report(tmp_path: Path, config_dir: str) -> None:
    draw = random.Random(0)
    stages = ("first", "features", "tuned")
    points = [(stage, "step", n) for stage, count in (("first", 6), ("tuned", 3)) for n in range(1, count + 1)]
    points += [(stage, call, n) for stage in ("first", "tuned") for call in ("rename", "fsync") for n in (1, 2)]
    points += [(stage, "time", draw.randrange(20, 400)) for stage in stages for _ in range(3)]
    # The ledger is written two or three times a stage, and each of the report's three files once.
    points += [("pipeline", "replace", n) for n in range(1, 13)]
    plan: dict[str, Any] = {"whole": []}
    plan |= {
        f"{n}": sorted(draw.sample(points, 3), key=lambda point: (*stages, "pipeline").index(point[0]))
        for n in range(12)
    }
    found = killed_pipelines(tmp_path / "runs", plan, config_dir)
    assert sum(sum(report["killed"]) for report in found.values()) >= 20, found
    for name in plan:
        assert without_clock(tmp_path / "runs" / name) == without_clock(tmp_path / "runs" / "whole"), plan[name]


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_stops_the_stage_with_its_code_and_the_same_command_goes_on(
    tmp_path: Path, config_dir: str, ran: list[str], signum: signal.Signals, code: int
) -> None:
    folder = tmp_path / "run"
    settings = [*SETTINGS, "first.train.epochs=4000", "train.save_every=100000", "first.train.eval_every=100000"]
    command = [*settings, f"output_dir={folder}"]
    started = [sys.executable, "-m", "vitexp", *command, "--config-dir", config_dir]
    process = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline, rows = time.monotonic() + 120, folder / "first" / "metrics.jsonl"
    while not (rows.exists() and rows.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no rows yet"
        time.sleep(0.05)
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert f"stopped by {signum.name}" in err
    assert "first did not finish; the same command goes on from there" in err.splitlines()[-1]
    assert "Traceback" not in out + err
    assert not (folder / "features").exists()
    assert len(list((folder / "first" / "checkpoints").glob("step_*"))) == 1
    assert pipeline.main(command, config_dir) == 0  # `ran` pretends to
    assert ran == ["first", "features", "tuned"]
    assert (folder / "first" / "checkpoints").is_dir(), "an interrupted stage is not set aside"
