"""Nothing of the peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..comm import Pending
from ..comm.base import Done
from ..geometry import Halo
from ..moments import combine
from .named import Named
from .rows import rows_like


class Absent(Named):
    """Nothing of the peers: each patch is a picture of its own, with zeros around it. Sends nothing."""

    kind = "naive"
    is_slow = False
    sees_peers = False

    def __init__(self, rank: int, kind: str = "naive") -> None:
        super().__init__()
        self._rank = rank
        self.kind = kind

    def neighbours(
        self, key: str, patch: Tensor, plan: Halo, dim: int, kind: str = "halo"
    ) -> Pending[Mapping[int, Tensor]]:
        """See Exchange."""
        if kind == "context":  # no keys at all, as in `gather`: zeros would take attention
            return Done({})
        return Done({peer: rows_like(patch, dim, count).zero_() for peer, count in plan.recvs})

    def gather(
        self,
        key: str,
        own: Sequence[Tensor],
        sizes: Sequence[int],
        dim: int,
        kind: str = "context",
        *,
        level: int | None = None,
    ) -> Pending[list[Sequence[Tensor]]]:
        """See Exchange. The peers' parts are empty."""
        nothing = [part.narrow(dim, 0, 0) for part in own]
        return Done([own if rank == self._rank else nothing for rank in range(len(sizes))])

    def moments(self, key: str, own: Tensor) -> Tensor:
        """See Exchange."""
        return combine([own])

    def finish(self) -> bool:
        """See Exchange."""
        return True
