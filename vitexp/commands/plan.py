"""`python -m vitexp plan [overrides]` or `plan run=<run> [overrides]`: what a run would be, without training.

Its parameters, arithmetic, memory, disk, steps and learning rates as text, and its time from a short probe:
`probe=true` measures a large model, too, `probe=false` none. `plot=<file.png>` draws the learning rate. `run` is a run
folder, the weights it exported, or mlflow:<run id> (runs:/<run id>) with `uri=` as tracking.uri."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vitexp import plots
from vitexp.config import RAW_NAME, RunConfig, build, compose_and_check, reload
from vitexp.costs import (
    DiskBytes,
    StateBytes,
    activation_bytes,
    checkpoint_bytes,
    count_parameters,
    forward_gflops,
    free_disk,
    state_bytes,
    training_gflops,
)
from vitexp.data.batch_transforms import normalise
from vitexp.data.memory import available_memory, cores
from vitexp.data.sampler import effective_batch_size, micro_batches_per_epoch
from vitexp.errors import UserError
from vitexp.horizon import Horizon, plan_horizon, preview
from vitexp.locate import locate, take_uri, truth
from vitexp.models.freeze import freeze
from vitexp.optim import build_optimizer, resolve_lr
from vitexp.probe import Speed, matrix_gflops, measure_speed
from vitexp.run import build_method, choose_evaluators, choose_teacher, model_arguments, open_source
from vitexp.runtime import make_accelerator
from vitexp.schedules import Schedule
from vitexp.seeding import derive_seed
from vitexp.teachers import Onlooker
from vitexp.trained import load_run
from vitexp.types import Batch, Evaluator, LabelMaps, Method, Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

KEYS = ("run", "uri", "probe", "plot")
IMAGENET_CLASSES = 1000  # what published parameter counts are made with
TABLE_ROWS = 11
BAR_WIDTH = 40
PAGE_WIDTH = 110
TIED = "\xa0"  # a space at which no line is broken
CURVE_POINTS = 1000
PROBE_S = 10.0
UNASKED_S = 2.0  # a forward and backward estimated to take longer is measured only on demand
OF_MATRIX_SPEED = 0.25  # what training a ViT usually reaches of a large matrix product's arithmetic, for that estimate


def main(arguments: list[str], config_dir: str | None) -> int:
    """Prints the plan of the run that these overrides describe. The data set is opened to count it, not read."""
    pairs = [text.partition("=")[::2] for text in arguments]
    given = {key: value for key, value in pairs if key in KEYS}
    overrides = [text for text, (key, _) in zip(arguments, pairs, strict=True) if key not in KEYS]
    probe, plot = parse_probe(given.get("probe")), _picture(given.get("plot"))
    if "run" not in given:
        if "uri" in given:
            raise UserError(f"uri={given['uri']}: says where run=mlflow:<run id> is; there is no run= here")
        return plan(compose_and_check(overrides, config_dir), probe=probe, plot=plot)
    uri, overrides = take_uri(overrides)
    found = locate(given["run"], uri=given.get("uri") or uri, needed=[RAW_NAME])
    folder, weights = found.folder, found.weights
    if (folder / RAW_NAME).exists() or weights is None:
        return plan(reload(folder, overrides, config_dir), probe=probe, plot=plot)
    asked = [*overrides, *(f"{key}={given[key]}" for key in ("probe", "plot") if key in given)]
    if asked:
        raise UserError(f"{asked[0]}: {folder} holds weights without the settings of their run, so nothing to train by")
    return plan_weights(folder, weights)


def plan_weights(folder: Path, weights: str) -> int:
    """Prints what exported weights alone can tell."""
    trained = load_run(folder, weights=weights)
    height, width = trained.preprocessing["image_size"]
    show("weights", f"{folder / weights}, of stage {trained.stage}")
    show("parameters", f"{count_parameters(trained.model):,} with {len(trained.classes):,} classes")
    show("forward", _forward(trained.model, (height, width), trained.preprocessing["channels"]))
    show("memory", f"weights {size(state_bytes(trained.model, optimizer_slots=0).weights)}")
    show("training", "not known: the settings of the run are not beside its weights; give the run's own folder")
    return 0


@dataclass(frozen=True)
class Planned:
    """A run's parts, its modules on the meta device."""

    config: RunConfig
    architecture: dict[str, Any]
    method: Method
    teacher: Onlooker | None
    image_size: tuple[int, int]
    num_train: int
    evaluators: list[Evaluator]  # that measure something
    horizon: Horizon
    batch_size: int  # of a forward on one process, at most the pictures there are
    lr: float  # the peak
    schedule: Schedule

    @property
    def global_batch(self) -> int:
        """Pictures of a full update, over all processes and accumulated forwards."""
        return self.batch_size * self.config.runtime.processes * self.config.train.accumulate

    @property
    def in_channels(self) -> int:
        return self.architecture.get("in_channels", 3)

    @property
    def num_classes(self) -> int:
        return self.architecture["num_classes"]

    def model_with_classes(self, count: int) -> nn.Module:
        """The model as published, before a method or stage changes it."""
        with torch.device("meta"):
            return build({**self.architecture, "num_classes": count})

    def inputs(self, device: torch.device, *, pictures: int) -> tuple[Batch, Progress]:
        """Of a forward in training, their values left undefined."""
        images = torch.empty(pictures, self.in_channels, *self.image_size, device=device)
        numbers = torch.empty(pictures, dtype=torch.long, device=device)
        return Batch(images, targets=numbers, index=numbers), self.horizon.progress(0)


