"""Strategies: which layers, which split, which policy."""

from __future__ import annotations

from ..comm import Comm
from ..config import ParallelConfig
from .base import State, Strategy
from .guidance import Guidance
from .independent import Naive, Shifted
from .patch import Displaced, Sync
from .pipelined import Pipelined
from .streamed import Streamed
from .tensor import Tensor

__all__ = ["Guidance", "State", "Strategy", "strategy_for"]

_STRATEGIES = {cls.name: cls for cls in (Sync, Displaced, Naive, Shifted, Pipelined, Tensor)}


def strategy_for(config: ParallelConfig, comm: Comm, everyone: Comm) -> Strategy:
    """The strategy that ``config`` names, for the ranks ``comm`` of one guidance branch, of all of them."""
    if config.patches is not None and comm.world > 1:
        return Streamed(config, comm, everyone)
    return _STRATEGIES[config.strategy](config, comm)
