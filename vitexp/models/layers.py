"""The ViT's layers with timm's parameter names: patch embedding, attention, encoder block.

Mlp, LayerScale and DropPath are timm's. Attention is our own because its fastest form depends on device and dtype,
the patch embedding because a matrix product over a view of the picture is faster than a strided convolution on a CPU
and lets a masked autoencoder embed only the patches it keeps. Where torch's own derivative copies more than it needs,
an autograd Function says how: same formula, once differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ATTENTION_PATHS = ("auto", "fused", "explicit")


class PatchEmbed(nn.Module):
    """Tokens from non-overlapping patches: a convolution with stride = kernel = patch. ViT section 3.1.

    Patches come in raster order. The weight has a convolution's shape (d, c, ph, pw) and is applied as a matrix."""

    def __init__(self, *, patch_size: tuple[int, int], in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

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
        return _Affine.apply(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


@cache
def _multiplies_bf16() -> bool:
    """Whether torch's CPU library has bf16 products for this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _Affine(Function):
    """x w^T + b for x (..., k), w (n, k), b (n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            gradient @ weight if for_x else None,
            rows.t() @ x.flatten(0, -2) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


class _SplitHeads(Function):
    """q, k, v, each (b, h, n, d) and contiguous, of the packed (b, n, 3 * h * d).

    Backward writes each gradient straight to its place; autograd would stack the three, then copy them over."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        return rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=num_heads).contiguous().unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        b, h, n, d = gradients[0].shape
        packed = gradients[0].new_empty(b, n, 3, h, d)
        for place, gradient in zip(packed.unbind(2), gradients, strict=True):
            place.copy_(gradient.transpose(1, 2))
        return packed.flatten(2), None


class _Probabilities(Function):
    """softmax(q k^T * scale), (b, h, n, n), of q and k (b, h, n, d); the scale is part of the products."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        scores = _scaled_product(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), scale)
        probabilities = scores.softmax(dim=-1).unflatten(0, q.shape[:2])
        ctx.save_for_backward(q, k, probabilities)
        ctx.scale = scale
        return probabilities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        q, k, probabilities = ctx.saved_tensors
        of_scores = torch._softmax_backward_data(gradient, probabilities, -1, probabilities.dtype)
        of_scores = of_scores.to(q.dtype).flatten(0, 1)  # CUDA's autocast has the softmax in float32
        of_q = _scaled_product(of_scores, k.flatten(0, 1), ctx.scale)
        of_k = _scaled_product(of_scores.transpose(1, 2), q.flatten(0, 1), ctx.scale)
        return of_q.view_as(q), of_k.view_as(k), None


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)  # beta 0: what is in the first is not read


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T * scale) v, in the form that is fastest where it runs.

    `attention`: "fused" is torch's scaled_dot_product_attention, "explicit" writes the softmax out, "auto" decides per
    call. `scale` is 1/sqrt(head width) unless given. Can be passed to timm's Block as `attn_layer`. A forward hook on
    `attn_drop` sees the attention probabilities on the explicit path only."""

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

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        qkv = self.qkv(x)
        explicit = attn_mask is None and not is_causal and self.uses_explicit(qkv)
        if explicit:
            q, k, v = _SplitHeads.apply(qkv, self.num_heads)
        else:
            q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if explicit:
            probabilities = _Probabilities.apply(q, k, self.scale)
            out = self.attn_drop(probabilities) @ v
        else:
            dropout_p = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=self.scale
            )
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(out))


class Block(nn.Module):
    """Pre-norm encoder block: x + attention(norm x), then x + mlp(norm x). ViT section 3.1, equations 2 and 3.

    `dropout` follows the attention's output projection and both dense layers of the MLP (ViT appendix B.1).
    `residual_scale` divides what attention and MLP add to x (LV-ViT, arXiv:2104.10858)."""

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
        self.attn = Attention(
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

    def forward(self, x: Tensor) -> Tensor:
        x = _residual(x, self.drop_path1(self.ls1(self.attn(self.norm1(x)))), self.residual_scale)
        return _residual(x, self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), self.residual_scale)


def _residual(x: Tensor, branch: Tensor, scale: float = 1.0) -> Tensor:
    """x + branch / scale. A bf16 branch is widened first, as the sum does inside too, and that copy then holds it."""
    if (x.dtype, branch.dtype) == (torch.float32, torch.bfloat16):
        widened = branch.float()
        return (widened if scale == 1 else widened.div_(scale)).add_(x)
    return x + branch if scale == 1 else torch.add(x, branch, alpha=1 / scale)
