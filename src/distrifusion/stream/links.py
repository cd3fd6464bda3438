"""The chain of stages: from each rank to the next, and from the last one back to all."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm import Comm, Pending
from ..exchange import concatenated


class Links:
    """This rank's place in the chain of stages, and the way back from its end.

    All ranks make one at the same time.

    Args:
        comm: those of one branch of guidance, in order of their stages.
        everyone: all ranks; those of a branch are consecutive.
    """

    def __init__(self, comm: Comm, everyone: Comm) -> None:
        self.comm = comm
        self._everyone = everyone
        self._under_way: deque[tuple[Pending[None], Tensor]] = deque()
        self._open()

    def _open(self) -> None:
        # A communicator for each pair of neighbours, and one for the way back: on an accelerator, all messages of one
        # wait for each other in turn.
        first, second = (self.comm.split(_pairs(self.comm.world, start)) for start in (0, 1))
        is_even = self.comm.rank % 2 == 0
        self._before, self._after = (second, first) if is_even else (first, second)
        self.back = Back(self._everyone, self.comm.world)
        self.is_broken = False

    def mend(self) -> None:
        """After an error in the middle of a step, which all ranks have had: forget what was under way. Collective."""
        if self.is_broken:
            self._under_way.clear()
            self._open()

    def send(self, words: Tensor) -> None:
        """Hand bytes to the next rank, which are left alone from now on."""
        while len(self._under_way) > 1:
            self._under_way.popleft()[0].wait()
        self._under_way.append((self._after.swap({1: words}, {}, kind="boundary"), words))

    def receive(self, num_bytes: int) -> tuple[Pending[None], Tensor]:
        """Bytes of the rank before, which are there after the wait."""
        words = torch.empty(num_bytes, dtype=torch.uint8, device=self.comm.device)
        return self._before.swap({}, {0: words}, kind="boundary"), words

    def drain(self) -> None:
        """Wait until all that was sent has left."""
        while self._under_way:
            self._under_way.popleft()[0].wait()


class Back:
    """What the last stage has made of a patch, on its way to all ranks, who step on it.

    Args:
        comm: all ranks; those of a branch of guidance are consecutive, in order of their stages.
        num_stages: of each branch, which has its part of the batch.
    """

    def __init__(self, comm: Comm, num_stages: int) -> None:
        self._comm = comm.split([list(range(comm.world))])
        self._lasts = list(range(num_stages - 1, comm.world, num_stages))
        self._branch = comm.rank // num_stages

    def launch(self, own: Tensor, shares: Sequence[int]) -> Back.Coming:
        """Send or await one patch of a prediction; ``own`` is that of this rank's part of the batch, if it is the last
        of its branch, else of its shape. ``shares`` are the pictures of each branch. All ranks call this.
        """
        comm = self._comm
        own = own.contiguous()
        is_last = comm.rank in self._lasts
        parts = [own.new_empty(share, *own.shape[1:]) for share in shares]
        if is_last:
            parts[self._branch] = own
        sends = {rank: own for rank in range(comm.world) if is_last and rank != comm.rank}
        recvs = {rank: part for rank, part in zip(self._lasts, parts, strict=True) if rank != comm.rank}
        return Back.Coming(comm.swap(sends, recvs, kind="output"), parts)

    @dataclass(frozen=True)
    class Coming:
        """One patch of a prediction under way."""

        pending: Pending[None]
        parts: Sequence[Tensor]  # by branch

        def wait(self) -> Tensor:
            """That of the whole batch."""
            self.pending.wait()
            return concatenated(self.parts, 0)


def _pairs(world: int, start: int) -> list[list[int]]:
    pairs = [list(range(first, min(first + 2, world))) for first in range(start, world, 2)]
    return [[0], *pairs] if start else pairs
