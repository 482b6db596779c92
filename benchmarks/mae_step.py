"""A pretraining step of vitexp's masked autoencoder beside the official one, and beside supervised training.

`mae_step.py PATH`: a checkout of facebookresearch/mae, whose license does not let us bring any of it along; its
`models_mae.py` is imported from there with the timm that is installed. Before any timing the same weights, pictures and
noise must give the same loss and gradients in fp32. Without a path vitexp's own rows are printed.

Step: forward, backward, AdamW. Each contender has a process of its own: vitexp's keep freed memory, as its runtime has
it, the official one runs as it is, with its recipe's default AdamW; one more row gives it vitexp's memory and fused
AdamW. `supervised` is vitexp's classification step of the same encoder.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
from measuring import Clock, Elsewhere, Times, parser, ratio, spread, start, table, take_turns, verdict
from torch import Tensor, nn

from vitexp.models.build import build_model
from vitexp.models.mae import MaskedAutoencoder
from vitexp.runtime import keep_freed_memory

MASK_RATIO = 0.75
TOLERANCE = 1e-5  # relative, of the loss and of each parameter's gradient


class Setting(NamedTuple):
    precision: str
    batch: int
    goal: float  # images/s over the official step's
    supervised_goal: float | None


SETTINGS = (
    Setting("fp32", 8, 1.15, 1.5),
    Setting("bf16", 8, 1.4, 1.5),
    Setting("bf16", 32, 1.25, 1.5),
)


def main() -> None:
    arguments = options().parse_args()
    clock = start(arguments)
    if arguments.checkout is None:
        print(
            "No path of an official checkout (facebookresearch/mae) was given: vitexp's rows alone, nothing checked\n"
        )
    else:
        check_equality(load_official(arguments.checkout), size=64 if arguments.quick else 224)
    rounds = arguments.rounds or (1 if arguments.quick else 10)
    rows: list[list[str]] = []
    for setting in SETTINGS:
        batch = setting.batch // 8 if arguments.quick else setting.batch
        rows += measure(setting, arguments.checkout, batch=batch, rounds=rounds, clock=clock)
    table(["ViT-B/16, 224 px", "ms a step", "images/s", "vitexp MAE is x faster", "goal"], rows)


def options() -> argparse.ArgumentParser:
    made = parser(__doc__ or "")
    made.add_argument("checkout", nargs="?", type=Path, default=None, help="folder of an official checkout")
    return made


# ---- the official model ------------------------------------------------------------------------------------------
def load_official(checkout: Path) -> Any:
    """The checkout's `models_mae`. Its year's timm, numpy and torch had names that theirs of today lack."""
    if not (checkout / "models_mae.py").is_file():
        raise SystemExit(f"{checkout}: holds no models_mae.py; is it a checkout of facebookresearch/mae?")
    if not hasattr(np, "float"):
        np.float = float  # noqa: NPY001
    sys.path.insert(0, str(checkout.resolve()))
    # Only while it is imported: it binds the two classes that it takes from timm by name.
    with mock.patch.object(timm_vit, "Block", tolerant(timm_vit.Block)):
        return importlib.import_module("models_mae")


def tolerant(block: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """timm's Block without the arguments that newer versions have dropped and that are None in the official code."""
    known = inspect.signature(block).parameters

    def make(*positional: Any, **named: Any) -> nn.Module:
        unknown = {name: value for name, value in named.items() if name not in known}
        if any(value is not None for value in unknown.values()):
            raise SystemExit(f"timm's Block takes no {', '.join(unknown)}: install the timm that the checkout names")
        return block(*positional, **{name: value for name, value in named.items() if name in known})

    return make


@contextlib.contextmanager
def given_noise(noise: Tensor) -> Iterator[None]:
    """torch.rand returns this, as the official code draws its mask with it."""

    def rand(*size: Any, **_: Any) -> Tensor:
        assert tuple(size) == tuple(noise.shape), f"the official code draws {size}, not one number a patch"
        return noise

    with mock.patch.object(torch, "rand", rand):
        yield


