"""Token labeling (LV-ViT, Jiang et al. 2021, arXiv:2104.10858) and re-labeling (Yun et al. 2021, arXiv:2101.05022)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vitexp.data.token_labels import Grid, crop_labels
from vitexp.errors import UserError
from vitexp.losses import soft_target_loss, token_label_loss, with_ground_truth
from vitexp.metrics import batch_top1, class_of
from vitexp.mixing import Box, one_hot
from vitexp.token_mixing import kept_share, mix_class_targets, mix_tokens, token_box
from vitexp.types import Batch, Features, Method, Progress, StepOutput

Labels = Literal["tokens", "picture", "ground_truth"]

HEAD_STD = 0.02  # of a token classifier's first weights, as of LV-ViT's
SEAM = ("embed", "encode", "pooled", "classify", "grid_size", "embed_dim")
NO_BOX: Box = (0, 0, 0, 0)


class TokenLabeling(Method):
    """Cross entropy of the class token with the crop's label and of every patch token with its own, weighted.

    `labels`: tokens; picture, the crop's alone against the backbone's own output, which any model has; or ground_truth,
    the class number for class and tokens alike, without a teacher. `mix_tokens` exchanges a box of tokens between
    pictures before they are encoded; each forward draws it from torch's generator. The tokens' outputs go back to their
    own pictures, so only the class token's label is mixed. `ground_truth_mixing` gives the class number a share in it.

    A backbone without a classifier of tokens gets one here, shared by all; it is evaluated without.
    Raises UserError for a backbone that does not fit, and for a batch without label maps."""

    def __init__(
        self,
        backbone: Any,  # a module with the members of SEAM, but for labels=picture
        *,
        labels: Labels = "tokens",
        cls_weight: float = 1.0,
        token_weight: float = 0.5,
        mix_tokens: bool = True,
        ground_truth_mixing: bool = False,
        official_axes: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if labels not in get_args(Labels):
            raise UserError(f"method.labels={labels} is not one of {', '.join(get_args(Labels))}")
        self.num_classes: int = backbone.num_classes
        if not self.num_classes:
            raise UserError("method=token_labeling: there are no classes to learn")
        self.backbone = backbone
        self.labels: Labels = labels
        self.reads_maps = labels != "ground_truth"
        self.cls_weight, self.token_weight = cls_weight, token_weight
        self.mix_tokens, self.ground_truth_mixing = mix_tokens, ground_truth_mixing
        self.official_axes, self.label_smoothing = official_axes, label_smoothing
        self.token_head: nn.Linear | None = None
        if labels == "picture":
            return
        if reason := _no_tokens(backbone):
            raise UserError(
                f"method.labels={labels}: {type(backbone).__name__} hands out no tokens to teach ({reason}); "
                "method.labels=picture works with any model"
            )
        if not hasattr(backbone, "token_logits"):
            self.token_head = nn.Linear(backbone.embed_dim, self.num_classes)
            nn.init.trunc_normal_(self.token_head.weight, std=HEAD_STD)
            nn.init.zeros_(self.token_head.bias)
        elif not backbone.token_head:
            raise UserError(
                f"method.labels={labels}: model.token_head=false leaves no classifier of tokens to teach; "
                "give model.token_head=true, or method.labels=picture"
            )

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {} if self.token_head is None else {"token_head": self.token_head}

    def countable(self) -> TokenLabeling:
        """Without label maps and drawn boxes, whose values decide over shapes."""
        twin = copy.copy(self)
        twin.reads_maps = twin.mix_tokens = False
        return twin

    def forward(self, batch: Batch, progress: Progress, *, box: Box | None = None) -> StepOutput:
        """`box` is exchanged instead of one that is drawn: top, bottom, left, right in tokens."""
        if self.labels == "picture":
            (label,) = self.targets(batch)
            logits = self.backbone(batch.images)
            loss = soft_target_loss(logits, label)
            return StepOutput(self.cls_weight * loss, {"top1": batch_top1(logits, class_of(batch.targets))})
        backbone: Any = self.backbone
        grid = backbone.grid_size
        cls_targets, token_targets = self.targets(batch, grids=[grid])
        if box is None:
            box = token_box(torch.rand(3, dtype=torch.float64).tolist(), grid=grid) if self.mix_tokens else NO_BOX
        cls_logits, token_logits = self.both_logits(
            backbone.encode(mix_tokens(backbone.embed(batch.images), box=box, grid=grid))
        )
        loss = token_label_loss(
            cls_logits,
            mix_tokens(token_logits, box=box, grid=grid),  # each token's with its own picture again
            mix_class_targets(cls_targets, box=box, grid=grid),
            token_targets,
            cls_weight=self.cls_weight,
            token_weight=self.token_weight,
        )
        classes = class_of(batch.targets)
        most = classes if kept_share(box, grid=grid) >= 0.5 else classes.flip(0)  # whose tokens the class token saw
        return StepOutput(loss, {"top1": batch_top1(cls_logits, most)})

    @torch.no_grad()
    def targets(self, batch: Batch, *, grids: Sequence[Grid] = ()) -> list[Tensor]:
        """(b, k) label of each crop, and (b, n, k) those of the tokens of each grid; n is 1 where all have the same.

        Float32 whatever autocast says: half precision would be an error of 1 % in a label."""
        if not self.reads_maps:
            truth = self._ground_truth(batch.targets)
            return [truth, *(truth[:, None] for _ in grids)]
        maps = batch.maps
        if maps is None:
            raise UserError(
                f"method.labels={self.labels}: the batch has no label maps; give train.token_labels=<store>"
            )
        with torch.autocast(maps.values.device.type, enabled=False):
            crops, *tokens = crop_labels(
                maps.values,
                maps.numbers,
                maps.boxes,
                maps.mirrored,
                num_classes=self.num_classes,
                grids=[(1, 1), *grids],
                smoothing=self.label_smoothing,
                official_axes=self.official_axes,
            )
        labels = [crops[:, 0], *tokens]
        if maps.lam < 1:
            labels = [torch.lerp(part.flip(0), part, maps.lam) for part in labels]
        if self.ground_truth_mixing:
            labels[0] = with_ground_truth(labels[0], self._ground_truth(batch.targets))
        return labels

    def _ground_truth(self, targets: Tensor) -> Tensor:
        """(b, k) smoothed probabilities of class numbers, or of what mixing has made of them."""
        if targets.ndim == 1:
            return one_hot(targets, self.num_classes, smoothing=self.label_smoothing)
        return targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes

    def both_logits(self, features: Features) -> tuple[Tensor, Tensor]:
        """Of the class token (b, k), and of every patch token (b, n, k)."""
        backbone: Any = self.backbone
        if self.token_head is None:
            return backbone.token_logits(features)
        return backbone.classify(backbone.pooled(features)), self.token_head(features.patches)


def _no_tokens(backbone: nn.Module) -> str | None:
    """Why tokens of this model cannot be taught; None where they can."""
    try:
        missing = [name for name in SEAM if getattr(backbone, name, None) is None]
    except UserError as error:  # of a timm model that is no plain ViT
        return str(error)
    return f"no {missing[0]}" if missing else None
