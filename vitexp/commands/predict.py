"""`python -m vitexp predict run=<run> input=<folder, file or glob> output=<csv, parquet or jsonl>`: a row a picture.

Columns: file, class, probability, then class and probability of the `topk` best, and error. A picture that cannot be
read has its reason in `error` and nothing else, and makes the exit code 1. Rows are in the order of their paths. The
output appears whole or not at all.

`run` is a run folder, a folder or file of exported weights, or mlflow:<run id> (runs:/<run id>) with `uri=` as
tracking.uri; `weights` names the file taken, of a run in MLflow the best ones there unless given. `workers` threads
read pictures beside the computing. At no time are more than a few batches of pictures in memory.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitexp import serving
from vitexp.errors import BadImage, UserError
from vitexp.locate import locate, words_given
from vitexp.serving import Row

if TYPE_CHECKING:
    from torch import Tensor

    from vitexp.trained import TrainedRun

KEYS = ("run", "input", "output", "batch_size", "topk", "workers", "weights", "device", "uri")
USAGE = "python -m vitexp predict run=<run folder> input=<folder, file or glob> output=<file.csv|.parquet|.jsonl>"
BATCHES_AHEAD = 2  # being read while one is computed
ROWS_A_GROUP = 8192  # of a Parquet file, kept in memory until they are written


@dataclass(frozen=True)
class Counts:
    """What `predict` came to."""

    pictures: int
    unreadable: int
    first_error: str = ""


def main(arguments: list[str], config_dir: str | None) -> int:
    """Exit code 0, or 1 when a picture could not be read."""
    given = words_given(arguments, KEYS, command="predict")
    for key in ("run", "input", "output"):
        if not given.get(key):
            raise UserError(f"predict: {key}= is missing\nusage: {USAGE}")
    batch_size, topk = _count(given, "batch_size", 64), _count(given, "topk", 5)
    workers = _count(given, "workers", 0)
    output = Path(given["output"]).expanduser()
    writer_of(output)  # a wrong suffix is said before anything is loaded
    files, left_out = find_pictures(os.path.expanduser(given["input"]), besides=output)

    from vitexp.signals import StopRequest

    with StopRequest():  # a signal ends it as an error does: the half-written output is removed
        chosen = {key: given.get(key) or None for key in ("weights", "device", "uri")}
        run = open_run(given["run"], **chosen)
        done = predict(run, files, output, batch_size=batch_size, topk=topk, workers=workers or None)
    if left_out:
        print(f"{left_out:,} files of the folder are no pictures by their names and left out")
    print(f"{done.pictures:,} pictures in {output}")
    if done.unreadable:
        print(
            f"vitexp: {done.unreadable:,} of them could not be read, see column error; {done.first_error}",
            file=sys.stderr,
        )
    return 1 if done.unreadable else 0


def predict(
    run: TrainedRun,
    files: Sequence[str],
    output: Path,
    *,
    batch_size: int = 64,
    topk: int = 5,
    workers: int | None = None,
) -> Counts:
    """Writes a row for each file, in their order. `workers`: threads that read pictures; None: one a core."""
    from tqdm import tqdm

    from vitexp.data.images import printable
    from vitexp.data.memory import cores
    from vitexp.run_folder import atomic_file, make_folder

    if not run.classes:
        raise UserError(f"{run.folder} has no classes to predict: its stage was {run.stage}")
    topk = min(topk, len(run.classes))
    columns = ["file", *serving.columns(topk)]
    unreadable, first_error = 0, ""
    make_folder(output.parent)
    with (
        atomic_file(output) as beside,
        writer_of(output)(beside, columns) as write,
        tqdm(
            total=len(files), desc="predicting", unit=" pictures", delay=2, miniters=1,
            mininterval=0.2 if sys.stderr.isatty() else 2,
        ) as bar,
    ):  # fmt: skip
        for names, pictures in _read_ahead(run, files, batch_size, workers or cores()):
            good = [picture for picture in pictures if not isinstance(picture, BadImage)]
            found = iter(run.predict(good, batch_size=batch_size, topk=topk) if good else [])
            rows = []
            for name, picture in zip(names, pictures, strict=True):
                bad = isinstance(picture, BadImage)
                if bad:
                    unreadable += 1
                    first_error = first_error or f"{printable(name)}: {picture.reason}"
                row: Row = dict.fromkeys(columns)
                row |= {"error": picture.reason} if bad else serving.row(next(found))
                rows.append(row | {"file": printable(name)})
            write(rows)
            bar.update(len(rows))
    return Counts(pictures=len(files), unreadable=unreadable, first_error=first_error)


def open_run(name: str, *, weights: str | None = None, device: str | None = None, uri: str | None = None) -> TrainedRun:
    """The exported model that run= names, on the GPU where there is one. Raises UserError."""
    from vitexp.trained import load_run

    found = locate(name, uri=uri, weights=weights)
    return load_run(found.folder, weights=found.weights or "model.safetensors", device=device or "auto")


def find_pictures(given: str, *, besides: Path | None = None) -> tuple[list[str], int]:
    """Paths of the pictures in a folder (nested ones too, links followed), of a file, or of what a glob matches, sorted
    by path; and how many files of folders were left out, having no picture's suffix or a hidden name.

    A file that is named or matched is taken whatever its suffix, `besides` never. Raises UserError for none."""
    if os.path.lexists(given):
        matched = [given]
    else:
        matched = glob.glob(given, recursive=True)
        if not matched:
            raise UserError(f"input={given}: there is no such file or folder, and as a pattern it matches none")
    spared = None if besides is None else os.path.realpath(besides)
    found: set[str] = set()
    left_out = 0
    for path in matched:
        if os.path.isdir(path):
            pictures, others = _walk(path)
            found.update(pictures)
            left_out += others
        elif os.path.realpath(path) != spared:
            found.add(path)
    if not found:
        also = f", and {left_out:,} files that are none by their names" if left_out else ""
        raise UserError(f"input={given}: no pictures there{also}")
    return sorted(found), left_out


def _walk(folder: str) -> tuple[list[str], int]:
    from vitexp.data.sources.folder import SUFFIXES

    def cannot_list(error: OSError) -> None:
        raise UserError(f"{error.filename}: the folder cannot be listed: {error.strerror}")

    found, left_out = [], 0
    for place, folders, files in os.walk(folder, onerror=cannot_list, followlinks=True):
        here = os.path.join(os.path.realpath(place), "")
        real = {name: os.path.join(os.path.realpath(os.path.join(place, name)), "") for name in folders}
        # A link to a folder that it lies in leads to the same pictures again, and again.
        folders[:] = [n for n in folders if n[0] != "." and n != "__MACOSX" and not here.startswith(real[n])]
        for name in files:
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                found.append(os.path.join(place, name))
            else:
                left_out += 1
    return found, left_out


def _read_ahead(
    run: TrainedRun, files: Sequence[str], batch_size: int, workers: int
) -> Iterator[tuple[Sequence[str], list[Tensor | BadImage]]]:
    """Batches of names with their pictures as uint8 at the model's size, or the reason why there is none."""

    def read(name: str) -> Tensor | BadImage:
        try:
            if os.path.exists(name) and not os.path.isfile(name):  # a pipe would be waited for
                raise BadImage(name, "is no file")
            return run.prepare(name, name)
        except BadImage as error:
            return error

    pool = ThreadPoolExecutor(max_workers=workers)  # the decoders let threads run beside each other
    try:
        ahead: deque = deque()
        for begin in range(0, len(files), batch_size):
            names = files[begin : begin + batch_size]
            ahead.append((names, [pool.submit(read, name) for name in names]))
            if len(ahead) > BATCHES_AHEAD:
                names, reading = ahead.popleft()
                yield names, [picture.result() for picture in reading]
        for names, reading in ahead:
            yield names, [picture.result() for picture in reading]
    finally:
        pool.shutdown(cancel_futures=True)


