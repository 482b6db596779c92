"""T2T-ViT with blocks that two convolutional networks inspired, section 3.2 of the paper (arXiv:2101.11986):
squeeze and excitation behind every attention, and cheap features as GhostNet makes them.

State-dict keys are the official code's (yitu-opensource/T2T-ViT, models/t2t_vit_se.py and t2t_vit_ghost.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.models.layers import Attention, Block, Linear
from vitexp.models.t2t import T2TViT

REDUCTION = 16  # channels for each one that squeeze and excitation looks at them through
GHOST_MLP_RATIO = 3  # the hidden features that are computed, and two cheap ones of each


# ---- squeeze and excitation --------------------------------------------------------------------------------------
class SqueezeExcite(nn.Module):
    """Tokens (b, n, dim), each channel times a share in (0, 1) that the mean over the tokens decides.
    Squeeze-and-Excitation section 3, arXiv:1709.01507."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = max(1, dim // REDUCTION)
        self.fc = nn.Sequential(
            nn.Linear(dim, inner, bias=False), nn.ReLU(), nn.Linear(inner, dim, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(dim=1, keepdim=True))


class SqueezeExciteAttention(Attention):
    """Attention whose output's channels are weighed. The shares are of all tokens: it is not for `last`."""

    def __init__(self, dim: int, num_heads: int = 8, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.se_layer = SqueezeExcite(dim)

    def project(self, gathered: Tensor) -> Tensor:
        return self.proj_drop(self.se_layer(self.proj(self.norm(gathered))))


class SqueezeExciteBlock(Block):
    attention_layer = SqueezeExciteAttention


class SqueezeExciteT2TViT(T2TViT):
    """T2T-ViT-SE: as T2TViT, with squeeze and excitation behind every attention."""

    block_layer = SqueezeExciteBlock


# ---- ghost features ----------------------------------------------------------------------------------------------
class CheapFeatures(nn.Module):
    """(b, n, dim) of tokens (b, n, dim): each channel times a number of its own. GhostNet section 3.1,
    arXiv:1911.11907, where a small convolution does it.

    The weight has the shape of a depthwise convolution of kernel 1, and the start torch gives that: U(-1, 1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.flatten()


class GhostAttention(Attention):
    """Attention of which one half of the queries, keys and values is computed and the other is cheap features of it."""

    def __init__(self, dim: int, num_heads: int = 8, *, qkv_bias: bool = False, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        del self.qkv
        half = dim // 2
        self.q, self.k, self.v = (Linear(dim, half, bias=qkv_bias) for _ in range(3))
        self.cheap_operation_q = CheapFeatures(half)
        self.cheap_operation_k = CheapFeatures(half)
        self.cheap_operation_v = CheapFeatures(half)

    def qkv(self, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        """(b, n, 3 * dim) as the one layer of a plain attention gives them; the cheap half stands behind its own."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        cheap_q, cheap_k, cheap_v = self.cheap_operation_q(q), self.cheap_operation_k(k), self.cheap_operation_v(v)
        return torch.cat([q, cheap_q, k, cheap_k, v, cheap_v], dim=2)


class GhostMlp(nn.Module):
    """(b, n, dim) of tokens (b, n, dim) by way of 3 * dim features: a third is computed, two thirds are cheap."""

    def __init__(self, dim: int, *, dropout: float) -> None:
        super().__init__()
        self.fc1 = Linear(dim, dim)
        self.cheap_operation2 = CheapFeatures(dim)
        self.cheap_operation3 = CheapFeatures(dim)
        self.fc2 = Linear(GHOST_MLP_RATIO * dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        cheap = (F.gelu(self.cheap_operation2(x)), F.gelu(self.cheap_operation3(x)))
        return self.drop(self.fc2(self.drop(torch.cat([x, *cheap], dim=2))))


class GhostBlock(Block):
    """Pre-norm block of a GhostAttention and a GhostMlp. Raises UserError for another `mlp_ratio` than 3."""

    attention_layer = GhostAttention

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float, dropout: float, **options: Any) -> None:
        if mlp_ratio != GHOST_MLP_RATIO:
            raise UserError(f"model.mlp_ratio={mlp_ratio}: T2T-ViT-Ghost makes {GHOST_MLP_RATIO} features of each")
        super().__init__(dim, num_heads, mlp_ratio=mlp_ratio, dropout=dropout, **options)
        self.mlp = GhostMlp(dim, dropout=dropout)  # pyrefly: ignore[bad-assignment]


class GhostT2TViT(T2TViT):
    """T2T-ViT-Ghost: as T2TViT, with cheap features in every attention and every MLP."""

    block_layer = GhostBlock

    @torch.no_grad()
    def init_weights(self) -> None:
        """As T2TViT's; the factors of cheap features are U(-1, 1)."""
        super().init_weights()
        for layer in self.modules():
            if isinstance(layer, CheapFeatures):
                layer.reset_parameters()
