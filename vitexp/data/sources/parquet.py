"""Pictures in Parquet tables as Hugging Face lays them out: bytes, a path, a label, class names in the schema."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitexp.data.checks import existing_path, same_classes
from vitexp.data.images import Source, check_channels, decode, listed, printable, split_source
from vitexp.data.memory import available_memory
from vitexp.errors import BadImage, UserError, nearest

MOST_CLASSES = 100_000  # without names for them, unless there are more pictures: each number below the largest is one


class TableImages:
    """Encoded pictures held in memory, each a slice of an Arrow buffer, so that loader workers share them."""

    def __init__(
        self,
        encoded: pa.ChunkedArray,
        *,
        order: np.ndarray,
        names: list[str],
        labels: np.ndarray,
        where: _Rows,
        channels: int,
    ) -> None:
        self.names, self.labels, self.channels = names, labels, channels
        lengths = pc.call_function("binary_length", [encoded])
        self.sizes = pc.fill_null(lengths, 0).to_numpy().astype(np.int64)[order]
        self._chunks, self._order, self._where = encoded.chunks, order, where
        self._starts = np.cumsum([0] + [len(chunk) for chunk in self._chunks])

    def __len__(self) -> int:
        return len(self._order)

    def read(self, i: int) -> np.ndarray:
        stored = self.stored(i)
        name = f"{self._where.name(int(self._order[i]))} ({self.names[i]})"
        if stored is None:
            raise BadImage(name, "the table holds no bytes for it")
        return decode(stored, name, self.channels)

    def stored(self, i: int) -> bytes | None:
        row = int(self._order[i])
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        buffer = self._chunks[chunk][row - int(self._starts[chunk])].as_buffer()
        return None if buffer is None else buffer.to_pybytes()


@dataclass(frozen=True)
class _Rows:
    """Which file a row of the joined table came from."""

    files: list[Path]
    starts: np.ndarray

    def name(self, row: int) -> str:
        k = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"{printable(str(self.files[k]))}: row {row - int(self.starts[k])}"


def parquet(
    train: str | Sequence[str],
    val: str | Sequence[str] | None = None,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    channels: int = 3,
) -> Source:
    """The rows of one or more tables: a file, a list, a pattern such as `data/train-*.parquet`, or a folder of them.

    The image column is struct{bytes, path} or binary. Labels are whole numbers with the class names of the schema's
    `huggingface` entry, or strings; label_column=None takes `label` where there is one, else pictures have no label.
    Rows are in the order of `path` where all have one and no two the same, so the same pictures in class folders give
    the same run. Without `val`, `val_fraction` of train is held out. Raises UserError naming file and column."""
    check_channels(channels)
    notices: list[str] = []
    columns = {"image_column": image_column, "label_column": label_column}
    classes, images = _read_split(train, None, key="data.train", **columns, channels=channels, notices=notices)
    if val is None:
        source = Source("parquet", images, None, classes, str(train), tuple(notices))
        return split_source(source, val_fraction=val_fraction, split_seed=split_seed)
    _, val_images = _read_split(val, classes, key="data.val", **columns, channels=channels, notices=notices)
    return Source("parquet", images, val_images, classes, str(train), tuple(notices))


def _read_split(
    paths: str | Sequence[str],
    classes: list[str] | None,
    *,
    key: str,
    image_column: str,
    label_column: str | None,
    channels: int,
    notices: list[str],
) -> tuple[list[str], TableImages]:
    """(class names, pictures). `classes` is None for the training split, whose names rule."""
    files = _files(paths, key=key)
    schema = _read_schema(files, key=key)
    wanted = "label" if label_column is None else label_column
    _require_column(schema, image_column, file=files[0], key="data.image_column")
    if label_column is not None:
        _require_column(schema, label_column, file=files[0], key="data.label_column")
    labelled = wanted in schema.names
    if not labelled:
        notices.append(
            f"{printable(str(files[0]))}: no column 'label' (there are: {listed(schema.names)}), so pictures have no "
            "label; data.label_column names another"
        )
    table, where = _read_rows(files, [image_column] + [wanted] * labelled, key=key)
    encoded, stored_paths = _image_parts(table[image_column], file=files[0], name=image_column)
    if labelled:
        named = _class_names(schema, wanted)
        classes, labels = _labels(table[wanted], named, classes, name=wanted, where=where)
    else:
        if classes:
            raise UserError(f"{key}: {printable(str(files[0]))} has no column {wanted!r}, but data.train has labels")
        classes, labels = [], np.full(len(table), -1, np.int64)
    known = [path for path in stored_paths if path is not None]
    if len(set(known)) == len(table):
        order = np.array(sorted(range(len(table)), key=known.__getitem__), np.int64)
        names = [printable(known[i]) for i in order]
    else:
        order, names = np.arange(len(table)), [f"{i:08d}" for i in range(len(table))]
    return classes, TableImages(encoded, order=order, names=names, labels=labels[order], where=where, channels=channels)


def _files(paths: str | Sequence[str], *, key: str) -> list[Path]:
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        if glob.has_magic(str(path)) and not Path(path).exists():
            matches = [Path(match) for match in sorted(glob.glob(str(Path(path).expanduser()), recursive=True))]
            if not matches:
                raise UserError(f"{key}={path}: no file matches")
            files += matches
            continue
        given = existing_path(path, key=key)
        inside = sorted(given.glob("*.parquet")) if given.is_dir() else [given]
        if not inside:
            raise UserError(f"{key}={printable(str(path))}: the folder holds no .parquet file")
        files += inside
    if not files:
        raise UserError(f"{key} is empty; it needs a Parquet file, a folder of them or a pattern")
    return files


def _read_schema(files: list[Path], *, key: str) -> pa.Schema:
    """The common schema. Checks, before anything is read, that the tables agree and that memory holds them."""
    schema, total = None, 0
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                here, rows = opened.schema_arrow, opened.metadata
                total += sum(rows.row_group(i).total_byte_size for i in range(rows.num_row_groups))
        except (pa.ArrowException, OSError) as error:
            said = printable(" ".join(str(error).split()))[:200]
            raise UserError(f"{key}={printable(str(file))}: not a Parquet file that can be read ({said})") from error
        schema = schema or here
        if not here.equals(schema):
            raise UserError(f"{key}: {printable(str(file))} has other columns or types than {printable(str(files[0]))}")
    if total > 0.6 * (free := available_memory()):
        raise UserError(
            f"{key}: {total / 1e9:.1f} GB of pictures do not fit in memory ({free / 1e9:.1f} GB are free); "
            "write them out as class folders and use data=folder, which reads them as needed"
        )
    return schema


def _require_column(schema: pa.Schema, column: str, *, file: Path, key: str) -> None:
    if column not in schema.names:
        raise UserError(
            f"{printable(str(file))} has no column {column!r}; it has: {listed(schema.names, limit=12)}. "
            f"{key} names it.{nearest(column, schema.names)}"
        )


def _read_rows(files: list[Path], columns: list[str], *, key: str) -> tuple[pa.Table, _Rows]:
    tables = []
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                tables.append(opened.read(columns=columns))
        except (pa.ArrowException, OSError) as error:
            said = printable(" ".join(str(error).split()))[:200]
            raise UserError(f"{key}={printable(str(file))}: damaged ({said})") from error
    table = pa.concat_tables(tables)
    if len(table) == 0:
        raise UserError(f"{key}={printable(str(files[0]))} holds no rows")
    return table, _Rows(files, np.cumsum([0] + [len(part) for part in tables])[:-1])


def _image_parts(column: pa.ChunkedArray, *, file: Path, name: str) -> tuple[pa.ChunkedArray, list[str | None]]:
    """(encoded bytes, stored paths: empty where there are none)"""
    kind, where = column.type, f"{printable(str(file))}: column {name!r}"
    if pa.types.is_struct(kind):
        fields = [field.name for field in kind]
        if "bytes" not in fields or not _is_bytes(kind.field("bytes").type):
            raise UserError(f"{where} has the fields {listed(fields)}; a picture is struct{{bytes, path}} or binary")
        parts = dict(zip(fields, column.flatten(), strict=True))
        paths = parts["path"].to_pylist() if "path" in fields else []
        return parts["bytes"], paths
    if not _is_bytes(kind):
        raise UserError(f"{where} is {kind}; a picture is struct{{bytes, path}} or binary")
    return column, []


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Those of the ClassLabel feature in the schema's `huggingface` entry, None where it has none."""
    try:
        entry = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = entry["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if names else None


def _labels(
    column: pa.ChunkedArray, named: list[str] | None, train_classes: list[str] | None, *, name: str, where: _Rows
) -> tuple[list[str], np.ndarray]:
    """(class names, class number of each row). `train_classes` is None for the training split, whose names rule."""
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise UserError(f"{where.name(row)}: column {name!r} is empty ({column.null_count:,} rows in all)")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        values = np.array(column.to_pylist())
        named = sorted(set(values.tolist()))
        numbers = np.searchsorted(named, values).astype(np.int64)
    elif pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        numbers = column.cast(pa.int64()).to_numpy()
        if not (named or train_classes) and int(numbers.max()) > max(MOST_CLASSES, len(numbers)):
            row = int(numbers.argmax())
            raise UserError(
                f"{where.name(row)}: {name}={numbers[row]}, but there are only {len(numbers):,} pictures; classes are "
                "numbered from 0 on"
            )
        named = named or train_classes or [str(k) for k in range(max(int(numbers.max()) + 1, 1))]
    else:
        raise UserError(f"{where.name(0)}: column {name!r} is {column.type}; a label is a whole number or a string")
    if len(set(named)) < len(named):
        twice = next(word for word in named if named.count(word) > 1)
        raise UserError(f"{printable(str(where.files[0]))}: two classes of {name!r} are called {twice!r}")
    outside = np.flatnonzero((numbers < -1) | (numbers >= len(named)))
    if outside.size:
        row = int(outside[0])
        raise UserError(
            f"{where.name(row)}: {name}={numbers[row]}, but the {len(named)} classes are numbered 0 to {len(named) - 1}"
        )
    if train_classes is None:
        return named, numbers
    same_classes(train_classes, named, train_name="data.train", val_name="data.val")
    place = np.array([train_classes.index(word) for word in named] + [-1], np.int64)  # -1, no label, stays
    return train_classes, place[numbers]
