"""DeiT (Touvron et al. 2021, arXiv:2012.12877) and DeiT III (Touvron et al. 2022, arXiv:2204.07118).

A distilled DeiT has a second token in front of the patches, with a classifier of its own that learns what a teacher
says. DeiT III scales every branch channel by channel, gives the class token no position and leaves branches out with
one probability at every depth. Everything else is the plain ViT. State-dict keys are the official code's, which are
timm's (DeiT III's gamma_1 and gamma_2 are ls1.gamma and ls2.gamma here; load_weights knows both).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.models.checks import flag, one_of
from vitexp.models.layers import Block, HMLPStem
from vitexp.models.vit import HEAD_INITS, AttentionPath, VisionTransformer, init_linear
from vitexp.types import Features

DropPathGrowth = Literal["linear", "constant"]
Stem = Literal["linear", "hmlp"]

TOKEN_STD = 0.02  # of tokens and positions at the start


class DistilledLogits(NamedTuple):
    """What the two classifiers of a distilled DeiT say of a batch."""

    cls: Tensor  # (b, k) of the class token, which learns the label
    dist: Tensor  # (b, k) of the distillation token, which learns what the teacher says


@dataclass(frozen=True)
class DistilledFeatures(Features):
    """Features of a distilled DeiT."""

    dist: Tensor  # (b, d) of the distillation token


class DeiT(VisionTransformer):
    """Logits (b, num_classes) from pictures (b, c, h, w): of a distilled model the mean of both classifiers'.

    `distilled` adds the distillation token and its classifier; a method that distils asks `distilled_logits`.
    `class_position=False` gives the tokens in front of the patches no row of the position table. `layer_scale` is the
    starting value of LayerScale, None leaves it out. `drop_path` is the probability to leave a branch out, of the last
    block with `drop_path_growth="linear"`, growing from 0 at the first, and of every block with "constant".
    `stem` turns patches into tokens by one matrix or by three small convolutions, see layers.HMLPStem.
    DeiT III is class_position=False, layer_scale=1e-4, drop_path_growth="constant". Raises UserError for what does not
    fit together."""

    position_mode = "mae"  # how the official code resizes positions: load_weights asks where a file's keys do not tell

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        distilled: bool = False,
        class_position: bool = True,
        stem: Stem = "linear",
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        drop_path_growth: DropPathGrowth = "linear",
        attention: AttentionPath = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            image_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            in_channels=in_channels,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
            layer_scale=layer_scale,
            norm_eps=norm_eps,
            qkv_bias=qkv_bias,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            init="timm",
        )
        if one_of("model.stem", stem, get_args(Stem)) == "hmlp":
            for key, size in (("model.patch_size", math.gcd(*self.patch_size)), ("model.embed_dim", self.embed_dim)):
                if size % 4:
                    raise UserError(f"{key}={size}: model.stem=hmlp needs a multiple of 4")
            self.patch_embed = HMLPStem(
                patch_size=self.patch_size, in_channels=self.in_channels, embed_dim=self.embed_dim
            )
        self.distilled = flag("model.distilled", distilled)
        self.num_prefix_tokens = 2 if self.distilled else 1
        self.prefix_positions = self.num_prefix_tokens if flag("model.class_position", class_position) else 0
        rows = self.prefix_positions + self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(torch.empty(1, rows, self.embed_dim))
        self.dist_token = nn.Parameter(torch.empty(1, 1, self.embed_dim)) if self.distilled else None
        self.head_dist = self._new_head_dist(std=HEAD_INITS["timm"])
        self._init_tokens()
        if one_of("model.drop_path_growth", drop_path_growth, get_args(DropPathGrowth)) == "constant" and drop_path > 0:
            for block in self.blocks:
                assert isinstance(block, Block)
                block.drop_path1, block.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    # ---- forward -------------------------------------------------------------------------------------------------
    def prefix_tokens(self) -> Tensor | None:
        if self.dist_token is None:
            return self.cls_token
        assert self.cls_token is not None
        return torch.cat([self.cls_token, self.dist_token], dim=1)

    def features(self, tokens: Tensor) -> Features:
        if not self.distilled:
            return super().features(tokens)
        return DistilledFeatures(cls=tokens[:, 0], patches=tokens[:, 2:], dist=tokens[:, 1])

    def distilled_logits(self, features: Features) -> DistilledLogits:
        """Both classifiers' logits, in training as in evaluation. Raises UserError for a model without the second."""
        if self.head_dist is None or not isinstance(features, DistilledFeatures):
            raise UserError("the model has no distillation token with a classifier (model.distilled=true)")
        assert features.cls is not None
        return DistilledLogits(self.head(features.cls), self.head_dist(features.dist))

    def pooled(self, features: Features) -> Tensor:
        """(b, d) the class token; of a distilled model (b, 2 * d), followed by the distillation token."""
        if not isinstance(features, DistilledFeatures):
            return super().pooled(features)
        assert features.cls is not None
        return torch.cat([features.cls, features.dist], dim=-1)

    def classify(self, vectors: Tensor) -> Tensor:
        """Logits from `pooled` vectors, or from single tokens, of which a distilled model asks both classifiers."""
        if self.head_dist is None:
            return super().classify(vectors)
        cls, dist = vectors.chunk(2, dim=-1) if vectors.shape[-1] == 2 * self.embed_dim else (vectors, vectors)
        return (self.head(cls) + self.head_dist(dist)) / 2

    # ---- what training and loading ask ---------------------------------------------------------------------------
    def layer_of(self, parameter_name: str) -> int:
        """As VisionTransformer's; the distillation token belongs to the embedding."""
        return 0 if parameter_name == "dist_token" else super().layer_of(parameter_name)

    @property
    def head_prefixes(self) -> tuple[str, ...]:
        """How the names of the classifiers' parameters begin."""
        return ("head.", "head_dist.") if self.distilled else ("head.",)

    def reset_head(self, num_classes: int, *, init: str = "zero") -> None:
        """New classifiers for `num_classes`, started alike; see VisionTransformer."""
        super().reset_head(num_classes, init=init)
        self.head_dist = self._new_head_dist(std=HEAD_INITS[init])

    def _new_head_dist(self, *, std: float) -> nn.Module | None:
        if not self.distilled or self.num_classes == 0:
            return None
        head = self._new_head().to(self.pos_embed)
        init_linear(head, std=std)
        return head

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws every parameter anew from torch's global generator, as the official code does: matrices, positions and
        tokens truncated N(0, 0.02), biases 0, norms 1 and 0, and torch's own start for the patch embedding."""
        super().init_weights()
        self._init_tokens()

    @torch.no_grad()
    def _init_tokens(self) -> None:
        for table in self.parameters(recurse=False):
            nn.init.trunc_normal_(table, std=TOKEN_STD)
