"""Where a ViT looks: attention probabilities, their rollout over the blocks, and how alike its position embeddings are.

The probabilities are computed beside the forward from each attention's own input, because the fused path never has
them. The model is left as it was found: no hook, no mode, no stored tensor remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention as TimmAttention
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.evaluators.classification import evaluation_mode
from vitexp.models.deit_parallel import ParallelBlock
from vitexp.models.layers import Attention
from vitexp.models.t2t_variants import GhostAttention, SqueezeExciteAttention

# Other subclasses and attentions (relative positions, windows) have further terms in their softmax.
_PLAIN = (Attention, SqueezeExciteAttention, GhostAttention, TimmAttention)


@dataclass(frozen=True)
class AttentionMaps:
    """What a picture's representation attends to among its patches; shares of one row of the softmax.

    The row is the class token's where the classifier reads that token, else the mean over the patches' rows. A row's
    sum is 1 less what goes to class and register tokens."""

    last: Tensor  # (b, heads, gh, gw) of the last block; of a parallel one the heads of both its attentions
    rollout: Tensor  # (b, gh, gw) over all blocks


def attention_maps(model: nn.Module, images: Tensor) -> AttentionMaps:
    """The maps of normalised pictures (b, c, h, w) on the model's device, float32 on the CPU.

    Holds one block's probabilities at a time. UserError unless the model `has_attention_maps`."""
    layers = _plain_attentions(model)
    steps: list[Tensor] = []  # of the rollout: only the newest is kept
    last: list[Tensor] = []

    def see(probabilities: Tensor) -> None:
        steps[:] = [_rolled(steps[0] if steps else None, probabilities)]
        last[:] = [probabilities]

    _look(model, layers, images, see)
    rollout = _to_patches(model, steps[0][:, None])[:, 0]
    return AttentionMaps(last=_to_patches(model, last[0]).cpu(), rollout=rollout.cpu())


def attention_probabilities(model: nn.Module, images: Tensor) -> list[Tensor]:
    """softmax(q k^T * scale) of each block, (b, heads, n, n) float32: row i says what token i takes from the others.

    Tokens come in the model's order, class token first. UserError unless the model `has_attention_maps`."""
    found: list[Tensor] = []
    _look(model, _plain_attentions(model), images, found.append)
    return found


def attention_rollout(layers: Iterable[Tensor]) -> Tensor:
    """(b, n, n) from the probabilities of all blocks, first block first. Rows sum to 1. Abnar and Zuidema 2020,
    arXiv:2005.00928, section 3: the mean over heads, half of it the residual connection, multiplied through."""
    rolled: Tensor | None = None
    for probabilities in layers:
        rolled = _rolled(rolled, probabilities)
    assert rolled is not None, "no blocks"
    return rolled


def has_attention_maps(model: nn.Module) -> bool:
    """Whether the model is a ViT whose blocks attend over all of one grid of patches: ours, or a plain one of timm."""
    try:
        _plain_attentions(model)
    except UserError:
        return False
    return True


def position_similarity(model: nn.Module) -> Tensor | None:
    """Cosine similarity of each patch's position embedding with all others, (gh, gw, gh, gw) float32 on the CPU:
    ViT figure 7. None for a model without a table of positions."""
    grid, table = getattr(model, "grid_size", None), getattr(_inner(model), "pos_embed", None)
    if grid is None or not isinstance(table, Tensor) or table.ndim != 3:
        return None
    rows, columns = grid
    patches = table.detach()[0, -rows * columns :].float()  # class and register tokens stand before the patches
    unit = F.normalize(patches, dim=1)
    return (unit @ unit.T).view(rows, columns, rows, columns).cpu()


def _rolled(before: Tensor | None, probabilities: Tensor) -> Tensor:
    mean = probabilities.mean(dim=1)
    mixed = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
    return mixed if before is None else mixed @ before


def _look(model: nn.Module, blocks: list[tuple[Any, ...]], images: Tensor, see: Callable[[Tensor], None]) -> None:
    """One forward in eval mode and float32; `see` gets each block's probabilities in turn."""
    of_block: list[Tensor] = []

    def before(layer: Any, inputs: tuple[Tensor, ...], *, is_last: bool) -> None:
        q, k, _ = rearrange(layer.qkv(inputs[0]), "b n (t h d) -> t b h n d", t=3, h=layer.num_heads).unbind(0)
        q, k = layer.q_norm(q), layer.k_norm(k)
        of_block.append(((q * layer.scale) @ k.transpose(-2, -1)).float().softmax(dim=-1))
        if is_last:
            see(torch.cat(of_block, dim=1) if len(of_block) > 1 else of_block[0])
            of_block.clear()

    handles = [
        layer.register_forward_pre_hook(partial(before, is_last=layer is block[-1]))
        for block in blocks
        for layer in block
    ]
    try:
        with evaluation_mode(model), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            model.forward(images)  # not model(images): compiled code would not know of the hooks
    finally:
        for handle in handles:
            handle.remove()


def _to_patches(model: nn.Module, probabilities: Tensor) -> Tensor:
    """(b, heads, gh, gw) from (b, heads, n, n)."""
    inner, grid = _inner(model), getattr(model, "grid_size", None)
    prefix = inner.num_prefix_tokens
    pool = getattr(inner, "global_pool", None) or inner.pool  # timm's word for it, and ours
    reads_class_token = inner.cls_token is not None and pool in ("token", "cls")
    query = probabilities[:, :, 0] if reads_class_token else probabilities[:, :, prefix:].mean(dim=2)
    return query[:, :, prefix:].unflatten(2, grid)


def _plain_attentions(model: nn.Module) -> list[tuple[Any, ...]]:
    """Of each block; those of a parallel one in the order in which they run."""
    inner, grid = _inner(model), getattr(model, "grid_size", None)
    layers = [
        (block.attn, block.attn1) if isinstance(block, ParallelBlock) else (getattr(block, "attn", None),)
        for block in getattr(inner, "blocks", ())
    ]
    if not layers or grid is None or any(type(layer) not in _PLAIN for block in layers for layer in block):
        name = type(inner).__name__
        raise UserError(f"{name} has no attention maps: only ViTs with plain attention in every block have them")
    return layers


def _inner(model: nn.Module) -> Any:
    """timm's own model, which a TimmBackbone keeps."""
    return getattr(model, "timm_model", model)