def plan(config: RunConfig, *, probe: bool | None = None, plot: Path | None = None) -> int:
    """Prints a page about the run that the settings describe. All but the time is counted on the meta device.

    probe: as the command's; None: where a forward is estimated to be short. plot: PNG of the learning rate."""
    if not config.stage.trains:
        raise UserError(f"stage={config.stage.name}: trains nothing, so there is nothing to plan")
    planned = prepare(config)
    accelerator = accelerator_of(config)
    try:
        held, work = held_by(planned), work_of(planned, accelerator)
        activations, each = work.activations, work.gflops
        horizon, seen = planned.horizon, pictures_of(planned)
        show("options", " ".join(f"{group}={option}" for group, option in config.choices.items()))
        model = planned.model_with_classes(planned.num_classes)
        show("parameters", _parameters(model, planned))
        show("forward", _forward(model, planned.image_size, planned.in_channels))
        show("memory", _memory(held, activations, planned.batch_size, _precision(accelerator)))
        show("disk", _disk(disk_of(planned, held), Path(config.output_dir)))
        show("steps", _steps(horizon, planned.global_batch, planned.num_train))
        show(
            "training", f"{seen:,} pictures seen, {each:.4g} GFLOPs each (forward and backward), {_flops(seen * each)}"
        )
        show("peak lr", f"{planned.lr:.6g}")
        speed = speed_or_why(planned, accelerator, held, work, probe=probe)
        show("time", speed if isinstance(speed, str) else _time(planned, accelerator, speed))
    finally:
        accelerator.end_training()
    print()
    print("\n".join(lr_table(planned.schedule, horizon, lr=planned.lr)))
    if plot is not None:
        print(f"\nthe learning rate is drawn in {plots.lr_curve(lr_rows(planned), plot)}")
    return 0


