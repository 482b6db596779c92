from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitexp.commands import plan as planning
from vitexp.commands.plan import lr_table, main, pictures_seen, slots_of
from vitexp.config import compose_and_check
from vitexp.errors import UserError
from vitexp.horizon import plan_horizon
from vitexp.schedules import constant, cosine
from vitexp.train import train

SMALL = ["model=vit_debug", "data=fake", "data.num_train=40", "train.batch_size=8", "runtime.precision=fp32"]


@pytest.fixture
def told(workdir: Path, capsys: pytest.CaptureFixture[str]):
    """The page that `plan` prints for overrides, its parts by name; `table` holds the lines of the rates."""

    def run(*overrides: str) -> dict[str, str]:
        assert main(list(overrides), None) == 0
        page, _, table = capsys.readouterr().out.partition("\n\n")
        parts: dict[str, str] = {}
        for line in page.splitlines():
            name = line[:11].strip() or next(reversed(parts))
            parts[name] = f"{parts.get(name, '')} {line[12:]}".strip()
        return {**parts, "table": table}

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two updates."""
    folder = tmp_path_factory.mktemp("plan") / "run"
    settings = ["evaluators=none", "tracking=none", "train.max_steps=2", "train.ema_decay=0.9", f"output_dir={folder}"]
    train(compose_and_check([*SMALL, *settings]))
    return folder


def test_vit_huge_is_counted_as_published_and_too_slow_to_be_measured_unasked(told, workdir: Path, monkeypatch):
    monkeypatch.setattr(planning, "matrix_gflops", lambda dtype, device: 100.0)
    page = told("model=vit_huge", "optim=adam", "train.batch_size=32", "runtime.precision=fp32")
    assert page["parameters"] == "630,777,610 with 10 classes; 632,045,800 with ImageNet's 1,000"
    assert page["forward"].startswith("334.6 GFLOPs a picture of 224x224x3, that is 167.3 G multiply-adds")  # timm's
    assert "weights 2.35 GiB + gradients 2.35 GiB + optimizer 4.70 GiB" in page["memory"]
    assert page["time"].startswith("not measured: 32 pictures' forward and backward might take 21 min here; probe=true")
    assert list(workdir.iterdir()) == []


def test_imagenets_count_is_not_told_twice(told):
    assert told(*SMALL, "data.num_classes=1000", "probe=false")["parameters"].count("1,000") == 1


def test_frozen_parameters_are_told_apart_and_cost_no_gradient(told):
    everything, head = (
        told(*SMALL, "probe=false", "init_from=null", f"stage.train_blocks={blocks}") for blocks in ("all", "0")
    )
    assert head["parameters"].endswith("; 330 of them trained")  # 32 x 10 + 10
    assert "gradients 0.0 MiB + optimizer 0.0 MiB" in head["memory"]
    assert "gradients 0.0 MiB" not in everything["memory"]
    flops = [float(page["training"].split(" GFLOPs each")[0].split()[-1]) for page in (everything, head)]
    assert 0.3 < flops[1] / flops[0] < 0.4  # the forward alone, out of three


def test_steps_and_pictures_are_those_the_loop_will_make(told):
    page = told(*SMALL, "train.accumulate=3", "train.epochs=4", "optim.lr=3e-4", "probe=false")
    assert page["steps"] == "2 updates an epoch (40 pictures, global batch 24), 4 epochs, 8 updates"
    assert page["training"].startswith("160 pictures seen")
    assert page["peak lr"] == "0.0003"
    assert page["time"] == "not measured (probe=false)"


def test_a_run_cut_short_says_so_and_counts_what_is_left(told):
    page = told(*SMALL, "train.epochs=4", "train.max_steps=7", "probe=false")
    assert page["steps"].endswith("20 updates; train.max_steps ends the run after 7")
    assert page["training"].startswith("56 pictures seen")


def test_memory_is_the_sum_of_its_parts_with_the_average_and_activations_that_grow_with_the_batch(told):
    def parts(*more: str) -> dict[str, float]:
        total, _, rest = told(*SMALL, "probe=false", "data.num_train=4096", *more)["memory"].partition(" MiB")
        found = re.findall(r"[=+] ([\w ]+) ([\d.,]+) MiB", rest)
        return {"total": float(total.replace(",", "")), **{name: float(size) for name, size in found}}

    small, large = parts("train.batch_size=64", "train.ema_decay=0.99"), parts("train.batch_size=640")
    for found in (small, large):
        assert found["total"] == pytest.approx(sum(found.values()) - found["total"], abs=0.3)
    assert small["averaged weights"] == small["weights"]
    assert list(large) == ["total", "weights", "gradients", "optimizer", "activations"]
    assert large["activations"] == pytest.approx(10 * small["activations"], rel=0.02)


def test_the_probe_makes_updates_of_the_run_and_takes_its_time_from_them(told, workdir: Path):
    page = told(*SMALL, "augment=deit", "train.ema_decay=0.9", "train.epochs=40")
    assert "20 updates of 8 made-up pictures measured" in page["time"]
    assert "(cpu, fp32, threads " in page["time"]
    assert float(page["time"].split(" at ")[1].split()[0].replace(",", "")) > 10
    assert list(workdir.iterdir()) == []


def test_a_model_that_is_too_slow_is_measured_with_fewer_pictures_when_asked(told, monkeypatch):
    monkeypatch.setattr(planning, "matrix_gflops", lambda dtype, device: 0.005)
    assert told(*SMALL)["time"].startswith("not measured")
    assert " updates of 2 made-up pictures measured" in told(*SMALL, "probe=true")["time"]


def test_a_model_that_does_not_fit_is_not_measured(told, monkeypatch):
    monkeypatch.setattr(planning, "free_memory", lambda device: 2**20)
    page = told(*SMALL, "probe=true")
    assert page["time"].startswith("not measured: 8 pictures need about ")
    assert page["time"].endswith("of memory, 1.0 MiB are free")


def test_a_run_is_planned_by_its_own_settings_with_overrides_and_without_touching_it(finished: Path, told):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    page = told(f"run={finished}")
    assert page["steps"].endswith("train.max_steps ends the run after 2")
    assert "averaged weights" in page["memory"]
    assert "of 8 made-up pictures" in page["time"]
    assert told(f"run={finished}/model.safetensors", "train.max_steps=5", "probe=false")["steps"].endswith("after 5")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_exported_weights_alone_tell_what_they_can(finished: Path, tmp_path: Path, told):
    for name in ("model.safetensors", "model.json"):
        shutil.copy(finished / name, tmp_path / name)
    by_file, by_folder = told(f"run={tmp_path}/model.safetensors"), told(f"run={tmp_path}")
    assert by_file == by_folder
    assert by_file["parameters"].endswith("with 10 classes")
    assert "picture of 32x32x3" in by_file["forward"]
    assert by_file["training"].startswith("not known")
    with pytest.raises(UserError, match=r"train.epochs=3: .* holds weights without the settings of their run"):
        main([f"run={tmp_path}", "train.epochs=3"], None)


def test_a_run_in_mlflow_is_fetched_and_planned(finished: Path, mlflow_uri: str, told):
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_uri)
    run_id = client.create_run(client.create_experiment("plan")).info.run_id
    for name in ("model.safetensors", "model.json", "config.yaml", "config.interpolated.yaml"):
        client.log_artifact(run_id, str(finished / name))
    asked = [f"run=mlflow:{run_id}", f"uri={mlflow_uri}", "probe=false"]
    assert told(*asked)["steps"] == told(f"run={finished}", "probe=false")["steps"]


def test_the_learning_rate_is_drawn_where_asked(told, workdir: Path):
    page = told(*SMALL, "probe=false", "plot=plots/lr.png")
    assert page["table"].rstrip().endswith("the learning rate is drawn in plots/lr.png")
    with Image.open(workdir / "plots" / "lr.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["probe=perhaps"], "probe=perhaps: expected true or false"),
        (["plot=lr.jpg"], "plot=lr.jpg: expected the name of a .png file"),
        (["run=not_there"], "run=not_there: there is no such run"),
        (["run=notes.txt"], "run=notes.txt: is no run folder and no exported weights"),
        (["run=empty"], "run=empty: not the folder of a run"),
        (["run=empty", "uri=x"], "uri=x: says where run=mlflow:<run id> is; run=empty is a path"),
        (["uri=x"], "uri=x: says where run=mlflow:<run id> is; there is no run= here"),
        (["model=vit_hug"], "model=vit_hug: no such option"),
        (["train.batch_siz=4"], "no such key 'train.batch_siz'"),
    ],
)
def test_what_cannot_be_planned_is_said_at_once(arguments: list[str], said: str, workdir: Path):
    (workdir / "notes.txt").write_text("")
    (workdir / "empty").mkdir()
    with pytest.raises(UserError) as error:
        main(arguments, None)
    assert said in str(error.value)


def test_pictures_of_dropped_short_batches_are_not_counted():
    horizon = plan_horizon(3, accumulate=1, epochs=2, max_steps=None)
    assert pictures_seen(horizon, global_batch=8, num_train=30) == 48
    assert pictures_seen(horizon, global_batch=12, num_train=30) == 60


def test_the_table_shows_first_top_and_last_rate():
    horizon = plan_horizon(10, accumulate=1, epochs=10, max_steps=None)
    rows = [line.split() for line in lr_table(partial(cosine, warmup_epochs=1.5), horizon, lr=1e-3)][1:]
    rates = {row[0]: float(row[2]) for row in rows}
    assert rates["0"] == 0
    assert rates["15"] == 1e-3
    assert 0 < rates["99"] < 1e-6
    assert len(rows) == 12


def test_the_top_is_found_to_the_update_in_a_long_run():
    horizon = plan_horizon(1251, accumulate=1, epochs=300, max_steps=None)
    rows = lr_table(partial(cosine, warmup_steps=10_003), horizon, lr=1e-3)
    assert any(row.split()[0] == "10,003" for row in rows)


def test_a_run_of_one_update_has_a_table_of_one_row():
    horizon = plan_horizon(10, accumulate=1, epochs=1, max_steps=1)
    assert len(lr_table(constant, horizon, lr=1e-3)) == 2
    assert len(lr_table(partial(constant, warmup_epochs=1), horizon, lr=1e-3)) == 2


@pytest.mark.parametrize(
    ("optimizer", "slots"),
    [
        (torch.optim.AdamW, 2),
        (partial(torch.optim.AdamW, amsgrad=True), 3),
        (partial(torch.optim.SGD, momentum=0.9), 1),
        (torch.optim.SGD, 0),
    ],
)
def test_slots_are_the_tensors_that_the_optimizer_really_keeps(optimizer, slots: int):
    assert slots_of(optimizer, weight_decay=0.1) == slots


def test_the_last_store_given_counts_whichever_way_it_is_named():
    from vitexp.locate import take_uri

    given = ["uri=a", "train.epochs=3", "tracking.uri=b"]
    assert take_uri(given) == ("b", ["train.epochs=3"])
    assert take_uri(["train.epochs=3"]) == (None, ["train.epochs=3"])
