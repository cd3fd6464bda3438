"""Weights that one rank keeps for all."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..comm import Comm
from ..weights import set_part, whole_shape


class Freed:
    """Weights whose memory all ranks but ``owner`` give up until `give_back`. They keep their device and dtype.

    Args:
        weights: in one order on all ranks. Those of another owner may never have been here.
        comm: the ranks.
        owner: the one that keeps them.
    """

    def __init__(self, weights: Iterable[Tensor], comm: Comm, owner: int) -> None:
        self._comm, self._owner = comm, owner
        self._held = [(weight, whole_shape(weight)) for weight in weights]
        if comm.rank != owner:
            for weight, _ in self._held:
                weight.data = weight.data.new_empty(0)

    def __bool__(self) -> bool:
        return bool(self._held)

    def give_back(self) -> None:
        """The owner sends them to all. Collective."""
        for weight, shape in self._held:
            if self._comm.rank != self._owner:
                weight.data = weight.data.new_empty(shape)
                set_part(weight, None)
            self._comm.broadcast(weight.data.contiguous(), self._owner)  # the owner's may be strided
        self._held = []
