"""LV-ViT (Jiang et al. 2021, "All Tokens Matter", arXiv:2104.10858): a ViT whose every token says a class.

Over the plain ViT it has a stem of four convolutions, residual branches divided by a constant, and a second classifier
that all patch tokens share. What the token labels teach, and MixToken between `embed` and `encode`, is the method's.
State-dict keys are the official code's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.models.checks import flag, one_of, positive, whole
from vitexp.models.layers import Block, Linear, PatchEmbed, reset_layers
from vitexp.models.vit import HEAD_INITS, AttentionPath, VisionTransformer, init_linear
from vitexp.types import Features

Output = Literal["cls_plus_max", "cls_plus_mean", "cls", "tokens_mean"]

TOKEN_WEIGHT = 0.5  # of the tokens beside the class token in an output of both; the official code's


class TokenLogits(NamedTuple):
    """What the two classifiers say of a batch."""

    cls: Tensor  # (b, k) of the class token
    tokens: Tensor  # (b, n, k) of every patch token, in the tokens' order


class ConvStem(PatchEmbed):
    """Patch tokens from three convolutions with BatchNorm and ReLU, then a patch embedding of what they give.

    Kernels 7, 3, 3; the first halves the picture, so that the patches embedded are half the picture's, 8 of 16 px."""

    def __init__(self, *, patch_size: tuple[int, int], in_channels: int, channels: int, embed_dim: int) -> None:
        height, width = patch_size
        super().__init__(patch_size=(height // 2, width // 2), in_channels=channels, embed_dim=embed_dim)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, images: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        maps = F.relu(self.bn1(self.conv1(images)), inplace=True)
        maps = F.relu(self.bn2(self.conv2(maps)), inplace=True)
        maps = F.relu(self.bn3(self.conv3(maps)), inplace=True)
        return super().forward(maps)


class LVViT(VisionTransformer):
    """Logits (b, num_classes) from pictures (b, c, h, w).

    As VisionTransformer with a class token, but for the stem, of `stem_channels`, and for `residual_scale`, which
    divides the output of every attention and MLP before it joins the stream. `drop_path` leaves out branches of single
    samples, with a probability that grows linearly from 0 at the first block to this value at the last.
    `token_head=False` leaves the tokens' classifier out, as the official model trained without token labels does.
    The stem's convolutions look beyond a patch, so none can be left out: `embed` has no `keep`.

    `output`, in training as in evaluation, of the class token's logits and the tokens': cls_plus_max is
    cls + 0.5 * the greatest of each class over the tokens, with which all published numbers were reached;
    cls_plus_mean takes their mean instead; cls and tokens_mean are one of the two alone. A method that teaches tokens
    asks `token_logits`. Raises UserError for what does not fit together."""

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        in_channels: int = 3,
        mlp_ratio: float = 3.0,
        stem_channels: int = 64,
        residual_scale: float = 2.0,
        num_classes: int = 1000,
        token_head: bool = True,
        output: Output = "cls_plus_max",
        norm_eps: float = 1e-5,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
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
            norm_eps=norm_eps,
            qkv_bias=qkv_bias,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            init="timm",
        )
        if any(side % 2 for side in self.patch_size):
            raise UserError(f"model.patch_size={patch_size}: the stem halves the picture first, so it must be even")
        self.token_head = flag("model.token_head", token_head)
        self.output = one_of("model.output", output, get_args(Output))
        if self.output != "cls" and not self.token_head:
            raise UserError(
                f"model.output={output} needs the tokens' classifier; set model.token_head=true or output=cls"
            )
        self.residual_scale = positive("model.residual_scale", residual_scale)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.residual_scale = self.residual_scale
        self.patch_embed = ConvStem(
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            channels=whole("model.stem_channels", stem_channels),
            embed_dim=self.embed_dim,
        )
        self.aux_head = self._new_aux_head(std=HEAD_INITS["timm"])

    # ---- forward -------------------------------------------------------------------------------------------------
    def embed(self, images: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        """(b, patches, d) tokens with their positions added, in raster order, without class token. Raises UserError
        for pictures of another size or number of channels than the model was built for."""
        self.check_pictures(images)
        return self.patch_embed(images) + self.pos_embed[:, self.prefix_positions :]

    def token_logits(self, features: Features) -> TokenLogits:
        """The class token's and every patch token's logits. Raises UserError for a model without tokens' classifier."""
        if self.aux_head is None:
            raise UserError("the model has no classifier of tokens (model.token_head, model.num_classes)")
        return TokenLogits(self.classify(self.pooled(features)), self.aux_head(features.patches))

    def predict(self, features: Features) -> Tensor:
        """(b, k) logits by `output`; a model without classes gives its (b, d) vectors."""
        if self.output == "cls" or self.num_classes == 0:
            return self.classify(self.pooled(features))
        cls, tokens = self.token_logits(features)
        if self.output == "cls_plus_max":
            return cls + TOKEN_WEIGHT * tokens.amax(dim=1)
        mean = tokens.mean(dim=1)
        return cls + TOKEN_WEIGHT * mean if self.output == "cls_plus_mean" else mean

    def forward(self, images: Tensor) -> Tensor:
        return self.predict(self.encode(self.embed(images)))

    # ---- what training and loading ask ---------------------------------------------------------------------------
    @property
    def head_prefixes(self) -> tuple[str, ...]:
        """How the names of both classifiers' parameters begin."""
        return ("head.", "aux_head.")

    def reset_head(self, num_classes: int, *, init: str = "zero") -> None:
        """New classifiers of class token and tokens for `num_classes`, started alike; see VisionTransformer."""
        super().reset_head(num_classes, init=init)
        self.aux_head = self._new_aux_head(std=HEAD_INITS[init])

    def _new_aux_head(self, *, std: float) -> Linear | None:
        if self.num_classes == 0 or not self.token_head:
            return None
        layer = Linear(self.num_features, self.num_classes).to(self.pos_embed)
        init_linear(layer, std=std)
        return layer

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws every parameter anew from torch's global generator, as the official code does: matrices, positions and
        class token truncated N(0, 0.02), biases 0, norms 1 and 0, and torch's own start for the whole stem."""
        super().init_weights()
        assert self.cls_token is not None
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        reset_layers(self.patch_embed)
