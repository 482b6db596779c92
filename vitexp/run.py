"""The parts of one run, built from its settings: data, model, method, optimizer, schedule, evaluators, tracking."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from vitexp.config import RunConfig, build
from vitexp.costs import forward_gflops
from vitexp.data.images import Source, keep_classes, keep_few, keep_share
from vitexp.data.label_store import LabelStore, open_store
from vitexp.data.loader import Split, open_split
from vitexp.errors import UserError
from vitexp.locate import weights_to_start_from
from vitexp.mixing import BatchStep
from vitexp.models.freeze import freeze
from vitexp.models.weights import load_weights
from vitexp.runtime import seed_everything
from vitexp.schedules import Schedule
from vitexp.teachers import Onlooker, open_teacher
from vitexp.types import Evaluator, Method

# What keeps pictures from being learned by heart, as models and methods call it.
NOISE = ("drop_path", "dropout", "attention_dropout", "label_smoothing", "mix_tokens")


@dataclass
class Run:
    """Plain objects and numbers: nothing behind this reads a configuration file."""

    config: RunConfig
    source: Source
    train_data: Split
    val_data: Split | None
    reference_data: Split | None  # the training split prepared as for evaluation, where an evaluator compares with it
    mix: BatchStep | None  # erasing and mixing of a training batch on the device
    backbone: nn.Module
    method: Method  # holds the backbone
    make_optimizer: Callable[..., Optimizer]
    schedule: Schedule
    evaluators: dict[str, Evaluator]
    make_mirror: Callable[..., Any]
    architecture: dict[str, Any]  # the model's `_target_` and arguments, num_classes included: rebuilds it anywhere
    preprocessing: dict[str, Any]  # what evaluation does to a picture
    token_labels: LabelStore | None = None  # of the training pictures
    teacher: Onlooker | None = None  # whose word the method teaches
    notes: list[str] = field(default_factory=list)  # choices made on the way that a person should know

    @property
    def model_name(self) -> str:
        return self.architecture.get("name") or self.config.choices.get("model", "model")

    @property
    def data_location(self) -> str:
        """Where the data lies, as MLflow shows it."""
        places = [self.config.data.get(key) for key in ("root", "train", "val")]
        return ", ".join(str(place) for place in places if place) or f"vitexp:{self.source.name}"

    def digests(self) -> dict[str, np.ndarray]:
        """What training reads, for data.images.changes to tell whether a later start finds the same."""
        digests = self.source.digests()
        if self.token_labels is not None:
            digests["token labels"] = np.array([int(self.token_labels.fingerprint(), 16)])
        if self.teacher is not None:
            digests["teacher"] = np.array([int(self.teacher.weights_sha256[:12], 16)])
        return digests

    def gflops(self) -> float:
        """10^9 floating point operations of one picture's forward, a multiplication and an addition counted apart."""
        with torch.device("meta"):
            model = build(self.architecture)
        return forward_gflops(model, _pair(self.architecture["image_size"]), self.architecture.get("in_channels", 3))


def build_run(config: RunConfig, *, for_training: bool = True) -> Run:
    """Everything a run needs, on the CPU. The weights depend on the seed alone. Raises UserError.

    Without for_training the pictures to train on stay undecoded."""
    labelled = config.train.token_labels if for_training else None
    store = None if labelled is None else open_store(Path(labelled).expanduser())
    source = open_source(config)
    teacher = choose_teacher(config, source) if for_training else None
    evaluators, evaluator_notes = choose_evaluators(config, source)
    cache, ranks = config.data["cache"], config.runtime.processes
    shown = os.environ.get("RANK", "0") == "0"
    train_data = open_split(
        source.train,
        build(config.augment["train"]),
        cache=cache if for_training else "none",
        name="train",
        processes=ranks,
        progress=shown,
        maps=None if store is None else (store, store.rows_for(source.train, classes=source.classes)),
    )
    evaluated_as = build(config.augment["eval"])
    val_data = reference_data = None
    how = {"cache": cache, "processes": ranks, "progress": shown}
    if source.val is not None and evaluators:
        val_data = open_split(source.val, evaluated_as, name="val", **how)
    if val_data is not None and any(evaluator.reads_train for evaluator in evaluators.values()):
        reference_data = open_split(source.train, evaluated_as, name="train, as evaluated", **how)

    mix = None if config.augment["batch"] is None else build(config.augment["batch"])
    smoothing = config.method.get("label_smoothing"), config.augment.get("label_smoothing")
    if mix is not None and all(smoothing):
        raise UserError(
            "method.label_smoothing={}, augment.label_smoothing={}: both smooth; set one to 0".format(*smoothing)
        )
    if mix is not None and smoothing[1] and config.method.get("loss") == "binary":
        raise UserError(
            f"method.loss=binary: with augment.label_smoothing={smoothing[1]} every class would be right; set it to 0"
        )

    seed_everything(config.seed)
    architecture = model_arguments(config, num_classes=len(source.classes))
    backbone = build(architecture)
    notes = [*source.notices, *evaluator_notes, train_data.note, *([val_data.note] if val_data is not None else [])]
    if store is not None:
        notes.append(f"{_described(store)} ({labelled}, {store.fingerprint()})")
    if teacher is not None:
        notes.append(f"taught by {teacher.name}, {teacher.model_name} at {teacher.image_size[0]} pixels")
    method = build_method(config, backbone, teacher)
    # A method may have taken the head off.
    architecture["num_classes"] = getattr(backbone, "num_classes", architecture["num_classes"])
    readers = [name for name, evaluator in evaluators.items() if evaluator.reads_logits]
    if readers and not method.has_classifier:
        raise UserError(
            f"evaluators.{readers[0]}: method={config.choices.get('method')} trains no classifier to evaluate; "
            "evaluators=mae measures without, method.online_probe=true trains one beside it"
        )
    if config.stage.trains and architecture["num_classes"] == len(source.classes) == 1:
        raise UserError(
            f"data={source.name}: all pictures are of one class, {source.classes[0]!r}, and a classifier needs two or "
            "more; method=mae learns from pictures alone"
        )
    if mix is not None and not architecture["num_classes"]:
        raise UserError("augment.batch mixes labels, and this method learns none: give augment.batch=null")
    stage, fresh = config.stage, ()
    if config.init_from is not None:
        into = backbone if method.whole is None else method.whole
        start = weights_to_start_from(config.init_from, uri=config.tracking.get("uri"))
        loaded = load_weights(into, start, head=stage.head, position_mode=stage.position_mode)
        notes.append(str(loaded))
        fresh = loaded.missing
        if loaded.head == "fresh":
            backbone.reset_head(backbone.num_classes, init=stage.head_init)
    freeze(backbone, stage.train_blocks, fresh=fresh)
    return Run(
        config=config,
        source=source,
        train_data=train_data,
        val_data=val_data,
        reference_data=reference_data,
        mix=mix,
        backbone=backbone,
        method=method,
        make_optimizer=build(config.optim["optimizer"]),
        schedule=build(config.schedule),
        evaluators=evaluators,
        token_labels=store,
        teacher=teacher,
        make_mirror=build(config.tracking),
        architecture=architecture,
        preprocessing={
            "image_size": list(_pair(config.model["image_size"])),
            "mean": config.data["mean"],
            "std": config.data["std"],
            "channels": config.data["channels"],
            "crop_fraction": evaluated_as.crop_fraction,
            **evaluated_as.resized,  # interpolation and resizer
        },
        notes=notes,
    )