def pair(official: Any, **options: Any) -> tuple[nn.Module, MaskedAutoencoder]:
    """The official base model and ours with the same weights."""
    theirs = official.mae_vit_base_patch16(norm_pix_loss=True, **options)
    for module in theirs.modules():  # the timm it names, 0.3.2, writes the softmax out; in bf16 that is the faster form
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    ours = build_model("mae", norm_pix_loss=True, image_size=options.get("img_size", 224))
    assert isinstance(ours, MaskedAutoencoder)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def check_equality(official: Any, *, size: int) -> None:
    """Ends the script when loss or any gradient is further apart than rounding."""
    torch.manual_seed(0)
    theirs, ours = pair(official, img_size=size)
    images, noise = torch.randn(2, 3, size, size), torch.rand(2, (size // 16) ** 2)
    with given_noise(noise):
        loss = theirs(images, mask_ratio=MASK_RATIO)[0]
    loss.backward()
    found = ours(images, noise, everywhere=False)
    found.loss.backward()
    apart = {"loss": abs(found.loss.item() / loss.item() - 1)}
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    gradients = {n.removeprefix("encoder."): p.grad for n, p in ours.named_parameters() if p.grad is not None}
    if expected.keys() != gradients.keys():
        raise SystemExit(f"other parameters are trained: {sorted(expected.keys() ^ gradients.keys())[:5]}")
    for name, gradient in expected.items():
        ours_, theirs_ = without_key_bias(name, gradients[name]), without_key_bias(name, gradient)
        apart[name] = ((ours_ - theirs_).norm() / theirs_.norm()).item()
    worst = max(apart, key=lambda name: apart[name])
    print(f"fp32, same weights and noise: loss apart by {apart['loss']:.1e}, gradients at most by {apart[worst]:.1e}")
    print(f"({worst}; {len(expected)} parameters)\n")
    if apart[worst] > TOLERANCE:
        raise SystemExit(f"{worst} is {apart[worst]:.1e} apart, more than {TOLERANCE:g}: the two are not the same")


def without_key_bias(name: str, gradient: Tensor) -> Tensor:
    """The bias of the keys moves no softmax: its gradient is zero but for rounding, and has no relative error."""
    if not name.endswith("qkv.bias"):
        return gradient
    query, _, value = gradient.chunk(3)
    return torch.cat([query, value])


# ---- steps -------------------------------------------------------------------------------------------------------
def measure(setting: Setting, checkout: Path | None, *, batch: int, rounds: int, clock: Clock) -> list[list[str]]:
    given = {"setting": setting, "batch": batch}
    makers: dict[str, tuple[Callable[..., Callable[[], None]], dict[str, Any]]] = {
        "vitexp MAE": (our_step, given),
        "vitexp supervised": (supervised_step, given),
    }
    if checkout is not None:
        for name, tuned in (("official MAE", False), ("official MAE, tuned", True)):
            makers[name] = (official_step, {**given, "checkout": checkout, "tuned": tuned})
    with contextlib.ExitStack() as running:
        steps = {
            name: running.enter_context(Elsewhere(make, told, clock=clock)) for name, (make, told) in makers.items()
        }
        times = take_turns(steps, rounds=rounds, clock=clock)
    goals = {"official MAE": setting.goal, "vitexp supervised": setting.supervised_goal}
    return [row(name, times, setting, batch, goals.get(name)) for name in makers]


def our_step(*, setting: Setting, batch: int) -> Callable[[], None]:
    keep_freed_memory()
    model, images = build_model("mae", norm_pix_loss=True), pictures(batch)
    return step_of(lambda: model(images, everywhere=False).loss, model, setting, fused=True)


def supervised_step(*, setting: Setting, batch: int) -> Callable[[], None]:
    keep_freed_memory()
    model, images = build_model("vit_base"), pictures(batch)
    classes = torch.arange(batch)
    return step_of(lambda: F.cross_entropy(model(images), classes), model, setting, fused=True)


def official_step(*, setting: Setting, batch: int, checkout: Path, tuned: bool) -> Callable[[], None]:
    if tuned:
        keep_freed_memory()
    model, _ = pair(load_official(checkout))
    images = pictures(batch)
    return step_of(lambda: model(images, mask_ratio=MASK_RATIO)[0], model, setting, fused=tuned)


def pictures(batch: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, 3, 224, 224)


def row(name: str, times: Times, setting: Setting, batch: int, goal: float | None) -> list[str]:
    seconds = statistics.median(times[name])
    return [
        f"{setting.precision}, batch {batch}: {name}",
        f"{1000 * seconds:.0f}",
        f"{batch / seconds:.2f}",
        "" if name == "vitexp MAE" else spread(times, ours="vitexp MAE", theirs=name),
        "" if goal is None else verdict(ratio(times, ours="vitexp MAE", theirs=name), goal),
    ]


def step_of(loss_of: Callable[[], Tensor], model: nn.Module, setting: Setting, *, fused: bool) -> Callable[[], None]:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=fused or None)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
