"""What the ViT's layers do their own way equals the plain formula: values, gradients, types, and what can be hooked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitexp.models import layers
from vitexp.models.layers import Block, Linear, _Affine, _Attend, add_branch

needs_bf16_products = pytest.mark.skipif(not layers._multiplies_bf16(), reason="no bf16 products on this processor")


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result and the gradient of each input, for one fixed gradient of the result."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    torch.manual_seed(7)
    out.backward(torch.randn(out.shape).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def plain_attention(qkv: Tensor, heads: int, scale: float) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return (((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def our_attention(qkv: Tensor, heads: int, scale: float) -> Tensor:
    return _Attend.apply(qkv, heads, scale, qkv.shape[1])


@pytest.mark.parametrize("cache", [1, 500, 1 << 21], ids=["a head at a time", "with a rest", "all at once"])
def test_attention_and_its_derivative_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch, cache: int) -> None:
    monkeypatch.setattr(layers, "_CACHE", cache)
    torch.manual_seed(0)
    qkv = torch.randn(3, 5, 3 * 2 * 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(our_attention(qkv, 2, 0.7), plain_attention(qkv, 2, 0.7))
    torch.testing.assert_close(_Attend.apply(qkv, 2, 0.7, 2), plain_attention(qkv, 2, 0.7)[:, -2:])
    for last in (5, 2):
        assert torch.autograd.gradcheck(lambda x, last=last: _Attend.apply(x, 2, 0.7, last), qkv)


@pytest.mark.parametrize(("batch", "tokens", "heads", "width"), [(8, 65, 3, 64), (2, 197, 4, 32), (4, 50, 3, 64)])
def test_bf16_attention_is_as_near_the_truth_as_the_plain_one(batch: int, tokens: int, heads: int, width: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(batch, tokens, 3 * heads * width).bfloat16()
    scale = width**-0.5
    plain, ours = (with_gradients(lambda x, f=f: f(x, heads, scale), qkv) for f in (plain_attention, our_attention))
    truth = with_gradients(lambda x: plain_attention(x, heads, scale), qkv.double())
    for a, b, exact in zip(ours, plain, truth, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - exact).norm() <= 1.01 * (b - exact).norm()


@needs_bf16_products
@pytest.mark.parametrize(("inner", "outer"), [(48, 96), (256, 320), (320, 256)])
def test_bf16_linear_is_as_near_the_truth_as_torchs(inner: int, outer: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape).bfloat16() for shape in ((8, 65, inner), (outer, inner), (outer,))]
    plain, ours, truth = (
        with_gradients(f, *given)
        for f, given in ((F.linear, inputs), (_Affine.apply, inputs), (F.linear, [t.double() for t in inputs]))
    )
    for a, b, exact in zip(ours, plain, truth, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert (a - exact).norm() <= 1.01 * (b - exact).norm()


@needs_bf16_products
def test_linear_adds_its_bias_in_the_product_only_in_bf16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    apply = _Affine.apply
    monkeypatch.setattr(_Affine, "apply", lambda *given: calls.append(given[0].dtype) or apply(*given))
    layer, x = Linear(6, 4), torch.randn(3, 6)
    assert layer(x).dtype == torch.float32
    assert layer.double()(x.double()).dtype == torch.float64
    layer.float()
    Linear(6, 4, bias=False).bfloat16()(x.bfloat16())
    assert layer.bfloat16()(x.bfloat16()[:0]).shape == (0, 4)
    assert not calls
    layer(x.bfloat16())
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer(x[0]).shape == (4,)
        frozen = layer.requires_grad_(False)(x.requires_grad_())
    frozen.float().sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.bfloat16().float().sum(0).expand(3, 6), rtol=0.02, atol=0.02)
    assert calls == [torch.bfloat16] * 4


def test_linear_of_takes_over_the_parameters_and_draws_none() -> None:
    plain = nn.Linear(6, 4)
    state = torch.get_rng_state()
    ours = Linear.of(plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert ours.weight is plain.weight
    assert ours.bias is plain.bias
    assert Linear.of(nn.Linear(6, 4, bias=False)).bias is None


def test_residual_sum_leaves_the_branch_as_it_was() -> None:
    x = torch.randn(2, 3)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        branch = torch.randn(2, 3).to(dtype)
        before = branch.clone()
        assert torch.equal(add_branch(x, branch), x + branch)
        assert torch.equal(branch, before)


@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_block_of_the_last_tokens_alone_gives_what_the_whole_gives_there(attention: str, dropout: float) -> None:
    torch.manual_seed(0)
    block = Block(24, 3, attention=attention, attention_dropout=dropout, residual_scale=2.0).double().eval()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    whole, part = (with_gradients(f, x) for f in (lambda x: block(x)[:, -3:], lambda x: block(x, last=3)))
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a, b)


def block_gradients(run: Callable[[nn.Module, Tensor], Tensor], *, seed: int = 3) -> list[Tensor]:
    torch.manual_seed(seed)
    block = Block(48, 3, dropout=0.1, attention_dropout=0.1)
    x = torch.randn(4, 17, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(block, x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in block.parameters())]


def test_recomputing_a_bf16_block_changes_no_number() -> None:
    plain = block_gradients(lambda block, x: block(x))
    again = block_gradients(lambda block, x: checkpoint(block, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_a_bf16_block_compiles_whole_with_its_derivative() -> None:
    plain = block_gradients(lambda block, x: block(x))
    compiled = block_gradients(lambda block, x: torch.compile(block, backend="aot_eager", fullgraph=True)(x))
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * b.abs().max().item())
