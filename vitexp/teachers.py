"""Teachers: classifiers that are done learning, for labels of places (labeling.py) and for distillation.

A teacher is a run, weights that a run exported, or a network of timm's with timm's weights. Other weights become a run
by `python -m vitexp stage=evaluate init_from=<file> model=… data=…`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitexp.config import RAW_NAME, RunConfig, build
from vitexp.data.label_store import class_difference
from vitexp.data.transforms import Interpolation, Resizer
from vitexp.errors import UserError, nearest
from vitexp.export import sha256_of
from vitexp.locate import Located, locate
from vitexp.models.checks import height_width
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.weights import load_weights
from vitexp.models.weights_hub import TIMM, ask_hub
from vitexp.trained import load_run

Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Teacher:
    """A classifier and what it is shown."""

    model: nn.Module
    columns: Sequence[int]  # of its logits, those of the data's classes, in their order
    image_size: Size
    mean: Sequence[float]
    std: Sequence[float]
    channels: int
    interpolation: Interpolation
    resizer: Resizer
    facts: Mapping[str, Any]  # name, weights_sha256


class Onlooker(nn.Module):
    """A teacher in front of its student's batches: (b, k) logits of the data's classes, in their order.

    It is asked of pictures (b, c, h, w) as the student is shown them, augmented, mixed and normalised by the student's
    mean and std. Where its own normalisation, number of channels or size differ they are changed to its own."""

    scale: Tensor | None  # (c, 1, 1)
    shift: Tensor | None

    def __init__(self, teacher: Teacher, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) > teacher.channels:
            raise UserError(
                f"teacher={teacher.facts['name']}: sees {teacher.channels} channels, the pictures have {len(mean)}"
            )
        self.name, self.weights_sha256 = str(teacher.facts["name"]), str(teacher.facts["weights_sha256"])
        self.model = teacher.model.eval().requires_grad_(False)
        self.image_size, self.channels = teacher.image_size, teacher.channels
        self.interpolation = teacher.interpolation
        of_student, own = [mean, std], [teacher.mean, teacher.std]
        its = [torch.tensor(values, dtype=torch.float64)[:, None, None] for values in of_student + own]
        same = [list(values) for values in of_student] == [list(values) for values in own]
        self.register_buffer("scale", None if same else (its[1] / its[3]).float())
        self.register_buffer("shift", None if same else ((its[0] - its[2]) / its[3]).float())
        everything = list(teacher.columns) == list(range(getattr(teacher.model, "num_classes", -1)))
        self.register_buffer("columns", None if everything else torch.tensor(teacher.columns))

    @property
    def model_name(self) -> str:
        return getattr(self.model, "name", type(self.model).__name__)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if self.scale is not None and self.shift is not None:
            images = images * self.scale + self.shift
        if images.shape[1] != self.channels:
            images = images.expand(-1, self.channels, -1, -1)
        if tuple(images.shape[2:]) != self.image_size:
            images = F.interpolate(images, self.image_size, mode=self.interpolation, antialias=True)
        logits = self.model(images)
        return logits if self.columns is None else logits[:, self.columns]


def open_teacher(name: str, classes: Sequence[str], *, uri: str | None = None) -> Teacher:
    """The teacher of this name: a run folder, weights it exported, mlflow:<run id> with `uri`, or timm:<name>.

    Raises UserError where there is none, and where its classes are not those of the data."""
    if name.startswith(TIMM):
        return timm_teacher(name, classes, None, weights=None)
    return exported_teacher(name, locate_teacher(name, uri=uri), classes, None)


def locate_teacher(name: str, *, uri: str | None = None, weights: str | None = None) -> Located:
    """Where the run or its weights are. Raises UserError."""
    if is_bare(Path(name).expanduser()):
        raise UserError(
            f"teacher={name}: weights that no run of vitexp exported; what says of which model they are makes a run of "
            "them:\npython -m vitexp stage=evaluate init_from=<file> model=… data=…"
        )
    try:
        return locate(name, uri=uri, weights=weights, needed=[RAW_NAME])
    except UserError as error:  # it speaks of run=, as it is called elsewhere
        raise UserError(str(error).replace(f"run={name}", f"teacher={name}")) from None


def is_bare(path: Path) -> bool:
    """Whether it is a file of weights without vitexp's description beside it."""
    return path.is_file() and not (path.suffix == ".safetensors" and path.with_suffix(".json").is_file())


