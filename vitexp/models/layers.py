"""The ViT's layers with timm's parameter names: patch embedding, attention, encoder block.

Mlp, LayerScale and DropPath are timm's. Attention is our own because its fastest form depends on device and dtype,
the patch embedding because a matrix product over a view of the picture is faster than a strided convolution on a CPU
and lets a masked autoencoder embed only the patches it keeps. Where torch's own derivative copies more than it needs,
an autograd Function says how: same formula, once differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ATTENTION_PATHS = ("auto", "fused", "explicit")
_NARROW = 256  # features: below it a product over rows takes its factors as they are
_CACHE = 1 << 21  # bytes of attention scores worked on at a time: a core's second-level cache


class PatchEmbed(nn.Module):
    """Tokens from non-overlapping patches: a convolution with stride = kernel = patch. ViT section 3.1.

    Patches come in raster order. The weight has a convolution's shape (d, c, ph, pw) and is applied as a matrix."""

    def __init__(self, *, patch_size: tuple[int, int], in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def reset_parameters(self) -> None:
        """torch's own start of a convolution."""
        self.proj.reset_parameters()

    def patches(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(b, n, c * ph * pw) pixels of every patch, channel slowest, as the weight's columns are ordered.

        With `keep` (b, m) those of the patches named alone, in that order."""
        height, width = self.patch_size
        if keep is None:
            return rearrange(images, "b c (gh ph) (gw pw) -> b (gh gw) (c ph pw)", ph=height, pw=width)
        grid = rearrange(images, "b c (gh ph) (gw pw) -> b gh gw c ph pw", ph=height, pw=width)
        return pick_patches(grid, keep).flatten(2)

    def project(self, patches: Tensor) -> Tensor:
        """(b, n, d) tokens of the patches given, any number of them."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.project(self.patches(images, keep))


class HMLPStem(PatchEmbed):
    """Tokens from patches as PatchEmbed, but by three convolutions that join ever larger parts of one patch: of a
    quarter of its side, then twice of two by two, each behind it normalised by the batch. Touvron et al. 2022, "Three
    things everyone should know about Vision Transformers", arXiv:2203.09795, section 5.

    Nothing looks beyond a patch, so that a masked autoencoder can leave patches out; the statistics of a batch are then
    those of the patches kept. They are each process's own, where the official code shares them."""

    def __init__(self, *, patch_size: tuple[int, int], in_channels: int, embed_dim: int) -> None:
        super().__init__(patch_size=patch_size, in_channels=in_channels, embed_dim=embed_dim)
        quarter, hidden = (patch_size[0] // 4, patch_size[1] // 4), embed_dim // 4
        self.proj = nn.Sequential(  # pyrefly: ignore[bad-assignment]
            *(nn.Conv2d(in_channels, hidden, kernel_size=quarter, stride=quarter), nn.BatchNorm2d(hidden), nn.GELU()),
            *(nn.Conv2d(hidden, hidden, kernel_size=2, stride=2), nn.BatchNorm2d(hidden), nn.GELU()),
            *(nn.Conv2d(hidden, embed_dim, kernel_size=2, stride=2), nn.BatchNorm2d(embed_dim)),
        )

    def reset_parameters(self) -> None:
        """torch's own start of each layer."""
        reset_layers(self.proj)

    def project(self, patches: Tensor) -> Tensor:
        """(b, n, d) tokens of the patches given, any number of them: each is a picture of its own."""
        pictures = patches.flatten(0, 1).unflatten(1, (-1, *self.patch_size))
        return self.proj(pictures).flatten(1).unflatten(0, patches.shape[:2])

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        if keep is None:
            return self.proj(images).flatten(2).transpose(1, 2)
        return super().forward(images, keep)


def reset_layers(stem: nn.Module) -> None:
    """torch's own start of the convolutions and norms that a stem is made of, in their order."""
    for layer in stem.children():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
            layer.reset_parameters()


def pick_patches(grid: Tensor, keep: Tensor) -> Tensor:
    """(b, m, ...) of (b, gh, gw, ...) at the raster positions `keep` (b, m); of a view only these are copied."""
    batch = torch.arange(keep.shape[0], device=keep.device)[:, None]
    return grid[batch, keep // grid.shape[2], keep % grid.shape[2]]


class Linear(nn.Linear):
    """torch's layer, where a CPU multiplies in bf16 with the bias added inside the product.

    torch writes the bias into the whole output first and then adds the product to it, which for 8320 x 192 x 768
    takes 3.3 ms on one AMX core instead of 1.8. Compiled code does its own fusing."""

    @classmethod
    def of(cls, layer: nn.Module) -> Linear:
        """With the very parameters of `layer`, torch's."""
        assert isinstance(layer, nn.Linear)
        made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
        in_bf16 = input.device.type == "cpu" and dtype == torch.bfloat16 and input.numel() > 0
        if self.bias is None or not in_bf16 or torch.compiler.is_compiling() or not _multiplies_bf16():
            return super().forward(input)
        return _Affine.apply(input.to(dtype), self.weight, self.bias)


@cache
def _multiplies_bf16() -> bool:
    """Whether torch's CPU library has bf16 products for this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _Affine(Function):
    """x w^T + b in the type of x for x (..., k), w (n, k), b (n); gradients in the type of what they are of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        ctx.types = weight.dtype, bias.dtype
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias.to(x.dtype), "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            gradient @ weight if for_x else None,
            _product_over_rows(rows, x.flatten(0, -2), ctx.types[0]) if for_weight else None,
            rows.sum(0, dtype=ctx.types[1]) if for_bias else None,
        )


def _product_over_rows(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a^T b of (m, n) and (m, k), contiguous (n, k) of `dtype`.

    The library reads a transposed factor slowly. To turn the smaller one over beforehand makes 27 ms of 42 for
    6304 x 768 x 3072 in bf16 on one AMX core, 31 of 46 for 6304 x 3072 x 768; narrower ones gain nothing."""
    n, k = a.shape[1], b.shape[1]
    if min(n, k) < _NARROW:
        product = a.t() @ b
    elif n <= k:
        product = a.t().contiguous() @ b
    else:
        product = (b.t().contiguous() @ a).t()
    return product.to(dtype, memory_format=torch.contiguous_format)


class _Attend(Function):
    """softmax(q k^T * scale) v, (b, m, h * d), of the last m of n queries; q, k, v packed as (b, n, 3 * h * d).

    Only the probabilities are kept. Scores and their gradients live a few heads at a time, in memory that stays in the
    processor's cache: 32 x 16 heads x 197 tokens x 32 take 77 ms forward and backward in bf16 on one AMX core, 119 ms
    with all heads at once."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, scale: float, last: int) -> Tensor:  # type: ignore[override]
        q, k, v = rearrange(qkv, "b n (three h d) -> three (b h) n d", three=3, h=num_heads).contiguous().unbind(0)
        q = q[:, -last:]
        probabilities, out = q.new_empty(*q.shape[:2], k.shape[1]), q.new_empty(q.shape)
        groups = _groups_of_heads(probabilities)
        scores = torch.empty_like(probabilities[groups[0]])
        for heads in groups:
            of_group = probabilities[heads]
            _scaled_product(q[heads], k[heads].transpose(1, 2), scale, out=scores[: len(of_group)])
            torch.softmax(scores[: len(of_group)], dim=-1, out=of_group)
            torch.bmm(of_group, v[heads], out=out[heads])
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.num_heads, ctx.scale = num_heads, scale
        return rearrange(out, "(b h) m d -> b m (h d)", h=num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, probabilities = ctx.saved_tensors
        of_out = rearrange(gradient, "b m (h d) -> (b h) m d", h=ctx.num_heads).contiguous()
        last = q.shape[1]
        packed = k.new_empty(3, *k.shape)
        of_q, of_k, of_v = packed.unbind(0)
        of_q[:, :-last] = 0
        groups = _groups_of_heads(probabilities)
        room = torch.empty_like(probabilities[groups[0]]), torch.empty_like(probabilities[groups[0]])
        for heads in groups:
            of_group = probabilities[heads]
            of_probabilities, of_scores = (each[: len(of_group)] for each in room)
            torch.bmm(of_group.transpose(1, 2), of_out[heads], out=of_v[heads])
            torch.bmm(of_out[heads], v[heads].transpose(1, 2), out=of_probabilities)
            torch._softmax_backward_data(of_probabilities, of_group, -1, of_group.dtype, grad_input=of_scores)
            _scaled_product(of_scores, k[heads], ctx.scale, out=of_q[heads, -last:])
            _scaled_product(of_scores.transpose(1, 2), q[heads], ctx.scale, out=of_k[heads])
        return rearrange(packed, "three (b h) n d -> b n (three h d)", h=ctx.num_heads), None, None, None


def _groups_of_heads(probabilities: Tensor) -> list[slice]:
    """Of (b * h, m, n): as many at a time as the cache of a core holds; all at once where no CPU computes."""
    count, each = len(probabilities), max(probabilities[0].nbytes, 1)
    size = max(1, _CACHE // each) if probabilities.device.type == "cpu" else count
    return [slice(begin, begin + size) for begin in range(0, count, size)]


def _scaled_product(a: Tensor, b: Tensor, scale: float, *, out: Tensor) -> None:
    torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale, out=out)  # beta 0: the first is not read


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T * scale) v, in the form that is fastest where it runs.

    `attention`: "fused" is torch's scaled_dot_product_attention, "explicit" writes the softmax out, "auto" decides per
    call. `scale` is 1/sqrt(head width) unless given. Can be passed to timm's Block as `attn_layer`."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        scale: float | None = None,
    ) -> None:
        super().__init__()
        assert dim % num_heads == 0
        assert attention in ATTENTION_PATHS
        where = {"device": device, "dtype": dtype}
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.attention = attention
        self.scale = head_dim**-0.5 if scale is None else scale
        self.qk_norm = qk_norm
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **where)
        self.q_norm = norm_layer(head_dim, **where) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(head_dim, **where) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(dim, **where) if scale_norm else nn.Identity()
        self.proj = Linear(dim, dim, bias=proj_bias, **where)
        self.proj_drop = nn.Dropout(proj_drop)

    def uses_explicit(self, qkv: Tensor) -> bool:
        """Whether these queries, keys and values go the explicit way.

        Forward and backward of 64 x 3 heads x 65 tokens x 64 in bf16 on one AMX core: explicit 8.6 ms, fused 52 ms.
        Without gradients the fused form wins there too (2.2 against 3.0 ms); elsewhere it is never the slower one."""
        if self.attention == "auto":
            return qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.requires_grad
        return self.attention == "explicit"

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, last: int | None = None
    ) -> Tensor:
        """(b, n, d) of tokens (b, n, d), or what the `last` of them alone gather from all."""
        qkv = self.qkv(x)
        last = x.shape[1] if last is None else last
        dropped = self.attn_drop.p if self.training else 0.0
        explicit = attn_mask is None and not is_causal and self.uses_explicit(qkv)
        if explicit and not dropped and not self.qk_norm and not torch.compiler.is_compiling():
            out = _Attend.apply(qkv, self.num_heads, self.scale, last)
        else:
            q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads).unbind(0)
            q, k = self.q_norm(q[:, :, -last:]), self.k_norm(k)
            if explicit:
                out = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
            else:
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=attn_mask, dropout_p=dropped, is_causal=is_causal, scale=self.scale
                )
            out = out.transpose(1, 2).flatten(2)
        return self.project(out)

    def project(self, gathered: Tensor) -> Tensor:
        """(b, n, d) what leaves the layer, of what its heads have gathered, side by side."""
        return self.proj_drop(self.proj(self.norm(gathered)))


