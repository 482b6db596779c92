"""Where the shipped configuration lies: conf/ in a checkout, vitexp/conf in an installed wheel."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """The shipped conf/ folder, absolute."""
    here = Path(__file__).resolve().parent
    for place in (here / "conf", here.parent / "conf"):
        if (place / "config.yaml").is_file():
            return place
    raise FileNotFoundError("vitexp's conf/ is missing: reinstall vitexp")


def config_groups(config_dir: str | None = None) -> dict[str, list[str]]:
    """Every config group and the names it can be set to, from the shipped conf/ and a person's own folder."""
    groups: dict[str, set[str]] = {}
    for root in [conf_dir(), *([Path(config_dir)] if config_dir else [])]:
        for path in sorted(root.rglob("*.yaml")):
            group = path.parent.relative_to(root).as_posix()
            if group != ".":
                groups.setdefault(group, set()).add(path.stem)
    return {group: sorted(names) for group, names in sorted(groups.items())}
