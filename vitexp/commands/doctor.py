"""`python -m vitexp doctor data=… [output=<folder>]`: what is wrong with a data set, before a run is spoilt by it.

Every picture is decoded once, by train.workers processes (one a core). A table is printed; `output`, else
outputs/doctor/<data>-<fingerprint>, gets doctor.html (one file, no network) with the pictures concerned and
findings.csv with all of them by name. Exit code 0: nothing serious; 1: what would stop a run or make its numbers wrong
(pictures that cannot be read, the same picture in train and val, a class that cannot be learned); 2: bad input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vitexp.errors import UserError


def main(arguments: list[str], config_dir: str | None) -> int:
    given = [text.partition("=")[2] for text in arguments if text.startswith("output=")]
    if given and not given[-1]:
        raise UserError("output=: needs a folder")
    overrides = [text for text in arguments if not text.startswith("output=")]

    from tqdm import tqdm

    from vitexp.config import compose_and_check
    from vitexp.data.doctor import NEAR_PHASH, SPOILS, check_all, look_at
    from vitexp.data.memory import cores
    from vitexp.doctor_page import Report, as_text, write_files
    from vitexp.run import open_source
    from vitexp.signals import StopRequest

    config = compose_and_check(overrides, config_dir)
    source = open_source(config)
    output = Path(given[-1]).expanduser() if given else Path("outputs/doctor", f"{source.name}-{source.fingerprint()}")
    workers = cores() if config.train.workers is None else config.train.workers
    total = sum(len(images) for images in source.splits().values())
    how: dict[str, Any] = {"delay": 2, "leave": False, "mininterval": 0.2 if sys.stderr.isatty() else 20}
    with StopRequest():  # a signal ends it as an error does
        with tqdm(total=total, desc="looking", unit=" pictures", **how) as bar:
            seen = {
                split: look_at(images, workers=workers, tell=bar.update) for split, images in source.splits().items()
            }
        bands = NEAR_PHASH + 1
        with tqdm(total=total * bands, desc="comparing", bar_format="{desc}: {percentage:3.0f}% {bar}", **how) as bar:
            report = Report(source, seen, check_all(source, seen, tell=bar.update))
    print(as_text(report))
    print(f"\nwritten to {write_files(report, output)}, every picture by name in findings.csv beside it")
    return int(any(check.verdict == SPOILS for check in report.checks))
