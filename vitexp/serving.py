"""A trained classifier in MLflow's model format: `mlflow.pyfunc.load_model("models:/cats/1").predict(["cat.jpg"])`.

In: a list, or a DataFrame of one column. Each text is the path of a picture, where there is such a file, or else a
picture's file in base64 (a `data:` URL, too); `params={"topk": 3}`. Out: a DataFrame with a row a picture, of the
columns that `python -m vitexp predict` writes. A picture that cannot be read has its reason in `error`.

The format's folder holds the exported pair, model.safetensors and model.json, and says that this module loads it: no
code is pickled, and whoever loads it needs vitexp installed. Paths are read where the model runs, so `mlflow models
serve` is for callers who may read that machine's pictures. Only vitexp.tracking and this module import MLflow."""

from __future__ import annotations

import base64
import binascii
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vitexp
from vitexp.errors import BadImage, UserError

if TYPE_CHECKING:
    import pandas

    from vitexp.trained import Prediction, TrainedRun

MODEL = "model"  # its name in every run: runs:/<run id>/model
TOPK = 5
BATCH = 64  # pictures in memory at a time
# One gray pixel as PNG, the example that MLflow keeps beside the signature: it works wherever the model does.
EXAMPLE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="

# All that write_format leaves.
FILES = (
    "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "input_example.json", "serving_input_example.json",
)  # fmt: skip

Row = dict[str, str | float | None]


# ---- predictions as a table ------------------------------------------------------------------------------------------


def columns(topk: int) -> list[str]:
    """class, probability, then both of each of the `topk` best, and error."""
    best = [f"top{place}_{what}" for place in range(1, topk + 1) for what in ("class", "probability")]
    return ["class", "probability", *best, "error"]


def row(prediction: Prediction) -> Row:
    found: Row = {"class": prediction.class_name, "probability": _digits(prediction.probability)}
    for place, (name, share) in enumerate(prediction.top, start=1):
        found |= {f"top{place}_class": name, f"top{place}_probability": _digits(share)}
    return found


def _digits(share: float) -> float:
    return float(f"{share:.6g}")  # as many as float32 has


# ---- what MLflow loads -----------------------------------------------------------------------------------------------


class Classifier:
    """What `mlflow.pyfunc.load_model` wraps; its `get_raw_model()` gives the TrainedRun."""

    def __init__(self, run: TrainedRun) -> None:
        self._run = run

    def get_raw_model(self) -> TrainedRun:
        return self._run

    def predict(self, data: pandas.DataFrame, params: dict[str, Any] | None = None) -> pandas.DataFrame:
        import pandas

        topk = max(1, min((params or {}).get("topk", TOPK), len(self._run.classes)))
        pictures = list(data.iloc[:, 0])
        rows: list[Row] = []
        for begin in range(0, len(pictures), BATCH):
            rows += self._rows(pictures[begin : begin + BATCH], begin, topk)
        return pandas.DataFrame(rows, columns=columns(topk))

    def _rows(self, pictures: list[str], begin: int, topk: int) -> list[Row]:
        rows: list[Row] = []
        good = []
        for number, text in enumerate(pictures, start=begin):
            try:
                good.append(self._run.prepare(_picture(text, f"picture {number}"), f"picture {number}"))
                rows.append({"error": None})
            except BadImage as error:
                rows.append({"error": error.reason})
        found = iter(self._run.predict(good, batch_size=BATCH, topk=topk) if good else [])
        return [one if one["error"] else one | row(next(found)) for one in rows]


def _picture(text: str, name: str) -> str | bytes:
    """The path, or the bytes of a file. Raises BadImage."""
    if os.path.isfile(text):
        return text
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise BadImage(name, "is no file here and no base64") from None


def _load_pyfunc(path: str) -> Classifier:
    """Called by MLflow with the folder of the format."""
    from vitexp.trained import load_run

    weights = [file.name for file in Path(path).glob("*.safetensors")]
    if len(weights) != 1:
        raise UserError(f"{path}: expected one .safetensors, found {', '.join(weights) or 'none'}")
    return Classifier(load_run(path, weights=weights[0], device="auto"))


# ---- what MLflow stores ----------------------------------------------------------------------------------------------


