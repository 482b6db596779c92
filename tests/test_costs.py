from __future__ import annotations

import timm
import torch
from torch import nn

from vitexp.costs import count_parameters, forward_gflops, state_bytes


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
