"""Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) with a seam between embedding and encoding.

State-dict keys are those of timm's VisionTransformer, so weights travel both ways. The seam: `embed` gives patch tokens
with their positions, `encode` puts the class token in front and runs the encoder. A masked autoencoder drops tokens
between the two and MixToken exchanges them, so neither owns a copy of the ViT.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitexp.errors import UserError
from vitexp.models.checks import divides, flag, fraction, height_width, one_of, positive, whole
from vitexp.models.layers import ATTENTION_PATHS, Block, PatchEmbed
from vitexp.models.pos_embed import big_vision_pos_embed, sincos_pos_embed
from vitexp.types import Features

Pool = Literal["cls", "mean"]
NormPlace = Literal["before_pool", "after_pool"]
Gelu = Literal["erf", "tanh"]
PositionEmbedding = Literal["learned", "sincos", "sincos_big_vision"]
Init = Literal["jax", "timm", "mae"]
HeadNorm = Literal["none", "batch"]
AttentionPath = Literal["auto", "fused", "explicit"]

# Standard deviation of a new head's weights; biases are zero. zero: ViT appendix B.1.1. timm: its default.
# mae_finetune and mae_linear_probe: what the MAE code draws for these two stages.
HEAD_INITS = {"zero": 0.0, "timm": 0.02, "mae_finetune": 2e-5, "mae_linear_probe": 0.01}


class VisionTransformer(nn.Module):
    """Logits (b, num_classes) from pictures (b, c, h, w); ViT section 3.1.

    Sizes are one number or (height, width) in pixels. `pool="mean"` averages the patch tokens, never the class token.
    `norm="before_pool"` normalises every token (the JAX code, also for its `gap`); `"after_pool"` normalises the pooled
    vector, as MAE's fine-tuning does, under the names `fc_norm.*`. `representation_dim` puts the pretraining head's
    hidden fc-tanh layer before the classifier. `head_norm="batch"` normalises what the classifier reads over the batch,
    without scale and shift, as MAE's linear probe does; the classifier is then `head.1.*`. `dropout` follows the
    position embedding, the attention's output and both dense layers of the MLP; `drop_path` grows linearly from 0 at
    the first block to its value at the last. `layer_scale` is the starting value of LayerScale, None leaves it out.
    `attention_scale` replaces 1/sqrt(head width). `num_classes=0` leaves the classifier out.

    `position_embedding`: learned; sincos, MAE's fixed table, a frozen parameter with a row of zeros for the class
    token; or sincos_big_vision, that of the better plain ViT baseline, a buffer outside the state dict without such a
    row. Raises UserError for what does not fit together."""

    block_layer: ClassVar[type[Block]] = Block  # a model with other blocks names them in a subclass

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
        class_token: bool = True,
        pool: Pool = "cls",
        norm: NormPlace = "before_pool",
        representation_dim: int | None = None,
        head_norm: HeadNorm = "none",
        gelu: Gelu = "erf",
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        position_embedding: PositionEmbedding = "learned",
        attention: AttentionPath = "auto",
        attention_scale: float | None = None,
        gradient_checkpointing: bool = False,
        init: Init = "jax",
    ) -> None:
        super().__init__()
        # ---- what was asked for, checked -------------------------------------------------------------------------
        self.image_size = height_width("model.image_size", image_size)
        self.patch_size = height_width("model.patch_size", patch_size)
        for patch_side, image_side in zip(self.patch_size, self.image_size, strict=True):
            divides("model.patch_size", patch_side, "model.image_size", image_side, shown=(patch_size, image_size))
        self.grid_size = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        self.in_channels = whole("model.in_channels", in_channels)
        self.embed_dim = whole("model.embed_dim", embed_dim)
        self.depth = whole("model.depth", depth)
        self.num_heads = whole("model.num_heads", num_heads)
        divides(
            "model.num_heads", self.num_heads, "model.embed_dim", self.embed_dim, shown=(self.num_heads, self.embed_dim)
        )
        if int(self.embed_dim * positive("model.mlp_ratio", mlp_ratio)) < 1:
            raise UserError(f"model.mlp_ratio={mlp_ratio} leaves no hidden unit of model.embed_dim={embed_dim}")
        self.num_classes = whole("model.num_classes", num_classes, at_least=0)
        self.pool = one_of("model.pool", pool, get_args(Pool))
        self.norm_place = one_of("model.norm", norm, get_args(NormPlace))
        self.position_embedding = one_of("model.position_embedding", position_embedding, get_args(PositionEmbedding))
        self.init = one_of("model.init", init, get_args(Init))
        self.head_norm = one_of("model.head_norm", head_norm, get_args(HeadNorm))
        self.gelu = one_of("model.gelu", gelu, get_args(Gelu))
        self.gradient_checkpointing = flag("model.gradient_checkpointing", gradient_checkpointing)
        if not flag("model.class_token", class_token) and self.pool == "cls":
            raise UserError("model.pool=cls needs the class token; set model.class_token=true or model.pool=mean")
        self.num_prefix_tokens = int(class_token)
        if representation_dim is not None:
            representation_dim = whole("model.representation_dim", representation_dim)
        rate = fraction("model.dropout", dropout)
        drop_path = fraction("model.drop_path", drop_path)

        # ---- embedding -------------------------------------------------------------------------------------------
        width, num_patches = self.embed_dim, self.grid_size[0] * self.grid_size[1]
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if class_token else None
        # Rows of the table before the first patch's.
        self.prefix_positions = 0 if self.position_embedding == "sincos_big_vision" else self.num_prefix_tokens
        positions = torch.empty(1, self.prefix_positions + num_patches, width)
        self.pos_embed: Tensor
        if self.position_embedding == "sincos_big_vision":
            self.register_buffer("pos_embed", positions, persistent=False)
        else:
            self.pos_embed = nn.Parameter(positions, requires_grad=self.position_embedding == "learned")
        self.patch_embed = PatchEmbed(patch_size=self.patch_size, in_channels=self.in_channels, embed_dim=width)
        self.pos_drop = nn.Dropout(rate)

        # ---- encoder ---------------------------------------------------------------------------------------------
        norm_layer = partial(nn.LayerNorm, eps=positive("model.norm_eps", norm_eps))
        self.blocks = nn.ModuleList(
            self.block_layer(
                width,
                self.num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=flag("model.qkv_bias", qkv_bias),
                dropout=rate,
                attention_dropout=fraction("model.attention_dropout", attention_dropout),
                drop_path=drop_path * i / max(self.depth - 1, 1),
                layer_scale=None if layer_scale is None else positive("model.layer_scale", layer_scale),
                norm_layer=norm_layer,
                act_layer=partial(nn.GELU, approximate="none" if self.gelu == "erf" else "tanh"),
                attention=one_of("model.attention", attention, ATTENTION_PATHS),
                attention_scale=None if attention_scale is None else positive("model.attention_scale", attention_scale),
            )
            for i in range(self.depth)
        )
        self.norm = norm_layer(width) if self.norm_place == "before_pool" else nn.Identity()

        # ---- head: fc-tanh-fc for pretraining, one fc otherwise. ViT section 3.1 ---------------------------------
        self.fc_norm = norm_layer(width) if self.norm_place == "after_pool" else nn.Identity()
        self.pre_logits: nn.Module = nn.Identity()
        self.num_features = width
        if representation_dim is not None:
            self.num_features = representation_dim
            # Named as in timm up to 0.4, whose ImageNet-21k files hold this layer.
            layers: OrderedDict[str, nn.Module] = OrderedDict(fc=nn.Linear(width, representation_dim), act=nn.Tanh())
            self.pre_logits = nn.Sequential(layers)
        self.head = self._new_head()
        self.init_weights()

    # ---- forward -------------------------------------------------------------------------------------------------
    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(b, patches, d) patch tokens with their positions added, in raster order, without class token.

        With `keep` (b, m), raster positions, (b, m, d) of these patches in that order, and only these are computed.
        Raises UserError for pictures of another size or number of channels than the model was built for."""
        self.check_pictures(images)
        positions = self.pos_embed[:, self.prefix_positions :]
        if keep is not None:
            positions = F.embedding(keep, positions[0])
        return self.patch_embed(images, keep) + positions

    def encode(self, tokens: Tensor) -> Features:
        """Features of any patch tokens from `embed`, as many as are left of them and in any order.

        The class token joins here with its own position, after whatever was done to the patches."""
        prefix = self.prefix_tokens()
        if prefix is not None:
            prefix = prefix + self.pos_embed[:, : self.prefix_positions] if self.prefix_positions else prefix
            tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = run_blocks(self.blocks, self.pos_drop(tokens), recompute=self.gradient_checkpointing and self.training)
        return self.features(self.norm(tokens))

    def check_pictures(self, images: Tensor) -> None:
        """Raises UserError for pictures of another size or number of channels than the model was built for."""
        if tuple(images.shape[1:]) != (self.in_channels, *self.image_size):
            given = "x".join(str(side) for side in images.shape[1:])
            wanted = "x".join(str(side) for side in (self.in_channels, *self.image_size))
            raise UserError(f"pictures are {given} but model.in_channels and model.image_size make it {wanted}")

    def prefix_tokens(self) -> Tensor | None:
        """(1, num_prefix_tokens, d) what stands in front of the patches, without positions; None: nothing."""
        return self.cls_token

    def features(self, tokens: Tensor) -> Features:
        """What stands where among the encoder's (b, num_prefix_tokens + n, d) outputs."""
        cls = None if self.cls_token is None else tokens[:, 0]
        return Features(cls=cls, patches=tokens[:, self.num_prefix_tokens :])

    def pooled(self, features: Features) -> Tensor:
        """(b, d) one vector a picture, normalised: what a classifier, a probe or a k-NN reads."""
        vector = features.cls if self.pool == "cls" else features.patches.mean(dim=1)
        assert vector is not None
        return self.fc_norm(vector)

    def classify(self, vectors: Tensor) -> Tensor:
        """Logits from `pooled` vectors, or from single tokens of the same width."""
        return self.head(self.pre_logits(vectors))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.pooled(self.encode(self.embed(images))))

    # ---- what training and loading ask ---------------------------------------------------------------------------
    @property
    def num_layers(self) -> int:
        """The highest number `layer_of` gives: depth + 1."""
        return self.depth + 1

    def layer_of(self, parameter_name: str) -> int:
        """0 for the embedding, i + 1 for block i, depth + 1 for last norm and head. MAE fine-tuning's layer decay:
        a parameter's learning rate is multiplied by layer_decay ** (num_layers - layer_of(name))."""
        if parameter_name in ("cls_token", "pos_embed") or parameter_name.startswith("patch_embed."):
            return 0
        block = re.match(r"blocks\.(\d+)\.", parameter_name)
        return int(block[1]) + 1 if block else self.num_layers

    @property
    def head_prefixes(self) -> tuple[str, ...]:
        """How the names of the classifier's parameters begin."""
        return ("head.",)

    def reset_head(self, num_classes: int, *, init: str = "zero") -> None:
        """A new classifier for `num_classes` (0: none) on the same device. `init`: zero (ViT appendix B.1.1), timm,
        mae_finetune or mae_linear_probe. Raises UserError."""
        std = HEAD_INITS[one_of("init", init, tuple(HEAD_INITS))]
        self.num_classes = whole("num_classes", num_classes, at_least=0)
        self.head = self._new_head().to(self.pos_embed)
        init_linear(self.head, std=std)

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        linear = nn.Linear(self.num_features, self.num_classes)
        if self.head_norm == "none":
            return linear
        return nn.Sequential(nn.BatchNorm1d(self.num_features, affine=False, eps=1e-6), linear)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws every parameter anew from torch's global generator; fixed position embeddings are computed.

        | parameter    | init=jax (the official ViT)  | init=timm                   | init=mae                   |
        | patch weight | lecun normal, cut at 2 sigma | torch's convolution default | xavier uniform of d x c*p² |
        | patch bias   | 0                            | torch's convolution default | torch's default            |
        | class token  | 0                            | N(0, 1e-6)                  | N(0, 0.02)                 |
        | positions    | N(0, 0.02)                   | truncated N(0, 0.02)        | N(0, 0.02) where learned   |
        | q, k, v      | xavier uniform of each d x d | truncated N(0, 0.02)        | xavier uniform of 3d x d   |
        | out, MLP     | xavier uniform               | truncated N(0, 0.02)        | xavier uniform             |
        | pre_logits   | lecun normal                 | truncated N(0, 0.02)        | xavier uniform             |
        | head         | 0                            | truncated N(0, 0.02)        | truncated N(0, 2e-5)       |
        | their biases | 0, but N(0, 1e-6) in the MLP | 0                           | 0                          |
        """
        for module in self.modules():
            if isinstance(module, (nn.LayerNorm, nn.BatchNorm1d, LayerScale)):
                module.reset_parameters()
        {"jax": _init_jax, "timm": _init_timm, "mae": _init_mae}[self.init](self)
        if self.position_embedding == "sincos":
            table = sincos_pos_embed(self.grid_size, self.embed_dim, num_prefix_tokens=self.num_prefix_tokens)
            self.pos_embed.copy_(table)
        elif self.position_embedding == "sincos_big_vision":
            self.pos_embed.copy_(big_vision_pos_embed(self.grid_size, self.embed_dim))


def run_blocks(blocks: nn.ModuleList, tokens: Tensor, *, recompute: bool, last: int | None = None) -> Tensor:
    """Tokens after every block, or the `last` of them alone, for which the final block does nothing else.

    `recompute` keeps no activations within a block but computes them again backward."""
    recompute = recompute and torch.is_grad_enabled()
    for number, block in enumerate(blocks, start=1):
        step = block if last is None or number < len(blocks) else partial(block, last=last)
        tokens = checkpoint(step, tokens, use_reentrant=False) if recompute else step(tokens)
    return tokens


def _init_jax(model: VisionTransformer) -> None:
    _lecun_normal(model.patch_embed.proj)
    if model.cls_token is not None:
        nn.init.zeros_(model.cls_token)
    nn.init.normal_(model.pos_embed, std=0.02)
    for block in model.blocks:
        assert isinstance(block, Block)
        qkv, mlp = block.attn.qkv, block.mlp
        # The bound of each of the three d x d matrices; of the packed (3d, d) one it would be sqrt(2) smaller.
        bound = math.sqrt(6 / (2 * model.embed_dim))
        nn.init.uniform_(qkv.weight, -bound, bound)
        nn.init.xavier_uniform_(block.attn.proj.weight)
        for bias in (qkv.bias, block.attn.proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for dense in (mlp.fc1, mlp.fc2):
            nn.init.xavier_uniform_(dense.weight)
            if dense.bias is not None:
                nn.init.normal_(dense.bias, std=1e-6)
    for hidden in model.pre_logits.modules():
        if isinstance(hidden, nn.Linear):
            _lecun_normal(hidden)
    init_linear(model.head, std=0.0)


def _init_timm(model: VisionTransformer) -> None:
    init_linear(model, std=0.02)
    model.patch_embed.reset_parameters()
    if model.cls_token is not None:
        nn.init.normal_(model.cls_token, std=1e-6)
    nn.init.trunc_normal_(model.pos_embed, std=0.02)


def _init_mae(model: VisionTransformer) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            xavier(module)
    init_linear(model.head, std=HEAD_INITS["mae_finetune"])
    model.patch_embed.proj.reset_parameters()
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.flatten(1))  # a view: the convolution is a matrix here
    if model.cls_token is not None:
        nn.init.normal_(model.cls_token, std=0.02)
    nn.init.normal_(model.pos_embed, std=0.02)


def xavier(layer: nn.Linear) -> None:
    """Xavier uniform weights of the whole matrix, packed queries, keys and values as one; bias 0."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _lecun_normal(layer: nn.Linear | nn.Conv2d) -> None:
    """Variance 1 / inputs from a normal cut at two of its sigmas, as flax draws it; bias 0."""
    sigma = math.sqrt(1 / layer.weight[0].numel()) / 0.87962566103423978  # std of a unit normal cut at +-2
    nn.init.trunc_normal_(layer.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def init_linear(module: nn.Module, *, std: float) -> None:
    """Every linear layer in it: weights of a normal cut at +-2, or zero; biases zero."""
    for layer in module.modules():
        if not isinstance(layer, nn.Linear):
            continue
        if std > 0:
            nn.init.trunc_normal_(layer.weight, std=std)
        else:
            nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
