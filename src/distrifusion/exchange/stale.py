"""What the peers said one step ago."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..comm import Comm, Pending
from ..comm.base import Done
from ..comm.slots import Slots
from ..config import GroupNormMode
from ..geometry import Halo
from ..moments import Ahead, Shares, carry, combine, correct
from .fresh import Fresh
from .named import Named
from .rows import outgoing


def uses_old_moments(group_norm: GroupNormMode) -> bool:
    """Whether `Stale` will ask for the moments of the step before, so that synchronous steps must keep them."""
    return group_norm not in ("separate", "sync")


class Stale(Named):
    """The own patch of this step, the peers' of the step before: DistriFusion. Sends leave in the background.

    ``group_norm``: ``"corrected"`` (the paper's), ``"carried"`` (peers old, moved on), ``"stale"``
    (own fresh, peers old), ``"separate"`` (own only), ``"sync"`` (fresh everywhere: exact, and the wait).
    """

    kind = "displaced"
    is_slow = False
    sees_peers = True

    def __init__(self, comm: Comm, slots: Slots, group_norm: GroupNormMode) -> None:
        super().__init__()
        self._slots = slots
        self._group_norm = group_norm
        self._rank = comm.rank
        self._ahead: dict[str, Ahead] = {}
        # A seam that the synchronous steps did not pass has no words of the step before: it is exchanged at once.
        self._fresh = Fresh(comm)

    def neighbours(
        self, key: str, patch: Tensor, plan: Halo, dim: int, kind: str = "halo"
    ) -> Pending[Mapping[int, Tensor]]:
        """See Exchange."""
        name = self._name(key)
        if name not in self._slots:
            return self._fresh.neighbours(key, patch, plan, dim, kind)
        before = self._slots.read(name)
        self._slots.post(name, outgoing(patch, plan, dim))
        return Done(before)

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
        """See Exchange."""
        name = self._name(key)
        if name not in self._slots:
            return self._fresh.gather(key, own, sizes, dim, kind)
        widths = [part.shape[-1] for part in own]
        before = {peer: torch.split(words, widths, -1) for peer, words in self._slots.read(name).items()}
        self._slots.post_shared(name, *own)
        return Done([own if rank == self._rank else before[rank] for rank in range(len(sizes))])

    def moments(self, key: str, own: Tensor) -> Tensor:
        """See Exchange."""
        name = self._name(key)
        if self._group_norm == "separate":
            return combine([own])
        if self._group_norm == "sync" or name not in self._slots:
            return self._fresh.moments(key, own)
        before = self._slots.read(name)
        if self._group_norm == "corrected" and name not in self._ahead:
            self._look_ahead(name)
        self._slots.post_shared(name, own)
        if self._group_norm == "stale":
            return combine(self._with_own(before, own))
        if self._group_norm == "carried":
            result, trail = carry(own, list(before.values()), self._slots.own[name])
            self._slots.keep_own(name, trail)
            return result
        result = correct(own, self._ahead.pop(name))
        self._slots.keep_own(name, own)
        return result

    def finish(self) -> bool:
        """See Exchange."""
        return self._slots.finish()

    def _with_own(self, others: dict[int, Tensor], own: Tensor) -> list[Tensor]:
        return [own if rank == self._rank else others[rank] for rank in range(len(others) + 1)]

    def _look_ahead(self, name: str) -> None:
        """For the norms whose words came with those of ``name``: a few operations for all of them."""
        slots = self._slots
        names = [each for each in slots.beside(name) if each in slots.own and each not in self._ahead]
        names = [each for each in names if slots.own[each].numel() == slots.own[name].numel()]
        own = torch.stack([slots.own[each] for each in names])
        others = torch.stack([words for each in names for words in slots.read(each).values()])
        others = others.view(len(names), -1, own.shape[1])
        if name not in slots.sizes:
            slots.sizes[name] = Shares.of(own, others)
        self._ahead.update(zip(names, Ahead.all_of(own, others, slots.sizes[name]), strict=True))
