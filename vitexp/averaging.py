"""Weights made of several moments of a run: the mean of its last checkpoints, or the moving average that it kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitexp import checkpoint
from vitexp.errors import UserError

_FOLDER = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Averaged:
    """Weights of a run's method, by the names they have in its checkpoints."""

    state: dict[str, Tensor]
    steps: tuple[int, ...]  # updates made at the checkpoints they come from, oldest first


def mean_of_last(folder: Path, count: int) -> Averaged:
    """The mean of the weights in the `count` newest checkpoints of `folder` (a run's checkpoints/), with equal shares.

    Sums are float64 and the results of the checkpoints' own type. What is no floating point number, such as a counter
    of batches, is the newest one's. Raises UserError where there are fewer, or where one is damaged."""
    found = _newest_last(folder)
    if not 1 <= count <= len(found):
        kept = f"{len(found)} checkpoints, of steps {', '.join(map(str, found))}" if found else "no checkpoint"
        raise UserError(
            f"average={count}: {folder} has {kept}\nallowed is 1 to what there is; train.keep=<number> keeps more"
        )
    chosen = list(found)[-count:]
    states = [_weights(found[step]) for step in chosen]
    return Averaged({name: _mean([state[name] for state in states]) for name in states[-1]}, tuple(chosen))


def moving_average(folder: Path) -> Averaged:
    """The exponential moving average in the newest checkpoint of `folder`. Raises UserError where none was kept."""
    found = checkpoint.latest(folder) if folder.is_dir() else None
    if found is None:
        raise UserError(f"ema=true: {folder} has no checkpoint, and averages lie there alone")
    kept = checkpoint.load(found, mmap=True).get("ema")
    if kept is None:
        raise UserError(
            f"ema=true: this run kept no average of its weights ({found.path}); train.ema_decay=… keeps one"
        )
    return Averaged(dict(kept), (found.step,))


def backbone_weights(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a method's weights hold of its backbone, under the names of `like`, the backbone's own state.

    Methods keep it under different names; the shortest that fits is taken. UserError where none does: the checkpoints
    are another model's than the exported weights."""
    first = next(iter(like))
    prefixes = sorted((name.removesuffix(first) for name in state if name.endswith(first)), key=len)
    for prefix in prefixes:
        if all(f"{prefix}{name}" in state and state[f"{prefix}{name}"].shape == like[name].shape for name in like):
            return {name: state[f"{prefix}{name}"] for name in like}
    raise UserError("the checkpoints are of another model than the exported weights beside them")


def _newest_last(folder: Path) -> dict[int, Path]:
    names = [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name)] if folder.is_dir() else []
    return dict(sorted((int(path.name.removeprefix("step_")), path) for path in names))


def _weights(path: Path) -> Mapping[str, Tensor]:
    # Mapped: of each checkpoint one tensor at a time is in memory, and the optimizer's moments never are.
    return checkpoint.load(checkpoint.open_checkpoint(path), mmap=True)["model"]


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    newest = tensors[-1]
    if not newest.is_floating_point():
        return newest
    return torch.stack([tensor.double() for tensor in tensors]).mean(dim=0).to(newest.dtype)
