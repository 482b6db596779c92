"""Names of Hugging Face transformers' ViT, DeiT and ViTMAE, as their files have them, changed to timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_MARK = "embeddings.patch_embeddings.projection.weight"
_TOP = {  # in files; within a program the names differ from version to version
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "pooler.dense": "pre_logits.fc",  # a layer with tanh behind the class token: the paper's representation layer
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
# The hub's files have decoder_layers, what transformers 5 writes decoder_encoder.layer.
_BLOCK = re.compile(r"(encoder\.layer|decoder\.(?:decoder_layers|decoder_encoder\.layer))\.(\d+)\.(.+)")
_PARTS = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_QUERY, _KEY, _VALUE = (f"attention.attention.{part}" for part in ("query", "key", "value"))


def has_transformers_names(state: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are named as those libraries' ViTs are."""
    return any(key.endswith(_MARK) for key in state)


def transformers_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names, query, key and value in one. Unknown names stay as they are, for the caller to refuse."""
    state = {key.removeprefix("vit.").removeprefix("deit."): tensor for key, tensor in state.items()}
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        block = _BLOCK.fullmatch(key)
        if block is None:
            out[_renamed(key, _TOP)] = tensor
            continue
        stem, leaf = f"{'decoder_' if block[1].startswith('decoder') else ''}blocks.{block[2]}.", block[3]
        part, _, kind = leaf.rpartition(".")
        three = [state.get(key.replace(leaf, f"{one}.{kind}")) for one in (_QUERY, _KEY, _VALUE)]
        if part not in (_QUERY, _KEY, _VALUE) or any(one is None for one in three):
            renamed = _renamed(leaf, _PARTS)
            out[key if renamed == leaf else stem + renamed] = tensor
        elif part == _QUERY:
            out[f"{stem}attn.qkv.{kind}"] = torch.cat([one for one in three if one is not None])
    return out


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """The name of a tensor, or of the layer that it is the weight or bias of, put for its other one."""
    layer, _, kind = key.rpartition(".")
    return names.get(key) or (f"{names[layer]}.{kind}" if layer in names else key)
