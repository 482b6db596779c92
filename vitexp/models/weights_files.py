"""Tensors out of files, run folders and hubs, by timm's names; nothing in a file is ever run."""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vitexp.errors import UserError
from vitexp.models.checks import height_width
from vitexp.models.pos_embed import Grid, square_side
from vitexp.models.weights_hub import HF, TIMM, hub_file, is_hub_name, timm_state
from vitexp.models.weights_jax import jax_to_timm
from vitexp.models.weights_transformers import has_transformers_names, transformers_to_timm

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".tar")  # .pth.tar, as ImageNet codes name them, is no archive
SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".npz")
HMLP_STEM = "patch_embed.proj.7.weight"
LVVIT_STEM = "patch_embed.conv3.weight"
T2T_STEM = "tokens_to_token.project.weight"

# Where training codes put the weights, those first that the code's own figures were measured with: LV-ViT and T2T-ViT
# (state_dict_ema beside state_dict) evaluate the averaged ones, DeiT (model_ema beside model) never does.
_WRAPPERS = ("state_dict_ema", "model", "state_dict", "model_ema", "net")  # net: T2T-ViT's transfers
_PREFIXES = ("module.", "_orig_mod.", "backbone.")
_LAYER_SCALE = re.compile(r"(blocks\.\d+)\.gamma_([12](_1)?)$")  # DeiT III's names, and timm's: blocks.i.ls1.gamma
# What torch and pickle raise when they read bytes that are none of theirs.
_DAMAGED = (
    RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error,
)  # fmt: skip
# What weights may name besides tensors; anything else that a pickle names is named when it is refused.
_OF_TENSORS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.(\w*Storage|Size|device|b?float\d+|u?int\d+|bool)"
    r"|collections\.OrderedDict|argparse\.Namespace"
)


@dataclass(frozen=True)
class Weights:
    """What a place holds."""

    place: str  # the file's path; of a hub's the name, too
    state: dict[str, Tensor]  # by timm's names
    family: str  # see LoadReport
    grid: Grid | None  # rows and columns of patches, where the configuration of its run tells
    notes: tuple[str, ...] = ()


def read_weights(path: str | Path) -> Weights:
    """The tensors of a file, a run folder, timm:<name> or hf:<owner/name>. Raises UserError with its name."""
    if not is_hub_name(path):
        file, grid = _resolve(Path(path).expanduser())
        return _read(file, str(file), grid)
    name = str(path)
    if name.startswith(HF):
        file = hub_file(name)
        return _read(file, f"{name} ({file.name})", None)
    state, full = timm_state(name)
    return Weights(f"{TIMM}{full}", state, _family(state), None)


def is_mae_decoder(key: str) -> bool:
    return key.startswith(("decoder", "mask_token"))


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].partition(". ")[0].strip()[:120] if lines else type(error).__name__


# ---- kinds of files ----------------------------------------------------------------------------------------------
def _read(file: Path, place: str, grid: Grid | None) -> Weights:
    if not file.exists():
        raise UserError(f"{file}: no such file")
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: weights are read from {' '.join(SUFFIXES)} or a run folder, not from {file.suffix!r}")
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty")
    if file.suffix == ".npz":
        try:
            return Weights(place, jax_to_timm(_read_npz(file), file), "jax", grid)
        except (RuntimeError, IndexError, TypeError) as error:  # arrays of other kinds or ranks than the layout's
            raise UserError(f"{file}: not the official ViT's layout ({first_line(error)})") from None
    loaded, notes = (_read_safetensors(file), []) if file.suffix == ".safetensors" else _unwrap(_read_torch(file))
    if not loaded or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()):
        raise UserError(f"{file}: holds no state dict, bare or under {', '.join(_WRAPPERS)}")
    state = _strip_prefixes(loaded)
    converted = has_transformers_names(state)
    if converted:
        state = transformers_to_timm(state)
        notes.append("names of transformers changed to timm's")
    state = {_LAYER_SCALE.sub(r"\1.ls\2.gamma", key): tensor for key, tensor in state.items()}
    family = _family(state)
    return Weights(place, state, "transformers" if converted and family == "timm" else family, grid, tuple(notes))


def _resolve(path: Path) -> tuple[Path, Grid | None]:
    """The weights file of a path, and the patch grid that its run's configuration tells, if it lies in a run folder."""
    file = path / "model.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise UserError(f"{path}: the folder holds no model.safetensors; is it a finished run?")
    config = file.parent / "config.yaml"
    if file.suffix != ".safetensors" or not config.is_file():
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
        raise UserError(f"{file}: damaged or no safetensors file ({first_line(error)})") from None


