"""Weights from files of any origin into a model, with a report of what was taken, resized and left.

Everything is checked before the first tensor of the model changes. How files are read: weights_files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.models.checks import one_of
from vitexp.models.pos_embed import POSITION_MODES, Grid, infer_grid, resize_pos_embed, square_side
from vitexp.models.weights_files import HMLP_STEM, LVVIT_STEM, T2T_STEM, is_mae_decoder, read_weights

HEAD_CHOICES = ("auto", "keep", "fresh")
# The official codes of LV-ViT, DeiT and T2T-ViT and transformers resize as MAE's does. timm's keys are those of a plain
# DeiT, too: there the model says how (`position_mode`).
_POSITION_MODE_OF = dict.fromkeys(("mae", "lvvit", "deit", "deit3", "t2t", "transformers"), "mae") | {"jax": "jax"}
# What only the blocks of one T2T-ViT hold, and a model that has such blocks.
_T2T_PARTS = {".se_layer.": "t2t_14_se", ".cheap_operation": "t2t_16_ghost", ".dense_linear.": "t2t_dense"}


@dataclass(frozen=True)
class Resized:
    """A position embedding that changed its grid on the way."""

    old_grid: Grid
    new_grid: Grid
    mode: str


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did. Printing it gives one paragraph."""

    path: str
    # jax (official .npz), mae (MAE pretraining), lvvit (LV-ViT's stem), t2t (T2T-ViT's soft splits), deit (DeiT's
    # distillation token), deit3 (LayerScale, and no position of the class token), transformers (its ViT and DeiT),
    # timm (timm's keys, all others)
    family: str
    loaded: int  # tensors taken over
    head: str  # kept, fresh (zero), or none where the model has no classifier
    missing: tuple[str, ...]  # the model's names that the file did not fill: they keep their fresh values
    unexpected: tuple[str, ...]  # the file's names that were left out
    resized: Resized | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.path} ({self.family}): {self.loaded} tensors loaded, head {self.head}"]
        if self.resized:
            old, new = ("x".join(map(str, grid)) for grid in (self.resized.old_grid, self.resized.new_grid))
            parts.append(f"position embedding resized {old} -> {new} ({self.resized.mode})")
        if self.missing:
            parts.append(f"fresh in the model: {_some(self.missing)}")
        if self.unexpected:
            parts.append(f"not used from the file: {_some(self.unexpected)}")
        return "; ".join([*parts, *self.notes])


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    head: str = "auto",
    position_mode: str | None = None,
    grid: Grid | None = None,
) -> LoadReport:
    """Fills `model` from a .safetensors, .pt .pth .bin .tar, official JAX ViT .npz or a run folder, and reports.

    `path` may also be timm:<name>, timm's pretrained weights, or hf:<owner/name>, a repository of the Hugging Face hub.
    `head`: auto keeps the file's classifier when it fits, else the model's starts at zero (ViT appendix B.1.1); keep
    insists; fresh always starts at zero. The hidden fc-tanh layer of a pretraining head is dropped when the model has
    none, and the classifier then starts fresh, since it read other features; the same where the file normalises every
    token and the model the pooled vector (`fc_norm`), as in MAE's fine-tuning. A masked autoencoder takes the decoder
    along where the file has one, else its own stays fresh and the report says so; other models leave it in the file.
    LV-ViT's classifier of tokens stays in the file where the model has none; a model with two keeps both or neither.
    `position_mode` is jax, mae or timm; by default that of the file's family: npz jax; MAE pretraining, LV-ViT, DeiT
    with distillation token, DeiT III, T2T-ViT and transformers mae; for timm's keys the model's, which is mae of a
    DeiT, else timm.
    `grid` is the file's (rows, columns) of patches, needed only where its number of patches does not tell.
    Raises UserError when the file cannot be read or anything else is missing, left over or of another shape."""
    one_of("head", head, HEAD_CHOICES)
    if position_mode is not None:
        one_of("position_mode", position_mode, tuple(POSITION_MODES))
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise UserError("the model lies on the meta device and has no memory to load weights into; build it on the CPU")

    # ---- read ----------------------------------------------------------------------------------------------------
    weights = read_weights(path)
    file, state, family, notes = weights.place, weights.state, weights.family, list(weights.notes)
    dropped: list[str] = []
    anew = _settle_decoder(state, own, dropped, notes)
    _settle_token_head(state, own, dropped)

    # ---- head ----------------------------------------------------------------------------------------------------
    # What the classifier reads comes from these two; where the file's are not the model's, they start fresh with it.
    replaced = ("pre_logits.",) if _settle_pre_logits(state, own, dropped) else ()
    replaced += ("fc_norm.",) if _settle_norm(state, own, dropped) else ()
    classifier = [key for key in own if key.startswith(_head_prefixes(model))]
    in_file = [key for key in state if key.startswith(_head_prefixes(model))]
    fits = bool(classifier) and set(in_file) == set(classifier) and not replaced
    fits = fits and all(state[key].shape == own[key].shape for key in classifier)
    if head == "keep" and not fits:
        raise UserError(f"{file}: head=keep, but {_why_head_does_not_fit(state, own, in_file, classifier)}")
    kept = fits and head != "fresh"
    if not kept:
        dropped += in_file
        for key in in_file:
            del state[key]

    # ---- position embedding --------------------------------------------------------------------------------------
    mode = position_mode or _POSITION_MODE_OF.get(family) or getattr(model, "position_mode", "timm")
    how = {"grid": grid or weights.grid, "mode": mode, "file": file}
    resized = _settle_positions("pos_embed", model, state, own, notes, **how)
    _settle_positions("decoder_pos_embed", model, state, own, [], **how)  # has the same grids

    # ---- everything else must fit --------------------------------------------------------------------------------
    fresh = [key for key in own if key not in state and (key.startswith(replaced + anew) or key in classifier)]
    missing = [key for key in own if key not in state and key not in fresh]
    unexpected = [key for key in state if key not in own]
    misshaped = [key for key in state if key in own and state[key].shape != own[key].shape]
    if missing or unexpected or misshaped:
        raise UserError(_misfit(file, state, own, missing, unexpected, misshaped))

    # ---- fill ----------------------------------------------------------------------------------------------------
    with torch.no_grad():
        for key, tensor in state.items():
            own[key].copy_(tensor)
        learned = {key for key, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, nn.Parameter)}
        for key in classifier if not kept else ():
            if key in learned:  # a head's BatchNorm has statistics, which start at 0 and 1
                own[key].zero_()
    if family == "jax" and getattr(getattr(model, "encoder", model), "gelu", "tanh") == "erf":
        notes.append("trained with the tanh GELU while the model computes erf: model.gelu=tanh is exact")
    return LoadReport(
        path=file,
        family=family,
        loaded=len(state),
        head="none" if not classifier else "kept" if kept else "fresh",
        missing=tuple(fresh),
        unexpected=tuple(dropped),
        resized=resized,
        notes=tuple(notes),
    )


