"""Patches of the picture that stream through stages of the model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..comm import Comm
from ..config import ParallelConfig
from ..exchange import Exchange
from ..layers import FrameHolder, Layer, StageUnit
from ..models import stream_layers
from ..stages import chain
from ..stream import Course, Links
from ..weights import part_of, whole_bytes
from .base import Joined, State
from .freed import Freed


class Streamed(Joined):
    """Displaced patches through a pipeline of stages (PipeFusion, arXiv 2405.14430), for transformers.

    The first step and ``warmup_steps`` more take the picture whole through one stage after the other: exact. In each
    later one its patches stream, and attend to the keys and values of the others as they were last.
    """

    name = "pipelined"

    def __init__(self, config: ParallelConfig, comm: Comm, everyone: Comm) -> None:
        self._config = config
        self._links = Links(comm, everyone)
        self.owners: Sequence[int] = ()  # the stage of each group of units, once the layers are known
        self._units: list[nn.Module] = []
        self._freed: list[Freed] = []

    def start(self) -> State:
        """See Strategy."""
        return State(course=Course(self._links, self.owners))

    def policy(self, state: State) -> Exchange:
        """See Strategy."""
        raise AssertionError("each pass has a policy of its own")

    def is_whole(self, state: State) -> bool:
        """Whether this step takes the picture whole."""
        return state.step <= self._config.warmup_steps

    def is_last_whole(self, state: State) -> bool:
        """Whether the patches of the next step begin where this one ends."""
        return state.step == self._config.warmup_steps

    def layers(self, model: nn.Module, holder: FrameHolder) -> list[Layer]:
        """The layers of ``model``, not attached. At the first call the blocks are cut into stages by their weights.

        All ranks see the same, so that nothing is said. See `models.stream_layers` for what is raised.
        """
        comm = self._links.comm
        layers = list(stream_layers(model, comm.world, holder))
        if not self.owners:
            self._units, self.owners = stages_of(layers, comm.world)
        return layers

    def free(self) -> None:
        """Give up the weights of the blocks of other stages, where the configuration says so, until `give_back`."""
        if self._config.blocks == "freed":
            for unit, owner in zip(self._units, self.owners, strict=True):
                is_mine = owner == self._links.comm.rank
                assert not (is_mine and any(map(part_of, unit.parameters()))), "the stages that it was read for"
                self._freed.append(Freed(unit.parameters(), self._links.comm, owner))

    def give_back(self) -> None:
        """Every rank has all weights again. Collective where some were freed."""
        for freed in self._freed:
            freed.give_back()
        self._freed.clear()


def stages_of(layers: Sequence[Layer], num_stages: int) -> tuple[list[nn.Module], tuple[int, ...]]:
    """The blocks among ``layers``, and the stage of each: by the bytes of their weights, which need not be here."""
    units = [layer.module for layer in layers if isinstance(layer, StageUnit)]
    return units, chain(tuple(whole_bytes(unit.parameters()) for unit in units), num_stages)
