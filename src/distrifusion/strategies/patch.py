"""Patch parallelism: every rank computes its rows and knows the rest, exactly or one step late."""

from __future__ import annotations

from ..comm import Comm
from ..comm.codec import codecs_for
from ..comm.residual import Wire
from ..comm.slots import Slots
from ..config import ParallelConfig
from ..exchange import Exchange, Fresh, Stale, uses_old_moments
from .base import Joined, State


class Sync(Joined):
    """Every value of this step: equal to one device. Waits at every seam.

    With a codec, values travel whole in a picture's first step, and as residuals from then on: near, not equal.
    """

    name = "sync"

    def __init__(self, config: ParallelConfig, comm: Comm) -> None:
        self._comm = comm
        self._codecs = codecs_for(config.codecs)

    def start(self) -> State:
        """See Strategy."""
        return State(wire=Wire(self._comm, self._codecs))

    def policy(self, state: State) -> Exchange:
        """See Strategy."""
        return Fresh(self._comm, wire=state.wire)


class Displaced(Joined):
    """Displaced patch parallelism (DistriFusion, arXiv 2402.19481): peers' values of the step before, sent in the
    background.

    The first step and ``warmup_steps`` more are synchronous, since early steps change most. With a codec, they send
    whole values, which the residuals of the displaced steps then build on.
    """

    name = "displaced"

    def __init__(self, config: ParallelConfig, comm: Comm) -> None:
        self._config = config
        self._comm = comm
        self._codecs = codecs_for(config.codecs)

    def start(self) -> State:
        """See Strategy."""
        slots = Slots(self._comm, self._codecs, in_place=self._config.cuda_graphs)
        return State(slots=slots, wire=Wire(self._comm, self._codecs))

    def policy(self, state: State) -> Exchange:
        """See Strategy."""
        assert state.slots is not None
        assert state.wire is not None
        # Slots are empty after a change of rows, too.
        if state.step <= self._config.warmup_steps or state.slots.is_empty:
            state.wire.clear()  # the prediction is whole in these steps, as all else
            keeps_moments = uses_old_moments(self._config.group_norm)
            return Fresh(self._comm, state.slots, keeps_moments=keeps_moments)
        return Stale(self._comm, state.slots, self._config.group_norm)