# ---- what may differ between file and model ----------------------------------------------------------------------
def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(getattr(model, "head_prefixes", ("head.",)))


def _settle_decoder(
    state: dict[str, Tensor], own: Mapping[str, Tensor], dropped: list[str], notes: list[str]
) -> tuple[str, ...]:
    """Drops a decoder that the model has no use for; how the names begin that a file leaves fresh in an autoencoder."""
    of_file = [key for key in state if is_mae_decoder(key)]
    if not any(map(is_mae_decoder, own)):
        dropped += of_file
        for key in of_file:
            del state[key]
        return ()
    anew: tuple[str, ...] = ()
    if not of_file:
        notes.append("the file holds no decoder, so it starts fresh (MAE's official files with one end in _full.pth)")
        anew = ("decoder", "mask_token")
    if "fc_norm.weight" in state and "norm.weight" not in state:
        # Fine-tuned: what it normalises is the pooled vector, not the tokens that the decoder reads.
        notes.append("the file is a fine-tuned one, so the encoder's last norm starts fresh")
        for key in ("fc_norm.weight", "fc_norm.bias"):
            if state.pop(key, None) is not None:
                dropped.append(key)
        anew += ("norm.",)
    return anew


def _settle_token_head(state: dict[str, Tensor], own: Mapping[str, Tensor], dropped: list[str]) -> None:
    """Drops LV-ViT's classifier of tokens where the model has none; the class token's may then still be kept."""
    of_file = [key for key in state if key.startswith("aux_head.")]
    if not any(key.startswith("aux_head.") for key in own):
        dropped += of_file
        for key in of_file:
            del state[key]


