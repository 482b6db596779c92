"""DeiT III with two attentions and two MLPs side by side in every block (Touvron et al. 2022, arXiv:2203.09795).

State-dict keys are the official code's (facebookresearch/deit, models_v2.py), but for LayerScale, whose gamma_1_1 is
ls1_1.gamma here; load_weights knows both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitexp.models.deit import DeiT
from vitexp.models.layers import Block, add_branch


class ParallelBlock(Block):
    """(b, n, d) of tokens (b, n, d): x + attention + another attention, then x + MLP + another MLP, each with a norm of
    its own. As wide and costly as two blocks in a row, and half as deep. Three things, section 3.

    Every one of the four branches is left out by its own draw of drop path."""

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        twin = Block(dim, num_heads, **options)
        self.norm11, self.attn1, self.ls1_1 = twin.norm1, twin.attn, twin.ls1
        self.norm21, self.mlp1, self.ls2_1 = twin.norm2, twin.mlp, twin.ls2

    def forward(self, x: Tensor, *, last: int | None = None) -> Tensor:
        """As Block's."""
        one = self.drop_path1(self.ls1(self.attn(self.norm1(x), last=last)))
        other = self.drop_path1(self.ls1_1(self.attn1(self.norm11(x), last=last)))
        x = add_branch(add_branch(x[:, -one.shape[1] :], one), other)
        one = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        other = self.drop_path2(self.ls2_1(self.mlp1(self.norm21(x))))
        return add_branch(add_branch(x, one), other)


class ParallelDeiT(DeiT):
    """As DeiT, of `depth` blocks that are ParallelBlock."""

    block_layer = ParallelBlock