def accelerator_of(config: RunConfig, *, side_by_side: int = 1) -> Accelerator:
    """Accelerate as in one process of the run, where `side_by_side` such runs share the machine."""
    runtime, processes = config.runtime, config.runtime.processes * side_by_side
    threads = runtime.threads or (max(1, cores() // processes) if processes > 1 else None)
    return make_accelerator(precision=runtime.precision, device=runtime.device, threads=threads)


def prepare(config: RunConfig, *, teacher: Onlooker | None = None) -> Planned:
    """What vitexp.run.build_run and vitexp.train.fit would make of the settings, without weights. Raises UserError.

    teacher: in place of one that the settings name and that is yet to be trained."""
    source = open_source(config)
    evaluators, _ = choose_evaluators(config, source)
    architecture = model_arguments(config, num_classes=len(source.classes))
    if "pretrained" in architecture:
        architecture["pretrained"] = False  # nothing is downloaded: of weights only the number matters
    settings, processes = config.train, config.runtime.processes
    teacher = teacher or choose_teacher(config, source)
    count, repeats = len(source.train), settings.repeats
    batch_size = effective_batch_size(count, settings.batch_size, processes, repeats=repeats)
    side = architecture["image_size"]
    with torch.device("meta"):
        method = method_of(config, architecture, teacher)
    horizon = plan_horizon(
        micro_batches_per_epoch(count, batch_size, processes, repeats=repeats),
        accumulate=settings.accumulate,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
    )
    return Planned(
        config=config,
        architecture=architecture,
        method=method,
        image_size=(side, side) if isinstance(side, int) else (side[0], side[1]),
        teacher=teacher,
        num_train=count,
        evaluators=list(evaluators.values()) if source.val is not None else [],
        horizon=horizon if config.stage.trains else replace(horizon, num_updates=0),
        batch_size=batch_size,
        lr=resolve_lr(
            **{key: config.optim[key] for key in ("lr", "base_lr", "reference_batch")},
            global_batch=batch_size * processes * settings.accumulate,
        ),
        schedule=build(config.schedule),
    )


def method_of(config: RunConfig, architecture: dict[str, Any], teacher: Onlooker | None) -> Method:
    """The method around a fresh backbone, with what the stage freezes frozen."""
    backbone = build(architecture)
    method = build_method(config, backbone, teacher)
    freeze(backbone, config.stage.train_blocks)
    return method


def slots_of(make_optimizer: Callable[..., Optimizer], *, weight_decay: float) -> int:
    """Tensors the optimizer keeps for every weight, seen by letting it make one update of a small one."""
    layer = nn.Linear(3, 5, bias=False)
    optimizer = build_optimizer(make_optimizer, layer, lr=1e-3, weight_decay=weight_decay)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    kept = optimizer.state[layer.weight].values()
    return sum(isinstance(value, Tensor) and value.shape == layer.weight.shape for value in kept)


def autocast_of(accelerator: Accelerator) -> torch.dtype | None:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)


@dataclass(frozen=True)
class Work:
    """Of one process."""

    activations: int  # bytes that a forward keeps for its backward
    gflops: float  # 10^9 operations of a picture's step, its teacher's included


def work_of(planned: Planned, accelerator: Accelerator) -> Work:
    activations = activation_bytes(
        planned.method.countable(),
        lambda device: planned.inputs(device, pictures=planned.batch_size),
        autocast=autocast_of(accelerator),
        device=accelerator.device,
    )
    # Two pictures: batch norm refuses one where nothing else is left to average over.
    each = training_gflops(planned.method.countable(), lambda device: planned.inputs(device, pictures=2)) / 2
    if planned.teacher is not None:
        each += forward_gflops(planned.teacher.model, planned.teacher.image_size, planned.teacher.channels)
    return Work(activations, each)


def held_by(planned: Planned) -> StateBytes:
    optim = planned.config.optim
    return state_bytes(
        planned.method,
        optimizer_slots=slots_of(build(optim["optimizer"]), weight_decay=optim["weight_decay"]),
        averaged=planned.config.train.ema_decay is not None,
        teacher=planned.teacher,
    )


def disk_of(planned: Planned, held: StateBytes) -> DiskBytes:
    """What the run leaves on disk."""
    config, settings, updates = planned.config, planned.config.train, planned.horizon.num_updates
    exported = state_bytes(planned.method.backbone, optimizer_slots=0).weights
    parts = sum(state_bytes(part, optimizer_slots=0).weights for part in planned.method.parts.values())
    # The last ones, and the best where the run finds out which those are.
    best = any(evaluator.reads_logits for evaluator in planned.evaluators)
    averages = settings.ema_decay is not None
    saves = -(-updates // (settings.save_every or planned.horizon.updates_per_epoch))
    uri = config.tracking.get("uri", "none")
    beside = uri is None or uri.startswith("sqlite:")  # MLflow's files lie beside its database then
    return DiskBytes(
        checkpoint=checkpoint_bytes(held),
        checkpoints=min(saves, settings.keep or saves),
        weights=(1 + best + averages) * exported + parts,
        logged=exported if settings.log_weights and beside else 0,
    )


def pictures_of(planned: Planned) -> int:
    return pictures_seen(planned.horizon, global_batch=planned.global_batch, num_train=planned.num_train)


# ---- Time --------------------------------------------------------------------------------------------------------


def speed_or_why(
    planned: Planned,
    accelerator: Accelerator,
    held: StateBytes,
    work: Work,
    *,
    probe: bool | None,
    seconds: float = PROBE_S,
) -> Speed | str:
    """How fast one process of the run is, measured for about so many seconds, or why that was not measured."""
    if probe is False:
        return "not measured (probe=false)"
    rate = OF_MATRIX_SPEED * matrix_gflops(autocast_of(accelerator) or torch.float32, accelerator.device)
    forward_s = planned.batch_size * work.gflops / rate
    if probe is None and forward_s > UNASKED_S:
        return (
            f"not measured: {planned.batch_size:,} pictures' forward and backward might take {lasting(forward_s)} "
            f"here; probe=true measures fewer, in about {seconds:.0f} s"
        )
    fitting = int(planned.batch_size * seconds / 3 / forward_s)  # a round that does not count and two that do
    batch_size = min(planned.batch_size, max(2, fitting))
    needed, free = held.total + work.activations * batch_size // planned.batch_size, free_memory(accelerator.device)
    if free is not None and needed > free:
        return f"not measured: {batch_size:,} pictures need about {size(needed)} of memory, {size(free)} are free"
    return speed_of(planned, accelerator, batch_size, seconds=seconds)


def seconds_of(planned: Planned, speed: Speed) -> float:
    """Of all updates of the run; reading of pictures, evaluations and saves not included."""
    share = pictures_of(planned) // planned.config.runtime.processes
    return speed.run_s(pictures=share, updates=planned.horizon.num_updates)


def speed_of(planned: Planned, accelerator: Accelerator, batch_size: int, *, seconds: float) -> Speed:
    """The measured speed of one process of the run with batches of so many pictures."""
    config, device = planned.config, accelerator.device
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, planned.in_channels, *planned.image_size)
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, max(1, planned.num_classes), (batch_size,), generator=generator)
    mix = None if config.augment["batch"] is None else build(config.augment["batch"])

    maps = None if config.train.token_labels is None else made_up_maps(batch_size, planned.num_classes, device)

    def make_batch(number: int) -> Batch:
        images = normalise(pictures.to(device), config.data["mean"], config.data["std"])
        batch = Batch(images, targets.to(device), index=torch.arange(batch_size), maps=maps)
        if mix is None:
            return batch
        return mix(batch, num_classes=planned.num_classes, seed=derive_seed(0, number))

    method = method_of(config, planned.architecture, planned.teacher).to(device)
    grouping = {key: config.optim[key] for key in ("weight_decay", "layer_decay", "no_decay")}
    return measure_speed(
        method,
        build_optimizer(build(config.optim["optimizer"]), method, lr=planned.lr, **grouping),
        make_batch,
        accelerator=accelerator,
        clip_norm=config.train.clip_norm,
        ema_decay=config.train.ema_decay,
        seconds=seconds,
    )


