"""Strategies: which layers, which split, which policy."""

from __future__ import annotations

from ..comm import Comm
from ..config import ParallelConfig
from .base import State, Strategy
from .guidance import Guidance
from .independent import Naive, Shifted
from .patch import Displaced, Sync
from .pipelined import Pipelined
from .tensor import Tensor

__all__ = ["Guidance", "State", "Strategy", "strategy_for"]

_STRATEGIES = {cls.name: cls for cls in (Sync, Displaced, Naive, Shifted, Pipelined, Tensor)}


def strategy_for(config: ParallelConfig, comm: Comm) -> Strategy:
    """The strategy that ``config`` names, for the ranks of one guidance branch."""
    return _STRATEGIES[config.strategy](config, comm)