def _read_torch(file: Path) -> Any:
    try:
        # Files of the MAE and DeiT codes hold their command line beside the weights; a Namespace only keeps values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on other pickle protocols: such a file is refused just below
            # weights_only is said aloud: an environment variable can turn torch's default off.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:  # torch's own words advise to load the file unsafely
        raise UserError(f"{file}: {_why_refused(file, str(error))}") from None
    except _DAMAGED as error:
        raise UserError(f"{file}: damaged, or no PyTorch file of tensors ({first_line(error)})") from None


def _why_refused(file: Path, said: str) -> str:
    """Words for a file that torch does not read safely, `said` being torch's."""
    try:
        named, protocol = _look_into(_pickles_of(file))
    except (*_DAMAGED, zipfile.BadZipFile):
        named, protocol = [], 0
    refused = re.findall(r"GLOBAL (\S+)", said)[:1] or [name for name in named if not _OF_TENSORS.fullmatch(name)]
    if refused:
        code = ", ".join(dict.fromkeys(refused))
        alone = "if you trust it, save its tensors alone where it was made: torch.save(model.state_dict(), …)"
        return f"refused, it holds more than tensors and would run {code}\n{alone}"
    if protocol > 2:
        return (
            f"written with pickle protocol {protocol}, which is not read safely; torch.save unasked writes protocol 2"
        )
    return "damaged, or no PyTorch file of tensors"


def _pickles_of(file: Path) -> bytes:
    if not zipfile.is_zipfile(file):
        return file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        return archive.read(next((name for name in archive.namelist() if name.endswith("/data.pkl")), "data.pkl"))


def _look_into(pickled: bytes) -> tuple[list[str], int]:
    """What the pickles would import, module and name, and their protocol; nothing is run. ValueError: no pickle."""
    stream, protocol = BytesIO(pickled), 0
    named: list[str] = []
    for _ in range(4):  # the old format: a number, a version, a system, then the weights
        if named or stream.tell() == len(pickled):
            break
        texts = [""]
        remembered: dict[Any, str] = {}
        for code, argument, _at in pickletools.genops(stream):
            given: Any = argument
            if code.name == "PROTO":
                protocol = max(protocol, given)
            elif code.name in ("GLOBAL", "INST"):
                named.append(given.replace(" ", "."))
            elif code.name == "STACK_GLOBAL":
                named.append(".".join(texts[-2:]))
            elif code.name == "MEMOIZE":
                remembered[len(remembered)] = texts[-1]
            elif code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                remembered[given] = texts[-1]
            elif code.name in ("GET", "BINGET", "LONG_BINGET"):
                texts.append(remembered.get(given, ""))
            elif isinstance(given, str):
                texts.append(given)
    return named, protocol


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile):
        # numpy's own words here advise to load the file unsafely.
        raise UserError(f"{file}: damaged, or no .npz file of plain arrays") from None


def _unwrap(loaded: Any) -> tuple[Mapping[str, Any], list[str]]:
    """The state dict of a training checkpoint, and where it lay."""
    if not isinstance(loaded, Mapping):
        return {}, []
    there = [key for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)]
    if not there:
        return loaded, []
    beside = f" (not {' or '.join(map(repr, there[1:]))})" if there[1:] else ""
    return loaded[there[0]], [f"weights under {there[0]!r}{beside}"]


def _strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DDP, torch.compile or a surrounding method put before every one of them."""
    names = {key: key for key in state}
    stripping = True
    while stripping:
        stripping = False
        for prefix in _PREFIXES:
            # A method's own layers (a decoder) lie beside its backbone; the caller judges what remains.
            relevant = [name for name in names.values() if not is_mae_decoder(name)]
            if relevant and all(name.startswith(prefix) for name in relevant):
                names = {key: name.removeprefix(prefix) for key, name in names.items()}
                stripping = True
    return {names[key]: tensor for key, tensor in state.items()}


# ---- families ---------------------------------------------------------------------------------------------------
def _is_mae_pretraining(state: Mapping[str, Tensor]) -> bool:
    """MAE files are told by their decoder, or by the class token's row of the fixed sin-cos table: all zeros."""
    table = state.get("pos_embed")
    zero_row = table is not None and table.ndim == 3 and "cls_token" in state and not table[:, 0].any()
    return any(map(is_mae_decoder, state)) or (bool(zero_row) and "head.weight" not in state)


def _family(state: Mapping[str, Tensor]) -> str:
    if _is_mae_pretraining(state):
        return "mae"
    for key, family in ((LVVIT_STEM, "lvvit"), (T2T_STEM, "t2t"), ("dist_token", "deit")):
        if key in state:
            return family
    table = state.get("pos_embed")
    scaled = "blocks.0.ls1.gamma" in state and "cls_token" in state
    return "deit3" if scaled and table is not None and table.ndim == 3 and square_side(table.shape[1]) else "timm"
