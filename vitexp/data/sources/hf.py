"""Data sets of the Hugging Face Hub, or folders in one of its layouts, through the optional package `datasets`."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vitexp.data.checks import same_classes
from vitexp.data.images import Source, check_channels, decode, listed, printable, split_source
from vitexp.errors import BadImage, UserError, nearest

VAL = ("validation", "valid", "val", "dev", "test")  # the first that exists is taken


class HubImages:
    """Encoded pictures in the package's memory-mapped tables; a row may name a file instead."""

    def __init__(self, rows: Any, column: str, *, split: str, labels: np.ndarray, channels: int) -> None:
        self._rows, self._column, self._split = rows, column, split
        self.labels, self.channels = labels, channels
        sizes, paths = [], []
        for batch in rows.iter(batch_size=1000):
            parts = dict(zip(("bytes", "path"), batch[column].flatten(), strict=True))
            lengths = pc.fill_null(pc.call_function("binary_length", [parts["bytes"]]), -1).to_pylist()
            for length, path in zip(lengths, parts["path"].to_pylist(), strict=True):
                sizes.append(length if length >= 0 else _size_of(path))
                paths.append(path)
        self.sizes = np.array(sizes, np.int64)
        # Paths that are the same on every machine and tell the pictures apart; else the row is the name.
        telling = all(path and not os.path.isabs(path) and "://" not in path for path in paths)
        if telling and len(set(paths)) == len(paths):
            self.names = [printable(path) for path in paths]
        else:
            self.names = [f"{i:08d}" for i in range(len(paths))]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> np.ndarray:
        stored = self.stored(i)
        name = f"{self._split}: row {i} ({self.names[i]})"
        if stored is None:
            raise BadImage(name, "the table holds no bytes for it")
        return decode(stored, name, self.channels)

    def stored(self, i: int) -> bytes | str | None:
        cell = self._rows[i][self._column][0].as_py() or {"bytes": None, "path": None}
        return (cell["path"] or None) if cell["bytes"] is None else cell["bytes"]


def _size_of(path: str | None) -> int:
    try:
        return os.stat(path).st_size if path else 0
    except OSError:
        return 0  # the check of the pictures names it


def hf(
    name: str,
    *,
    config: str | None = None,
    train_split: str = "train",
    val_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    channels: int = 3,
) -> Source:
    """The pictures of a data set on the Hub (`owner/name`) or of a folder that `datasets` can load.

    Splits may be slices such as `train[:10%]`. val_split=None takes validation, valid, val, dev or test, the first
    there is, else holds out `val_fraction` of train. image_column=None takes the only Image column. label_column=None
    takes the only ClassLabel column, or one called `label`; where there is neither, pictures have no label. Raises
    UserError in a line or two."""
    check_channels(channels)
    try:
        datasets: Any = importlib.import_module("datasets")  # optional, so by name
    except ImportError as error:
        raise UserError("data=hf needs the package 'datasets': pip install 'vitexp[hf]'") from error

    shown = printable(name) + (f" data.config={printable(config)}" if config else "")
    builder = _asked(shown, lambda: datasets.load_dataset_builder(name, config))
    _asked(shown, builder.download_and_prepare)
    known = list(builder.info.splits or [])
    if val_split is None:
        val_split = next((word for word in VAL if word in known and word != train_split), None)
    columns = {"image_column": image_column, "label_column": label_column}

    def read(split: str, key: str) -> tuple[list[str], HubImages]:
        if (plain := split.partition("[")[0]) not in known and "+" not in split:
            raise UserError(
                f"data.{key}={printable(split)}: {printable(name)} has no such split; it has: {listed(known)}."
                f"{nearest(plain, known)}"
            )
        table = _asked(f"{shown} data.{key}={printable(split)}", lambda: builder.as_dataset(split=split))
        return _read_split(datasets, table, f"{printable(name)} {split}", **columns, channels=channels)

    classes, train = read(train_split, "train_split")
    if val_split is None:
        source = Source("hf", train, None, classes, name)
        return split_source(source, val_fraction=val_fraction, split_seed=split_seed)
    val_classes, val = read(val_split, "val_split")
    same_classes(classes, val_classes, train_name=train_split, val_name=val_split)
    place = np.array([classes.index(word) for word in val_classes] + [-1], np.int64)  # -1, no label, stays
    val.labels = place[val.labels]
    return Source("hf", train, val, classes, name)


