"""`python -m vitexp plan [overrides]`: what a run would be, without training. Its parameters, arithmetic, memory, steps
and learning rates, as text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vitexp.config import build, compose_and_check
from vitexp.costs import TRAIN_TO_FORWARD, count_parameters, forward_gflops, state_bytes
from vitexp.data.sampler import effective_batch_size, micro_batches_per_epoch
from vitexp.horizon import Horizon, plan_horizon, preview
from vitexp.optim import build_optimizer, resolve_lr
from vitexp.run import model_arguments
from vitexp.schedules import Schedule

IMAGENET_CLASSES = 1000  # what published parameter counts are made with
TABLE_ROWS = 11
BAR_WIDTH = 40


def main(arguments: list[str], config_dir: str | None) -> int:
    """Prints the plan of the run that these overrides describe. The data set is opened to count it, not read."""
    config = compose_and_check(arguments, config_dir)
    source = build(config.data["source"])
    architecture = model_arguments(config, num_classes=len(source.classes))
    size = architecture["image_size"]

    def model_with_classes(count: int) -> nn.Module:
        with torch.device("meta"):
            return build({**architecture, "num_classes": count})

    settings, processes = config.train, config.runtime.processes
    batch_size = effective_batch_size(len(source.train), settings.batch_size, processes)
    horizon = plan_horizon(
        micro_batches_per_epoch(len(source.train), settings.batch_size, processes),
        accumulate=settings.accumulate,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
    )
    global_batch = batch_size * processes * settings.accumulate
    rates = {key: config.optim[key] for key in ("lr", "base_lr", "reference_batch")}
    make_optimizer = build(config.optim["optimizer"])
    print("  ".join(f"{group}={option}" for group, option in config.choices.items()))
    print(
        plan(
            model=model_with_classes(architecture["num_classes"]),
            model_with_classes=model_with_classes,
            num_classes=architecture["num_classes"],
            image_size=size if isinstance(size, int) else (size[0], size[1]),
            in_channels=architecture.get("in_channels", 3),
            horizon=horizon,
            lr=resolve_lr(**rates, global_batch=global_batch),
            schedule=build(config.schedule),
            global_batch=global_batch,
            num_train=len(source.train),
            optimizer_slots=slots_of(make_optimizer, weight_decay=config.optim["weight_decay"]),
        ),
        end="",
    )
    return 0


def slots_of(make_optimizer: Callable[..., Optimizer], *, weight_decay: float) -> int:
    """Tensors the optimizer keeps for every weight, seen by letting it make one update of a small one."""
    layer = nn.Linear(3, 5, bias=False)
    optimizer = build_optimizer(make_optimizer, layer, lr=1e-3, weight_decay=weight_decay)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    kept = optimizer.state[layer.weight].values()
    return sum(isinstance(value, Tensor) and value.shape == layer.weight.shape for value in kept)


def plan(
    *,
    model: nn.Module,
    model_with_classes: Callable[[int], nn.Module],
    num_classes: int,
    image_size: int | tuple[int, int],
    in_channels: int,
    horizon: Horizon,
    lr: float,
    schedule: Schedule,
    global_batch: int,
    num_train: int,
    optimizer_slots: int = 2,
) -> str:
    """A page of text about the run that these would make. Everything is counted on the meta device, in a second.

    model_with_classes builds the same model for another number of classes: published counts are ImageNet's.
    global_batch: pictures of a full update, over all processes and accumulated forwards.
    lr: the resolved peak, which `schedule(progress, lr=lr)` scales. optimizer_slots: as in vitexp.costs.state_bytes."""
    lines = [
        ("parameters", _parameters(model, model_with_classes, num_classes)),
        ("forward", _forward(model, image_size, in_channels)),
        ("memory", _memory(model, optimizer_slots)),
        ("steps", _steps(horizon, global_batch, num_train)),
        ("training", _training(model, image_size, in_channels, horizon, global_batch, num_train)),
        ("peak lr", f"{lr:.6g}"),
    ]
    return "\n".join([*(f"{name:<11} {text}" for name, text in lines), "", *lr_table(schedule, horizon, lr=lr)]) + "\n"


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


def _parameters(model: nn.Module, model_with_classes: Callable[[int], nn.Module], num_classes: int) -> str:
    total = count_parameters(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    text = f"{total:,} with {num_classes:,} classes"
    if trained != total:
        text += f", {trained:,} of them trained"
    if num_classes != IMAGENET_CLASSES:
        text += f"; {count_parameters(model_with_classes(IMAGENET_CLASSES)):,} with ImageNet's 1,000"
    return text


def _forward(model: nn.Module, image_size: int | tuple[int, int], in_channels: int) -> str:
    gflops = forward_gflops(model, image_size, in_channels)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return (
        f"{gflops:.4g} GFLOPs a picture of {height}x{width}x{in_channels}, "
        f"that is {gflops / 2:.4g} G multiply-adds, which papers print as GFLOPs"
    )


def _memory(model: nn.Module, optimizer_slots: int) -> str:
    held = state_bytes(model, optimizer_slots=optimizer_slots)
    return (
        f"{_mib(held.total)} = weights {_mib(held.weights)} + gradients {_mib(held.gradients)} "
        f"+ optimizer {_mib(held.optimizer)}, in float32 on every process; activations come on top"
    )


def _steps(horizon: Horizon, global_batch: int, num_train: int) -> str:
    text = (
        f"{horizon.updates_per_epoch:,} updates an epoch ({num_train:,} pictures, global batch {global_batch:,}), "
        f"{horizon.total_epochs:g} epochs, {horizon.total_steps:,} updates"
    )
    if horizon.num_updates < horizon.total_steps:
        text += f"; train.max_steps ends the run after {horizon.num_updates:,}"
    return text


def _training(
    model: nn.Module,
    image_size: int | tuple[int, int],
    in_channels: int,
    horizon: Horizon,
    global_batch: int,
    num_train: int,
) -> str:
    pictures = pictures_seen(horizon, global_batch=global_batch, num_train=num_train)
    each = TRAIN_TO_FORWARD * forward_gflops(model, image_size, in_channels)
    return f"{pictures:,} pictures seen, about {each:.4g} GFLOPs each (forward and backward), {_flops(pictures * each)}"


def _mib(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"


def _flops(gflops: float) -> str:
    for unit in ("GFLOPs", "TFLOPs", "PFLOPs"):
        if gflops < 1000:
            return f"{gflops:.3g} {unit} in all"
        gflops /= 1000
    return f"{gflops:.3g} EFLOPs in all"
