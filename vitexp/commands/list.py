"""`python -m vitexp list [group] [filter]`: what a group can be set to, each with a sentence of its file.

`params=true` counts the weights of models, with ImageNet's classes. `list timm <pattern>` names timm's models."""

from __future__ import annotations

import fnmatch
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from vitexp.config_paths import conf_dir, config_groups
from vitexp.errors import UserError, nearest

TIMM = "timm"
IMAGENET_CLASSES = 1000
PAGE_WIDTH = 110
# A point that ends a sentence: a capital follows, so neither `0.5` nor `He et al. 2022` is cut.
SENTENCE_END = re.compile(r"\.(?=\s+[\"'`]?[A-Z]|$)")


def main(arguments: list[str], config_dir: str | None) -> int:
    """Prints groups, or the options of one. Raises UserError for a name that is not there."""
    words = [text for text in arguments if "=" not in text]
    counted = _counted([text for text in arguments if "=" in text])
    if len(words) > 2:
        raise UserError(f"{words[2]!r}: expected list [group] [filter], such as list models vit_base")
    groups = config_groups(config_dir)
    if not words:
        _show((group, f"{len(options):>3}: {', '.join(options)}") for group, options in groups.items())
        _show([(TIMM, "timm's models by name, such as: python -m vitexp list timm '*resnet*'")])
        return 0
    pattern = words[1] if len(words) > 1 else ""
    if words[0] == TIMM:
        _list_timm(pattern, counted=counted)
        return 0
    group = group_named(words[0], groups)
    if counted and group != "model":
        raise UserError(f"params=true: only models have parameters to count, not {words[0]}")
    rows = {name: sentence(option_file(group, name, config_dir)) for name in groups[group]}
    names = _matching(pattern, rows)
    if not names:
        raise UserError(f"{pattern!r}: no such {group}.{nearest(pattern, rows)}\n{group} has: {', '.join(rows)}")
    _show((name, _with_count(rows[name], lambda name=name: parameters(name, config_dir), counted)) for name in names)
    return 0


def group_named(word: str, groups: Iterable[str]) -> str:
    """The group of a name in the singular or the plural. Raises UserError with the nearest one."""
    plural = {f"{group}s": group for group in groups} | {group: group for group in groups}
    if word not in plural:
        known = [*plural, TIMM]
        raise UserError(f"list {word}: no such group.{nearest(word, known)}\ngroups: {', '.join([*groups, TIMM])}")
    return plural[word]


def option_file(group: str, name: str, config_dir: str | None) -> Path:
    """The file behind `group=name`; Hydra takes the shipped one where a person's own has the same name."""
    roots = [conf_dir(), *([Path(config_dir)] if config_dir else [])]
    return next(path for root in roots if (path := root / group / f"{name}.yaml").exists())


def sentence(path: Path) -> str:
    """The first sentence of the comment that a YAML file starts with; an empty string where it starts without."""
    found: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.startswith("#  "):  # the settings begin, or an indented command to type
            break
        if not line.startswith("# @package"):
            found.append(line.lstrip("# "))
    text = " ".join(found)
    end = SENTENCE_END.search(text)
    return text[: end.start()] if end else text.rstrip(".:")


def parameters(name: str, config_dir: str | None) -> int:
    """Weights of a model of the group, which is built without values."""
    import torch

    from vitexp.config import build, compose_unjudged
    from vitexp.costs import count_parameters
    from vitexp.models.build import build_model, model_names

    with torch.device("meta"):
        if name in model_names():
            return count_parameters(build_model(name))
        _, tree = compose_unjudged([f"model={name}"], config_dir)
        node = tree["model"]
        return count_parameters(build({**node, "num_classes": node.get("num_classes") or IMAGENET_CLASSES}))


def _list_timm(pattern: str, *, counted: bool) -> None:
    import timm
    import torch

    from vitexp.costs import count_parameters

    names = _matching(pattern, dict.fromkeys(timm.list_models(), ""))
    if not names:
        raise UserError(f"{pattern!r}: timm has no such model.{nearest(pattern, timm.list_models())}")

    def count(name: str) -> int:
        with torch.device("meta"):
            return count_parameters(timm.create_model(name))

    _show((name, _with_count("", lambda name=name: count(name), counted)) for name in names)


def _matching(pattern: str, rows: dict[str, str]) -> list[str]:
    """Names that a pattern with * ? [ fits, or that hold the word, or whose sentence does."""
    if any(mark in pattern for mark in "*?["):
        return [name for name in rows if fnmatch.fnmatchcase(name, pattern)]
    word = pattern.lower()
    return [name for name, text in rows.items() if word in name.lower() or word in text.lower()]


def _with_count(text: str, count: Callable[[], int], wanted: bool) -> str:
    return f"{count() / 1e6:8.2f} M  {text}" if wanted else text


def _show(rows: Iterable[tuple[str, str]]) -> None:
    """A line for each as soon as it is known: counting may take a while."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PAGE_WIDTH
    for name, text in rows:
        lead = f"{name:<25} "
        print(textwrap.fill(lead + text, max(width, 60), subsequent_indent=" " * 26).rstrip(), flush=True)


def _counted(pairs: list[str]) -> bool:
    for pair in pairs:
        if pair not in ("params=true", "params=false"):
            raise UserError(f"{pair}: list takes params=true or params=false")
    return pairs[-1:] == ["params=true"]