def made_up_maps(pictures: int, num_classes: int, device: torch.device) -> LabelMaps:
    """Of 5 classes in each of 14 x 14 cells, some 20 in a picture, as a teacher of ImageNet makes them."""
    generator = torch.Generator().manual_seed(0)
    shape, named = (pictures, 5, 14, 14), min(20, num_classes)
    numbers = torch.randint(0, named, shape, dtype=torch.int32, generator=generator)
    return LabelMaps(
        values=torch.zeros(shape, dtype=torch.float16, device=device),
        numbers=numbers.to(device),
        boxes=torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(pictures, 1),
        mirrored=torch.zeros(pictures, dtype=torch.bool),
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free where the model would be; None where the device does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() if device.type == "cpu" else None


def _time(planned: Planned, accelerator: Accelerator, speed: Speed) -> str:
    processes, pictures = planned.config.runtime.processes, pictures_of(planned)
    seconds = seconds_of(planned, speed)
    place = f"{accelerator.device.type}, {_precision(accelerator)}"
    if accelerator.device.type == "cpu":
        place += f", threads {torch.get_num_threads()}"
    text = (
        f"{lasting(seconds)} of updates at {pictures / seconds:,.4g} pictures/s ({place}; {speed.rounds} updates of "
        f"{speed.batch_size:,} made-up pictures measured); reading pictures, evaluating and saving come on top"
    )
    if processes > 1:
        text += f"; one process measured alone, {processes} taken to be as fast each"
    if planned.config.runtime.compile:
        text += "; measured without torch.compile"
    return text


# ---- Steps and learning rates ------------------------------------------------------------------------------------


def pictures_seen(horizon: Horizon, *, global_batch: int, num_train: int) -> int:
    """Pictures trained on in horizon.num_updates updates; the last update of an epoch may be a short one."""
    full_epochs, updates = divmod(horizon.num_updates, horizon.updates_per_epoch)
    micro_batch = global_batch // horizon.accumulate
    per_epoch = min(num_train, micro_batch * horizon.micro_batches_per_epoch)
    return full_epochs * per_epoch + min(updates * global_batch, per_epoch)


def lr_table(schedule: Schedule, horizon: Horizon, *, lr: float) -> list[str]:
    """Lines of update, epoch, learning rate and a bar, evenly over the run; the first update at the top rate is one."""
    steps = {step for step, _ in preview(schedule, horizon, lr=lr, points=TABLE_ROWS)}
    steps.add(_first_top(schedule, horizon, lr=lr))
    lines = [f"{'update':>10} {'epoch':>8} {'lr':>10}"]
    for step in sorted(steps):
        progress = horizon.progress(step)
        rate = schedule(progress, lr=lr)
        bar = "#" * round(BAR_WIDTH * rate / lr)
        lines.append(f"{step:>10,} {progress.epoch:>8.2f} {rate:>10.3g} {bar}".rstrip())
    return lines


def _first_top(schedule: Schedule, horizon: Horizon, *, lr: float) -> int:
    """The first update at the highest rate: on a coarse grid, then between that point's neighbours."""
    grid = preview(schedule, horizon, lr=lr)
    at = max(range(len(grid)), key=lambda i: grid[i][1])
    near = range(grid[max(at - 1, 0)][0], grid[min(at + 1, len(grid) - 1)][0] + 1)
    return max(near, key=lambda step: schedule(horizon.progress(step), lr=lr))


def lr_rows(planned: Planned) -> list[dict[str, float]]:
    """step, epoch and lr of updates all over the run, the first at the top rate among them."""
    horizon, lr = planned.horizon, planned.lr
    steps = {step for step, _ in preview(planned.schedule, horizon, lr=lr, points=CURVE_POINTS)}
    steps.add(_first_top(planned.schedule, horizon, lr=lr))
    at = [horizon.progress(step) for step in sorted(steps)]
    return [{"step": p.step, "epoch": p.epoch, "lr": planned.schedule(p, lr=lr)} for p in at]


# ---- Words -------------------------------------------------------------------------------------------------------


def parse_probe(text: str | None) -> bool | None:
    return truth("probe", text, why="without it small models are measured")


def _picture(text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text).expanduser()
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"plot={text}: expected the name of a .png file")
    return path


