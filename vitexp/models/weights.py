"""Weights from files of any origin into a model, with a report of what was taken, resized and left.

Reads safetensors, PyTorch files, the official JAX ViT's .npz and run folders. Everything is checked before the first
tensor of the model changes, and nothing in a file is ever run.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.models.checks import height_width, one_of
from vitexp.models.pos_embed import POSITION_MODES, Grid, infer_grid, resize_pos_embed, square_side

HEAD_CHOICES = ("auto", "keep", "fresh")
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".tar")  # .pth.tar, as ImageNet codes name them, is no archive
SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".npz")

# Where training codes put the weights, best first: who saved averaged weights evaluated those.
_WRAPPERS = ("state_dict_ema", "model_ema", "model", "state_dict")
_PREFIXES = ("module.", "_orig_mod.", "backbone.")
_LVVIT_STEM = "patch_embed.conv3.weight"
_T2T_STEM = "tokens_to_token.project.weight"
# The official codes of LV-ViT, DeiT and T2T-ViT resize as MAE's does. timm's keys are those of a plain DeiT, too: there
# the model says how (`position_mode`).
_POSITION_MODE_OF = {"jax": "jax", "mae": "mae", "lvvit": "mae", "deit": "mae", "deit3": "mae", "t2t": "mae"}
_LAYER_SCALE = re.compile(r"(blocks\.\d+)\.gamma_([12])")  # DeiT III's names, and timm's: blocks.i.ls1.gamma


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
    # distillation token), deit3 (LayerScale, and no position of the class token), timm (timm's keys, all others)
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

    `head`: auto keeps the file's classifier when it fits, else the model's starts at zero (ViT appendix B.1.1); keep
    insists; fresh always starts at zero. The hidden fc-tanh layer of a pretraining head is dropped when the model has
    none, and the classifier then starts fresh, since it read other features; the same where the file normalises every
    token and the model the pooled vector (`fc_norm`), as in MAE's fine-tuning. A masked autoencoder takes the decoder
    along where the file has one, else its own stays fresh and the report says so; other models leave it in the file.
    LV-ViT's classifier of tokens stays in the file where the model has none; a model with two keeps both or neither.
    `position_mode` is jax, mae or timm; by default that of the file's family: npz jax; MAE pretraining, LV-ViT, DeiT
    with distillation token, DeiT III and T2T-ViT mae; for timm's keys the model's, which is mae of a DeiT, else timm.
    `grid` is the file's (rows, columns) of patches, needed only where its number of patches does not tell.
    Raises UserError when the file cannot be read or anything else is missing, left over or of another shape."""
    one_of("head", head, HEAD_CHOICES)
    if position_mode is not None:
        one_of("position_mode", position_mode, tuple(POSITION_MODES))
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise UserError("the model lies on the meta device and has no memory to load weights into; build it on the CPU")

    # ---- read ----------------------------------------------------------------------------------------------------
    file, run_grid = _resolve(Path(path).expanduser())
    state, family, wrapper = read_state_dict(file)
    notes = [f"weights under {wrapper!r}"] if wrapper else []
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
    how = {"grid": grid or run_grid, "mode": mode, "file": file}
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
        path=str(file),
        family=family,
        loaded=len(state),
        head="none" if not classifier else "kept" if kept else "fresh",
        missing=tuple(fresh),
        unexpected=tuple(dropped),
        resized=resized,
        notes=tuple(notes),
    )


# ---- files -------------------------------------------------------------------------------------------------------
def read_state_dict(file: Path) -> tuple[dict[str, Tensor], str, str | None]:
    """(tensors by timm's names, family, the file's entry they lay under or None). UserError names the file."""
    if not file.exists():
        raise UserError(f"{file}: no such file")
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: weights are read from {' '.join(SUFFIXES)} or a run folder, not from {file.suffix!r}")
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty")
    if file.suffix == ".npz":
        try:
            return jax_to_timm(_read_npz(file), file), "jax", None
        except (RuntimeError, IndexError, TypeError) as error:  # arrays of other kinds or ranks than the layout's
            raise UserError(f"{file}: not the official ViT's layout ({_first_line(error)})") from None
    loaded, wrapper = (_read_safetensors(file), None) if file.suffix == ".safetensors" else _unwrap(_read_torch(file))
    if not loaded or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()):
        raise UserError(f"{file}: holds no state dict, bare or under {', '.join(_WRAPPERS)}")
    state = {_LAYER_SCALE.sub(r"\1.ls\2.gamma", key): tensor for key, tensor in _strip_prefixes(loaded).items()}
    return state, _family(state), wrapper


