"""Stages of the model on different ranks, at different time steps."""

from __future__ import annotations

from ..boundary import Late, Stages, Whole
from ..comm import Comm
from ..config import MEASURED, ParallelConfig
from ..exchange import Exchange
from .base import Joined, State


class Pipelined(Joined):
    """Asynchronous denoising (AsyncDiff, arXiv 2406.06911): a rank computes one stage of the model in every step, from
    what the other stages made in the step before.

    A step takes as long as the slowest stage. All stages are told the time of the step they run in. The first step and
    ``warmup_steps`` more are synchronous: every rank computes the whole model.
    """

    name = "pipelined"

    def __init__(self, config: ParallelConfig, comm: Comm) -> None:
        self._config = config
        self._comm = comm
        self._alone = comm.split([[rank] for rank in range(comm.world)])

    def start(self) -> State:
        """See Strategy."""
        stages = Stages(self._comm, is_measured=self._config.balance == MEASURED)
        return State(slots=stages.slots, stages=stages)

    def policy(self, state: State) -> Exchange:
        """See Strategy."""
        assert state.stages is not None
        if state.step <= self._config.warmup_steps:
            return Whole(self._alone, state.stages, is_last=state.step == self._config.warmup_steps)
        return Late(self._alone, state.stages)
