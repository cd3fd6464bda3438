"""Patches that do not talk: the baseline that shows what the exchange is worth."""

from __future__ import annotations

from ..comm import Comm
from ..config import ParallelConfig
from ..exchange import Absent, Exchange
from .base import State


class Naive:
    """Each patch is denoised as a picture of its own; only the output is gathered. Fast, with seams."""

    name = "naive"

    def __init__(self, config: ParallelConfig, comm: Comm) -> None:
        self._absent = Absent(comm.rank)

    def start(self) -> State:
        """See Strategy."""
        return State()

    def policy(self, state: State) -> Exchange:
        """See Strategy."""
        return self._absent
