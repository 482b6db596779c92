"""Runs with token labels: killed and started again they end the same, and another store does not go unseen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.data.made_up_store import made_up_store
from tests.test_resume import RUN, assert_equal, assert_same_run, final_state, killed_runs, rows
from vitexp.config import compose_and_check
from vitexp.run import open_source

# RandAugment on the whole picture and its map, erasing, mixup, MixToken, batch norm.
LABELLED = [
    "method=token_labeling",
    "augment=lvvit",
    "augment.policy=rand-m9-n3-mstd0.5-inc1",
    "augment.mixup=0.8",
    "augment.erasing=0.5",
    "model.patch_size=8",
    "model.drop_path=0.2",
]
LVVIT = [
    *("model=lvvit", "model.image_size=32", "model.embed_dim=16", "model.depth=2", "model.num_heads=2"),
    "model.stem_channels=4",
]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    source = open_source(compose_and_check([*RUN]))
    return made_up_store(tmp_path / "store", source.train, source.classes)


@pytest.mark.slow
def test_killed_with_token_labels_it_ends_bit_for_bit_the_same(tmp_path: Path, store: Path) -> None:
    with_maps = [*LABELLED, *LVVIT, f"train.token_labels={store}"]
    here = killed_runs(
        tmp_path,
        {"whole": [], "killed": [("step", 3), ("rename", 3)]},
        *with_maps,
        "train.workers=0",
    )
    assert all(here["killed"]["killed"])
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    workers = {"workers": [("step", 5)]}
    assert all(killed_runs(tmp_path, workers, *with_maps, "data.cache=none", "train.workers=2")["workers"]["killed"])
    assert_equal(final_state(tmp_path / "whole"), final_state(tmp_path / "workers"), "state")
    assert rows(tmp_path / "whole") == rows(tmp_path / "workers")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert len(summary["token_labels"]) == 12


def test_going_on_with_another_store_is_said(tmp_path: Path, store: Path) -> None:
    from vitexp.train import train

    settings = [*RUN, *LABELLED, "augment.mixup=0", f"train.token_labels={store}", f"output_dir={tmp_path / 'run'}"]
    settings += ["train.workers=0", "train.eval_every=1000"]
    first = train(compose_and_check([*settings, "train.max_steps=2"]))
    log = tmp_path / "run" / "train.log"
    assert "has changed" not in log.read_text()
    assert "token labels of made up 0: 3 classes in each of 4 x 4 cells" in log.read_text()
    shutil.rmtree(store)
    source = open_source(compose_and_check([*RUN]))
    made_up_store(store, source.train, source.classes, seed=1)
    second = train(compose_and_check([*settings, "train.max_steps=3"]))
    assert "token labels: 1 added, 1 gone" in log.read_text()
    assert first["token_labels"] != second["token_labels"]
