"""What of a pretrained backbone trains: all of it, its head alone, or its last blocks as well."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from vitexp.errors import UserError


def freeze(backbone: nn.Module, train_blocks: int | str, *, fresh: Collection[str] = ()) -> None:
    """Leaves trainable what `stage.train_blocks` says, and switches the gradient of everything else off.

    all: nothing is switched off. 0: the head alone trains, as in linear probing. k: the last k blocks with the last
    norm and the head, partial fine-tuning (MAE, arXiv:2111.06377, figure 9). Blocks are the layers that the backbone's
    `layer_of` numbers between embedding and head. What is frozen takes no part in backward: nothing below the first
    block that trains keeps activations for it.
    `fresh` names parameters that no weights file filled. Raises UserError where one of them would be frozen, and for a
    backbone without head, without numbered layers or with fewer blocks."""
    if train_blocks == "all":
        return
    assert isinstance(train_blocks, int)
    asked = f"stage.train_blocks={train_blocks}"
    names = [name for name, _ in backbone.named_parameters()]
    head = tuple(getattr(backbone, "head_prefixes", ()))
    trained = {name for name in names if name.startswith(head)}
    if not trained:
        raise UserError(f"{asked}: {type(backbone).__name__} has no classifier to train (model.num_classes)")
    if train_blocks > 0:
        layers, top = _layers(backbone, names, asked=asked)
        if train_blocks > top - 1:
            raise UserError(f"{asked}: the model has {top - 1} blocks; all trains every one and the embedding")
        trained |= {name for name in names if layers[name] >= top - train_blocks}
    untrained = [name for name in names if name in fresh and name not in trained]
    if untrained:
        raise UserError(
            f"{asked}: {untrained[0]} is not in init_from, and frozen it would stay as it was drawn.\n"
            "Choose a model without it (model.norm=before_pool, model.representation_dim=null)"
        )
    for name, parameter in backbone.named_parameters():
        if name not in trained:
            parameter.requires_grad_(False)


def _layers(backbone: Any, names: list[str], *, asked: str) -> tuple[dict[str, int], int]:
    """Number of each parameter's layer, and the head's, which is the highest."""
    if not hasattr(backbone, "layer_of"):
        raise UserError(f"{asked}: {type(backbone).__name__} does not number its layers; give 0 or all")
    try:
        return {name: backbone.layer_of(name) for name in names}, backbone.num_layers
    except UserError:  # worded for layer decay, which asks the same
        raise UserError(f"{asked}: this timm model gives no order of its layers; give 0 or all") from None