def quiet_mlflow() -> None:
    """To be called before MLflow is imported: quiet, with short time-outs; a person's own settings win."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # we retry; MLflow's default blocks for four minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # a server answers a large upload only once it has put it away
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # a locked database is an ERROR of 60 lines there, one notice here
    }.items():
        os.environ.setdefault(name, value)


def can_serve(description: Path) -> bool:
    """Whether exported weights are a classifier's, by their description."""
    try:
        return bool(_read(description)["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read(description: Path) -> dict[str, Any]:
    return json.loads(description.read_text(encoding="utf-8"))


def write_format(folder: Path, *, classes: int, **identity: Any) -> None:
    """MLmodel with the signature, and the packages needed, into an empty folder; the weights go beside them."""
    quiet_mlflow()
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    said = columns(min(TOPK, classes))
    signature = ModelSignature(
        inputs=Schema([ColSpec("string")]),  # without a name a list will do, and a column of any name
        outputs=Schema(
            [ColSpec("double" if name.endswith("probability") else "string", name, required=False) for name in said]
        ),
        params=ParamSchema([ParamSpec("topk", "long", TOPK)]),
    )
    mlflow.pyfunc.save_model(
        str(folder),
        loader_module=__name__,
        mlflow_model=Model(**identity),
        signature=signature,
        input_example=[EXAMPLE],
        # Named here, or MLflow starts a process that loads the model to find out: 10 s.
        pip_requirements=[f"vitexp=={vitexp.__version__}", f"mlflow=={mlflow.__version__}"],
    )


def read_format(folder: Path) -> TrainedRun:
    """The run, loaded as MLflow loads it."""
    quiet_mlflow()
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(folder)).get_raw_model()


def log_model(client: Any, run: Any, files: Iterable[Path], *, register: str | None) -> tuple[str, str | None]:
    """Id and registered version, once MLflow has the exported files as a model of this run. Explicit ids, and none of
    MLflow's global state.

    `files`: the weights, their description, and what shall lie beside them. With `register` it becomes a new version of
    the registered model of that name. One that was left half-way is finished."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    files, run_id, experiment = list(files), run.info.run_id, run.info.experiment_id
    described = _read(next(file for file in files if file.suffix == ".json"))
    model = next((one for one in _models(client, run) if one.status == LoggedModelStatus.PENDING), None)
    if model is None:
        model = client.create_logged_model(experiment, MODEL, run_id, model_type="classifier")
    for file in files:
        client.log_model_artifact(model.model_id, str(file))
    with tempfile.TemporaryDirectory() as beside:
        write_format(
            Path(beside), classes=len(described["classes"]), run_id=run_id, model_id=model.model_id,
            model_uuid=model.model_id, artifact_path=model.artifact_location,
        )  # fmt: skip
        client.log_model_artifacts(model.model_id, beside)
    _log_metrics(client, run_id, model.model_id, described["metrics"])
    outputs = client.get_run(run_id).outputs
    if all(one.model_id != model.model_id for one in (outputs.model_outputs if outputs else ())):
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    version = None if register is None else _register(client, model, register)
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)  # last: what was left before is done again
    return model.model_id, version


def model_of(client: Any, run: Any) -> dict[str, str]:
    """The exported files in the run's newest model by name, each with where it lies; none where it has no model."""
    from mlflow.entities import LoggedModelStatus

    whole = [one for one in _models(client, run) if one.status == LoggedModelStatus.READY]
    if not whole:
        return {}
    newest = max(whole, key=lambda one: one.creation_timestamp)
    files = client.list_logged_model_artifacts(newest.model_id)
    return {file.path: f"{newest.artifact_location}/{file.path}" for file in files if file.path not in FILES}


def _models(client: Any, run: Any) -> list[Any]:
    wanted = f"source_run_id = '{run.info.run_id}' AND name = '{MODEL}'"
    return client.search_logged_models([run.info.experiment_id], wanted)


def download(address: str, folder: str, *, store: str) -> str:
    """Path of the file that `model_of` found, in `folder`. Not by models:/<id>: MLflow would ask its default store."""
    from mlflow.artifacts import download_artifacts

    return download_artifacts(artifact_uri=address, dst_path=folder, tracking_uri=store)


def _log_metrics(client: Any, run_id: str, model_id: str, metrics: dict[str, float | None]) -> None:
    """The evaluation that the weights come from, for MLflow's table of models: the run's own points, so that its curves
    stay as they are."""
    from mlflow.entities import Metric

    points = []
    for key, value in metrics.items():
        same = [one for one in client.get_metric_history(run_id, key) if one.value == value]
        points += [
            Metric(key, one.value, one.timestamp, one.step, model_id=model_id, run_id=run_id) for one in same[:1]
        ]
    if points:
        client.log_batch(run_id, metrics=points)


def _register(client: Any, model: Any, name: str) -> str:
    """The version of the registered model `name` that this model is: a new one, unless it is one already."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Not models:/<id>, which a database's client would look up in MLflow's default store instead of its own.
    source, run_id = model.artifact_location, model.source_run_id
    versions = client.search_model_versions(f"name = '{name}' AND run_id = '{run_id}'")
    known = next((one for one in versions if one.source == source), None)
    return (known or client.create_model_version(name, source, run_id, model_id=model.model_id)).version
