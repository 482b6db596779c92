"""What a model costs before any training: parameters, arithmetic, memory. Counted, never measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
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

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def state_bytes(model: nn.Module, *, optimizer_slots: int) -> StateBytes:
    """Bytes of weights, gradients and optimizer state; activations come on top and depend on the batch.

    optimizer_slots: tensors the optimizer keeps for every weight, 2 for Adam and AdamW, 1 for SGD with momentum,
    0 without. Frozen parameters have neither gradient nor slot."""

    def size(tensors: Sequence[nn.Parameter]) -> int:
        return FLOAT32_BYTES * sum(tensor.numel() for tensor in tensors)

    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return StateBytes(
        weights=size(parameters) + sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        gradients=size(trained),
        optimizer=optimizer_slots * size(trained),
    )