def _resolve(path: Path) -> tuple[Path, Grid | None]:
    """The weights file of a path, and the patch grid that its run's configuration tells, if it lies in a run folder."""
    file = path / "model.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise UserError(f"{path}: the folder holds no model.safetensors; is it a finished run?")
    config = file.parent / "config.yaml"
    if file.name != "model.safetensors" or not config.is_file():
        return file, None
    try:
        made = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
        height, width = height_width("image_size", made["image_size"])
        down, across = height_width("patch_size", made["patch_size"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return file, None  # a configuration without sizes (a timm model's): the table itself tells
    return file, (height // down, width // across)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or no safetensors file ({_first_line(error)})") from None


def _read_torch(file: Path) -> Any:
    try:
        # Files of the MAE and DeiT codes hold their command line beside the weights; a Namespace only keeps values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on other pickle protocols: such a file is refused just below
            # weights_only is said aloud: an environment variable can turn torch's default off.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(f"{file}: refused, it holds more than tensors and would run {code[1]}") from None
        # torch's own words here advise to load the file unsafely.
        raise UserError(f"{file}: damaged, or no PyTorch file of tensors") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: damaged, or no PyTorch file of tensors ({_first_line(error)})") from None


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile):
        # numpy's own words here advise to load the file unsafely.
        raise UserError(f"{file}: damaged, or no .npz file of plain arrays") from None


def _unwrap(loaded: Any) -> tuple[Mapping[str, Any], str | None]:
    if not isinstance(loaded, Mapping):
        return {}, None
    for key in _WRAPPERS:
        if isinstance(loaded.get(key), Mapping):
            return loaded[key], key
    return loaded, None


def _strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DDP, torch.compile or a surrounding method put before every one of them."""
    names = {key: key for key in state}
    stripping = True
    while stripping:
        stripping = False
        for prefix in _PREFIXES:
            # A method's own layers (a decoder) lie beside its backbone; the caller judges what remains.
            relevant = [name for name in names.values() if not _is_mae_decoder(name)]
            if relevant and all(name.startswith(prefix) for name in relevant):
                names = {key: name.removeprefix(prefix) for key, name in names.items()}
                stripping = True
    return {names[key]: tensor for key, tensor in state.items()}


# ---- the official JAX layout -------------------------------------------------------------------------------------
# Sub-modules of a block: the published files number them _1 _2 _3, what flax writes today _0 _1 _0.
_JAX_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(\w+?)/(.+)")
_JAX_BLOCK_PARTS = {
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "LayerNorm_2": "norm2",
    "MultiHeadDotProductAttention_0": "attn",
    "MultiHeadDotProductAttention_1": "attn",
    "MlpBlock_0": "mlp",
    "MlpBlock_3": "mlp",
}
_JAX_TOP = {
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
_JAX_LEAVES = {"scale": "weight", "bias": "bias", "Dense_0/kernel": "fc1.weight", "Dense_0/bias": "fc1.bias"}
_JAX_LEAVES |= {"Dense_1/kernel": "fc2.weight", "Dense_1/bias": "fc2.bias"}


def jax_to_timm(arrays: Mapping[str, np.ndarray], file: Path) -> dict[str, Tensor]:
    """timm's names and layouts from the '/'-joined ones of google-research's vision_transformer and big_vision.

    Unknown names stay as they are, for the caller to refuse. Raises UserError for hybrids with a ResNet stem."""
    tensors = {key: _tensor(array) for key, array in _jax_parameters(arrays).items()}
    if any(key.startswith(("conv_root", "gn_root", "block1/")) for key in tensors):
        raise UserError(f"{file}: a hybrid with a ResNet stem (conv_root); only plain ViT files are read")
    if not any(key.startswith(("embedding/", "Transformer/")) for key in tensors):
        raise UserError(f"{file}: not the official ViT's layout; its first names are {_some(list(tensors))}")
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        block = _JAX_BLOCK.fullmatch(key)
        if key == "embedding/kernel":
            state[_JAX_TOP[key]] = tensor.permute(3, 2, 0, 1)
        elif key in _JAX_TOP:
            state[_JAX_TOP[key]] = tensor.T if key.endswith("kernel") else tensor
        elif block and block[2] in _JAX_BLOCK_PARTS:
            _add_jax_block(state, f"blocks.{block[1]}.{_JAX_BLOCK_PARTS[block[2]]}.", block[3], tensor, key, tensors)
        else:
            state[key] = tensor
    if "pos_embedding" in tensors and "cls" in tensors:
        # big_vision adds positions before the class token joins: its row of ours is zero.
        state["pos_embed"] = torch.cat([torch.zeros_like(state["pos_embed"][:, :1]), state["pos_embed"]], dim=1)
    return state


def _add_jax_block(
    state: dict[str, Tensor], name: str, leaf: str, tensor: Tensor, key: str, tensors: Mapping[str, Tensor]
) -> None:
    if not name.endswith("attn."):
        state[name + _JAX_LEAVES[leaf] if leaf in _JAX_LEAVES else key] = tensor.T if tensor.ndim == 2 else tensor
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


def _jax_parameters(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
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


# ---- what may differ between file and model ----------------------------------------------------------------------
def _is_mae_decoder(key: str) -> bool:
    return key.startswith(("decoder", "mask_token"))


def _is_mae_pretraining(state: Mapping[str, Tensor]) -> bool:
    """MAE files are told by their decoder, or by the class token's row of the fixed sin-cos table: all zeros."""
    table = state.get("pos_embed")
    zero_row = table is not None and table.ndim == 3 and "cls_token" in state and not table[:, 0].any()
    return any(map(_is_mae_decoder, state)) or (bool(zero_row) and "head.weight" not in state)


def _family(state: Mapping[str, Tensor]) -> str:
    if _is_mae_pretraining(state):
        return "mae"
    for key, family in ((_LVVIT_STEM, "lvvit"), (_T2T_STEM, "t2t"), ("dist_token", "deit")):
        if key in state:
            return family
    table = state.get("pos_embed")
    scaled = "blocks.0.ls1.gamma" in state and "cls_token" in state
    return "deit3" if scaled and table is not None and table.ndim == 3 and square_side(table.shape[1]) else "timm"


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(getattr(model, "head_prefixes", ("head.",)))


def _settle_decoder(
    state: dict[str, Tensor], own: Mapping[str, Tensor], dropped: list[str], notes: list[str]
) -> tuple[str, ...]:
    """Drops a decoder that the model has no use for; how the names begin that a file leaves fresh in an autoencoder."""
    of_file = [key for key in state if _is_mae_decoder(key)]
    if not any(map(_is_mae_decoder, own)):
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
    """Drops a hidden head layer that the model cannot take; True when the classifier then reads other features."""
    of_file = {key: state[key].shape for key in state if key.startswith("pre_logits.")}
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
    file: Path,
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
    file: Path,
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
    if all(map(_is_mae_decoder, missing + unexpected + misshaped)):
        return "\nOnly the decoder differs: load_weights(model.encoder, ...) loads the encoder alone"
    if _T2T_STEM in unexpected:
        return "\nThe file is a T2T-ViT: model=t2t_7 to t2t_24, or t2t_t_14 to t2t_t_24"
    if _T2T_STEM in missing:
        return "\nThe file has no soft splits of T2T-ViT: model=vit_base, deit_base and the like"
    if any(key.startswith("tokens_to_token.") for key in missing):
        other = "transformer" if "tokens_to_token.attention1.attn.qkv.weight" in unexpected else "performer"
        return f"\nThe file has another module between its soft splits: model.token_module={other}"
    if _LVVIT_STEM in unexpected:
        return "\nThe file is an LV-ViT: model=lvvit_tiny, lvvit_small, lvvit_medium or lvvit_large"
    if _LVVIT_STEM in missing:
        return "\nThe file has no LV-ViT stem: model=vit_base and the like"
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
    if missing + unexpected and all(re.search(r"\.ls[12]\.gamma$", key) for key in missing + unexpected):
        return f"\nOnly one of the two has LayerScale: model.layer_scale={'1.0e-4' if unexpected else 'null'}"
    if all(key.endswith("qkv.bias") for key in unexpected + missing):
        return f"\nOnly one of the two has q, k, v biases: model.qkv_bias={str(bool(unexpected)).lower()}"
    return ""


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].partition(". ")[0].strip()[:120] if lines else type(error).__name__
