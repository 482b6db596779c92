"""vitexp: Vision Transformer experiments, composed with Hydra, trained through Accelerate, compared in MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["build_model", "load_run", "load_weights"]

if TYPE_CHECKING:
    from vitexp.models.build import build_model
    from vitexp.models.weights import load_weights
    from vitexp.trained import load_run

_LAZY = {
    "build_model": "vitexp.models.build",
    "load_weights": "vitexp.models.weights",
    "load_run": "vitexp.trained",
}


def __getattr__(name: str) -> Any:
    """Import torch and timm only when something is asked for: `python -m vitexp --help` stays quick."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vitexp' has no attribute {name!r}")
