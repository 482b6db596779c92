"""A finished run in a notebook: its model, what it does to a picture, its classes, and predictions.

run = vitexp.load_run("outputs/digits/2026-11-22_17-30-00")
run.predict("cat.jpg")[0].class_name
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitexp.data.batch_transforms import normalise
from vitexp.data.images import decode
from vitexp.data.transforms import ResizeCenterCrop
from vitexp.errors import BadImage, UserError
from vitexp.export import FORMAT, PREPROCESSING_KEYS, description_of, sha256_of

# One picture: a path, a file's bytes, a PIL image, a uint8 array (h, w) or (h, w, c), or a uint8 tensor (c, h, w).
Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Prediction:
    """What the model says about one picture. Probabilities are the softmax over all classes."""

    class_name: str
    probability: float
    top: list[tuple[str, float]]  # the most probable classes, best first; the first is class_name


@dataclass(frozen=True)
class TrainedRun:
    """What `load_run` gives. The model is in eval mode and float32 on `device`."""

    folder: Path
    model: nn.Module
    classes: list[str]
    config: dict[str, Any]  # the run's config.yaml; empty where only the weights were copied
    metrics: dict[str, float | None]  # of the evaluation that the weights come from
    stage: str
    preprocessing: dict[str, Any]
    architecture: dict[str, Any]
    device: torch.device
    _fit: ResizeCenterCrop

    def transform(self, picture: Picture) -> Tensor:
        """Float (c, h, w) on the CPU, resized, cropped and normalised as evaluation did. Raises BadImage."""
        return normalise(
            self.prepare(picture, "the picture")[None], self.preprocessing["mean"], self.preprocessing["std"]
        )[0]

    @torch.inference_mode()
    def predict(
        self, pictures: Picture | Iterable[Picture], *, batch_size: int = 64, topk: int = 5
    ) -> list[Prediction]:
        """A Prediction for each picture, in order: also for one picture a list, of one. Read and computed batch by
        batch, so that many paths need no more memory than `batch_size` pictures. Raises BadImage naming the file."""
        if not self.classes:
            raise UserError(f"{self.folder} has no classes to predict: its stage was {self.stage}")
        several = _several(pictures)
        found: list[Prediction] = []
        batch: list[Tensor] = []
        for number, picture in enumerate(several):
            batch.append(self.prepare(picture, f"picture {number}"))
            if len(batch) == batch_size:
                found += self._classify(batch, topk)
                batch = []
        return found + self._classify(batch, topk) if batch else found

    def _classify(self, batch: list[Tensor], topk: int) -> list[Prediction]:
        images = torch.stack(batch).to(self.device)
        logits = self.model(normalise(images, self.preprocessing["mean"], self.preprocessing["std"]))
        best = logits.float().softmax(dim=1).topk(min(max(topk, 1), len(self.classes)), dim=1)
        found = []
        for shares, numbers in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            top = [(self.classes[number], share) for number, share in zip(numbers, shares, strict=True)]
            found.append(Prediction(class_name=top[0][0], probability=top[0][1], top=top))
        return found

    def prepare(self, picture: Picture, name: str) -> Tensor:
        """uint8 (c, H, W) as the evaluation loader makes it."""
        pixels = _pixels(picture, name, channels=self.preprocessing["channels"])
        fixed = self._fit.fixed(pixels)
        return torch.from_numpy(self._fit.random(fixed[None], np.empty((1, 0)))[0])


def load_run(
    run_dir: str | os.PathLike[str], *, weights: str = "model.safetensors", device: str | torch.device = "cpu"
) -> TrainedRun:
    """The exported model of a run folder, ready to predict. `weights="model_best.safetensors"` takes the best one,
    `device="auto"` a GPU where there is one.

    Nothing in the folder can run code: the weights are safetensors, and only models of this package are built.
    Raises UserError naming the file that is missing, damaged, or does not belong to the weights."""
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"{folder} is {'a file, not a run folder' if folder.exists() else 'not there'}")
    path = folder / weights
    if not path.is_file():
        others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
        hint = f"there is {others}: pass weights=" if others else "a run writes it when it ends"
        raise UserError(f"{path} is not there; {hint}")
    place = _device(device)
    described = _describe(description_of(path))
    if sha256_of(path) != described["weights"]["sha256"]:
        raise UserError(f"{path} is damaged or of another export than {description_of(path).name}: checksums differ")
    model = _build(described["architecture"], description_of(path))
    _fill(model, path)
    preprocessing = described["preprocessing"]
    fit = {key: value for key, value in preprocessing.items() if key not in ("mean", "std", "channels")}
    try:
        fitter = ResizeCenterCrop(**fit)
    except TypeError as error:
        raise UserError(f"{description_of(path)}: preprocessing: {error}") from error
    return TrainedRun(
        folder=folder,
        model=model.to(place).eval(),
        classes=described["classes"],
        config=_config(folder / "config.yaml"),
        metrics=described["metrics"],
        stage=described["stage"],
        preprocessing=preprocessing,
        architecture=described["architecture"],
        device=place,
        _fit=fitter,
    )


def _describe(path: Path) -> dict[str, Any]:
    """The content of model.json, with the types that are relied on."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there: without it the weights cannot be used") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from error
    wanted = {
        "format": int, "weights": dict, "architecture": dict, "classes": list, "preprocessing": dict, "metrics": dict,
        "stage": str,
    }  # fmt: skip
    for key, kind in wanted.items():
        if not isinstance(described, dict) or not isinstance(described.get(key), kind):
            raise UserError(
                f"{path} is no description of exported weights: {key!r} is missing or not a {kind.__name__}"
            )
    if described["format"] != FORMAT:
        raise UserError(
            f"{path} has format {described['format']}, this version of vitexp reads {FORMAT}: another made it"
        )
    missing = [key for key in PREPROCESSING_KEYS if key not in described["preprocessing"]]
    if missing:
        raise UserError(f"{path}: preprocessing lacks {', '.join(missing)}")
    if not isinstance(described["weights"].get("sha256"), str):
        raise UserError(f"{path}: weights lacks sha256")
    return described


