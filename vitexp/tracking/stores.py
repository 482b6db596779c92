"""Where MLflow keeps things: a database of this machine, or a server."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

from vitexp.errors import UserError


def default_uri(root: Path) -> str:
    """The store beside the runs: `sqlite:///<absolute root>/mlflow.db`."""
    return f"sqlite:///{Path(root).expanduser().resolve() / 'mlflow.db'}"


def resolve_uri(uri: str | None, root: Path) -> str:
    """A tracking URI that means the same from any working directory; `default_uri(root)` for None.

    UserError for a folder of files, which MLflow has stopped supporting, and for anything else that is no store."""
    if uri is None:
        return default_uri(root)
    wanted = "a database such as sqlite:///outputs/mlflow.db, or the http(s):// address of a server"
    scheme = uri.partition("://")[0] if "://" in uri else uri.partition(":")[0]
    if scheme == "sqlite":
        path, _, query = uri.removeprefix("sqlite://").removeprefix("/").partition("?")
        if not uri.startswith("sqlite:///") or path in ("", ":memory:"):
            raise UserError(f"tracking.uri={uri} names no file; wanted: {wanted}")
        absolute = Path(path).expanduser().resolve()
        return f"sqlite:///{absolute}" + (f"?{query}" if query else "")
    if scheme in ("http", "https") and urlsplit(uri).hostname:
        return uri
    database = scheme.partition("+")[0] in ("postgresql", "mysql", "mssql") and "://" in uri
    if database or scheme in ("databricks", "databricks-uc"):
        return uri
    hint = " (MLflow 3 no longer writes to a folder of files)" if scheme in ("file", uri) else ""
    raise UserError(f"tracking.uri={uri} is not a store MLflow can write to{hint}; wanted: {wanted}")


def ui_line(uri: str) -> str:
    """What a person types to see the runs; for a server, its address."""
    if urlsplit(uri).scheme in ("http", "https"):
        return without_password(uri)
    return f"mlflow ui --backend-store-uri {shlex.quote(without_password(uri))}"


def without_password(uri: str) -> str:
    """The URI with `***` for a password: what may be printed and kept in a run folder that people pass on."""
    return re.sub(r"(://[^/@:]*:)[^/@]+@", r"\1***@", uri)


def sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def folder_of(uri: str) -> Path | None:
    """Where the store's file lies; None for a server and for a database that is no file."""
    path = sqlite_path(uri)
    return None if path is None else path.parent


def one_line(error: Exception) -> str:
    """The beginning of an error that may be pages of SQL or HTML, without passwords."""
    text = without_password(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