def build_method(config: RunConfig, backbone: nn.Module, teacher: nn.Module | None) -> Method:
    """The method around a backbone; one that learns from a teacher evaluates without."""
    given = {"teacher": teacher} if "teacher" in config.method else {}
    return build(_quiet(config.method, config), backbone=backbone, **given)


def choose_teacher(config: RunConfig, source: Source) -> Onlooker | None:
    """The teacher that the method names, None where it names none or nothing is to be learned. Raises UserError."""
    name = config.method.get("teacher")
    if name is None or not config.stage.trains:
        return None
    try:
        teacher = open_teacher(str(name), source.classes, uri=config.tracking.get("uri"))
        return Onlooker(teacher, mean=config.data["mean"], std=config.data["std"])
    except UserError as error:
        raise UserError(str(error).replace(f"teacher={name}", f"method.teacher={name}")) from None


def choose_evaluators(config: RunConfig, source: Source) -> tuple[dict[str, Evaluator], list[str]]:
    """Those of the settings that the pictures allow, and what is to be said of others: without any label some can go.

    Raises UserError where none is left that does without labels the pictures lack."""
    evaluators: dict[str, Evaluator] = build(config.evaluators)
    notes = []
    if not source.classes and any(not evaluator.needs_labels for evaluator in evaluators.values()):
        left_out = [name for name, evaluator in evaluators.items() if evaluator.needs_labels]
        evaluators = {name: evaluator for name, evaluator in evaluators.items() if name not in left_out}
        if left_out:
            notes = [f"evaluators left out, for no picture has a label: {', '.join(left_out)}"]
    if any(evaluator.needs_labels for evaluator in evaluators.values()):
        source.require_labels()
    return evaluators, notes


def open_source(config: RunConfig) -> Source:
    """The data set as this run uses it: all of it, or the classes and the share of train that the settings name."""
    source: Source = build(config.data["source"])
    if config.train.classes is not None:
        source = keep_classes(source, config.train.classes)
    source = keep_share(source, config.train.fraction)
    return source if config.train.overfit is None else keep_few(source, config.train.overfit)


def model_arguments(config: RunConfig, *, num_classes: int) -> dict[str, Any]:
    """The model's mapping with as many classes as the data has, unless model.num_classes says otherwise."""
    wanted = config.model.get("num_classes")
    if wanted is not None and num_classes not in (0, wanted):
        raise UserError(f"model.num_classes={wanted}: the data has {num_classes} classes; null takes as many")
    return {**_quiet(config.model, config), "num_classes": num_classes if wanted is None else wanted}


def _quiet(node: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """The arguments, without those that keep pictures from being learned by heart where train.overfit asks for it."""
    if config.train.overfit is None:
        return node
    return {key: type(value)(0) if key in NOISE and value else value for key, value in node.items()}


def _described(store: LabelStore) -> str:
    _, kept, height, width = store.values.shape
    teacher = store.head["teacher"].get("name", "a teacher")
    return f"token labels of {teacher}: {kept} classes in each of {height} x {width} cells"


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