def _settle_pre_logits(state: dict[str, Tensor], own: Mapping[str, Tensor], dropped: list[str]) -> bool:
    """Drops a hidden head layer that the model cannot take; True when the classifier then reads other features.

    big_vision's pooling by attention (MAPHead_0) is such a layer, too."""
    of_file = {key: state[key].shape for key in state if key.startswith(("pre_logits.", "MAPHead_0/"))}
    if of_file == {key: own[key].shape for key in own if key.startswith("pre_logits.")}:
        return False
    for key in of_file:
        del state[key]
    dropped += of_file
    return True


def _settle_norm(state: dict[str, Tensor], own: Mapping[str, Tensor], dropped: list[str]) -> bool:
    """MAE's fine-tuning: the encoder's last norm gives way to a fresh one after pooling; True when that happened."""
    swap = "norm.weight" in state and "fc_norm.weight" not in state
    swap = swap and "fc_norm.weight" in own and "norm.weight" not in own
    for key in ("norm.weight", "norm.bias") if swap else ():
        if state.pop(key, None) is not None:
            dropped.append(key)
    return swap


def _settle_positions(
    name: str,
    model: nn.Module,
    state: dict[str, Tensor],
    own: Mapping[str, Tensor],
    notes: list[str],
    *,
    grid: Grid | None,
    mode: str,
    file: str,
) -> Resized | None:
    """Brings the table of this name in `state` to the model's grid, in place; None when it has that already."""
    table, new_grid = state.get(name), getattr(model, "grid_size", None)
    if table is None or name not in own or new_grid is None or table.ndim != 3:
        return None
    if any((token in state) != (token in own) for token in ("cls_token", "dist_token")):
        return None  # said below, in plainer words than a table of the wrong length would be
    prefix = own[name].shape[1] - new_grid[0] * new_grid[1]
    rows = table.shape[1]
    if prefix == 0 and "cls_token" in own and not _lacks_class_row(rows, grid=grid, like=new_grid):
        raise UserError(f"{file}: its class token has a position and the model's has none: model.class_position=true")
    if prefix == 1 and _lacks_class_row(rows, grid=grid, like=new_grid):
        # deit3 and others give the class token no position: a row of zeros says the same in our table.
        table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        rows += 1
    if grid is not None and rows != prefix + grid[0] * grid[1]:
        raise UserError(f"{file}: its position embedding has {rows} rows, not {prefix} + {grid[0]}x{grid[1]}")
    try:
        old_grid = grid or infer_grid(rows - prefix, like=new_grid)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if grid is None and old_grid == new_grid and new_grid[0] != new_grid[1] and square_side(rows - prefix):
        side = square_side(rows - prefix)
        notes.append(
            f"position embedding taken as {new_grid[0]}x{new_grid[1]} like the model's; if the file's pictures were "
            f"square, say grid=({side}, {side})"
        )
    state[name] = resize_pos_embed(table, old_grid=old_grid, new_grid=new_grid, num_prefix_tokens=prefix, mode=mode)
    return (
        None
        if tuple(old_grid) == tuple(new_grid)
        else Resized((old_grid[0], old_grid[1]), (new_grid[0], new_grid[1]), mode)
    )


def _lacks_class_row(rows: int, *, grid: Grid | None, like: Grid) -> bool:
    if grid is not None:
        return rows == grid[0] * grid[1]
    patches = like[0] * like[1]
    return rows == patches or (square_side(rows) is not None and rows - 1 != patches)


