"""What a model costs before any training: parameters, arithmetic, memory, disk. Counted, never measured."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

TRAIN_TO_FORWARD = 3  # backward multiplies each weight matrix twice, by the incoming gradient and by the input
FLOAT32_BYTES = 4


def count_parameters(model: nn.Module) -> int:
    """Numbers that training can change, frozen ones included, shared ones once. Buffers are not parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def forward_gflops(model: nn.Module, image_size: int | tuple[int, int], in_channels: int = 3) -> float:
    """10^9 floating point operations of one picture's forward pass, where a multiply-add is two.

    Matrix products, convolutions and attention only, as every published table counts. Those tables print
    multiply-adds under the name GFLOPs: ViT-B/16 at 224 is "17.6 GFLOPs" there and 35.1 here.
    Runs on the meta device whatever device the model is on, so it takes no time, no memory and no random numbers.
    Count before torch.compile: a compiled model would be compiled anew for meta tensors."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    weight = next((tensor for tensor in tensors.values() if tensor.is_floating_point()), torch.empty(0))
    picture = torch.empty(1, in_channels, height, width, dtype=weight.dtype, device="meta")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # drop path and token masking would change the count
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, on_meta, (picture,))
    finally:
        for module, training in modes:
            module.training = training
    return counter.get_total_flops() / 1e9


@dataclass(frozen=True)
class StateBytes:
    """Bytes that stay for the whole run, all in float32 as mixed precision keeps them."""

    weights: int
    gradients: int
    optimizer: int
    average: int = 0  # the EMA's copy of the weights
    teacher: int = 0  # weights of a model beside it that only answers

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.teacher


def state_bytes(
    model: nn.Module, *, optimizer_slots: int, averaged: bool = False, teacher: nn.Module | None = None
) -> StateBytes:
    """Bytes of weights, gradients and optimizer state; activations come on top and depend on the batch.

    optimizer_slots: tensors the optimizer keeps for every weight, 2 for Adam and AdamW, 1 for SGD with momentum,
    0 without. Frozen parameters have neither gradient nor slot. averaged: an EMA keeps a copy of all weights."""

    def size(tensors: Sequence[nn.Parameter]) -> int:
        return FLOAT32_BYTES * sum(tensor.numel() for tensor in tensors)

    def weights(module: nn.Module) -> int:
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
        return size(list(module.parameters())) + buffers

    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return StateBytes(
        weights=weights(model),
        gradients=size(trained),
        optimizer=optimizer_slots * size(trained),
        average=weights(model) if averaged else 0,
        teacher=0 if teacher is None else weights(teacher),
    )


@dataclass(frozen=True)
class DiskBytes:
    """What a run leaves on disk, but for its rows and pictures."""

    checkpoint: int  # one
    checkpoints: int  # how many of them stay
    weights: int  # exported files
    logged: int = 0  # the copy of some of them in a tracking store on this disk

    @property
    def left(self) -> int:
        """At its end. While it runs it needs a checkpoint more at times: an old one goes when the new one is whole."""
        return self.checkpoints * self.checkpoint + self.weights + self.logged


def checkpoint_bytes(held: StateBytes) -> int:
    """Bytes of a checkpoint: weights, what the optimizer keeps, and the average."""
    return held.weights + held.optimizer + held.average


def disk_needed(runs: Sequence[DiskBytes], *, at_a_time: int) -> int:
    """Bytes that runs in the end, so many side by side, take at most."""
    between = sorted((run.checkpoint for run in runs if run.checkpoints), reverse=True)[:at_a_time]
    return sum(run.left for run in runs) + sum(between)


def free_disk(place: Path) -> int:
    """Bytes that are free where a folder is, or is going to be."""
    place = place.expanduser().absolute()
    return shutil.disk_usage(next(one for one in (place, *place.parents) if one.exists())).free


def training_gflops(method: nn.Module, make_inputs: Callable[[torch.device], Sequence[Any]]) -> float:
    """10^9 operations, counted as by forward_gflops, of a training step's forward and backward for all of its inputs.

    method: anything whose output has a `loss`, on the meta device. `make_inputs` gives its arguments on that device.
    About three times the forward where everything trains, less where the first layers are frozen."""
    method = copy.deepcopy(method).train()  # takes the gradients
    with FlopCounterMode(display=False) as counter:
        method(*make_inputs(torch.device("meta"))).loss.backward()
    return counter.get_total_flops() / 1e9


def activation_bytes(
    module: nn.Module,
    make_inputs: Callable[[torch.device], Sequence[Any]],
    *,
    autocast: torch.dtype | None,
    device: torch.device,
) -> int:
    """Bytes that a forward in training keeps for its backward, each storage once, weights and buffers left out.

    Under autocast (its dtype; None: float32) the weights' low-precision copies count, for they stay until the backward.
    What lives for a moment only does not, nor what gradient checkpointing makes again.

    Nothing is computed and no memory used: tensors are fake ones of `device`, whose kernels decide what is kept (fused
    attention keeps no probabilities). `module` is on the meta device; `make_inputs` gives its arguments on the device
    it is called with."""
    module = copy.deepcopy(module).train()
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    low = contextlib.nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    with FakeTensorMode():
        fake = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device, requires_grad=tensor.requires_grad)
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        with low, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = functional_call(module, fake, tuple(make_inputs(device)))
        del output
        own = {tensor.untyped_storage()._cdata for tensor in fake.values()}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)
