"""What the command leaves: a whole folder or none, the weights asked for, a card with nothing but facts."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from vitexp import checkpoint, export_formats, load_run
from vitexp.commands import export
from vitexp.config import compose_and_check
from vitexp.errors import UserError
from vitexp.model_card import command_of, read_records
from vitexp.train import train

SETTINGS = [
    "model=vit_debug",
    "data=fake",
    "data.num_train=64",
    "data.num_val=20",
    "data.num_classes=6",
    "train.max_steps=4",
    "train.batch_size=32",
    "train.save_every=1",
    "train.keep=3",
    "train.ema_decay=0.5",
    "optim.lr=0.01",
    "optim.betas=[0.9,0.95]",
    "runtime.device=cpu",
    "runtime.precision=fp32",
    "tracking=none",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(compose_and_check([*SETTINGS, f"output_dir={folder}"]))
    return folder


def states(run: Path, part: str) -> list[dict[str, torch.Tensor]]:
    paths = sorted((run / "checkpoints").iterdir())
    return [checkpoint.load(checkpoint.open_checkpoint(path))[part] for path in paths]


@pytest.mark.parametrize("name", ["safetensors", "timm", "hf", "mlflow"])
def test_an_export_lies_in_the_runs_folder_with_its_card(run, name, capsys):
    if name == "hf":
        pytest.importorskip("transformers")
    assert export.main([f"run={run}", f"format={name}"], None) == 0
    folder = run / "export" / name
    form = export_formats.FORMATS[name]
    assert {path.name for path in folder.iterdir()} <= {"README.md", *form.files}
    difference, largest = export_formats.largest_difference(load_run(run), form.reopen(folder))
    assert difference < 1e-5 < largest
    assert "largest difference" in capsys.readouterr().out
    assert list(run.glob("export/.*")) == []


def test_the_card_holds_what_the_run_recorded(run, tmp_path):
    export.main([f"run={run}", "format=safetensors", f"output={tmp_path / 'out'}"], None)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = card.split("---\n")[1]
    assert yaml.safe_load(front)["library_name"] == "vitexp"
    summary = json.loads((run / "summary.json").read_text())
    described = json.loads((run / "model.json").read_text())
    wanted = [summary["data"]["fingerprint"], f"{summary['parameters']:,}", summary["versions"]["torch"]]
    wanted += [f"| {key} | {value:.6g} |" for key, value in described["metrics"].items()]
    wanted += [", ".join(described["classes"]), str(described["preprocessing"]["mean"]), "| optim.lr | 0.01 |"]
    wanted += ["python -m vitexp export run=", f'load_run("{tmp_path / "out"}")', "## Licence"]
    assert [words for words in wanted if words not in card] == []


def test_the_cards_command_makes_the_runs_settings_again(run):
    command = command_of(read_records(run), None)
    assert command is not None
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "vitexp"]
    again = compose_and_check(words[3:])
    saved = yaml.safe_load((run / "config.yaml").read_text())
    for side in (again.resolved, saved):
        side.pop("output_dir")
    assert again.resolved == saved
    assert set(words[3:]) <= set(SETTINGS)  # and nothing but what was given


@pytest.mark.parametrize(
    "given",
    [
        ["experiment=digits_resnet18", "+model.options.drop_rate=0.1"],
        ["data=folder", "data.root='/nowhere at all/it\\'s'", "train.classes=[cat,'a, b','1']", "name='true'"],
        ["optim.no_decay=mae_pretrain", "train.clip_norm=null", "schedule.min_lr=1e-6", "model.drop_path=0.25"],
    ],
)
def test_settings_of_every_kind_are_written_as_they_were_given(given):
    from vitexp.model_card import Records, _composed

    choices, flat = _composed(given, None)
    composed: dict = {}
    for key, value in flat.items():
        place = composed
        *parents, leaf = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    command = command_of(Records(settings={}, composed=composed | {"choices": choices}, summary={}), None)
    assert command is not None
    assert _composed(shlex.split(command)[3:], None)[1] == flat


def test_without_settings_the_card_says_so(run, tmp_path):
    for name in ("model.safetensors", "model.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    export.main([f"run={tmp_path}/model.safetensors", "format=timm", f"output={tmp_path}/out"], None)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "settings of the run did not lie beside its weights" in card
    assert "could be composed again" in card


def test_the_last_checkpoints_are_averaged(run, tmp_path):
    export.main([f"run={run}", "format=safetensors", "average=2", f"output={tmp_path}/out"], None)
    found = load_run(tmp_path / "out")
    older, newest = states(run, "model")[-2:]
    for name, tensor in found.model.state_dict().items():
        key = f"backbone.{name}"
        assert torch.equal(tensor, ((older[key].double() + newest[key].double()) / 2).float()), name
    assert not torch.equal(found.model.head.weight, newest["backbone.head.weight"])
    assert found.metrics == {}  # nobody has measured these weights
    assert "checkpoints of steps 3, 4" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_moving_average_comes_with_what_was_measured_of_it(run, tmp_path):
    export.main([f"run={run}", "format=safetensors", "ema=true", f"output={tmp_path}/out"], None)
    found = load_run(tmp_path / "out")
    kept = states(run, "ema")[-1]
    assert all(torch.equal(tensor, kept[f"backbone.{name}"]) for name, tensor in found.model.state_dict().items())
    assert found.metrics
    assert set(found.metrics) == {name for name in load_run(run).metrics if name.startswith("val_ema/")}


def test_an_export_is_replaced_only_when_asked_and_nothing_else_ever(run, tmp_path):
    output, asked = tmp_path / "out", [f"run={run}", f"output={tmp_path / 'out'}"]
    export.main([*asked, "format=timm"], None)
    before = (output / "README.md").read_bytes()
    with pytest.raises(UserError, match="overwrite=true replaces it"):
        export.main([*asked, "format=safetensors"], None)
    assert (output / "README.md").read_bytes() == before
    export.main([*asked, "format=safetensors", "overwrite=true"], None)
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "model.json", "model.safetensors"]
    (output / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"no export to be replaced, it holds thesis\.tex"):
        export.main([*asked, "format=timm", "overwrite=true"], None)
    with pytest.raises(UserError, match=r"is no export to be replaced"):
        export.main([f"run={run}", f"output={run}", "format=timm", "overwrite=true"], None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_export_that_computes_something_else_is_not_kept(run, tmp_path, monkeypatch):
    from dataclasses import replace

    wrong = replace(export_formats.FORMATS["timm"], reopen=lambda folder: lambda images: torch.zeros(len(images), 6))
    monkeypatch.setitem(export_formats.FORMATS, "timm", wrong)
    with pytest.raises(UserError, match="does not compute what the run does"):
        export.main([f"run={run}", "format=timm", f"output={tmp_path / 'out'}"], None)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_said_before_anything_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_formats, "is_installed", lambda package: package != "onnxscript")
    with pytest.raises(UserError, match=r"format=onnx needs onnxscript: pip install 'vitexp\[export\]'"):
        export.main([f"run={run}", "format=onnx", f"output={tmp_path / 'out'}"], None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["format=timm"], r"run= is missing\nusage"),
        (["run=RUN"], r"format= is missing\nusage"),
        (["run=RUN", "format=onx"], "Did you mean 'onnx'"),
        (["run=RUN", "fromat=onnx"], "no such key 'fromat'. Did you mean 'format'"),
        (["run=RUN", "format=timm", "average=0"], "average=0"),
        (["run=RUN", "format=timm", "average=9"], "average=9: .*3 checkpoints, of steps 2, 3, 4"),
        (["run=RUN", "format=timm", "ema=maybe"], "ema=maybe"),
        (["run=RUN", "format=timm", "average=2", "ema=true"], "average and ema each say"),
        (["run=RUN", "format=timm", "ema=true", "weights=model_best.safetensors"], "ema and weights each say"),
        (["run=RUN", "format=timm", "weights=best"], "weights=best"),
        (["run=nowhere", "format=timm"], "no such run"),
    ],
)
def test_a_mistake_is_told(run, tmp_path, given, words):
    with pytest.raises(UserError, match=words):
        export.main([*(text.replace("RUN", str(run)) for text in given), f"output={tmp_path / 'out'}"], None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_line_says_what_goes_on_and_where_it_is(run, tmp_path):
    pytest.importorskip("onnxscript")
    command = [sys.executable, "-m", "vitexp", "export", f"run={run}", "format=onnx", f"output={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["writing onnx …", "opening it again, to compare it with the run …"]
    first, second = done.stdout.splitlines()
    assert first == f"onnx in {tmp_path / 'out'}: README.md, model.onnx"
    assert "largest difference" in second


def test_an_export_for_mlflow_is_registered_as_a_version_of_its_run(tmp_path, mlflow_uri, capsys):
    from mlflow import MlflowClient

    folder = tmp_path / "run"
    train(
        compose_and_check(
            [*SETTINGS[:-1], "tracking.model=false", f"tracking.uri={mlflow_uri}", f"output_dir={folder}"]
        )
    )
    assert export.main([f"run={folder}", "format=mlflow", "register=fakes"], None) == 0
    client = MlflowClient(mlflow_uri)
    (version,) = client.search_model_versions("name = 'fakes'")
    assert client.get_run(version.run_id).data.tags["run_dir"] == str(folder)
    assert f"models:/fakes/1 in {mlflow_uri}" in capsys.readouterr().out
    there = {path.name for path in Path(version.source.removeprefix("file://")).iterdir()}
    assert {"MLmodel", "README.md", "model.safetensors", "model.json"} <= there


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["format=timm", "register=a"], "^register=a: MLflow registers format=mlflow, not format=timm"),
        (["format=mlflow", "register=a/b"], "^register=a/b: .* without / :"),
        (["format=mlflow", "register=a"], "^register=a: .* does not say which run in MLflow it is"),
    ],
)
def test_what_cannot_be_registered_is_said(run, tmp_path, given, said):
    with pytest.raises(UserError, match=said):
        export.main([f"run={run}", f"output={tmp_path / 'out'}", *given], None)
