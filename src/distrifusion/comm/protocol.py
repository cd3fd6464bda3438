"""The contract of a communicator: how tensors travel between ranks.

Two implementations keep it, held by one suite (``tests/test_comm_contract.py``): ranks that are threads of one process,
and torch.distributed. A communicator knows nothing of layers, steps or freshness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from .meter import Meter

if TYPE_CHECKING:
    from .route import Layout

EVERYONE = -1  # the receiver of what every peer gets

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


@dataclass(eq=False)
class Box:
    """The messages of one turn of a route, as bytes: by receiver or sender."""

    direct: Mapping[int, Tensor]
    shared: Mapping[int, Tensor] = field(default_factory=dict)  # by sender: what it said to all
    views: list[Tensor] | None = None  # what the route's user has cut out of it; it lives as long as the memory


class Route(Protocol):
    """Messages of fixed sizes between the ranks, sent again and again. See `Layout`.

    Each turn: write ``outbox``, ``launch``, and later ``wait``. One turn is under way at a time, and it was waited for
    before the next outbox is written.
    """

    @property
    def num_bytes(self) -> int:
        """Memory that it holds on this rank, for what is sent and what is received."""
        ...

    @property
    def outbox(self) -> Box:
        """Where the next turn's words are written, by receiver, `EVERYONE` among them. Ask anew after each launch."""
        ...

    def launch(self) -> None:
        """Send the outbox. What the last ``wait`` returned may be overwritten from now on."""
        ...

    def wait(self) -> Box:
        """What the peers said, until the next ``launch``.

        Raises:
            PeerLost: as `Pending.wait`.
        """
        ...


class Comm(Protocol):
    """Ranks 0 .. world-1 of one group. All ranks make the same calls in the same order.

    Every launch takes its tensors as they are at the call; a tensor being sent or received into must be left alone
    until ``wait``. ``kind`` names the seam for the meter (``"halo"``, ``"moments"``, ``"context"``, ``"chunk"``,
    ``"sum"``, ``"output"``, ``"control"``).
    """

    rank: int
    world: int
    device: torch.device
    meter: Meter
    timeout: float  # seconds until a silent peer counts as lost

    @property
    def wire(self) -> str:
        """What tensors on ``device`` travel over, for reports."""
        ...

    @property
    def is_slow(self) -> bool:
        """Whether a message takes so long that what can be computed before it arrives should be, at a small price.

        The same on all ranks, and at all times: a result that depended on who was late would be another in each run.
        """
        ...

    def swap(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor], *, kind: str) -> Pending[None]:
        """Send to some peers and receive from some, all at once, in place.

        ``sends[p]`` and the peer's ``recvs[me]`` have the same number of bytes; any dtype; contiguous. Pairs of ranks
        match their swaps in order. A rank with nothing to say to anyone may skip the call. Counts one message per
        send.
        """
        ...

    def all_gather(
        self, own: Tensor, sizes: Sequence[int], *, kind: str, into: Tensor | None = None
    ) -> Pending[list[Tensor]]:
        """Everyone's flat tensor, in order of rank: ``own`` is ``[sizes[rank]]``, the result ``[[sizes[0]], ...]``.

        Sizes may differ and may be 0; they are the same list on all ranks. One dtype, contiguous. The result's own part
        is equal to ``own``. With ``into``, ``[world, largest size]`` of the same dtype, it is the beginnings of the
        rows of that, in any order, where anything travels; else it is new memory. Counts one message.
        """
        ...

    def all_reduce(self, own: Tensor, *, kind: str) -> Tensor:
        """The sum of everyone's tensor of one shape and dtype, equal on all ranks to the last bit. Waits.

        Of a swap and an all-gather, ``2 (world - 1) / world`` of the tensor per rank; with two ranks one all-gather,
        which is as many bytes. The sum is made in order of rank, in float32 where the dtype has fewer bits.
        """
        ...

    def route(self, layout: Layout, *, kind: str) -> Route:
        """Open a route. Collective: all ranks call it. Each launch counts as a swap and an all-gather would."""
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
