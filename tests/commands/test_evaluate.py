"""A person measures a run on its own pictures and on others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vitexp import load_run
from vitexp.commands.evaluate import main
from vitexp.config import compose_and_check
from vitexp.data.sources.folder import folder
from vitexp.errors import UserError
from vitexp.train import train

COMMON = [
    "train.max_steps=4", "optim.lr=0.02", "train.batch_size=8", "runtime.device=cpu", "runtime.precision=fp32",
    "tracking=none", "train.workers=0", "model.in_channels=1", "data.channels=1", "data.mean=[0.2]", "data.std=[0.4]",
    "data.val_fraction=0.5",
]  # fmt: skip
ALIKE = ["runtime.precision=fp32", "runtime.device=cpu", "train.workers=0"]


def files(root: Path, *, seed: int, size: int = 32, count: int = 24) -> Path:
    rng = np.random.default_rng(seed)
    for number in range(count):
        file = root / f"class_{number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """With pictures in own/ and other/, and run/ that learned from own/ and measures its top2."""
    place = tmp_path_factory.mktemp("place")
    settings = ["model=vit_debug", "data=folder", f"data.root={files(place / 'own', seed=0)}", *COMMON]
    train(compose_and_check([*settings, "evaluators.classification.topk=[2]", f"output_dir={place / 'run'}"]))
    files(place / "other", seed=1, size=40)
    return place


def evaluated(run: Path, *arguments: str) -> dict:
    assert main([f"run={run}", *arguments, *ALIKE], None) == 0
    folder = run if run.is_dir() else run.parent
    return json.loads((folder / "evaluation.json").read_text())


def test_its_own_pictures_give_what_training_found(place):
    summary = json.loads((place / "run" / "summary.json").read_text())
    own = evaluated(place / "run")
    assert {"val/top2", "val/loss"} <= own.keys()
    for name, value in own.items():
        if name != "val/class_accuracy":
            assert value == pytest.approx(summary[name], rel=1e-5), name
    named = evaluated(place / "run", "data=folder", f"data.root={place / 'own'}", "data.val_fraction=0.5")
    assert named.pop("val/class_accuracy") == own.pop("val/class_accuracy")
    assert named == pytest.approx(own, rel=1e-5)


def test_other_pictures_are_prepared_as_the_run_prepared_its_own(place):
    """The option data=folder has another mean and std than the run, and colours."""
    other = ["data=folder", f"data.root={place / 'other'}", "data.val_fraction=0.9"]
    found = evaluated(place / "run", *other, "evaluators.classification.topk=[1]")
    run = load_run(place / "run")
    held_out = folder(str(place / "other"), val_fraction=0.9, channels=1).val
    assert held_out is not None
    losses = []
    for i, label in enumerate(held_out.labels.tolist()):
        with torch.no_grad():
            logits = run.model(run.transform(held_out.read(i))[None])
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([label]))))
    assert found["val/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert evaluated(place / "run", *other, "evaluators=knn").keys() == {"val/knn_top1"}


def test_its_own_pictures_may_be_gone(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    config = (tmp_path / "run" / "config.interpolated.yaml").read_text().replace(str(place / "own"), "/nowhere")
    (tmp_path / "run" / "config.interpolated.yaml").write_text(config)
    with pytest.raises(UserError, match=r"data\.root=/nowhere"):
        evaluated(tmp_path / "run")
    other = ["data=folder", f"data.root={place / 'other'}"]
    assert "val/top2" in evaluated(tmp_path / "run", *other)
    assert "val/top2" in evaluated(tmp_path / "run", f"data.root={place / 'other'}")


def test_a_method_with_parts_of_its_own_is_kept(place, tmp_path):
    root = f"data.root={place / 'own'}"
    tiny = ["model=vit_debug", "method=mae", "method.decoder_depth=1", "method.decoder_dim=16", "augment=light"]
    mae = [*tiny, "method.decoder_num_heads=2", "evaluators=reconstruction", "data=folder", root, *COMMON]
    train(compose_and_check([*mae, f"output_dir={tmp_path / 'run'}"]))
    found = evaluated(tmp_path / "run", "data=folder", root, "data.val_fraction=0.5")
    assert found.keys() == {"val/loss", "val/effective_rank"}
    assert found == pytest.approx(evaluated(tmp_path / "run"), rel=1e-5)


def test_a_runs_folder_cannot_have_other_code_run(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["evaluators"] = {"harm": {"_target_": "os.mkdir", "path": str(tmp_path / "harm")}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"evaluators\.harm\._target_=os\.mkdir: not allowed"):
        evaluated(tmp_path / "run", "data=folder", f"data.root={place / 'other'}")
    assert not (tmp_path / "harm").exists()


def test_bare_exports_need_only_data_and_other_classes_are_told_apart(place, tmp_path):
    for name in ("model.safetensors", "model.json"):
        shutil.copy(place / "run" / name, tmp_path)
    own = ["data=folder", f"data.root={place / 'own'}", "data.val_fraction=0.5"]
    found = evaluated(tmp_path / "model.safetensors", *own)
    assert found["val/loss"] == pytest.approx(evaluated(place / "run")["val/loss"], rel=1e-5)
    with pytest.raises(UserError, match="missing none; extra class_3, class_4"):
        evaluated(place / "run", "data=fake", "data.num_classes=5")
    with pytest.raises(UserError, match=r"data\.rot.*Did you mean 'data\.root'"):
        evaluated(place / "run", "data=folder", "data.rot=x")
