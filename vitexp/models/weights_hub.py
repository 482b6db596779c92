"""Weights by a name: timm:<name> for timm's pretrained ones, hf:<owner/name> for a repository of the Hugging Face hub.

What was fetched once is taken from the hub's cache, with or without a network."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vitexp.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

TIMM, HF = "timm:", "hf:"
FILES = ("model.safetensors", "pytorch_model.bin")  # what a repository may call them, the first one there is taken

Fetched = TypeVar("Fetched")


def is_hub_name(name: object) -> bool:
    """Whether it names weights of a hub, not a file. UserError for hf: without owner and name."""
    if not isinstance(name, str) or not name.startswith((TIMM, HF)):
        return False
    if name.startswith(HF) and not re.fullmatch(r"hf:[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name}: a repository of the Hugging Face hub is hf:<owner>/<name>")
    return True


def timm_state(name: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of timm:<name> as timm's own model has them, and the name with the tag that timm took.

    Raises UserError where timm knows no such model or has no weights for it, and where they cannot be had."""
    import timm

    asked = name.removeprefix(TIMM)
    if not timm.is_model(asked):
        raise UserError(f"{name}: timm has no such model.{nearest(asked, timm.list_models())}")
    tags = timm.list_pretrained(f"{asked.partition('.')[0]}.*")
    if not tags:
        raise UserError(f"{name}: timm has no weights for it")
    if "." in asked and asked not in tags:
        raise UserError(f"{name}: timm has no such weights of it.{nearest(asked, tags)}\nThere are: {', '.join(tags)}")
    described = timm.get_pretrained_cfg(asked)
    full = asked if "." in asked or described is None else f"{asked}.{described.tag}"
    return ask_hub(name, lambda: timm.create_model(asked, pretrained=True).state_dict()), full


def hub_file(name: str) -> Path:
    """The weights file of hf:<owner/name> in the hub's cache, fetched if need be. Raises UserError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    repository, answers = name.removeprefix(HF), True
    failure: UserError | None = None
    for file in FILES:
        get = partial(hf_hub_download, repository, file, local_files_only=not answers)
        try:
            return Path(ask_hub(name, get))
        except UserError as error:
            failure = error
            if isinstance(error.__cause__, LocalEntryNotFoundError):
                answers = False  # the other file may be in the cache, and asking again would take as long again
            elif not isinstance(error.__cause__, RemoteEntryNotFoundError):
                raise
    assert failure is not None
    raise failure


def ask_hub(name: str, get: Callable[[], Fetched]) -> Fetched:
    """What `get` fetches. Whatever a hub's client raises becomes one UserError that starts with `name`."""
    print(f"{name}: looking in the hub's cache, and on the hub", file=sys.stderr, flush=True)
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # without a network it would tell of each of a dozen attempts
    try:
        return get()
    except Exception as error:  # the clients of hub and timm raise what differs from version to version
        raise UserError(f"{name}: the weights cannot be had: {_why(error)}") from error
    finally:
        log.setLevel(level)


def _why(error: Exception) -> str:
    kinds: set[str] = set()
    behind: BaseException | None = error
    while behind is not None:  # timm's builder says in its own words what the client raised
        kinds |= {kind.__name__ for kind in type(behind).__mro__}
        behind = behind.__cause__ or behind.__context__
    hand = "\nwithout a network give a file that holds them: init_from=<file>"
    if "GatedRepoError" in kinds:
        return "the repository asks for a permission that this machine has not; accept its terms and set HF_TOKEN"
    if "RepositoryNotFoundError" in kinds:
        return "the hub has no such repository, or none for you; a private one needs HF_TOKEN"
    if "RemoteEntryNotFoundError" in kinds:
        return f"the repository has neither {' nor '.join(FILES)}"
    if kinds & {"LocalEntryNotFoundError", "ConnectionError", "OfflineModeIsEnabled", "URLError", "ConnectError"}:
        return f"the hub does not answer, and they are not in its cache{hand}"
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
