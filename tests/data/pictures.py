"""Small pictures on disk, as class folders and as Parquet tables."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ["bird", "cat", "dog"]


def picture(number: int, height: int = 12, width: int = 10) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def library(per_class: int = 4, first: int = 0) -> dict[str, bytes]:
    """`<class>/<number>.jpg` of every class, in no useful order."""
    numbers = range(first, first + per_class)
    return {f"{name}/{n}.jpg": picture(100 * k + n) for n in reversed(numbers) for k, name in enumerate(CLASSES)}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_parquet(
    path: Path, files: dict[str, bytes], *, classes: list[str] | None = None, labels: list[int] | None = None
) -> Path:
    classes = classes or CLASSES
    labels = [classes.index(name.split("/")[0]) for name in files] if labels is None else labels
    table = pa.table(
        {
            "image": [{"bytes": data, "path": name} for name, data in files.items()],
            "label": pa.array(labels, pa.int64()),
        }
    )
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    schema = table.schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table.cast(schema), path, row_group_size=5)
    return path