# ---- output: each opens a path and gives a function that takes rows

Writer = Callable[[Path, list[str]], contextlib.AbstractContextManager[Callable[[list[Row]], Any]]]


def writer_of(path: Path) -> Writer:
    """The writer for the path's suffix. Raises UserError for one that is not known."""
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        raise UserError(f"output={path}: its suffix says the format; known are {', '.join(WRITERS)}")
    if path.is_dir():
        raise UserError(f"output={path}: is a folder")
    return writer


@contextlib.contextmanager
def _csv(path: Path, columns: list[str]) -> Iterator[Callable[[list[Row]], Any]]:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        yield writer.writerows


@contextlib.contextmanager
def _jsonl(path: Path, columns: list[str]) -> Iterator[Callable[[list[Row]], Any]]:
    with path.open("w", encoding="utf-8") as file:
        yield lambda rows: file.writelines(
            json.dumps({name: row[name] for name in columns}, ensure_ascii=False) + "\n" for row in rows
        )


@contextlib.contextmanager
def _parquet(path: Path, columns: list[str]) -> Iterator[Callable[[list[Row]], Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([(name, pa.float64() if name.endswith("probability") else pa.string()) for name in columns])
    kept: list[Row] = []
    with parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(kept, schema=schema))
            kept.clear()

        def write(rows: list[Row]) -> None:
            kept.extend(rows)
            if len(kept) >= ROWS_A_GROUP:
                flush()

        yield write
        if kept:
            flush()


WRITERS: dict[str, Writer] = {".csv": _csv, ".parquet": _parquet, ".jsonl": _jsonl}


# ---- the command line


def _count(given: dict[str, str], key: str, otherwise: int) -> int:
    value = given.get(key)
    if value is None:
        return otherwise
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"predict: {key}={value}: expected a whole number of at least 1")
    return int(value)
