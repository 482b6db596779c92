"""What evaluators of features share: vectors of pictures from a backbone, and rows of all ranks in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.models.timm_backbone import TimmBackbone

Pool = Literal["mean", "cls", "model"]
POOLS = get_args(Pool)


def feature_extractor(
    backbone: nn.Module, accelerator: Accelerator, *, pool: Pool, key: str
) -> Callable[[Tensor], Tensor]:
    """Gives float32 vectors (b, d) of whole, unmasked pictures (b, c, h, w), encoded in the run's precision.

    mean: of the patch tokens that `encode` gives. cls: its class token. model: what the backbone's own classifier
    reads. timm's plain ViTs have all three, its other models `model` alone. Raises UserError, which names `key`, for
    what a backbone lacks."""
    whole: Any = _what_the_classifier_reads(backbone, key) if pool == "model" else None
    parts: Any = backbone
    if pool != "model" and not all(callable(getattr(backbone, name, None)) for name in ("embed", "encode")):
        raise UserError(f"{key}={pool}: {type(backbone).__name__} gives no tokens; {key}=model is for such a model")

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        with accelerator.autocast():
            if whole is not None:
                return whole(images).float()
            try:
                features = parts.encode(parts.embed(images))
            except UserError as error:
                if not isinstance(backbone, TimmBackbone):
                    raise
                raise UserError(f"{key}={pool}: {error}; {key}=model works with any timm model") from None
        vectors = features.cls if pool == "cls" else features.patches.float().mean(dim=1)
        if vectors is None:
            raise UserError(f"{key}=cls: the model has no class token; use mean or model")
        return vectors.float()

    return extract


def _what_the_classifier_reads(backbone: Any, key: str) -> Callable[[Tensor], Tensor]:
    if isinstance(backbone, TimmBackbone):
        timm_model = backbone.timm_model
        return lambda images: timm_model.forward_head(timm_model.forward_features(images), pre_logits=True)
    if not hasattr(backbone, "pooled"):
        raise UserError(f"{key}=model: {type(backbone).__name__} does not say what its classifier reads")
    return lambda images: backbone.pooled(backbone.encode(backbone.embed(images)))


def gather_rows(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows (n, ...) of all ranks, one rank after the other, on every rank. Shares may differ in length; a rank
    without any gives an empty tensor with as many dimensions."""
    if accelerator.num_processes == 1:
        return rows
    shapes = accelerator.gather(torch.tensor([rows.shape], device=accelerator.device))
    assert isinstance(shapes, Tensor)
    padded = torch.zeros(shapes.amax(dim=0).tolist(), dtype=rows.dtype, device=accelerator.device)
    if len(rows):
        padded[: len(rows)] = rows
    gathered = accelerator.gather(padded)
    assert isinstance(gathered, Tensor)
    shares = zip(gathered.split(len(padded)), shapes[:, 0].tolist(), strict=True)
    return torch.cat([share[:count] for share, count in shares])
