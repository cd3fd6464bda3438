"""Everything of this step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from ..comm import Comm, Pending
from ..comm.residual import Arriving, Wire
from ..comm.slots import Slots
from ..geometry import Halo
from ..moments import combine
from .named import Named
from .rows import outgoing, packed, resized, rows_like


class Fresh(Named):
    """Everything of this step: exact. With ``slots``, what arrives is kept for steps that start from it.

    ``keeps_moments`` is False where these will not ask for moments. ``wire`` says how values
    travel, and remembers from step to step what its codecs ask for; with one, peers' values are exact the first time
    only.
    """

    kind = "sync"
    sees_peers = True

    def __init__(
        self, comm: Comm, slots: Slots | None = None, *, keeps_moments: bool = True, wire: Wire | None = None
    ) -> None:
        super().__init__()
        self._comm = comm
        self._slots = slots
        self._keeps_moments = keeps_moments
        self._wire = wire if wire is not None else Wire(comm)

    @property
    def is_slow(self) -> bool:
        """See Exchange."""
        return self._comm.is_slow

    def neighbours(
        self, key: str, patch: Tensor, plan: Halo, dim: int, kind: str = "halo"
    ) -> Pending[Mapping[int, Tensor]]:
        """See Exchange."""
        name = self._name(key)
        sends = {peer: words.contiguous() for peer, words in outgoing(patch, plan, dim).items()}
        recvs = {peer: rows_like(patch, dim, count) for peer, count in plan.recvs}
        travel = self._wire.swap(name, sends, recvs, kind=kind)
        if self._slots is not None:
            weight = plan.total_recvs * prod(resized(patch.shape, dim, 1)) * patch.element_size()
            self._slots.keep(name, sends, recvs, links=plan.links, weight=weight, kind=kind)
        return travel

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
        name, widths = self._name(key), [part.shape[-1] for part in own]
        words = packed(own)
        shapes = [resized(words.shape, dim, size) for size in sizes]
        travel = self._wire.all_gather(name, words, shapes, kind=kind)

        def shaped(parts: list[Tensor]) -> list[Sequence[Tensor]]:
            self._keep_shared(name, words, parts, kind)
            return [torch.split(part, widths, -1) for part in parts]

        return Arriving(travel, shaped)

    def moments(self, key: str, own: Tensor) -> Tensor:
        """See Exchange."""
        parts = self._comm.all_gather(own, [own.numel()] * self._comm.world, kind="moments").wait()
        if self._keeps_moments:
            self._keep_shared(self._name(key), own, parts, "moments")
        return combine(parts)

    def _keep_shared(self, name: str, own: Tensor, parts: list[Tensor], kind: str) -> None:
        """Keep what everyone said to everyone, ``parts[rank]``, for steps that start from it."""
        if self._slots is None:
            return
        self._slots.keep_shared(name, own, parts, kind=kind)
        if kind == "moments":
            self._slots.own[name] = own

    def finish(self) -> bool:
        """See Exchange."""
        return True


class Summed(Fresh):
    """A step in which every rank has the whole picture, and a part of each layer's weights: all of this step."""

    def total(self, key: str, part: Tensor) -> Tensor:
        """The sum of all ranks' ``part``, which have one shape: the same to the last bit everywhere."""
        return self._comm.all_reduce(part, kind="sum")
