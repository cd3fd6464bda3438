"""Stages of the model on different ranks, at different time steps."""

from __future__ import annotations

from dataclasses import replace

from ..boundary import Late, Stages, Whole
from ..comm import Comm
from ..config import ParallelConfig
from ..exchange import Exchange
from ..forms import MEASURED
from ..mesh import Mesh
from .base import Joined, State


class Pipelined(Joined):
    """Asynchronous denoising (AsyncDiff, arXiv 2406.06911): a rank computes one stage of the model in every step, from
    what the other stages made in the step before.

    A step takes as long as the slowest stage. The first step and ``warmup_steps`` more are synchronous: every rank
    computes the whole model.

    With ``patch``, the ranks of a stage share the picture, and tell each other what their patches need at once: fresh.

    With ``stride=2``, a stage computes in every other step, for two of them. The stage that gives the prediction then
    has two ranks: one for the step at hand, and one for the next.

    A stage is told the time of the step that it computes for. With ``time_shift`` it is told the time of the step
    before that one, once steps are no longer synchronous, as AsyncDiff's published code does it (``time_shift`` in
    ``asyncdiff/async_sd.py`` of github.com/czg1225/AsyncDiff): all stages alike, though they lie several steps apart.
    The latents and the scheduler keep their own time.
    """

    name = "pipelined"

    def __init__(self, config: ParallelConfig, comm: Comm) -> None:
        self._config, self._comm = config, comm
        self._is_doubled = config.stride > 1 and comm.world > 1
        mesh = Mesh.fit(replace(config, cfg=1), comm.world)
        self.num_stages = mesh.size("pipe") - self._is_doubled
        self._patches = comm.split(mesh.groups("patch"))
        self._depth = comm.split(mesh.groups("pipe")) if mesh.size("patch") > 1 else comm

    def start(self) -> State:
        """See Strategy."""
        is_measured = self._config.balance == MEASURED
        stages = Stages(self._depth, self._comm, is_measured=is_measured, is_doubled=self._is_doubled)
        return State(slots=stages.slots, stages=stages)

    def policy(self, state: State) -> Exchange:
        """See Strategy."""
        assert state.stages is not None
        if not self.is_late(state):
            return Whole(self._patches, state.stages, is_last=state.step == self._config.warmup_steps)
        return Late(self._patches, state.stages)

    def is_late(self, state: State) -> bool:
        """Whether this step reads what other stages have made in an earlier one."""
        return state.step > self._config.warmup_steps

    def looks_ahead(self, state: State) -> bool:
        """Whether this step is computed together with the next one."""
        return self._is_doubled and self.is_late(state)

    def is_ahead(self, comm_rank: int) -> bool:
        """Whether a rank of `comm` computes for the next step in such a step."""
        return comm_rank < self._comm.world - 1