def _asked(shown: str, question: Callable[[], Any]) -> Any:
    """What the package answers; whatever it raises, in one line and with what helps."""
    # Without a network the hub's client tries again for half a minute and says so six times; here the end is said once.
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)
    try:
        return question()
    except MemoryError:
        raise
    except Exception as error:  # its own, requests', the file system's, pyarrow's: there is no common class
        said = printable(" ".join(str(error).split()))[:220] or type(error).__name__
        offline = isinstance(error, ConnectionError) or os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
        help_ = "\nwithout a network only data sets that are in its cache (HF_HOME) can be loaded" if offline else ""
        raise UserError(f"data.name={shown}: cannot be loaded ({said}){help_}") from error
    finally:
        client.setLevel(level)


def _read_split(
    datasets: Any, table: Any, where: str, *, image_column: str | None, label_column: str | None, channels: int
) -> tuple[list[str], HubImages]:
    """(class names, pictures) of one split."""
    features = dict(table.features)
    image = _column(features, image_column, datasets.Image, where, key="data.image_column")
    if image is None:
        raise UserError(f"{where}: no column of pictures; it has: {listed(features, limit=12)}")
    if len(table) == 0:
        raise UserError(f"{where}: holds no rows")
    if label_column is None and "label" in features and not _of_kind(features, datasets.ClassLabel):
        label_column = "label"
    label = _column(features, label_column, datasets.ClassLabel, where, key="data.label_column")
    classes: list[str] = []
    labels = np.full(len(table), -1, np.int64)
    if label is not None:
        column = table.select_columns([label]).with_format("arrow")[:][label]
        named = list(features[label].names) if isinstance(features[label], datasets.ClassLabel) else None
        classes, labels = _labels(column, named, f"{where}: column {label!r}")
    rows = table.select_columns([image]).cast_column(image, datasets.Image(decode=False)).with_format("arrow")
    return classes, HubImages(rows, image, split=where, labels=labels, channels=channels)


def _of_kind(features: dict[str, Any], kind: type) -> list[str]:
    return [name for name, feature in features.items() if isinstance(feature, kind)]


def _column(features: dict[str, Any], wanted: str | None, kind: type, where: str, *, key: str) -> str | None:
    """The column asked for, or the only one of its kind."""
    found = _of_kind(features, kind)
    if wanted is None:
        if len(found) > 1:
            raise UserError(
                f"{where}: several columns are {kind.__name__}: {listed(found)}; {key} names the one to use"
            )
        return found[0] if found else None
    if wanted not in features:
        raise UserError(
            f"{key}={printable(wanted)}: {where} has no such column; it has: {listed(features, limit=12)}."
            f"{nearest(wanted, features)}"
        )
    if kind.__name__ == "Image" and wanted not in found:
        raise UserError(f"{key}={wanted}: {where} has it as {features[wanted]}, not as Image")
    return wanted


def _labels(column: pa.ChunkedArray, named: list[str] | None, where: str) -> tuple[list[str], np.ndarray]:
    """(class names, class number of each row). Strings are numbered in their order, whole numbers name themselves."""
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise UserError(f"{where} is empty in row {row} ({column.null_count:,} rows in all)")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        values = np.array(column.to_pylist())
        named = sorted(set(values.tolist()))
        return named, np.searchsorted(named, values).astype(np.int64)
    if not (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        raise UserError(f"{where} is {column.type}; a label is a ClassLabel, a whole number or a string")
    numbers = column.cast(pa.int64()).to_numpy()
    named = named or [str(k) for k in range(max(int(numbers.max()) + 1, 1))]
    if len(set(named)) < len(named):
        twice = next(word for word in named if named.count(word) > 1)
        raise UserError(f"{where}: two classes are called {twice!r}")
    outside = np.flatnonzero((numbers < -1) | (numbers >= len(named)))
    if outside.size:
        row = int(outside[0])
        raise UserError(f"{where} is {numbers[row]} in row {row}, but the classes are numbered 0 to {len(named) - 1}")
    return named, numbers
