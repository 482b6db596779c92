from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from vitexp.config import compose_and_check
from vitexp.data.images import Source
from vitexp.profiling import WARMUP, make_profiler
from vitexp.run import build_run, open_source
from vitexp.train import train

TINY = ["model=vit_debug", "data=fake", "data.num_train=40", "train.batch_size=8", "runtime.precision=fp32"]


def test_the_updates_after_the_first_ones_are_in_the_table_and_the_trace(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO, logger="vitexp")
    profiler = make_profiler(tmp_path / "profile", updates=3)
    weight = torch.ones(8, 8)
    for _ in range(WARMUP + 3 + 2):
        weight.mm(weight)
        weight.mm(weight)
        profiler.step()
    profiler.stop()
    row = next(record.getMessage() for record in caplog.records if record.getMessage().endswith("aten::mm"))
    assert row.split()[3] == "2"  # calls an update
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert sum(event["name"] == "aten::mm" for event in events) == 6


def test_a_run_too_short_to_be_profiled_says_so_and_leaves_nothing(tmp_path: Path, caplog):
    profiler = make_profiler(tmp_path / "profile", updates=3)
    for _ in range(WARMUP + 1):
        profiler.step()
    profiler.stop()
    assert "before 5 updates" in caplog.text
    assert not (tmp_path / "profile").exists()


@pytest.mark.slow
def test_debug_profile_leaves_a_trace_in_the_run_folder_and_changes_no_loss(workdir: Path):
    plain = ["debug=profile", *TINY, "train.log_every=1"]
    train(compose_and_check([*plain, "output_dir=profiled"]))
    train(compose_and_check([*plain, "runtime.profile=null", "output_dir=plain"]))
    losses = [
        [json.loads(line)["train/loss"] for line in (workdir / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("profiled", "plain")
    ]
    assert losses[0] == losses[1]
    assert (workdir / "profiled" / "profile" / "trace.json").exists()
    assert not (workdir / "plain" / "profile").exists()


@pytest.mark.slow
def test_a_batch_learned_by_heart_is_told_from_one_that_is_not(workdir: Path, capsys):
    overfit = ["debug=overfit", *TINY, "optim.lr=3e-3"]
    summary = train(compose_and_check([*overfit, "train.max_steps=200", "output_dir=long"]))
    assert summary["learned_by_heart"]["near_zero"] is True
    assert "by heart    yes: the loss went from " in capsys.readouterr().out
    summary = train(compose_and_check([*overfit, "train.max_steps=10", "train.log_every=1", "output_dir=short"]))
    assert summary["learned_by_heart"]["near_zero"] is False


def test_what_is_learned_by_heart_is_one_batch_of_all_classes_without_noise(workdir: Path):
    noisy = ["model.drop_path=0.3", "model.dropout=0.1", "method.label_smoothing=0.1"]
    config = compose_and_check([*TINY, *noisy, "debug=overfit", "train.overfit=20"])
    source: Source = open_source(config)
    assert len(source.train) == 20
    assert set(torch.bincount(torch.as_tensor(source.train.labels), minlength=10).tolist()) == {2}
    run = build_run(config)
    assert run.architecture["drop_path"] == run.architecture["dropout"] == 0
    assert run.method.label_smoothing == 0
    assert config.optim["weight_decay"] == 0


@pytest.mark.parametrize("name", ["mae_pretrain", "lvvit_small", "vit_imagenet", "mae_finetune_base", "vit_pretrain"])
def test_experiments_can_be_learned_by_heart(name: str, tmp_path: Path):
    (tmp_path / "weights.safetensors").touch()
    (tmp_path / "store").touch()
    given = [f"init_from={tmp_path}/weights.safetensors", f"train.token_labels={tmp_path}/store"]
    wanted = given[:1] if "finetune" in name else given[1:] if "lvvit" in name else []
    config = compose_and_check([f"experiment={name}", "debug=overfit", "data=fake", *wanted])
    assert config.train.max_steps == 300
    assert config.augment["batch"] is None
    assert config.train.overfit == config.train.batch_size
