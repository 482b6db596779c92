"""Learning rates as pure functions of `Progress`: no scheduler object, no state, nothing to save or to step twice.

Every schedule is called as `schedule(progress, lr=peak)`; its other arguments are the keys of conf/schedule/*.yaml.
A duration in steps is measured on `progress.step / total_steps`, one in epochs or as a fraction of the run on
`progress.epoch / total_epochs`. The position is the one *before* the update, so a warm-up from 0 makes the first
update with lr 0, as MAE and JAX ViT do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from vitexp.errors import UserError
from vitexp.types import Progress

Schedule = Callable[..., float]  # (progress, *, lr) once its YAML arguments are bound


def cosine(
    progress: Progress,
    *,
    lr: float,
    warmup_epochs: float | None = None,
    warmup_steps: int | None = None,
    warmup_fraction: float | None = None,
    default_warmup_fraction: float = 0.0,
    warmup_start_lr: float = 0.0,
    min_lr: float = 0.0,
) -> float:
    """Linear warm-up to `lr`, then half a cosine down to `min_lr` at the end of the run.

    With warmup_epochs this is MAE's per-iteration formula, with warmup_steps JAX ViT's cosine (which has min_lr 0).
    At most one warm-up duration; `default_warmup_fraction` of the run where none is given. A warm-up longer than the
    run rises as far as the run goes. Raises UserError for two durations, negative numbers and min_lr above lr.
    """
    _check_levels(lr, warmup_start_lr, min_lr)
    position, length, total = _duration(
        "warmup", warmup_epochs, warmup_steps, warmup_fraction, default_warmup_fraction, progress
    )
    if position < length:
        return _rise(position / length, warmup_start_lr, lr)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * _share(position - length, total - length)))


def cosine_by_epoch(
    progress: Progress,
    *,
    lr: float,
    warmup_epochs: float | None = None,
    warmup_steps: int | None = None,
    warmup_fraction: float | None = None,
    default_warmup_fraction: float = 0.0,
    warmup_start_lr: float = 0.0,
    cooldown_epochs: float = 0.0,
    lag_epochs: int = 0,
    min_lr: float = 0.0,
) -> float:
    """Linear warm-up to `lr`, half a cosine and `cooldown_epochs` at `min_lr`, one value an epoch, as timm's scheduler.

    The cosine starts with the run, not after the warm-up, which takes its place for as long as it lasts. With
    lag_epochs 1 every epoch has the value that was due one epoch before, the first two the start's: DeiT's loop.
    Warm-up and errors as in `cosine`; a run no longer than its cooldown only warms up.
    """
    _check_levels(lr, warmup_start_lr, min_lr)
    epoch = max(math.floor(progress.epoch) - number_in_range("schedule.lag_epochs", lag_epochs), 0.0)
    begun = Progress(
        step=round(epoch / progress.total_epochs * progress.total_steps),
        total_steps=progress.total_steps,
        epoch=epoch,
        total_epochs=progress.total_epochs,
    )
    position, length, _ = _duration(
        "warmup", warmup_epochs, warmup_steps, warmup_fraction, default_warmup_fraction, begun
    )
    if position < length:
        return _rise(position / length, warmup_start_lr, lr)
    falling = progress.total_epochs - number_in_range("schedule.cooldown_epochs", cooldown_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * _share(epoch, falling)))


def linear_warmup(
    progress: Progress,
    *,
    lr: float,
    warmup_epochs: float | None = None,
    warmup_steps: int | None = None,
    warmup_fraction: float | None = None,
    default_warmup_fraction: float = 0.0,
    warmup_start_lr: float = 0.0,
    min_lr: float = 0.0,
) -> float:
    """Linear warm-up to `lr`, then linear decay to `min_lr` at the end of the run. ViT section 4.1, arXiv:2010.11929.

    With warmup_steps and min_lr 1e-5 this is JAX ViT's linear schedule. Warm-up and errors as in `cosine`.
    """
    _check_levels(lr, warmup_start_lr, min_lr)
    position, length, total = _duration(
        "warmup", warmup_epochs, warmup_steps, warmup_fraction, default_warmup_fraction, progress
    )
    if position < length:
        return _rise(position / length, warmup_start_lr, lr)
    return min_lr + (lr - min_lr) * (1.0 - _share(position - length, total - length))


def constant(
    progress: Progress,
    *,
    lr: float,
    warmup_epochs: float | None = None,
    warmup_steps: int | None = None,
    warmup_fraction: float | None = None,
    default_warmup_fraction: float = 0.0,
    warmup_start_lr: float = 0.0,
) -> float:
    """Linear warm-up to `lr`, which then stays. Warm-up and errors as in `cosine`."""
    _check_levels(lr, warmup_start_lr, 0.0)
    position, length, _ = _duration(
        "warmup", warmup_epochs, warmup_steps, warmup_fraction, default_warmup_fraction, progress
    )
    return _rise(position / length, warmup_start_lr, lr) if position < length else lr


def wsd(
    progress: Progress,
    *,
    lr: float,
    warmup_epochs: float | None = None,
    warmup_steps: int | None = None,
    warmup_fraction: float | None = None,
    default_warmup_fraction: float = 0.0,
    warmup_start_lr: float = 0.0,
    decay_epochs: float | None = None,
    decay_steps: int | None = None,
    decay_fraction: float | None = None,
    default_decay_fraction: float = 0.2,
    min_lr: float = 0.0,
) -> float:
    """Warm-up, stable, decay: `lr` stays until a linear cooldown to `min_lr` ends the run. Zhai et al. 2021, section
    3.5 (arXiv:2106.04560, for ViT); the name is MiniCPM's (arXiv:2404.06395).

    Warm-up as in `cosine`; the cooldown's duration is given in the same three units. Where the two overlap the lower
    value holds. Raises UserError as `cosine` does.
    """
    rising = constant(
        progress,
        lr=lr,
        warmup_epochs=warmup_epochs,
        warmup_steps=warmup_steps,
        warmup_fraction=warmup_fraction,
        default_warmup_fraction=default_warmup_fraction,
        warmup_start_lr=warmup_start_lr,
    )
    _check_levels(lr, warmup_start_lr, min_lr)
    position, length, total = _duration(
        "decay", decay_epochs, decay_steps, decay_fraction, default_decay_fraction, progress
    )
    left = total - position
    falling = lr if left >= length else _rise(max(left, 0.0) / length, min_lr, lr)
    return min(rising, falling)


def number_in_range(key: str, value: object, *, low: float = 0.0, high: float = math.inf) -> float:
    """The value as a float. Raises UserError naming the key unless it is a finite number in [low, high]."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:  # type: ignore[operator]
        allowed = f"a number of at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
        raise UserError(f"{key}={value}: needs {allowed}")
    return float(value)  # type: ignore[arg-type]


