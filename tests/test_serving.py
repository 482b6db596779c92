"""What a run leaves in MLflow is a model that MLflow loads by itself, and it says what `vitexp predict` says."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitexp import tracking
from vitexp.commands import predict
from vitexp.errors import UserError
from vitexp.export import export_model
from vitexp.journal import Journal
from vitexp.models.vit import VisionTransformer
from vitexp.tracking import Mirror

SIZE = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
CLASSES = ["cat", "dog", "鸟"]


def finished_run(folder: Path, *, classes: list[str]) -> Path:
    """A run folder with a journal and the best weights of its evaluation."""
    torch.manual_seed(0)
    model = VisionTransformer(**SIZE)
    torch.nn.init.normal_(model.head.weight, std=0.5)  # a new head says nothing
    export_model(
        folder,
        model.state_dict(),
        architecture={"_target_": "vitexp.models.vit.VisionTransformer", **SIZE},
        classes=classes,
        preprocessing={
            "image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_fraction": 1.0, "interpolation": "bilinear",
            "channels": 3,
        },
        metrics={"val/top1": 0.75, "val/loss": float("nan")},
        stage="pretrain",
        filename="model_best.safetensors",
    )  # fmt: skip
    journal = Journal(folder / tracking.JOURNAL_NAME)
    for step, top1 in enumerate((0.5, 0.75, 0.625)):
        journal.append({"step": step, "epoch": float(step), "val/top1": top1})
    journal.close()
    return folder


@dataclass(frozen=True)
class Served:
    """A run that has ended, and its store."""

    folder: Path
    uri: str
    run_id: str
    client: Any


def mirrored(folder: Path, uri: str, **options: Any) -> Served:
    from mlflow import MlflowClient

    mirror = Mirror(folder, root=folder.parent, uri=uri, run_name="run", params={}, tags={}, **options)
    mirror.artifacts(["model_best.safetensors", "model_best.json"])
    assert mirror.close(timeout_s=60)
    assert mirror.run_id is not None
    return Served(folder, uri, mirror.run_id, MlflowClient(uri))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Served:
    place = tmp_path_factory.mktemp("served")
    shutil.copyfile(mlflow_template, place / "mlflow.db")
    folder = finished_run(place / "run", classes=CLASSES)
    return mirrored(folder, f"sqlite:///{place}/mlflow.db", register="pets")


@pytest.fixture
def mlflow(served: Served) -> Iterator[Any]:
    import mlflow.pyfunc

    mlflow.set_tracking_uri(served.uri)
    yield mlflow
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    paths = [folder / "a.png", folder / "b.jpg"]
    for path, size in zip(paths, [(40, 30), (16, 20)], strict=True):
        Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)).resize(size).save(path)
    return paths


def as_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def predicted(served: Served, pictures: list[Path], output: Path) -> list[dict[str, Any]]:
    """What `python -m vitexp predict` writes of them."""
    weights = served.folder / "model_best.safetensors"
    predict.main([f"run={weights}", f"input={pictures[0].parent}", f"output={output}", "device=cpu"], None)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "file"} for row in rows]


@pytest.mark.parametrize("place", ["models:/pets/1", "runs:/{run_id}/model"])
def test_mlflow_says_of_paths_and_of_base64_what_predict_says(served, pictures, mlflow, tmp_path, place) -> None:
    import pandas

    model = mlflow.pyfunc.load_model(place.format(run_id=served.run_id))
    wanted = predicted(served, pictures, tmp_path / "wanted.jsonl")
    assert len({row["probability"] for row in wanted}) == 2
    encoded = [as_base64(pictures[0]), f"data:image/jpeg;base64,{as_base64(pictures[1])}"]
    for given in (list(map(str, pictures)), encoded, pandas.DataFrame({"any name": encoded})):
        assert model.predict(given).to_dict("records") == wanted
    assert list(model.predict(encoded, params={"topk": 1}).columns) == [
        "class", "probability", "top1_class", "top1_probability", "error",
    ]  # fmt: skip


def test_what_cannot_be_read_has_its_reason_and_costs_no_other_row(served, pictures, mlflow, tmp_path) -> None:
    torn = base64.b64encode(pictures[0].read_bytes()[:60]).decode()
    found = mlflow.pyfunc.load_model("models:/pets/1").predict([str(tmp_path / "none.png"), torn, str(pictures[0])])
    assert found["error"][0] == "is no file here and no base64"
    assert found["error"].notna().tolist() == [True, True, False]
    assert found["class"].notna().tolist() == [False, False, True]


@pytest.mark.slow  # 5 s: torch and MLflow are imported
def test_a_process_that_knows_nothing_but_the_address_loads_it(served, pictures, mlflow) -> None:
    own = mlflow.pyfunc.load_model("models:/pets/1").predict([str(pictures[0])])["class"][0]
    code = (
        "import sys, mlflow; mlflow.set_tracking_uri(sys.argv[1])\n"
        "print(ascii(mlflow.pyfunc.load_model(sys.argv[2]).predict([sys.argv[3]])['class'][0]))"
    )
    command = [sys.executable, "-c", code, served.uri, "models:/pets/1", str(pictures[0])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pictures[0].parent, timeout=120)
    assert done.stdout.strip() == ascii(own), done.stderr


def test_the_weights_lie_in_mlflow_once_and_a_run_starts_from_them(served, tmp_path) -> None:
    store = Path(served.uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert len(list(store.rglob("*.safetensors"))) == 1
    assert not list(store.rglob("*.pkl"))
    folder, weights = tracking.fetch(served.run_id, root=tmp_path, uri=served.uri)
    for name in (weights, "model_best.json"):
        assert (folder / name).read_bytes() == (served.folder / name).read_bytes()


def test_the_model_has_the_evaluation_of_its_weights_and_the_run_its_curve(served) -> None:
    (model,) = served.client.search_logged_models([served.client.get_run(served.run_id).info.experiment_id])
    assert {(metric.key, metric.value, metric.step) for metric in model.metrics} == {("val/top1", 0.75, 1)}
    history = served.client.get_metric_history(served.run_id, "val/top1")
    assert [(point.step, point.value) for point in history] == [(0, 0.5), (1, 0.75), (2, 0.625)]
    assert served.client.get_run(served.run_id).data.metrics["val/top1"] == 0.625


def test_delivering_again_makes_no_second_version(served) -> None:
    assert tracking.deliver(served.folder).artifacts == 0
    (served.folder / "model_best.safetensors").touch()  # as after a resume that found the same weights again
    assert tracking.deliver(served.folder).artifacts == 1
    versions = served.client.search_model_versions("name = 'pets'")
    assert sorted(int(one.version) for one in versions) == [1, 2]


def test_without_classes_or_with_model_false_the_weights_are_plain_artifacts(mlflow_uri, tmp_path) -> None:
    features = mirrored(finished_run(tmp_path / "features", classes=[]), mlflow_uri)
    asked = mirrored(finished_run(tmp_path / "asked", classes=CLASSES), mlflow_uri, model=False)
    for one in (features, asked):
        there = [entry.path for entry in one.client.list_artifacts(one.run_id)]
        assert there == ["model_best.json", "model_best.safetensors"]


@pytest.mark.parametrize(("options", "said"), [({"model": False}, "needs tracking.model=true"), ({}, "without / :")])
def test_a_name_that_cannot_be_registered_is_said_at_the_start(tmp_path, options, said) -> None:
    with pytest.raises(UserError, match=said):
        Mirror(tmp_path, root=tmp_path, run_name="run", params={}, tags={}, register="a/b", **options)
