"""Co-training of two submodels that drop path draws from one network (Touvron et al. 2022, arXiv:2212.04884)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from vitexp.errors import UserError
from vitexp.losses import binary_loss
from vitexp.metrics import batch_top1, class_of
from vitexp.types import Batch, Method, Progress, StepOutput


class Cosub(Method):
    """A quarter of each: the binary loss of both submodels with the class, and of each with what the other says.

    Every picture stands in the batch twice, and drop path or dropout makes two submodels of the backbone; nothing flows
    back through what one tells the other. With `binarize` every class with a share in a mixed picture is a right one,
    as DeiT III trains; without, the shares are what is learned. Costs two forward and backward passes an update.
    Raises UserError where nothing is left out in training, so that both submodels would be one."""

    def __init__(self, backbone: nn.Module, *, binarize: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        self.binarize = binarize

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        if not any(_leaves_out(module) for module in self.backbone.modules()):
            raise UserError(
                "method=cosub: what trains leaves nothing out, so both submodels are the same; "
                "give model.drop_path=0.1, and blocks to train (stage.train_blocks)"
            )
        one, other = self.backbone(torch.cat([batch.images, batch.images])).float().chunk(2)
        of_class = sum(binary_loss(logits, batch.targets, binarize=self.binarize) for logits in (one, other))
        of_other = _agreement_loss(one, other) + _agreement_loss(other, one)
        metrics = {
            "top1": batch_top1(one, class_of(batch.targets)),
            "agreement": batch_top1(one, other.argmax(1)),
            "cosub_loss": of_other.detach() / 2,
        }
        return StepOutput((of_class + of_other) / 4, metrics)


def _agreement_loss(logits: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, told.detach().sigmoid())


def _leaves_out(module: nn.Module) -> bool:
    rate = module.drop_prob if isinstance(module, DropPath) else module.p if isinstance(module, nn.Dropout) else 0
    return module.training and bool(rate)
