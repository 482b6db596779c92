"""What init_from= may name besides files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vitexp.config import compose_and_check
from vitexp.errors import UserError
from vitexp.run import build_run
from vitexp.tracking import RECORD_NAME
from vitexp.train import train

SETTINGS = ["model=vit_debug", "data=fake", "data.num_train=16", "data.num_val=8", "train.batch_size=8"]
SETTINGS += ["train.max_steps=2", "train.workers=0", "augment=none"]


@pytest.fixture(scope="module")
def run_in_mlflow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run's folder, its id in MLflow and the store."""
    place = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{place}/mlflow.db"
    train(compose_and_check([*SETTINGS, f"output_dir={place}/run", f"tracking.uri={uri}"]))
    stores = json.loads((place / "run" / RECORD_NAME).read_text())["stores"]
    return place / "run", next(iter(stores.values()))["run_id"], uri


@pytest.mark.parametrize("form", ["mlflow:{}", "runs:/{}"])
def test_a_run_in_mlflow_gives_its_best_weights_to_start_from(
    run_in_mlflow: tuple[Path, str, str], workdir: Path, form: str
) -> None:
    folder, run_id, uri = run_in_mlflow
    asked = [*SETTINGS, "stage=finetune", f"init_from={form.format(run_id)}", f"tracking.uri={uri}"]
    run = build_run(compose_and_check([*asked, "stage.head=keep"]))
    best = load_file(folder / "model_best.safetensors")
    assert all(torch.equal(tensor, best[key]) for key, tensor in run.backbone.state_dict().items())
    assert any(f"{run_id}/model_best.safetensors (timm)" in note for note in run.notes)


@pytest.mark.parametrize(
    ("name", "uri", "said"),
    [
        ("mlflow:0123456789abcdef", None, "^init_from=mlflow:0123456789abcdef: .*no such run; give tracking.uri="),
        ("mlflow:{}", "sqlite:///nowhere/mlflow.db", "^init_from=.*there is no MLflow store .*nowhere/mlflow.db"),
        ("hf:google", None, "^hf:google: .*hf:<owner>/<name>"),
        ("timm:vit_tinny_patch16_224", None, "^timm:vit_tinny_patch16_224: timm has no such model.*vit_tiny_patch16"),
        ("hub:google", None, "^init_from=hub:google: no such file"),
    ],
)
def test_a_start_that_is_not_there_is_one_clear_error(
    run_in_mlflow: tuple[Path, str, str], workdir: Path, name: str, uri: str | None, said: str
) -> None:
    _, run_id, store = run_in_mlflow
    with pytest.raises(UserError, match=said) as caught:
        build_run(compose_and_check([*SETTINGS, f"init_from={name.format(run_id)}", f"tracking.uri={uri or store}"]))
    assert len(str(caught.value).splitlines()) <= 3