def _build(architecture: Mapping[str, Any], path: Path) -> nn.Module:
    """The untrained model that `architecture` names. Only public classes of vitexp.models are called."""
    arguments = dict(architecture)
    target = arguments.pop("_target_", None)
    refused = UserError(f"{path}: architecture _target_={target!r} is not a model of vitexp.models")
    module, _, name = str(target).rpartition(".")
    if not module.startswith("vitexp.models.") or name.startswith("_"):
        raise refused
    try:
        constructor = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise refused from None
    # A module's own imports are its attributes, too: what counts is where the thing was made.
    if not inspect.isclass(constructor) or not issubclass(constructor, nn.Module) or constructor.__module__ != module:
        raise refused
    parameters = inspect.signature(constructor).parameters
    if "pretrained" in parameters:
        arguments["pretrained"] = False  # its weights are replaced by the run's: nothing is downloaded for them
    try:
        return constructor(**arguments)
    except (TypeError, ValueError) as error:  # a misspelt argument; what the model itself refuses
        raise UserError(f"{path}: architecture: {_one_line(error)}") from error


def _fill(model: nn.Module, path: Path) -> None:
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from error
    own = model.state_dict()
    for key in [*own, *weights]:
        if key not in weights:
            raise UserError(f"{path} lacks {key}, which the architecture beside it has")
        if key not in own:
            raise UserError(f"{path} has {key}, which the architecture beside it lacks")
        if weights[key].shape != own[key].shape:
            raise UserError(f"{path}: {key} is {list(weights[key].shape)}, in the model {list(own[key].shape)}")
    model.load_state_dict(weights)


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} cannot be read: it holds no settings")
    return config


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device} is not to be had here: {_one_line(error)}") from error
    return place


def _several(pictures: Picture | Iterable[Picture]) -> Iterable[Picture]:
    if isinstance(pictures, (str, os.PathLike, bytes, Image.Image)):
        return [pictures]
    if isinstance(pictures, Tensor):
        return [pictures] if pictures.ndim == 3 else pictures
    if isinstance(pictures, np.ndarray) and pictures.ndim < 4:
        return [pictures]
    return pictures


def _pixels(picture: Picture, name: str, *, channels: int) -> np.ndarray:
    """uint8 (h, w, channels), decoded as the data sources decode."""
    if isinstance(picture, (str, os.PathLike)):
        return decode(picture, os.fspath(picture), channels)
    if isinstance(picture, bytes):
        return decode(picture, name, channels)
    if isinstance(picture, Image.Image):
        return decode(_encoded(picture, name), name, channels)
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu().movedim(0, -1).numpy() if picture.ndim == 3 else picture.detach().cpu().numpy()
    if not isinstance(picture, np.ndarray):
        raise UserError(
            f"{name} is a {type(picture).__name__}: a path, bytes, PIL image, uint8 array or tensor is understood"
        )
    if picture.ndim == 2:
        picture = picture[..., None]
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (1, 3, 4) or 0 in picture.shape:
        raise UserError(
            f"{name} is a {picture.dtype} array of shape {list(picture.shape)}: needed is uint8 (height, width) or "
            "(height, width, channels) with 1, 3 or 4 channels; a tensor has its channels first"
        )
    if picture.shape[2] == channels:
        return np.array(picture, order="C")  # a copy: torch warns of arrays that cannot be written to, as Pillow's
    return decode(
        _encoded(Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture), name), name, channels
    )


def _encoded(image: Image.Image, name: str) -> bytes:
    """The picture as a lossless file, so that `decode` treats its mode and transparency as it would the file's."""
    file = io.BytesIO()
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            image.save(file, "PNG", compress_level=0, exif=b"")
        else:
            image.save(file, "TIFF")
    except (OSError, ValueError, KeyError) as error:
        raise BadImage(name, f"a PIL image of mode {image.mode} that cannot be used: {_one_line(error)}") from error
    return file.getvalue()


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