# ---- words -------------------------------------------------------------------------------------------------------
def _why_head_does_not_fit(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], in_file: list[str], classifier: list[str]
) -> str:
    if not classifier:
        return "the model has no classifier (model.num_classes=0)"
    if not in_file:
        return "the file has no classifier"
    for key in classifier:
        if key not in state:
            return f"the file has no {key}"
        if state[key].shape != own[key].shape:
            return f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"
    return "the file's classifier reads other features than the model gives (pre_logits or the last norm differ)"


def _misfit(
    file: str,
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    misshaped: list[str],
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} of the model's are missing ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} are not the model's ({_some(unexpected)})")
    if misshaped:
        shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in misshaped]
        parts.append(f"{len(misshaped)} have another shape ({_some(shapes)})")
    return f"{file} does not fit the model: " + ", ".join(parts) + _hint(own, missing, unexpected, misshaped)


def _hint(own: Mapping[str, Tensor], missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
    if all(map(is_mae_decoder, missing + unexpected + misshaped)):
        return "\nOnly the decoder differs: load_weights(model.encoder, ...) loads the encoder alone"
    for part, option in _T2T_PARTS.items():
        if any(part in key for key in unexpected):
            return f"\nThe file is a T2T-ViT with other blocks: model={option}"
    if T2T_STEM in unexpected:
        return "\nThe file is a T2T-ViT: model=t2t_7 to t2t_24, or t2t_t_14 to t2t_t_24"
    if T2T_STEM in missing:
        return "\nThe file has no soft splits of T2T-ViT: model=vit_base, deit_base and the like"
    if any(part in key for key in missing for part in _T2T_PARTS):
        return "\nThe file is a T2T-ViT with plain blocks: model=t2t_7 to t2t_24, or t2t_t_14 to t2t_t_24"
    if any(key.startswith("tokens_to_token.") for key in missing):
        other = "transformer" if "tokens_to_token.attention1.attn.qkv.weight" in unexpected else "performer"
        return f"\nThe file has another module between its soft splits: model.token_module={other}"
    if LVVIT_STEM in unexpected:
        return "\nThe file is an LV-ViT: model=lvvit_tiny, lvvit_small, lvvit_medium or lvvit_large"
    if LVVIT_STEM in missing:
        return "\nThe file has no LV-ViT stem: model=vit_base and the like"
    for keys, option, stem in ((unexpected, "deit3_small_18x2", "hmlp"), (missing, "deit3_small", "linear")):
        if any(key.endswith("attn1.proj.weight") for key in keys):
            return f"\nOnly one of the two has blocks with two attentions: model={option} and the like"
        if HMLP_STEM in keys:
            return f"\nOnly one of the two has the hMLP stem: model.stem={stem}"
    if "dist_token" in unexpected:
        return "\nThe file is a distilled DeiT: model=deit_base_distilled and the like, or model.distilled=true"
    if "dist_token" in missing:
        return "\nThe file has no distillation token: model.distilled=false"
    if "cls_token" in missing:
        return "\nThe file has no class token: model.class_token=false model.pool=mean"
    if "cls_token" in unexpected:
        return "\nThe file has a class token: model.class_token=true"
    if "norm.weight" in missing and "fc_norm.weight" in unexpected:
        return "\nThe file normalises after pooling: model.pool=mean model.norm=after_pool"
    if missing + unexpected == ["pos_embed"]:
        return f"\nmodel.position_embedding={'sincos_big_vision' if missing else 'learned'} would fit"
    if missing + unexpected and all(re.search(r"\.ls[12](_1)?\.gamma$", key) for key in missing + unexpected):
        return f"\nOnly one of the two has LayerScale: model.layer_scale={'1.0e-4' if unexpected else 'null'}"
    if all(key.endswith("qkv.bias") for key in unexpected + missing):
        return f"\nOnly one of the two has q, k, v biases: model.qkv_bias={str(bool(unexpected)).lower()}"
    return ""


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
