from __future__ import annotations

from collections.abc import Sequence

import pytest
import timm
import torch
from torch import Tensor, nn

from vitexp.costs import activation_bytes, count_parameters, forward_gflops, state_bytes, training_gflops
from vitexp.methods.supervised import Supervised
from vitexp.models.build import build_model
from vitexp.types import Batch, Progress, StepOutput


def vit_base_on_meta() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224")


def test_parameters_are_counted_once_when_two_modules_share_them():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(3, 5))
    assert count_parameters(model) == 2 * (3 * 5 + 5)
    model[1].weight = model[0].weight
    assert count_parameters(model) == 3 * 5 + 2 * 5


def test_buffers_are_no_parameters_and_frozen_ones_are():
    model = nn.BatchNorm2d(7)
    model.requires_grad_(False)
    assert count_parameters(model) == 2 * 7


def test_vit_base_costs_what_its_published_table_says():
    model = vit_base_on_meta()
    assert count_parameters(model) == 86_567_656
    assert round(forward_gflops(model, 224) / 2, 1) == 17.6  # published "GFLOPs" are multiply-adds


def test_attention_is_counted_alike_on_both_of_its_paths():
    model = vit_base_on_meta()
    counts = []
    for fused in (True, False):
        for block in model.blocks:
            block.attn.fused_attn = fused
        counts.append(forward_gflops(model, 224))
    assert counts[0] == counts[1]


def test_a_multiply_add_is_two_operations_in_layers_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(2, 6, 4, stride=4), nn.Flatten(), nn.Linear(6 * 2 * 3, 5))
    multiply_adds = (2 * 3) * 6 * (2 * 4 * 4) + (6 * 2 * 3) * 5
    assert forward_gflops(model, (8, 12), in_channels=2) * 1e9 == 2 * multiply_adds


def test_counting_leaves_weights_modes_and_random_numbers_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 2))
    model.train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    forward_gflops(model, 4)
    assert [module.training for module in model.modules()] == [True, True, False, True, True, True]
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, before[name])


def test_state_counts_gradients_and_slots_of_trained_weights_only():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 1, bias=False))
    model[0].requires_grad_(False)
    memory = state_bytes(model, optimizer_slots=2)
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * 110, 4 * 10, 2 * 4 * 10)
    assert memory.total == 4 * 110 + 4 * 10 + 8 * 10


def test_the_averages_copy_holds_all_weights_and_statistics():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10))
    model[0].requires_grad_(False)
    held = state_bytes(model, optimizer_slots=0, averaged=True)
    assert held.average == held.weights == 4 * (100 + 20 + 20) + 8
    assert state_bytes(model, optimizer_slots=0).average == 0


class TwoLayers(nn.Module):
    """10 numbers in, 20 between, 3 out; the loss is their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))

    def forward(self, x: Tensor) -> StepOutput:
        return StepOutput(self.layers(x).sum())


def four_rows(device: torch.device) -> list[Tensor]:
    return [torch.zeros(4, 10, device=device)]


def two_layers_on_meta() -> TwoLayers:
    with torch.device("meta"):
        return TwoLayers()


def test_a_steps_arithmetic_is_that_of_its_products_and_less_where_layers_are_frozen():
    model, rows = two_layers_on_meta(), 4
    first, second = 2 * rows * 10 * 20, 2 * rows * 20 * 3
    assert training_gflops(model, four_rows) * 1e9 == 2 * first + 3 * second  # no gradient of the pictures
    model.layers[0].requires_grad_(False)
    assert training_gflops(model, four_rows) * 1e9 == first + 2 * second
    assert model.layers[2].weight.grad is None


def test_activations_are_what_the_backward_needs_each_once():
    model = two_layers_on_meta()
    where = {"device": torch.device("cpu")}
    # The input, and what ReLU gives: the second layer's input is the same numbers.
    assert activation_bytes(model, four_rows, autocast=None, **where) == 4 * 4 * (10 + 20)
    # Both in half the bytes, and a copy of the second weight, through which the gradient goes.
    assert activation_bytes(model, four_rows, autocast=torch.bfloat16, **where) == 2 * (4 * (10 + 20) + 20 * 3)


def vit_inputs(device: torch.device) -> Sequence[object]:
    images, targets = torch.ones(3, 3, 32, 32, device=device), torch.zeros(3, dtype=torch.long, device=device)
    return Batch(images, targets, targets), Progress(0, 1, 0.0, 1.0)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_vits_activations_are_those_of_a_real_forward(autocast: torch.dtype | None):
    options = {"image_size": 32, "num_classes": 10, "dropout": 0.1, "drop_path": 0.1}
    model = Supervised(build_model("vit_debug", **options)).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    low = torch.autocast("cpu", autocast, enabled=autocast is not None)
    with low, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(*vit_inputs(torch.device("cpu")))
    real = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    del output
    with torch.device("meta"):
        described = Supervised(build_model("vit_debug", **options))
    state = torch.get_rng_state()
    assert activation_bytes(described, vit_inputs, autocast=autocast, device=torch.device("cpu")) == real
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_checkpointing_keeps_less():
    bytes_kept = []
    for checkpointing in (False, True):
        with torch.device("meta"):
            model = Supervised(build_model("vit_debug", image_size=32, gradient_checkpointing=checkpointing))
        bytes_kept.append(activation_bytes(model, vit_inputs, autocast=None, device=torch.device("cpu")))
    assert bytes_kept[1] < 0.5 * bytes_kept[0]
