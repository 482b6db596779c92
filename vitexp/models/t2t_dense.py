"""T2T-ViT-Dense, section 3.2 of the T2T-ViT paper (arXiv:2101.11986): tokens that grow wider from block to block.

As in DenseNet (arXiv:1608.06993) a block leaves the channels it gets as they are and adds some of its own behind them;
between two stages a layer halves the width. The number of tokens never changes. State-dict keys are the official code's
(yitu-opensource/T2T-ViT, models/t2t_vit_dense.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.models.checks import whole
from vitexp.models.layers import Block, Linear
from vitexp.models.t2t import T2TViT, TokenModule
from vitexp.models.vit import AttentionPath

# The official code spreads drop_path over 12 blocks and gives each block the share of its stage's number.
DROP_PATH_STEPS = 11


class DenseBlock(Block):
    """(b, n, dim + growth) of tokens (b, n, dim): these, and `growth` channels of what a plain block makes of them."""

    def __init__(self, dim: int, num_heads: int, *, growth: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.dense_linear = Linear(dim, growth)

    def forward(self, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        return torch.cat([x, self.dense_linear(super().forward(x))], dim=2)


class Transition(nn.Module):
    """(b, n, dim // 2) of tokens (b, n, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = Linear(dim, dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x))


class DenseT2TViT(T2TViT):
    """Logits (b, num_classes) from pictures (b, c, h, w) whose sides 16 divides.

    As T2TViT, but `depths` are the blocks of each stage, every one of which adds `growth` channels to its tokens. The
    soft splits make tokens of width `stem_dim`; behind each stage but the last the width is halved. What comes out of
    the last block is `embed_dim` wide, and that is what `encode` hands out and the classifier reads. `num_heads`
    divides the width of every block. `drop_path` means what it does in the official code: i / 11 of it in the blocks
    of stage i, counted from 0. Raises UserError for what does not fit together."""

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        stem_dim: int,
        depths: Sequence[int],
        growth: int,
        num_heads: int,
        in_channels: int = 3,
        mlp_ratio: float = 2.0,
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
        if not isinstance(depths, Sequence) or isinstance(depths, str) or not depths:
            raise UserError(f"model.depths={depths}: a list of the stages' blocks is needed, such as [3, 6, 6, 4]")
        depths = [whole("model.depths", depth) for depth in depths]
        num_heads = whole("model.num_heads", num_heads)
        if whole("model.stem_dim", stem_dim, at_least=2) % 2:
            raise UserError(f"model.stem_dim={stem_dim}: sines and cosines in turns need an even width")
        widths = stage_widths(stem_dim, depths=depths, growth=whole("model.growth", growth))
        for stage, of_blocks in enumerate(widths):
            for width in of_blocks[:-1]:
                if width % num_heads:
                    raise UserError(
                        f"model.num_heads={num_heads} does not divide {width}, the width of a block in stage {stage}; "
                        "widths follow from model.stem_dim, model.depths and model.growth"
                    )
        super().__init__(
            image_size=image_size,
            embed_dim=stem_dim,
            depth=sum(depths),
            num_heads=num_heads,
            in_channels=in_channels,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
            token_module=token_module,
            token_dim=token_dim,
            norm_eps=norm_eps,
            qkv_bias=qkv_bias,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
            performer_dropout=performer_dropout,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
        )
        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        self.blocks = nn.ModuleList()
        for stage, (*of_blocks, last) in enumerate(widths):
            self.blocks.extend(
                DenseBlock(
                    width,
                    num_heads,
                    growth=growth,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    dropout=dropout,
                    attention_dropout=attention_dropout,
                    drop_path=drop_path * min(stage / DROP_PATH_STEPS, 1),
                    norm_layer=norm_layer,
                    attention=attention,
                )
                for width in of_blocks
            )
            if stage < len(widths) - 1:
                self.blocks.append(Transition(last))
        self.embed_dim = self.num_features = widths[-1][-1]
        self.norm = norm_layer(self.embed_dim)
        self.head = self._new_head()
        self.init_weights()

    def layer_of(self, parameter_name: str) -> int:
        """As T2TViT's; what halves the width belongs to the block behind it."""
        place = re.match(r"blocks\.(\d+)\.", parameter_name)
        if place is None:
            return super().layer_of(parameter_name)
        return 1 + sum(isinstance(block, DenseBlock) for block in self.blocks[: int(place[1])])


def stage_widths(stem_dim: int, *, depths: Sequence[int], growth: int) -> list[list[int]]:
    """Of each stage the widths that its blocks get, one after the other, and the width it ends with."""
    stages: list[list[int]] = []
    for depth in depths:
        start = stages[-1][-1] // 2 if stages else stem_dim
        stages.append([start + growth * i for i in range(depth + 1)])
    return stages
