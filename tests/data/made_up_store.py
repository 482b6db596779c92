"""A store of label maps with made-up values, for tests that train."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vitexp.data.images import Images
from vitexp.data.label_store import LabelWriter, identities


def made_up_store(
    folder: Path, images: Images, classes: list[str], *, kept: int = 3, grid: tuple[int, int] = (4, 4), seed: int = 0
) -> Path:
    """The folder of a store with a map of each picture: its own class in most cells, others beside it."""
    rng = np.random.default_rng(seed)
    kept = min(kept, len(classes))
    ranks = rng.random((len(images), len(classes), *grid)).argsort(axis=1)
    numbers = ranks[:, :kept].astype(np.int32)
    values = np.sort(4 * rng.standard_normal(numbers.shape), axis=1)[:, ::-1].astype(np.float16)
    head = {
        "teacher": {"name": f"made up {seed}", "weights": f"{seed:064x}"},
        "preprocessing": {},
        "image_size": [16, 16],
        "crop": "whole",
        "k": kept,
        "classes": classes,
        "grid": list(grid),
        "missing": 0,
    }
    with LabelWriter(folder, head) as writer:
        writer.append(identities(images), np.ascontiguousarray(values), numbers)
        writer.finish()
    return folder