def show(name: str, text: str) -> None:
    indented = {"initial_indent": f"{name:<11} ", "subsequent_indent": " " * 12}
    filled = textwrap.fill(text, PAGE_WIDTH, break_on_hyphens=False, break_long_words=False, **indented)
    print(filled.replace(TIED, " "), flush=True)


def _parameters(model: nn.Module, planned: Planned) -> str:
    total, num_classes = count_parameters(model), planned.num_classes
    text = f"{total:,} with {num_classes:,} classes"
    if num_classes != IMAGENET_CLASSES:
        text += f"; {count_parameters(planned.model_with_classes(IMAGENET_CLASSES)):,} with ImageNet's 1,000"
    method = count_parameters(planned.method)
    trained = sum(parameter.numel() for parameter in planned.method.parameters() if parameter.requires_grad)
    if method != total:
        text += f"; {method:,} with what the method adds and takes away"
    if trained != method:
        text += f"; {trained:,} of them trained"
    return text


def _forward(model: nn.Module, image_size: tuple[int, int], in_channels: int) -> str:
    gflops = forward_gflops(model, image_size, in_channels)
    return (
        f"{gflops:.4g} GFLOPs a picture of {image_size[0]}x{image_size[1]}x{in_channels}, "
        f"that is {gflops / 2:.4g} G multiply-adds, which papers print as GFLOPs"
    )


