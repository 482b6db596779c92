"""`python -m vitexp compare RUN RUN … [output=<folder>]`: finished runs side by side, on the same pictures.

What their settings differ in, metrics with 95 % bootstrap intervals, intervals of the differences, McNemar's test of
each pair of classifiers, mean ± std of runs that differ in seed alone, and a warning where data, preprocessing or seeds
differ. RUN is a run folder, weights it exported, or mlflow:<run id> with `uri=`; `weights` names the file taken of all.

Pictures are those of the first run's validation split that the others held out, too; `data=…` (with data.<key>=… and
train.classes=…) chooses others. Tables are printed; `output` gets compare.html (one file, no network) and CSV. Nothing
is written into the runs' folders."""

from __future__ import annotations

import sys
from pathlib import Path

from vitexp.errors import UserError, nearest

KEYS = ("output", "weights", "uri", "device", "batch_size")
USAGE = "python -m vitexp compare <run> <run> … [output=<folder>] [data=…]"


def main(arguments: list[str], config_dir: str | None) -> int:
    runs, given, overrides = parse(arguments)
    batch_size = given.get("batch_size", "64")
    if not batch_size.isdecimal() or int(batch_size) < 1:
        raise UserError(f"compare: batch_size={batch_size}: expected a whole number of at least 1")
    output = Path(given["output"]).expanduser() if "output" in given else None

    from tqdm import tqdm

    from vitexp.compare_page import as_text, write_files
    from vitexp.comparison import compare, open_entries, refuse_inside
    from vitexp.signals import StopRequest

    entries = open_entries(runs, uri=given.get("uri"), weights=given.get("weights"))
    if output is not None:
        refuse_inside(output, entries)
    with (
        StopRequest(),  # a signal ends it as an error does
        tqdm(
            desc="comparing", unit=" pictures", delay=2, miniters=1,
            mininterval=0.2 if sys.stderr.isatty() else 2,
        ) as bar,
    ):  # fmt: skip

        def tell(name: str, done: int, of: int) -> None:
            bar.total = of
            bar.set_description(name, refresh=False)
            bar.update(done - bar.n)

        found = compare(
            entries,
            overrides,
            config_dir=config_dir,
            device=given.get("device"),
            batch_size=int(batch_size),
            tell=tell,
        )
    print(as_text(found))
    if output is not None:
        print(f"\nwritten to {write_files(found, output)}, with CSV files beside it")
    return 0


def parse(arguments: list[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """(runs, keys of this command, overrides that choose pictures). Raises UserError."""
    runs, given, overrides = [], {}, []
    for text in arguments:
        key, equals, value = text.partition("=")
        key = {"tracking.uri": "uri"}.get(key, key)
        if not equals or Path(text).expanduser().exists():
            runs.append(text)
        elif key in KEYS and value:
            given[key] = value
        elif key == "data" or key.startswith("data.") or key == "train.classes":
            overrides.append(text)
        else:
            known = [*KEYS, "data", "train.classes"]
            raise UserError(
                f"compare: {text}: no such key, or no value.{nearest(key, known)}\n"
                f"it takes runs, {', '.join(known)} and data.<key>"
            )
    if len(runs) < 2:
        raise UserError(f"compare: needs two runs or more, {len(runs)} given\nusage: {USAGE}")
    return runs, given, overrides
