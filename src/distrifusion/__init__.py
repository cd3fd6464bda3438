"""One picture on several devices, the same picture, sooner. The public face; torch is loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import ParallelConfig
from .errors import ConfigError, DistrifusionError, PeerLost, RanksDisagree, UnsupportedModel

if TYPE_CHECKING:
    from .comm import run_ranks
    from .engine import Engine
    from .loading import load
    from .pipeline import parallelize, report, reset, restore

__all__ = [
    "ConfigError",
    "DistrifusionError",
    "Engine",
    "ParallelConfig",
    "PeerLost",
    "RanksDisagree",
    "UnsupportedModel",
    "load",
    "parallelize",
    "report",
    "reset",
    "restore",
    "run_ranks",
]
__version__ = "0.1.0"

_LAZY = {
    "Engine": "engine",
    "load": "loading",
    "parallelize": "pipeline",
    "report": "pipeline",
    "reset": "pipeline",
    "restore": "pipeline",
    "run_ranks": "comm",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