class Block(nn.Module):
    """Pre-norm encoder block: x + attention(norm x), then x + mlp(norm x). ViT section 3.1, equations 2 and 3.

    `dropout` follows the attention's output projection and both dense layers of the MLP (ViT appendix B.1).
    `residual_scale` divides what attention and MLP add to x (LV-ViT, arXiv:2104.10858)."""

    attention_layer: ClassVar[type[Attention]] = Attention  # a block with another one names it in a subclass

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        residual_scale: float = 1.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        act_layer: Any = nn.GELU,  # timm's Mlp declares a class and takes any factory
        attention: str = "auto",
        attention_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.norm1 = norm_layer(dim)
        self.attn = self.attention_layer(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            attn_drop=attention_dropout,
            proj_drop=dropout,
            attention=attention,
            scale=attention_scale,
        )
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, init_values=layer_scale)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=dropout)
        self.mlp.fc1, self.mlp.fc2 = Linear.of(self.mlp.fc1), Linear.of(self.mlp.fc2)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, init_values=layer_scale)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, *, last: int | None = None) -> Tensor:
        """(b, n, d) of tokens (b, n, d); with `last` that many at the end, for which the others are only looked at."""
        branch = self.attn(self.norm1(x), last=last)
        x = add_branch(x[:, -branch.shape[1] :], self.drop_path1(self.ls1(branch)), self.residual_scale)
        return add_branch(x, self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), self.residual_scale)


def add_branch(x: Tensor, branch: Tensor, scale: float = 1.0) -> Tensor:
    """x + branch / scale. A bf16 branch is widened first, as the sum does inside too, and that copy then holds it."""
    if (x.dtype, branch.dtype) == (torch.float32, torch.bfloat16):
        widened = branch.float()
        return (widened if scale == 1 else widened.div_(scale)).add_(x)
    return x + branch if scale == 1 else torch.add(x, branch, alpha=1 / scale)
