"""Where the shipped configuration lies: inside the package in a wheel, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

from vitexp.errors import UserError


def conf_dir() -> Path:
    """The folder of the shipped YAML groups. Raises UserError when the installation has none."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "model").is_dir():
            return folder
    raise UserError(f"no configuration beside {package}: vitexp is not installed whole, install it again")


def config_groups(config_dir: str | None = None) -> dict[str, list[str]]:
    """Every config group and the names it can be set to, from the shipped conf/ and a person's own folder."""
    groups: dict[str, set[str]] = {}
    for root in [conf_dir(), *([Path(config_dir)] if config_dir else [])]:
        for path in sorted(root.rglob("*.yaml")):
            group = path.parent.relative_to(root).as_posix()
            if group != ".":
                groups.setdefault(group, set()).add(path.stem)
    return {group: sorted(names) for group, names in sorted(groups.items())}
