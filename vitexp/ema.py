"""Exponential moving average of weights, as evaluated and exported in DeiT, MAE fine-tuning and LV-ViT recipes.

What is averaged is what timm's ModelEmaV3 averages, BatchNorm's statistics among it. Own code, because that keeps a
second module: a deepcopy, which fails once attention hooks have run, and which torch.compile would compile again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from vitexp.errors import UserError


def ema_decay(step: int, *, decay: float, warmup_power: float) -> float:
    """Share of the old average that is kept in the update after `step` earlier ones: min(decay, 1 - (1 + step)^-power).

    The warm-up is timm's ModelEmaV3's with gamma 1: the first update copies the weights, so a short run is not averaged
    with its random start. At power 2/3 it passes 0.99 at step 1000 and 0.999 at 31 600. Power 0 means no warm-up."""
    if warmup_power == 0:
        return decay
    return min(decay, 1.0 - (1.0 + step) ** -warmup_power)


class Ema:
    """Averages of a model's parameters and of its saved buffers of floating point (BatchNorm's statistics), on the same
    device. What counts in whole numbers is the model's own.

    Make it once the model is on its device with its starting weights, from the bare module (not the DDP or compiled
    wrapper) whose keys name the weights. `decay` in [0, 1), `warmup_power` >= 0; UserError outside."""

    def __init__(self, model: nn.Module, *, decay: float, warmup_power: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema decay={decay}: allowed is 0 <= decay < 1, usual are 0.99 to 0.99999")
        if not 0 <= warmup_power < float("inf"):
            raise UserError(f"ema warmup_power={warmup_power}: allowed is 0 (no warm-up) or more, usual is 0.667")
        self.decay, self.warmup_power = decay, warmup_power
        self._model = model
        # The very objects that are trained, once each, also where several names of the state dict mean one of them.
        named = {n: tensor for n, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point()}
        for name, tensor in named.items():
            if tensor.dtype not in (torch.float32, torch.float64):
                # (1 - decay) * difference is below the resolution of half precision: the average would stand still.
                raise UserError(f"ema needs float32 weights, {name} is {str(tensor.dtype).removeprefix('torch.')}")
        self._tensors = list({id(tensor): tensor for tensor in named.values()}.values())
        self._averages = [tensor.detach().clone() for tensor in self._tensors]
        places = {id(tensor): place for place, tensor in enumerate(self._tensors)}
        self._places = {name: places[id(tensor)] for name, tensor in named.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the model's weights. `step`: updates made before this one, 0 for the first."""
        weight = 1.0 - ema_decay(step, decay=self.decay, warmup_power=self.warmup_power)
        torch._foreach_lerp_(self._averages, self._tensors, weight)  # pyright: ignore[reportPrivateImportUsage]

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the averaged weights inside the block and its own again after it. Nothing is copied.

        Exchanges storages under the same tensor objects, so wrappers and compiled code go on working. Do not train,
        save or enter it again inside."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for place, tensor in enumerate(self._tensors):
            tensor.data, self._averages[place] = self._averages[place], tensor.data

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under all of the model's own keys, as references: for the checkpoint and for export."""
        return {**self._model.state_dict(), **{name: self._averages[place] for name, place in self._places.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over saved averages, bit for bit. ValueError where keys or shapes differ from the model's.

        Whole numbers among them are not read: they equal those saved with the model's own weights."""
        own = self.state_dict()
        shapes, saved = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (own, state))
        if shapes != saved:
            odd = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
            raise ValueError(f"saved average does not fit the model; first of {len(odd)}: {', '.join(odd[:3])}")
        for name, place in self._places.items():
            self._averages[place].copy_(state[name])