def exported_teacher(name: str, found: Located, classes: Sequence[str], size: Size | None) -> Teacher:
    """The exported model of a run; a teacher that knows other classes, too, is asked of the data's alone."""
    trained = load_run(found.folder, weights=found.weights or "model.safetensors")
    if not trained.classes:
        raise UserError(f"teacher={name}: knows no classes, its stage was {trained.stage}; finetune it first")
    if not set(classes) <= set(trained.classes):
        raise UserError(
            f"teacher={name}: was trained on other classes than the data has: "
            f"{class_difference(trained.classes, classes)}"
        )
    shown = trained.preprocessing
    own, model = (shown["image_size"][0], shown["image_size"][1]), trained.model
    path = found.folder / (found.weights or "model.safetensors")
    if size is not None and size != own:
        model = build(_sized(trained.architecture, size))
        load_weights(model, path, head="keep", grid=getattr(trained.model, "grid_size", None))
    return Teacher(
        model=model,
        columns=[trained.classes.index(one) for one in classes],
        image_size=size or own,
        mean=shown["mean"],
        std=shown["std"],
        channels=shown["channels"],
        interpolation=shown["interpolation"],
        resizer=shown.get("resizer", "torch"),
        facts={"name": name, "weights_sha256": sha256_of(path)},
    )


def timm_teacher(name: str, classes: Sequence[str], size: Size | None, *, weights: str | None) -> Teacher:
    """A timm model with timm's weights, or those of a file, shown pictures as timm's description of it says."""
    import timm

    model_name = name.removeprefix(TIMM)
    described = timm.get_pretrained_cfg(model_name) if timm.is_model(model_name) else None
    if described is None:
        raise UserError(f"teacher={name}: timm has no such model.{nearest(model_name, timm.list_models())}")
    size = size or (described.input_size[1], described.input_size[2])
    if weights is not None:
        model = TimmBackbone(model_name, image_size=size, num_classes=len(classes))
        checksum = sha256_of(Path(load_weights(model, Path(weights).expanduser(), head="keep").path))
    else:
        learn = f"teach it: python -m vitexp model=timm model.name={model_name} data=…, and give teacher=<that run>"
        if not described.has_weights:
            raise UserError(f"teacher={name}: timm has no weights for it\n{learn}")
        if described.num_classes != len(classes):
            raise UserError(
                f"teacher={name}: timm's weights know {described.num_classes:,} classes, the data has {len(classes):,}"
                f"\n{learn}"
            )
        get = partial(TimmBackbone, model_name, image_size=size, num_classes=described.num_classes, pretrained=True)
        try:
            model = ask_hub(name, get)
        except UserError as error:
            raise UserError(f"teacher={error}".replace("init_from=<file>", "weights=<file>")) from error
        checksum = _checksum(model)
    return Teacher(
        model=model,
        columns=range(len(classes)),
        image_size=size,
        mean=list(described.mean),
        std=list(described.std),
        channels=described.input_size[0],
        interpolation="bilinear" if described.interpolation == "bilinear" else "bicubic",
        resizer="torch",
        facts={"name": name, "weights_sha256": checksum},
    )


def bare_teacher(
    name: str, config: RunConfig, architecture: Mapping[str, Any], classes: Sequence[str], size: Size | None
) -> Teacher:
    """Weights without a description, as the architecture and the preprocessing of the settings."""
    path = Path(name).expanduser()
    size = size or height_width("model.image_size", architecture["image_size"])
    model = build(_sized(architecture, size))
    load_weights(model, path, head="keep")
    return Teacher(
        model=model,
        columns=range(len(classes)),
        image_size=size,
        mean=config.data["mean"],
        std=config.data["std"],
        channels=architecture.get("in_channels", 3),
        **build(config.augment["eval"]).resized,  # interpolation and resizer
        facts={"name": name, "weights_sha256": sha256_of(path)},
    )


def _sized(architecture: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """The architecture for pictures of this size; its weights come from the teacher's file, not from elsewhere."""
    sized = {**architecture, "image_size": list(size)}
    return sized | ({"pretrained": False} if "pretrained" in sized else {})


def _checksum(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
