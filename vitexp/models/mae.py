"""Masked autoencoder (He et al. 2022, arXiv:2111.06377): an encoder of visible patches, a small decoder of all of them.

Written so that nothing is computed and thrown away: hidden patches are never embedded, the decoder works in the order
of the noise, where what is hidden lies at the end, and in training the last block's queries, head, target and loss see
that end alone. The
function, its gradients and the names in the state dict are the official code's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.masking import MASKINGS, check_masking
from vitexp.models.checks import divides, flag, fraction, one_of, positive, whole
from vitexp.models.layers import Block, Linear, pick_patches
from vitexp.models.pos_embed import sincos_pos_embed
from vitexp.models.vit import VisionTransformer, run_blocks, xavier
from vitexp.types import Features

NORM_EPS = 1e-6


class Reconstruction(NamedTuple):
    """What a masked autoencoder returns."""

    loss: Tensor  # scalar: mean squared error over the hidden patches
    prediction: Tensor  # (b, n, ph * pw * c) in raster order, or of the hidden patches alone in the order of the noise
    mask: Tensor  # (b, n) in raster order, 0 seen, 1 hidden


class MaskedAutoencoder(nn.Module):
    """Reconstruction of pictures (b, c, h, w) from a part of their patches; MAE section 3.

    `encoder` is a backbone with the seam `embed(images, keep)`, `encode(tokens)`, as VisionTransformer, without
    classifier. `norm_pix_loss` predicts each patch less its mean over its standard deviation. `mask_ratio` is the share
    hidden, `masking` random, block or grid. Raises UserError for what does not fit together.

    State-dict keys are the official ones, the encoder's without prefix; parameters are named as the modules are."""

    def __init__(
        self,
        encoder: Any,  # a module with the seam
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        mask_ratio: float = 0.75,
        masking: str = "random",
    ) -> None:
        super().__init__()
        # ---- what was asked for, checked -------------------------------------------------------------------------
        _check_encoder(encoder)
        self.decoder_dim = whole("decoder_dim", decoder_dim)
        if self.decoder_dim % 4:
            raise UserError(f"decoder_dim={decoder_dim}: 4 does not divide it, as its sine-cosine positions need")
        heads = whole("decoder_num_heads", decoder_num_heads)
        divides("decoder_num_heads", heads, "decoder_dim", self.decoder_dim, shown=(heads, decoder_dim))
        self.norm_pix_loss = flag("norm_pix_loss", norm_pix_loss)
        self.mask_ratio = fraction("mask_ratio", mask_ratio)
        self.masking = one_of("masking", masking, tuple(MASKINGS))
        self.grid_size: tuple[int, int] = encoder.grid_size
        self.num_keep = check_masking(self.masking, grid=self.grid_size, mask_ratio=self.mask_ratio)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

        # ---- encoder and decoder ---------------------------------------------------------------------------------
        self.encoder: Any = encoder
        self.num_prefix_tokens: int = encoder.num_prefix_tokens
        norm_layer = partial(nn.LayerNorm, eps=NORM_EPS)
        height, width = encoder.patch_size
        self.decoder_embed = Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        positions = torch.empty(1, self.num_prefix_tokens + self.num_patches, decoder_dim)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, heads, mlp_ratio=positive("mlp_ratio", mlp_ratio), norm_layer=norm_layer)
            for _ in range(whole("decoder_depth", decoder_depth))
        )
        self.decoder_norm = norm_layer(decoder_dim)
        self.decoder_pred = Linear(decoder_dim, height * width * encoder.in_channels)
        self.init_decoder()
        self.register_state_dict_post_hook(_without_encoder_prefix)
        self.register_load_state_dict_pre_hook(_with_encoder_prefix)

    # ---- forward -------------------------------------------------------------------------------------------------
    def forward(self, images: Tensor, noise: Tensor | None = None, *, everywhere: bool = True) -> Reconstruction:
        """Loss, prediction and mask of pictures normalised as for training.

        `noise` (b, n), uniform in [0, 1), decides the mask; without it torch's generator is drawn from. With
        `everywhere=False` only what the loss needs is computed: the same loss and gradients."""
        order = self.order(images, noise)
        return self.restore(images, self.see(images, order), order, everywhere=everywhere)

    def see(self, images: Tensor, order: Tensor) -> Features:
        """The encoder's features of the visible patches, in their order."""
        return self.encoder.encode(self.encoder.embed(images, order[:, : self.num_keep]))

    def restore(self, images: Tensor, features: Features, order: Tensor, *, everywhere: bool) -> Reconstruction:
        """What `forward` returns, from what `see` saw."""
        hidden = order[:, self.num_keep :]
        decoded = self.decode(features, order, last=self.num_patches if everywhere else hidden.shape[1])
        prediction = self.decoder_pred(self.decoder_norm(decoded))
        predicted = prediction[:, self.num_keep :] if everywhere else prediction
        loss = (predicted - self.targets(images, hidden)).square().mean()
        mask = torch.zeros(order.shape, dtype=images.dtype, device=images.device).scatter_(1, hidden, 1.0)
        if everywhere:
            prediction = prediction.take_along_dim(order.argsort(dim=1)[..., None], dim=1)
        return Reconstruction(loss, prediction, mask)

    def order(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(b, n) raster positions of every picture's patches: the first `num_keep` are seen, the others hidden."""
        shape = (images.shape[0], self.num_patches)
        if noise is None:
            noise = torch.rand(shape, device=images.device)
        elif tuple(noise.shape) != shape:
            raise UserError(f"noise is {tuple(noise.shape)}: one number for each picture's patch makes it {shape}")
        return MASKINGS[self.masking](noise, grid=self.grid_size, keep=self.num_keep)

    def decode(self, features: Features, order: Tensor, *, last: int) -> Tensor:
        """(b, last, decoder width) of the last patches in the order given, after the blocks and before the last norm.

        Mask tokens stand after the visible ones; each token gets the position of the patch it stands for."""
        table = self.decoder_pos_embed
        positions = F.embedding(order, table[0, self.num_prefix_tokens :])
        visible = self.decoder_embed(features.patches) + positions[:, : self.num_keep]
        tokens = [visible, self.mask_token + positions[:, self.num_keep :]]
        if features.cls is not None:
            tokens.insert(0, self.decoder_embed(features.cls)[:, None] + table[:, :1])
        recompute = getattr(self.encoder, "gradient_checkpointing", False) and self.training
        return run_blocks(self.decoder_blocks, torch.cat(tokens, dim=1), recompute=recompute, last=last)

    # ---- pixels --------------------------------------------------------------------------------------------------
    def patchify(self, images: Tensor) -> Tensor:
        """(b, n, ph * pw * c) pixels of every patch in raster order; within a patch row, column, channel."""
        return self._pixels(images).flatten(1, 2).flatten(2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(b, c, h, w) pictures from (b, n, ph * pw * c) patches in raster order: patchify undone."""
        (rows, columns), (height, width) = self.grid_size, self.encoder.patch_size
        return rearrange(
            patches,
            "b (gh gw) (ph pw c) -> b c (gh ph) (gw pw)",
            gh=rows,
            gw=columns,
            ph=height,
            pw=width,
        )

    def targets(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(b, n, ph * pw * c) what the prediction is compared with; of the patches `keep` (b, m) alone, if given."""
        patches = self.patchify(images) if keep is None else pick_patches(self._pixels(images), keep).flatten(2)
        if not self.norm_pix_loss:
            return patches
        mean, std = patch_statistics(patches)
        return (patches - mean) / std

    def _pixels(self, images: Tensor) -> Tensor:
        """(b, gh, gw, ph, pw, c), a view."""
        height, width = self.encoder.patch_size
        return rearrange(images, "b c (gh ph) (gw pw) -> b gh gw ph pw c", ph=height, pw=width)

    # ---- start ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def init_decoder(self) -> None:
        """Draws the decoder anew: xavier uniform with bias 0, mask token N(0, 0.02); positions are computed."""
        for name, module in self.named_modules():
            if name.startswith("decoder") and isinstance(module, nn.Linear):
                xavier(module)
            elif name.startswith("decoder") and isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder_pos_embed.copy_(
            sincos_pos_embed(self.grid_size, self.decoder_dim, num_prefix_tokens=self.num_prefix_tokens)
        )


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """(b, n, 1) mean and standard deviation of each patch's values, as norm_pix_loss takes them: unbiased, + 1e-6."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def masked_autoencoder(
    *,
    image_size: int | Sequence[int] = 224,
    patch_size: int | Sequence[int] = 16,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    in_channels: int = 3,
    decoder_dim: int = 512,
    decoder_depth: int = 8,
    decoder_num_heads: int = 16,
    mlp_ratio: float = 4.0,
    norm_pix_loss: bool = False,
    mask_ratio: float = 0.75,
    masking: str = "random",
    num_classes: int = 0,
) -> MaskedAutoencoder:
    """A masked autoencoder around a ViT as the official code makes it: fixed sine-cosine positions, xavier start.

    `mlp_ratio` is that of encoder and decoder. It has no classifier: UserError for any num_classes but 0."""
    if num_classes != 0:
        raise UserError(
            f"model.num_classes={num_classes}: a masked autoencoder has no classifier; to train one: "
            "model=vit_base method=mae"
        )
    encoder = VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        in_channels=in_channels,
        mlp_ratio=mlp_ratio,
        num_classes=0,
        position_embedding="sincos",
        init="mae",
    )
    return MaskedAutoencoder(
        encoder,
        decoder_dim=decoder_dim,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder_num_heads,
        mlp_ratio=mlp_ratio,
        norm_pix_loss=norm_pix_loss,
        mask_ratio=mask_ratio,
        masking=masking,
    )


# Layers between tokens and classifier, and what leaves them out.
_OF_TIMM = "model.options={global_pool: token}"
_READ_BY_A_CLASSIFIER = {
    "fc_norm": f"model.norm=before_pool, of a timm model {_OF_TIMM}",
    "pre_logits": "model.representation_dim=null",
    "attn_pool": _OF_TIMM,
}


def _check_encoder(encoder: Any) -> None:
    name, embed = type(encoder).__name__, getattr(encoder, "embed", None)
    if not callable(getattr(encoder, "encode", None)) or embed is None:
        raise UserError(f"model {name}: a masked autoencoder needs a backbone with embed() and encode(), as model=vit")
    if "keep" not in inspect.signature(embed).parameters:
        raise UserError(
            f"model {name}: its embed() cannot leave patches out (keep=); where tokens see beyond their patches, "
            "hidden pixels would show.\nMAE needs separate patches: model=vit, deit or a plain timm ViT"
        )
    try:
        placed = None not in (encoder.patch_size, encoder.grid_size)
    except UserError as error:  # of a timm model that is no plain ViT
        raise UserError(f"model {name}: a masked autoencoder needs separate patches: {error}") from None
    if not placed:
        raise UserError(
            f"model {name}: its patches have no positions, so nothing tells a masked autoencoder which it sees"
        )
    if encoder.num_classes != 0:
        raise UserError(f"model.num_classes={encoder.num_classes}: a masked autoencoder's encoder has no classifier: 0")
    for part, option in _READ_BY_A_CLASSIFIER.items():
        if any(True for _ in getattr(encoder, part, nn.Identity()).parameters()):
            raise UserError(f"model.{part} would never be trained by a masked autoencoder: {option}")


# ---- the official names ------------------------------------------------------------------------------------------
def _without_encoder_prefix(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}encoder.")]:
        state[prefix + key.removeprefix(f"{prefix}encoder.")] = state.pop(key)


def _with_encoder_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = ("decoder_", "mask_token")
    for key in [key for key in state if key.startswith(prefix)]:
        if not key.removeprefix(prefix).startswith(own):
            state[f"{prefix}encoder.{key.removeprefix(prefix)}"] = state.pop(key)
