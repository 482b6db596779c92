"""The average of weights: right by definition, exact over a resume, and free to look at."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from vitexp.ema import Ema, ema_decay
from vitexp.errors import UserError


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def train_step(model: nn.Module, step: int) -> None:
    """One made-up update that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    model.train()
    model(torch.randn(8, 6, generator=generator))  # moves the BatchNorm statistics
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def test_average_equals_the_definition_statistics_included_and_counters_are_the_models_own() -> None:
    model = small_model()
    ema = Ema(model, decay=0.9)
    counter = "1.num_batches_tracked"
    expected = {name: tensor.double() for name, tensor in model.state_dict().items() if name != counter}
    for step in range(7):
        train_step(model, step)
        ema.update(step)
        for name in expected:
            expected[name] = 0.9 * expected[name] + 0.1 * model.state_dict()[name].double()
    state = ema.state_dict()
    assert list(state) == list(model.state_dict())
    for name, value in expected.items():
        torch.testing.assert_close(state[name].double(), value, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(state["1.running_mean"], model[1].running_mean)
    assert state[counter] == 7


def test_statistics_of_a_constant_model_stay_to_the_bit() -> None:
    model = small_model()
    ema = Ema(model, decay=0.99992)
    for step in range(20):
        ema.update(step)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in ema.state_dict().items())


@pytest.mark.parametrize("warms_up", [True, False])
def test_averages_are_timms(warms_up: bool) -> None:
    from timm.utils import ModelEmaV3

    model = small_model()
    ema = Ema(model, decay=0.6, warmup_power=2 / 3 if warms_up else 0.0)
    theirs = ModelEmaV3(model, decay=0.6, use_warmup=warms_up)
    for step in range(8):
        train_step(model, step)
        ema.update(step)
        theirs.update(model, step=step + 1 if warms_up else None)  # timm counts from 1
    assert ema.state_dict().keys() == theirs.module.state_dict().keys()
    for name, expected in theirs.module.state_dict().items():
        torch.testing.assert_close(ema.state_dict()[name], expected, rtol=1e-6, atol=1e-7)


def test_decay_is_a_function_of_the_step_alone() -> None:
    assert ema_decay(0, decay=0.999, warmup_power=0) == 0.999
    assert ema_decay(0, decay=0.999, warmup_power=2 / 3) == 0.0
    warming = [ema_decay(step, decay=0.999, warmup_power=2 / 3) for step in range(0, 40_000, 100)]
    assert warming == sorted(warming)
    assert warming[10] == pytest.approx(0.99, abs=1e-4)  # step 1000
    assert warming[-1] == 0.999


def test_first_warmed_up_update_copies_the_weights() -> None:
    model = small_model()
    ema = Ema(model, decay=0.999, warmup_power=2 / 3)
    train_step(model, 0)
    ema.update(0)
    assert torch.equal(ema.state_dict()["0.weight"], model[0].weight)


def test_resumed_average_is_bit_identical() -> None:
    def run(model: nn.Module, ema: Ema, steps: range) -> None:
        for step in steps:
            train_step(model, step)
            ema.update(step)

    straight = small_model()
    straight_ema = Ema(straight, decay=0.97, warmup_power=2 / 3)
    run(straight, straight_ema, range(6))

    first = small_model()
    first_ema = Ema(first, decay=0.97, warmup_power=2 / 3)
    run(first, first_ema, range(3))
    saved = io.BytesIO()
    torch.save({"model": first.state_dict(), "ema": first_ema.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    second = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))  # other random weights
    second_ema = Ema(second, decay=0.97, warmup_power=2 / 3)
    second.load_state_dict(state["model"])
    second_ema.load_state_dict(state["ema"])
    run(second, second_ema, range(3, 6))

    expected, got = straight_ema.state_dict(), second_ema.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert not torch.equal(expected["0.weight"], straight[0].weight)


def test_swapping_in_exchanges_storages_and_gives_them_back_after_an_error() -> None:
    model = small_model()
    ema = Ema(model, decay=0.5)
    train_step(model, 0)
    ema.update(0)
    own = copy.deepcopy(model.state_dict())
    average = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    own_place, average_place = model[0].weight.data_ptr(), ema.state_dict()["0.weight"].data_ptr()
    parameters = list(model.parameters())

    def evaluate_and_fail() -> None:
        with ema.swapped_in():
            assert model[0].weight.data_ptr() == average_place
            assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())
            raise RuntimeError("evaluation broke")

    with pytest.raises(RuntimeError, match="evaluation broke"):
        evaluate_and_fail()
    assert model[0].weight.data_ptr() == own_place
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, average[name]) for name, tensor in ema.state_dict().items())
    assert all(before is after for before, after in zip(parameters, model.parameters(), strict=True))


def test_a_weight_of_two_names_is_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    ema = Ema(model, decay=0.5)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    own = model[0].weight.detach().clone()
    ema.update(0)
    for name in ("0.weight", "1.weight"):
        torch.testing.assert_close(ema.state_dict()[name], (start + own) / 2)
    with ema.swapped_in():
        torch.testing.assert_close(model[1].weight.detach(), (start + own) / 2)
    assert torch.equal(model[0].weight, own)


def test_state_of_another_model_is_refused_by_name() -> None:
    ema = Ema(small_model(), decay=0.9)
    with pytest.raises(ValueError, match=r"first of 2: 2\.bias, 2\.weight"):
        ema.load_state_dict(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).state_dict())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Ema(small_model(), decay=1.0), "decay=1.0"),
        (lambda: Ema(small_model(), decay=float("nan")), "decay=nan"),
        (lambda: Ema(small_model(), decay=0.9, warmup_power=-1), "warmup_power=-1"),
        (lambda: Ema(small_model().bfloat16(), decay=0.9), "0.weight is bfloat16"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], Ema], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
