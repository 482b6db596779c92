"""Masked autoencoding (He et al. 2022, arXiv:2111.06377): a backbone learns by what a decoder restores from a part."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.models.mae import MaskedAutoencoder
from vitexp.types import Batch, Method, Progress, StepOutput

NO_CLASSIFIER = "method=mae: has no classifier to evaluate; method.online_probe=true trains one beside it"
PROBE_STD = 0.01  # of the probe's first weights, as of MAE's linear probe


class MaskedAutoencoding(Method):
    """Mean squared error of the hidden patches' pixels. Each forward draws its masks from torch's generator.

    The backbone loses its classifier. `online_probe` trains one beside it, BatchNorm and a linear layer on the mean of
    the visible patches' features, with the same optimizer: no gradient of it reaches the backbone and it is not counted
    in the loss. Pictures without a label (-1) teach it nothing. Raises UserError for what does not fit together."""

    def __init__(
        self,
        backbone: Any,  # a module with the seam embed(images, keep), encode(tokens)
        *,
        mask_ratio: float = 0.75,
        masking: str = "random",
        norm_pix_loss: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        decoder_mlp_ratio: float = 4.0,
        online_probe: bool = False,
    ) -> None:
        super().__init__()
        classes = getattr(backbone, "num_classes", 0)
        if hasattr(backbone, "reset_head"):
            backbone.reset_head(0)
        self.autoencoder = MaskedAutoencoder(
            backbone,
            decoder_dim=decoder_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
            mlp_ratio=decoder_mlp_ratio,
            norm_pix_loss=norm_pix_loss,
            mask_ratio=mask_ratio,
            masking=masking,
        )
        self.probe: nn.Module | None = None
        if online_probe:
            if not classes:
                raise UserError("method.online_probe=true: the pictures have no classes to be told apart")
            linear = nn.Linear(backbone.embed_dim, classes)
            nn.init.trunc_normal_(linear.weight, std=PROBE_STD)
            nn.init.zeros_(linear.bias)
            self.probe = nn.Sequential(nn.BatchNorm1d(backbone.embed_dim, affine=False, eps=1e-6), linear)

    @property
    def backbone(self) -> nn.Module:  # pyrefly: ignore[bad-override]
        return self.autoencoder.encoder

    @property
    def has_classifier(self) -> bool:
        return self.probe is not None

    @property
    def whole(self) -> nn.Module:
        return self.autoencoder

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.autoencoder} | ({} if self.probe is None else {"probe": self.probe})

    def clipped(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.autoencoder.parameters() if parameter.requires_grad]

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        if self.probe is None:  # as one call, which runtime.compile compiles
            return StepOutput(self.autoencoder(batch.images, everywhere=False).loss)
        order = self.autoencoder.order(batch.images)
        features = self.autoencoder.see(batch.images, order)
        loss = self.autoencoder.restore(batch.images, features, order, everywhere=False).loss
        logits = self.probe(features.patches.detach().mean(dim=1))
        labelled = batch.targets >= 0
        count = labelled.sum().clamp(min=1)
        probe_loss = F.cross_entropy(logits, batch.targets, ignore_index=-1, reduction="sum") / count
        right = ((logits.detach().argmax(dim=1) == batch.targets) & labelled).sum() / count
        metrics = {"probe_loss": probe_loss.detach(), "probe_top1": right}
        return StepOutput(loss + (probe_loss - probe_loss.detach()), metrics)

    def logits(self, images: Tensor) -> Tensor:
        """The online probe's, from all patches. UserError without one."""
        if self.probe is None:
            raise UserError(NO_CLASSIFIER)
        encoder = self.autoencoder.encoder
        return self.probe(encoder.encode(encoder.embed(images)).patches.mean(dim=1))
