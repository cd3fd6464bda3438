"""The contract of a communicator: how tensors travel between ranks.

Two implementations keep it, held by one suite (``tests/test_comm_contract.py``): ranks that are threads of one process,
and torch.distributed. A communicator knows nothing of layers, steps or freshness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .meter import Meter

T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """Something under way."""

    def wait(self) -> T_co:
        """Finish it and return its result. On an accelerator this orders the stream; the host does not block.

        Waiting again returns the same result.

        Raises:
            PeerLost: a peer died, or did not answer within the communicator's timeout.
        """
        ...


class Comm(Protocol):
    """Ranks 0 .. world-1 of one group. All ranks make the same calls in the same order.

    Every launch takes its tensors as they are at the call; a tensor being sent or received into must be left alone
    until ``wait``. ``kind`` names the seam for the meter (``"halo"``, ``"moments"``, ``"context"``, ``"chunk"``,
    ``"output"``, ``"control"``).
    """

    rank: int
    world: int
    device: torch.device
    meter: Meter
    timeout: float  # seconds until a silent peer counts as lost

    def swap(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor], *, kind: str) -> Pending[None]:
        """Send to some peers and receive from some, all at once, in place.

        ``sends[p]`` and the peer's ``recvs[me]`` have the same number of bytes; any dtype; contiguous. Pairs of ranks
        match their swaps in order. A rank with nothing to say to anyone may skip the call. Counts one message per
        send.
        """
        ...

    def all_gather(self, own: Tensor, sizes: Sequence[int], *, kind: str) -> Pending[list[Tensor]]:
        """Everyone's flat tensor, in order of rank: ``own`` is ``[sizes[rank]]``, the result ``[[sizes[0]], ...]``.

        Sizes may differ and may be 0; they are the same list on all ranks. One dtype, contiguous. The result's own part
        is equal to ``own``. Counts one message.
        """
        ...

    def all_gather_object(self, value: Any) -> list[Any]:
        """Everyone's picklable value, in order of rank. Blocks."""
        ...

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """The root's picklable value, on all ranks. Blocks."""
        ...

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite ``tensor`` in place by the root's, on all ranks. Same shape and dtype everywhere. Blocks."""
        ...

    def split(self, groups: Sequence[Sequence[int]]) -> Comm:
        """The communicator of the one group that holds this rank; its ranks are positions in that group.

        The groups are disjoint, cover the world and are the same on all ranks. The meter is shared with this one.
        """
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def abort(self) -> None:
        """Drop the connections without waiting: peers that wait for this rank raise PeerLost. May be called twice."""
        ...

    def close(self) -> None:
        """Release what this communicator opened itself; a group that the user brought stays. May be called twice."""
        ...
