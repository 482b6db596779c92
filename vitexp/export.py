"""The exported run: weights as safetensors, and beside them a JSON file with all that is needed to use them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import vitexp
from vitexp.errors import UserError
from vitexp.run_folder import atomic_file, make_folder, write_atomic

FORMAT = 1
# What evaluation does to a picture: mean and std are of pixels in 0..1, the rest are arguments of ResizeCenterCrop, of
# which others may be given as well.
PREPROCESSING_KEYS = ("image_size", "mean", "std", "crop_fraction", "interpolation", "channels")


def export_model(
    run_dir: str | Path,
    state_dict: Mapping[str, Tensor],
    *,
    architecture: Mapping[str, Any],
    classes: Sequence[str],
    preprocessing: Mapping[str, Any],
    metrics: Mapping[str, float],
    stage: str,
    filename: str = "model.safetensors",
) -> Path:
    """Writes `filename` and its description, `model.json` for `model.safetensors`; returns the path of the weights.

    `architecture` is the model's resolved config: `_target_`, a class in vitexp.models, and all of its arguments.
    Each file appears whole or not at all, and the description holds the checksum of the weights: should a run be
    killed between the two, `load_run` refuses the pair. Raises UserError when a file cannot be written."""
    assert filename.endswith(".safetensors"), filename
    assert str(architecture["_target_"]).startswith("vitexp.models."), architecture["_target_"]
    assert set(PREPROCESSING_KEYS) <= set(preprocessing), sorted(preprocessing)
    assert not any("_orig_mod." in key or key.startswith("module.") for key in state_dict), "export the unwrapped model"
    path = make_folder(Path(run_dir)) / filename
    checksum, size = _write_weights(path, state_dict)
    description = {
        "format": FORMAT,
        "vitexp": vitexp.__version__,
        "weights": {"file": filename, "bytes": size, "sha256": checksum},
        "stage": stage,
        "architecture": dict(architecture),
        "classes": list(classes),
        "preprocessing": dict(preprocessing),
        # JSON knows no nan: a metric without a value is null.
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
    }
    write_atomic(description_of(path), json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def export_part(run_dir: str | Path, name: str, state_dict: Mapping[str, Tensor]) -> Path:
    """Writes `<name>.safetensors`, which a method keeps beside its backbone. Raises UserError."""
    path = make_folder(Path(run_dir)) / f"{name}.safetensors"
    _write_weights(path, state_dict)
    return path


def load_part(run_dir: str | Path, name: str) -> dict[str, Tensor]:
    """What export_part wrote. Raises UserError."""
    path = Path(run_dir) / f"{name}.safetensors"
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read, and without it this run cannot be evaluated: {error}") from None


def description_of(weights: Path) -> Path:
    """`model_best.json` for `model_best.safetensors`."""
    return weights.with_suffix(".json")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_weights(path: Path, state_dict: Mapping[str, Tensor]) -> tuple[str, int]:
    """The file's checksum and bytes, once it is there whole. Raises UserError."""
    try:
        with atomic_file(path) as beside:
            save_file(_separate(state_dict), beside, metadata={"format": "pt"})
            return sha256_of(beside), beside.stat().st_size
    except SafetensorError as error:  # its own class for a full disk, too
        raise UserError(f"cannot write {path}: {error}") from error


def _separate(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with memory of its own: safetensors refuses shared and strided ones."""
    seen: set[int] = set()
    separate = {}
    for key, tensor in state_dict.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        separate[key] = tensor
    return separate