def _duration(
    what: str,
    epochs: float | None,
    steps: int | None,
    fraction: float | None,
    default_fraction: float,
    progress: Progress,
) -> tuple[float, float, float]:
    """(position, duration, length of the run), all three in the unit in which the duration was given."""
    given = {f"{what}_epochs": epochs, f"{what}_steps": steps, f"{what}_fraction": fraction}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        both = " and ".join(f"schedule.{name}={given[name]:g}" for name in named)
        raise UserError(f"{both}: one of them counts; give the other as null")
    if steps is not None:
        return progress.step, number_in_range(f"schedule.{what}_steps", steps), progress.total_steps
    if epochs is not None:
        return progress.epoch, number_in_range(f"schedule.{what}_epochs", epochs), progress.total_epochs
    key = f"schedule.{what}_fraction" if fraction is not None else f"schedule.default_{what}_fraction"
    share = number_in_range(key, default_fraction if fraction is None else fraction, high=1.0)
    return progress.epoch, share * progress.total_epochs, progress.total_epochs


def _check_levels(lr: float, warmup_start_lr: float, min_lr: float) -> None:
    number_in_range("optim.lr", lr)
    for name, value in (("warmup_start_lr", warmup_start_lr), ("min_lr", min_lr)):
        if number_in_range(f"schedule.{name}", value) > lr:
            raise UserError(
                f"schedule.{name}={value:g}: above the peak learning rate {lr:g}; lower it or raise optim.lr"
            )


def _rise(share: float, start: float, end: float) -> float:
    return start + (end - start) * share


def _share(part: float, whole: float) -> float:
    """part / whole within [0, 1]. 1 where nothing is left to decay over: a warm-up as long as the run."""
    return min(part / whole, 1.0) if whole > 0 else 1.0
