"""T2T-ViT (Yuan et al. 2021, "Tokens-to-Token ViT", arXiv:2101.11986): patches that overlap, gathered step by step.

Three soft splits, each taking the neighbourhood of every second or fourth place, with an attention of 64 channels
between them, make 14 x 14 tokens of 224 px; behind them is a plain ViT with fixed positions. State-dict keys are the
official code's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.models.checks import fraction, height_width, one_of, whole
from vitexp.models.layers import Linear
from vitexp.models.pos_embed import sincos
from vitexp.models.vit import AttentionPath, VisionTransformer, init_linear

TokenModule = Literal["performer", "transformer"]

SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding of the three soft splits, in places
PATCH_SIZE = math.prod(stride for _, stride, _ in SPLITS)  # px from token to token
INIT_STD = 0.02
EPSILON = 1e-8  # added to the sum that performer attention divides by


def soft_split(maps: Tensor, *, kernel: int, stride: int, padding: int) -> Tensor:
    """(b, n, c * kernel²) neighbourhoods of places in maps (b, c, h, w): channel slowest, then row and column."""
    return F.unfold(maps, kernel_size=kernel, stride=stride, padding=padding).transpose(1, 2)


class TokenAttention(nn.Module):
    """One head whose values are its residual stream: v + proj(softmax(q k^T / sqrt(in_dim)) v), (b, n, dim).

    The scale is of the width that comes in, not of the head's, as in the official code."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.scale = in_dim**-0.5
        self.qkv = Linear(in_dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # Of thousands of tokens the fused form never writes the probabilities out: on one AMX core 3136 tokens take it
        # two thirds of the written-out form's time in bf16, half in float32.
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return (v + self.proj(attended))[:, 0]


class TokenTransformer(nn.Module):
    """(b, n, dim) from tokens (b, n, in_dim): attention and an MLP as wide as the tokens. T2T-ViT_t of the paper."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.attn = TokenAttention(in_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_features=dim)
        self.mlp.fc1, self.mlp.fc2 = Linear.of(self.mlp.fc1), Linear.of(self.mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenPerformer(nn.Module):
    """(b, n, dim) from tokens (b, n, in_dim) as TokenTransformer, but with attention linear in n: see kernel_attention.

    `w` holds dim / 2 fixed orthogonal random features. `dropout` follows the attention's projection and the MLP."""

    def __init__(self, in_dim: int, dim: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.kqv = Linear(in_dim, 3 * dim)
        self.w = nn.Parameter(torch.empty(dim // 2, dim), requires_grad=False)
        self.proj = Linear(dim, dim)
        self.drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(Linear(dim, dim), nn.GELU(), Linear(dim, dim), nn.Dropout(dropout))

    @torch.no_grad()
    def draw_features(self) -> None:
        """New features: orthogonal rows of length sqrt(their number), as the official code draws them."""
        nn.init.orthogonal_(self.w, gain=math.sqrt(self.w.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        x = v + self.drop(self.proj(kernel_attention(q, k, v, self.w)))
        return x + self.mlp(self.norm2(x))


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """(b, n, d) of q, k, v (b, n, d): phi(q) (phi(k)^T v) / (phi(q) sum phi(k) + 1e-8), with m features w (m, d),
    phi(x) = exp(w x - |x|² / 2) / sqrt(m). Performer, Choromanski et al. 2021, arXiv:2009.14794.

    In float32 or wider whatever autocast says. Factors of each query and of each feature over all keys are taken out of
    the exponentials, the 1e-8 being divided by them: the same value, but none of the sums can overflow or vanish."""
    with _without_autocast(q.device):
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, v, w = q.to(wide), k.to(wide), v.to(wide), w.to(wide)
        log_q, log_k = (x @ w.t() - x.square().sum(-1, keepdim=True) / 2 for x in (q, k))
        # The result does not depend on what is taken out, so nothing flows back through it.
        of_feature = log_k.detach().amax(dim=1, keepdim=True)
        log_q = log_q + of_feature
        of_query = log_q.detach().amax(dim=2, keepdim=True)
        phi_q, phi_k = (log_q - of_query).exp(), (log_k - of_feature).exp()
        total = phi_q @ phi_k.sum(dim=1).unsqueeze(-1)
        return phi_q @ (phi_k.transpose(1, 2) @ v) / (total + len(w) * EPSILON * (-of_query).exp())


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    known = torch.amp.is_autocast_available(device.type)  # the meta device, on which costs are counted, has none
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


class TokensToToken(nn.Module):
    """(b, h/16 * w/16, embed_dim) tokens in raster order from pictures (b, c, h, w). T2T-ViT section 3.1."""

    def __init__(self, *, in_channels: int, embed_dim: int, token_dim: int, token_module: str, dropout: float) -> None:
        super().__init__()

        def attention(in_dim: int) -> nn.Module:
            if token_module == "transformer":
                return TokenTransformer(in_dim, token_dim)
            return TokenPerformer(in_dim, token_dim, dropout=dropout)

        first, second, third = (kernel**2 for kernel, _, _ in SPLITS)
        self.attention1 = attention(in_channels * first)
        self.attention2 = attention(token_dim * second)
        self.project = Linear(token_dim * third, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        maps = images
        for attention, (kernel, stride, padding) in zip((self.attention1, self.attention2), SPLITS, strict=False):
            rows = maps.shape[2] // stride
            tokens = attention(soft_split(maps, kernel=kernel, stride=stride, padding=padding))
            maps = tokens.transpose(1, 2).unflatten(2, (rows, -1))
        kernel, stride, padding = SPLITS[-1]
        return self.project(soft_split(maps, kernel=kernel, stride=stride, padding=padding))


class T2TViT(VisionTransformer):
    """Logits (b, num_classes) from pictures (b, c, h, w) whose sides 16 divides.

    As VisionTransformer with a class token, but that tokens come from overlapping patches and that positions are a
    fixed sinusoid over their number, the class token's being 0. `token_module`: performer or transformer, of
    `token_dim` channels. `performer_dropout` is inside the performer alone: the official code drops a tenth there
    whatever `dropout` is. Every patch takes part in every token, so none can be left out: `embed` has no `keep`.
    Raises UserError for what does not fit together."""

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        in_channels: int = 3,
        mlp_ratio: float = 3.0,
        num_classes: int = 1000,
        token_module: TokenModule = "performer",
        token_dim: int = 64,
        norm_eps: float = 1e-5,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        performer_dropout: float = 0.1,
        attention: AttentionPath = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        if any(side % PATCH_SIZE for side in height_width("model.image_size", image_size)):
            raise UserError(f"model.image_size={image_size}: the soft splits need multiples of {PATCH_SIZE} px")
        super().__init__(
            image_size=image_size,
            patch_size=PATCH_SIZE,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            in_channels=in_channels,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
            norm_eps=norm_eps,
            qkv_bias=qkv_bias,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            init="timm",
        )
        del self.patch_embed
        self.tokens_to_token = TokensToToken(
            in_channels=self.in_channels,
            embed_dim=self.embed_dim,
            token_dim=whole("model.token_dim", token_dim, at_least=2),
            token_module=one_of("model.token_module", token_module, get_args(TokenModule)),
            dropout=fraction("model.performer_dropout", performer_dropout),
        )
        self.pos_embed.requires_grad_(False)
        _draw(self.tokens_to_token)

    def embed(self, images: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        """(b, patches, d) tokens with their positions added, in raster order, without class token. Raises UserError
        for pictures of another size or number of channels than the model was built for."""
        self.check_pictures(images)
        return self.tokens_to_token(images) + self.pos_embed[:, self.prefix_positions :]

    def layer_of(self, parameter_name: str) -> int:
        """As VisionTransformer's; the soft splits' parts belong to the embedding."""
        return 0 if parameter_name.startswith("tokens_to_token.") else super().layer_of(parameter_name)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws every parameter anew from torch's global generator, as the official code does: matrices and class token
        truncated N(0, 0.02), biases 0, norms 1 and 0; positions and the performer's features as they are fixed."""
        _draw(self)
        assert self.cls_token is not None
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)
        self.pos_embed.copy_(sinusoid_pos_embed(*self.pos_embed.shape[1:]))


@torch.no_grad()
def _draw(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
        elif isinstance(layer, TokenPerformer):
            layer.draw_features()
    init_linear(module, std=INIT_STD)


def sinusoid_pos_embed(count: int, dim: int) -> Tensor:
    """float64 (count, dim): sine and cosine in turns, at frequencies 10000^(-2i / dim), as Transformers have them.

    Raises UserError for an odd width."""
    if dim % 2:
        raise UserError(f"model.embed_dim={dim}: sines and cosines in turns need an even width")
    table = sincos(torch.arange(count), dim // 2, steps=dim // 2)
    return table.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
