"""The layout of the official JAX ViTs: the .npz files of google-research's vision_transformer and of big_vision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitexp.errors import UserError

# Sub-modules of a block: the published files number them _1 _2 _3, what flax writes today _0 _1 _0.
_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(\w+?)/(.+)")
_BLOCK_PARTS = {
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "LayerNorm_2": "norm2",
    "MultiHeadDotProductAttention_0": "attn",
    "MultiHeadDotProductAttention_1": "attn",
    "MlpBlock_0": "mlp",
    "MlpBlock_3": "mlp",
}
_TOP = {
    "embedding/kernel": "patch_embed.proj.weight",
    "embedding/bias": "patch_embed.proj.bias",
    "cls": "cls_token",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "pos_embedding": "pos_embed",
    "Transformer/encoder_norm/scale": "norm.weight",
    "Transformer/encoder_norm/bias": "norm.bias",
    "pre_logits/kernel": "pre_logits.fc.weight",
    "pre_logits/bias": "pre_logits.fc.bias",
    "head/kernel": "head.weight",
    "head/bias": "head.bias",
}
_LEAVES = {"scale": "weight", "bias": "bias", "Dense_0/kernel": "fc1.weight", "Dense_0/bias": "fc1.bias"}
_LEAVES |= {"Dense_1/kernel": "fc2.weight", "Dense_1/bias": "fc2.bias"}


def jax_to_timm(arrays: Mapping[str, np.ndarray], file: Path) -> dict[str, Tensor]:
    """timm's names and layouts from the '/'-joined ones of google-research's vision_transformer and big_vision.

    Unknown names stay as they are, for the caller to refuse. Raises UserError for hybrids with a ResNet stem."""
    tensors = {key: _tensor(array) for key, array in _parameters(arrays).items()}
    if any(key.startswith(("conv_root", "gn_root", "block1/")) for key in tensors):
        raise UserError(f"{file}: a hybrid with a ResNet stem (conv_root); only plain ViT files are read")
    if not any(key.startswith(("embedding/", "Transformer/")) for key in tensors):
        raise UserError(f"{file}: not the official ViT's layout; its first names are {', '.join(list(tensors)[:3])}")
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        block = _BLOCK.fullmatch(key)
        if key == "embedding/kernel":
            state[_TOP[key]] = tensor.permute(3, 2, 0, 1)
        elif key in _TOP:
            state[_TOP[key]] = tensor.T if key.endswith("kernel") else tensor
        elif block and block[2] in _BLOCK_PARTS:
            _add_block(state, f"blocks.{block[1]}.{_BLOCK_PARTS[block[2]]}.", block[3], tensor, key, tensors)
        else:
            state[key] = tensor
    if "pos_embedding" in tensors and "cls" in tensors:
        # big_vision adds positions before the class token joins: its row of ours is zero.
        state["pos_embed"] = torch.cat([torch.zeros_like(state["pos_embed"][:, :1]), state["pos_embed"]], dim=1)
    return state


def _add_block(
    state: dict[str, Tensor], name: str, leaf: str, tensor: Tensor, key: str, tensors: Mapping[str, Tensor]
) -> None:
    if not name.endswith("attn."):
        state[name + _LEAVES[leaf] if leaf in _LEAVES else key] = tensor.T if tensor.ndim == 2 else tensor
        return
    part, _, kind = leaf.partition("/")
    if part == "out":  # kernel (heads, head width, d)
        state[f"{name}proj.{'weight' if kind == 'kernel' else 'bias'}"] = (
            tensor.flatten(0, 1).T if kind == "kernel" else tensor
        )
    elif part == "query":  # kernel (d, heads, head width); key and value are taken along
        stem = key.removesuffix(leaf)
        three = [tensors.get(f"{stem}{projection}/{kind}") for projection in ("query", "key", "value")]
        flat = [t.flatten(1).T if kind == "kernel" else t.flatten() for t in three if t is not None]
        state[f"{name}qkv.{'weight' if kind == 'kernel' else 'bias'}"] = torch.cat(flat)
    elif part not in ("key", "value"):
        state[key] = tensor


def _parameters(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters without optimizer state and prefix, and a scanned encoder's leading depth axis taken apart."""
    for prefix in ("opt/target/", "params/img/", "params/"):
        if any(key.startswith(prefix) for key in arrays):
            arrays = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
    scanned = "Transformer/encoderblock/"
    out = {key: array for key, array in arrays.items() if not key.startswith(scanned)}
    for key, array in arrays.items():
        if key.startswith(scanned):
            for i in range(array.shape[0]):
                out[f"Transformer/encoderblock_{i}/{key.removeprefix(scanned)}"] = array[i]
    return out


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # numpy has no bfloat16 and stores its bytes
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))
