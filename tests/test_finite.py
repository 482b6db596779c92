"""A loss that is not finite never reaches the weights, whether the host looks at once or only when it logs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitexp.errors import UserError
from vitexp.finite import FiniteGuard

NAMES = [f"picture-{n}.png" for n in range(20)]


def a_step(layer: nn.Module, optimizer: torch.optim.Optimizer, guard: FiniteGuard, step: int, scale: float) -> None:
    loss = layer(torch.ones(2, 3)).square().mean() * scale
    loss.backward()
    guard.admit(step, loss.detach(), torch.tensor([2 * step, 2 * step + 1]))
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_on_a_gpu_the_fused_optimizer_leaves_the_weights_alone_until_the_host_looks(make: type) -> None:
    layer = nn.Linear(3, 2)
    optimizer = make(layer.parameters(), lr=0.1, fused=True)
    guard = FiniteGuard(optimizer, deferred=True, names=NAMES)
    assert guard.deferred
    a_step(layer, optimizer, guard, 0, 1.0)
    guard.look()
    before = [p.detach().clone() for p in layer.parameters()]
    a_step(layer, optimizer, guard, 1, 1.0)
    assert not all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True)), "a good step counts"
    before = [p.detach().clone() for p in layer.parameters()]
    moments = {k: v.clone() for s in optimizer.state.values() for k, v in s.items() if isinstance(v, torch.Tensor)}
    a_step(layer, optimizer, guard, 2, float("nan"))
    a_step(layer, optimizer, guard, 3, 1.0)  # a good one after it: the run is to stop where it went wrong
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    after = {k: v for s in optimizer.state.values() for k, v in s.items() if isinstance(v, torch.Tensor)}
    assert all(torch.equal(moments[k], after[k]) for k in moments)
    with pytest.raises(UserError, match="train/loss is nan at step 3") as error:
        guard.look()
    assert "picture-4.png, picture-5.png" in str(error.value)


def test_an_optimizer_that_cannot_be_held_back_is_checked_at_once() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.RMSprop(layer.parameters(), lr=0.1)
    guard = FiniteGuard(optimizer, deferred=True, names=NAMES)
    assert not guard.deferred
    before = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(UserError, match="train/loss is inf at step 1"):
        a_step(layer, optimizer, guard, 0, float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def test_weights_that_are_not_finite_are_not_saved() -> None:
    layer = nn.Linear(3, 2)
    guard = FiniteGuard(torch.optim.SGD(layer.parameters(), lr=0.1), deferred=False, names=NAMES)
    guard.check_weights(list(layer.parameters()), 4)
    with torch.no_grad():
        layer.bias[0] = float("inf")
    with pytest.raises(UserError, match="weights are not finite after step 4"):
        guard.check_weights(list(layer.parameters()), 4)
