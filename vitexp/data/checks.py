"""What a data source checks before it reads: paths that exist, splits that agree."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vitexp.data.images import listed, printable
from vitexp.errors import UserError, nearest


def existing_path(path: str | os.PathLike[str], *, key: str) -> Path:
    """The path, `~` expanded. Raises UserError with how much of it exists and the entry most like the rest."""
    given = Path(path).expanduser()
    if given.exists():
        return given
    here, lost = given.absolute(), ""
    while not here.exists():
        here, lost = here.parent, here.name
    try:
        around = sorted(os.listdir(here)) if here.is_dir() else []
    except OSError:
        around = []
    hint = nearest(lost, around) or (f" It holds: {listed(around)}." if around else "")
    where = f"no {printable(lost)!r} in {printable(str(here))}"
    raise UserError(f"{key}={printable(str(path))} does not exist: {where}.{printable(hint)}")


def existing_folder(path: str | os.PathLike[str], *, key: str) -> Path:
    """As existing_path, and a folder."""
    given = existing_path(path, key=key)
    if not given.is_dir():
        raise UserError(f"{key}={printable(str(path))} is a file, not a folder")
    return given


def same_classes(train: Sequence[str], val: Sequence[str], *, train_name: str, val_name: str) -> None:
    """Raises UserError naming the classes that only one of the splits has. One rule: both hold the same classes."""
    extra, lacking = sorted(set(val) - set(train)), sorted(set(train) - set(val))
    found = [f"only in {val_name}: {listed(extra)}"] if extra else []
    found += [f"only in {train_name}: {listed(lacking)}"] if lacking else []
    if found:
        raise UserError("the splits hold different classes\n" + "\n".join(found))
