"""Patches of the picture that stream through stages of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..comm import Comm
from ..config import ParallelConfig
from ..errors import ConfigError
from ..exchange import Exchange
from ..geometry import Levels, Split
from ..layers import Frame, FrameHolder, Layer, StageUnit
from ..layers.base import own_rows
from ..layers.tokens import TOKENS
from ..models import Call, Table, stream_layers
from ..stages import chain
from ..stream import Course, Links, Pass
from .base import Joined, State


class Streamed(Joined):
    """Displaced patches through a pipeline of stages (PipeFusion, arXiv 2405.14430), for transformers.

    The first step and ``warmup_steps`` more take the picture whole through one stage after the other: exact. In each
    later one its patches stream, and attend to the keys and values of the others as they were last.
    """

    name = "pipelined"

    def __init__(self, config: ParallelConfig, comm: Comm) -> None:
        self._config = config
        self._links = Links(comm)
        self.owners: Sequence[int] = ()  # the stage of each group of units, once the layers are known

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
            units = [layer.module for layer in layers if isinstance(layer, StageUnit)]
            costs = [sum(p.numel() * p.element_size() for p in unit.parameters()) for unit in units]
            self.owners = chain(tuple(costs), comm.world)
        return layers


@dataclass(frozen=True)
class Flow:
    """What the passes of one step gave on this rank."""

    result: Any  # of the model, in the last pass
    own: Tensor  # [B, C, rows, W] of the whole picture; only the last rank's holds the prediction
    levels: Levels  # of the patches
    kind: str


class Streaming:
    """Runs the steps of `Streamed`: the model's forward once for each patch.

    Args:
        strategy: says which steps are whole.
        table: of the model.
        num_patches: of the picture.
        holder: of the frames.
        dim: along which the picture is cut, see Frame.
        comm: the ranks in order of their stages.
    """

    def __init__(
        self, strategy: Streamed, table: Table, num_patches: int, holder: FrameHolder, dim: int, comm: Comm
    ) -> None:
        self._strategy, self._table, self._holder = strategy, table, holder
        self._num_patches, self._dim = num_patches, dim
        self._comm = comm

    def output_split(self, size: int) -> Split:
        """Who has which of the prediction's ``size`` rows: the last rank has all."""
        return Split((*[0] * self._comm.world, size))

    def step(self, call: Call, state: State, model: Callable[..., Any]) -> Flow:
        """One step of the part ``call`` of the batch.

        Raises:
            ConfigError: more patches than rows of tokens.
        """
        assert state.course is not None
        whole, parts = self._levels(call, 1), self._levels(call, self._num_patches)
        is_whole = self._strategy.is_whole(state)
        patches = [None] if is_whole else list(range(self._num_patches))
        table, levels = self._table, whole if is_whole else parts
        third, num_guests = table.third(call, self._dim), table.num_guests(call)
        tokens = parts.splits[TOKENS]

        def frame_of(patch: int, exchange: Exchange) -> Frame:
            return Frame(
                patch, self._dim, levels, exchange, third, num_guests, memory=state.memory, asks_always=is_whole
            )

        def cut(x: Tensor, dim: int) -> list[Tensor]:
            shape = self._holder.now().shape(TOKENS, tokens.size)
            x, along = torch.unflatten(x, dim, shape), dim + self._dim - 1
            return [own_rows(x, tokens, patch, along).flatten(dim, dim + 2) for patch in range(tokens.num_patches)]

        own: list[Tensor] = []
        for patch, following in zip(patches, [*patches[1:], None], strict=True):
            keeps = self._strategy.is_last_whole(state)
            policy = Pass(state.course, patch, tokens, cut, keeps=keeps, following=following)
            self._holder.frame = frame = frame_of(patch or 0, policy)
            policy.begin()
            result = policy.run(model, **table.localise(call, frame, fed=False).arguments)
            own.append(table.fold(result[0], call, frame))
        return Flow(result, own[0] if is_whole else torch.cat(own, self._dim), levels, policy.kind)

    def _levels(self, call: Call, num_patches: int) -> Levels:
        table, size, frames = self._table, self._table.size(call), self._table.third(call, 2)
        tokens = table.levels(*size, (1.0,), self._dim, frames).splits[TOKENS]
        if tokens.size < num_patches:
            what = {1: "frames", 2: "rows", 3: "columns"}[self._dim]
            raise ConfigError(
                f"patches={num_patches} are more than the {tokens.size} {what} of tokens of this picture: "
                f"patches={tokens.size} is the most"
            )
        return table.levels(*size, (1.0,) * num_patches, self._dim, frames)
