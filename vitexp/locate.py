"""What `run=` names, the same in every command: a run folder, weights it exported, or a run in MLflow; and its settings
where they serve, too. `init_from=` names weights of other codes and of hubs besides."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitexp.config import RAW_NAME, RunConfig, reload
from vitexp.errors import UserError, nearest


@dataclass(frozen=True)
class Located:
    """A folder with exported weights, or that of a run without any yet."""

    folder: Path
    weights: str | None  # the file's name; None where the folder has no such file


def locate(run: str, *, uri: str | None = None, weights: str | None = None, needed: Iterable[str] = ()) -> Located:
    """Finds `run`, and `weights` in it where they are named; a run in MLflow is fetched into outputs/from_mlflow.

    `uri` is the tracking store of mlflow:<run id>; `needed` names files that such a run must have. Raises UserError."""
    from vitexp import tracking
    from vitexp.reports import OUTPUTS

    if not run:
        raise UserError("run= has no value; give a run folder or mlflow:<run id>")
    run_id, place = tracking.run_id_of(run), Path(run).expanduser()
    if run_id is not None:
        store = uri or store_of_training()
        return Located(*tracking.fetch(run_id, root=OUTPUTS, uri=store, weights=weights, needed=needed))
    if uri is not None:
        raise UserError(f"uri={uri}: says where run=mlflow:<run id> is; run={run} is a path")
    if place.is_dir():
        there = [file.name for file in sorted(place.glob("*.safetensors"))]
        if weights is not None and weights not in there:
            raise UserError(f"weights={weights}: {place} has {', '.join(there) or 'none'}.{nearest(weights, there)}")
        return Located(place, weights or ("model.safetensors" if "model.safetensors" in there else None))
    if place.is_file() and place.suffix == ".safetensors":
        if weights not in (None, place.name):
            raise UserError(f"weights={weights}: run={run} names the weights already")
        return Located(place.parent, place.name)
    if place.exists():
        raise UserError(f"run={run}: is no run folder and no exported weights (.safetensors)")
    beside = place.parent.iterdir() if place.parent.is_dir() else ()
    siblings = [path.name for path in beside if path.is_dir() or path.suffix == ".safetensors"]
    raise UserError(f"run={run}: there is no such run.{nearest(place.name, siblings)}")


def weights_to_start_from(name: str, *, uri: str | None) -> str:
    """What load_weights takes: `name` itself, or the weights of mlflow:<run id>, fetched from the tracking store `uri`.

    Raises UserError."""
    from vitexp import tracking

    if tracking.run_id_of(name) is None:
        return name
    try:
        found = locate(name, uri=uri)
    except UserError as error:  # it speaks of run= and uri=, as they are called elsewhere
        said = str(error).replace("run=", "init_from=", 1).replace("give uri=", "give tracking.uri=")
        raise UserError(said) from None
    return str(found.folder / (found.weights or "model.safetensors"))


def own_settings(found: Located, overrides: list[str], config_dir: str | None) -> RunConfig | None:
    """The settings of the run itself, some of them changed. None where they do not lie beside its weights, or where
    `data=` names other pictures, which have other keys: all is to be composed anew then. Raises UserError."""
    if names_data(overrides) or not (found.folder / RAW_NAME).exists():
        return None
    return reload(found.folder, overrides, config_dir)


def names_data(overrides: Iterable[str]) -> bool:
    """Whether other pictures than a run's own are named."""
    return any(text.startswith("data=") for text in overrides)


def words_given(arguments: Sequence[str], keys: Sequence[str], *, command: str) -> dict[str, str]:
    """key=value of a command that takes these keys and no settings. Raises UserError for another."""
    given = {}
    for text in arguments:
        key, equals, value = text.partition("=")
        key = {"tracking.uri": "uri"}.get(key, key)
        if not equals or key not in keys:
            raise UserError(f"{command}: no such key {key!r}.{nearest(key, keys)} It takes {', '.join(keys)}")
        if not value:
            raise UserError(f"{command}: {key}= has no value")
        given[key] = value
    return given


def truth(key: str, text: str | None, *, why: str = "") -> bool | None:
    """A command's word that is true or false, None where it was not given. Raises UserError, which `why` ends."""
    if text is None:
        return None
    if text.lower() not in ("true", "false"):
        raise UserError(f"{key}={text}: expected true or false" + (f"; {why}" if why else ""))
    return text.lower() == "true"


def take_uri(overrides: list[str]) -> tuple[str | None, list[str]]:
    """The tracking store that `uri=` or `tracking.uri=` names, the last one given, and the overrides without them."""
    keys = ("uri=", "tracking.uri=")
    given = [text.partition("=")[2] for text in overrides if text.startswith(keys)]
    return (given[-1] if given else None), [text for text in overrides if not text.startswith(keys)]


def store_of_training() -> str | None:
    """Where training tracks when nothing is said: conf/tracking/mlflow.yaml."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None
