"""`python -m vitexp sync run=<run folder> [uri=…]`: delivers to MLflow what it missed while it was away."""

from __future__ import annotations

from pathlib import Path

from vitexp.errors import UserError
from vitexp.tracking import deliver, ui_line


def sync(run_dir: Path | str, uri: str | None = None) -> str:
    """Says what MLflow has now of the run. UserError when the folder is no run's or the store does not answer."""
    done = deliver(Path(run_dir), uri=uri)
    state = "still going, its status is left alone" if done.status == "RUNNING" else f"status {done.status}"
    return (
        f"MLflow run {done.run_id} is up to date: {done.rows} metric rows, {done.artifacts} files sent now, {state}\n"
        f"{ui_line(done.uri)}"
    )


def main(arguments: list[str], config_dir: str | None) -> int:
    given = {name: value for name, _, value in (text.partition("=") for text in arguments)}
    unknown = sorted(set(given) - {"run", "uri"})
    if unknown or not given.get("run"):
        raise UserError("usage: python -m vitexp sync run=<run folder> [uri=<tracking store>]")
    print(sync(given["run"], given.get("uri") or None))
    return 0
