"""Messages of fixed sizes that travel again and again, with memory of their own (MPI calls them persistent)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .protocol import EVERYONE, Box, Pending


@dataclass(frozen=True)
class Layout:
    """Bytes of each message of a route, on one rank.

    A rank's ``sends[p]`` equals rank p's ``recvs[rank]``; ``shared`` (what each rank says to all) is the same list on
    all ranks. Messages without bytes are left out.
    """

    sends: Mapping[int, int]
    recvs: Mapping[int, int]
    shared: Sequence[int] = field(default_factory=tuple)

    @property
    def says_to_all(self) -> bool:
        """Whether anyone says anything to all."""
        return any(self.shared)

    def outgoing(self, rank: int) -> dict[int, int]:
        """Bytes of what ``rank``, whose layout this is, says: to each peer, and to `EVERYONE`."""
        return {**self.sends, **({EVERYONE: self.shared[rank]} if self.says_to_all else {})}


class Carrier(Protocol):
    """What a plain route asks of a communicator. See `Comm`."""

    rank: int
    world: int
    device: torch.device

    def swap(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor], *, kind: str) -> Pending[None]:
        """See `Comm.swap`."""
        ...

    def all_gather(
        self, own: Tensor, sizes: Sequence[int], *, kind: str, into: Tensor | None = None
    ) -> Pending[list[Tensor]]:
        """See `Comm.all_gather`."""
        ...


class PlainRoute:
    """A route over any communicator: one send buffer and one receive buffer, a swap, and a gather for what all get."""

    def __init__(self, comm: Carrier, layout: Layout, kind: str) -> None:
        self._comm, self._layout, self._kind = comm, layout, kind
        largest = max(layout.shared, default=0)
        with torch.inference_mode(False):  # written in whatever mode the caller's next step runs
            direct = _buffers(layout.sends, comm.device)
            # A gather of unequal parts would pad them itself, each time, in new memory.
            self._own = torch.empty(largest, dtype=torch.uint8, device=comm.device)
            self._rows = torch.empty(comm.world if largest else 0, largest, dtype=torch.uint8, device=comm.device)
            self.outbox = Box({**direct, EVERYONE: self._own[: layout.shared[comm.rank]]} if largest else direct)
            self._inbox = Box(_buffers(layout.recvs, comm.device))
        self._swapping: Pending[None] | None = None
        self._gathering: Pending[list[Tensor]] | None = None

    @property
    def num_bytes(self) -> int:
        """See `Route`."""
        direct = sum(self._layout.sends.values()) + sum(self._layout.recvs.values())
        return direct + self._own.numel() + self._rows.numel()

    def launch(self) -> None:
        """See `Route`."""
        sends = {peer: words for peer, words in self.outbox.direct.items() if peer != EVERYONE}
        if sends or self._inbox.direct:
            self._swapping = self._comm.swap(sends, self._inbox.direct, kind=self._kind)
        if self._layout.says_to_all:
            sizes = [self._own.numel()] * self._comm.world
            self._gathering = self._comm.all_gather(self._own, sizes, kind=self._kind, into=self._rows)

    def wait(self) -> Box:
        """See `Route`."""
        if self._swapping is not None:
            self._swapping.wait()
        if self._gathering is not None:
            gathered = self._gathering.wait()
            if not self._inbox.shared:  # the same memory each time; which row is whose, the communicator knows
                sized = {rank: row[: self._layout.shared[rank]] for rank, row in enumerate(gathered)}
                self._inbox = Box(self._inbox.direct, sized)
        self._swapping = self._gathering = None
        return self._inbox


def _buffers(sizes: Mapping[int, int], device: torch.device) -> dict[int, Tensor]:
    return {lane: torch.empty(size, dtype=torch.uint8, device=device) for lane, size in sizes.items()}
