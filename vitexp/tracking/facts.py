"""What MLflow is told of a run beside its metrics: data, settings, where the code stood."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHANGED = "changed."  # begins the tag of a param that a resume has changed: in MLflow params cannot


@dataclass(frozen=True)
class DataFingerprint:
    """Which data a run saw, shown by MLflow as its data set input. Two runs on equal data have equal digests."""

    name: str
    digest: str  # cut to 36 characters, MLflow's limit
    source: str  # a path or an address
    profile: Mapping[str, Any] = field(default_factory=dict)  # counts worth showing: pictures, classes


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """Leaves of a resolved config as MLflow params: dotted keys, text as it is, everything else (lists too) as JSON.

    Values are cut at 6000 characters and keys at 250, MLflow's limits."""
    flat: dict[str, str] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping) and node:
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            text = node if isinstance(node, str) else json.dumps(node, default=str)
            flat[entity_name(prefix)] = text[:6000]

    if config:
        walk("", config)
    return flat


def git_state(cwd: Path | str) -> dict[str, str]:
    """`git.sha`, `git.branch`, `git.dirty` (true or false) of the checkout that `cwd` is in; empty outside one."""

    def git(*arguments: str) -> str:
        # No optional locks: looking must not collide with a git command of the person at the keyboard.
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=cwd, capture_output=True, text=True, errors="replace", timeout=10, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.stdout.strip()

    state: dict[str, str] = {}
    try:
        state["git.sha"] = git("rev-parse", "HEAD")
        state["git.branch"] = git("rev-parse", "--abbrev-ref", "HEAD")
        state["git.dirty"] = "true" if git("status", "--porcelain") else "false"
    except (OSError, subprocess.SubprocessError):
        pass  # what was found out before stands: a huge tree may time out on status alone
    return state


def run_tags(run_dir: Path, *, stage: str, model: str, data: str, group: str | None = None) -> dict[str, str]:
    """Tags by which runs are found and grouped: stage, model, data, git state, run folder, host, command."""
    git = git_state(Path.cwd())
    tags = {
        "stage": stage, "model": model, "data": data, **git,
        "run_dir": str(Path(run_dir).resolve()), "host": socket.gethostname(), "command": shlex.join(sys.argv),
        "mlflow.source.name": "vitexp", "mlflow.source.type": "LOCAL",
    }  # fmt: skip
    if group is not None:
        tags["vitexp.group"] = group  # a tag and not a parent run: nested runs leave MLflow's table and charts empty
    if "git.sha" in git:
        tags["mlflow.source.git.commit"] = git["git.sha"]
    return tags


def entity_name(key: str) -> str:
    """A key MLflow takes: letters, digits and `_-./: `, no empty or dotted path parts, at most 250 characters."""
    clean = re.sub(r"[^\w\-./: ]", "_", key)
    parts = [part for part in clean.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:250].rstrip("/") or "_"