def _memory(held: StateBytes, activations: int, batch_size: int, precision: str) -> str:
    parts = [f"weights {size(held.weights)}", f"gradients {size(held.gradients)}"]
    parts.append(f"optimizer {size(held.optimizer)}")
    if held.average:
        parts.append(f"averaged weights {size(held.average)}")
    if held.teacher:
        parts.append(f"teacher {size(held.teacher)}")
    parts[-1] += ", in fp32,"
    parts.append(f"activations {size(activations)}")
    total = f"{size(held.total + activations)} on every process = "
    return (
        total
        + " ".join(f"+ {part}".replace(" ", TIED) for part in parts).removeprefix(f"+{TIED}")
        + (f" ({batch_size:,} pictures, {precision})")
    )


def _disk(disk: DiskBytes, place: Path) -> str:
    parts = f"{disk.checkpoints} checkpoints of {size(disk.checkpoint)} each, weights {size(disk.weights)}"
    if disk.logged:
        parts += f", a copy for MLflow {size(disk.logged)}"
    return f"{size(disk.left)}: {parts}; {size(free_disk(place))} free"


def _steps(horizon: Horizon, global_batch: int, num_train: int) -> str:
    text = (
        f"{horizon.updates_per_epoch:,} updates an epoch ({num_train:,} pictures, global batch {global_batch:,}), "
        f"{horizon.total_epochs:g} epochs, {horizon.total_steps:,} updates"
    )
    if horizon.num_updates < horizon.total_steps:
        text += f"; train.max_steps ends the run after {horizon.num_updates:,}"
    return text


def _precision(accelerator: Accelerator) -> str:
    return {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)


def size(number: int) -> str:
    """Bytes in words."""
    return f"{number / 2**20:,.1f} MiB" if number < 2**30 else f"{number / 2**30:,.2f} GiB"


def _flops(gflops: float) -> str:
    for unit in ("GFLOPs", "TFLOPs", "PFLOPs"):
        if gflops < 1000:
            return f"{gflops:.3g} {unit} in all"
        gflops /= 1000
    return f"{gflops:.3g} EFLOPs in all"


def lasting(seconds: float) -> str:
    """`0.8 s`, `45 s`, `12 min`, `3 h 5 min`, `2 d 4 h`: two figures, for nothing here is known better."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
