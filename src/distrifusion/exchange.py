"""How old an answer may be: the freshness policies.

A layer asks at its seam by one of three verbs. The policy answers with values of this step (`Fresh`), of the step
before (`Stale`), or with none (`Absent`), and sends what the peers will want. Layers never know which policy they
talk to. Where the ranks share weights and not the picture, there is one verb more (`Summed`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from .comm import Comm, Pending
from .comm.base import Done
from .comm.residual import Arriving, Wire
from .comm.slots import Slots
from .config import GroupNormMode
from .geometry import Halo
from .moments import carry, combine, correct


class Exchange(Protocol):
    """One step's policy. All ranks ask under the same keys in the same order."""

    kind: str  # what ran, for the report
    sees_peers: bool  # whether anything of the peers is known, and so their rows of the latents, which every rank has
    recall: Recall | None  # what the patch saw in earlier steps, where it stands alone and moves

    @property
    def is_slow(self) -> bool:
        """Whether answers take so long that a layer should first compute what it can without them."""
        ...

    def begin(self) -> None:
        """Start a step."""
        ...

    def neighbours(
        self, key: str, patch: Tensor, plan: Halo, dim: int, kind: str = "halo"
    ) -> Pending[Mapping[int, Tensor]]:
        """Rows of the peers: peer -> ``[..., rows, ...]`` for each of ``plan.recvs``.

        ``patch`` is the own patch; ``plan.sends`` of its ``dim`` go to the peers. Called on every rank where any rows
        travel. ``kind`` is the seam's, ``"context"`` for keys and values of neighbours alone. The result may be used
        until the next verb.
        """
        ...

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
        """Everyone's parts, in order of rank; the own ones are always fresh.

        ``own`` are tensors that differ in their last dim only, such as K and V; they travel as one message. Rank r's
        have ``sizes[r]`` along ``dim``, where the tokens of its rows at ``level`` stand; None: sums over all of its
        tokens. The result may be used until the next verb.
        """
        ...

    def moments(self, key: str, own: Tensor) -> Tensor:
        """Mean and biased variance ``[2, K]`` of the whole picture; ``own``: moments ``[1 + 2K]``, see moments.py."""
        ...

    def finish(self) -> bool:
        """End the step. False where the model left out seams, so that the next step cannot build on this one."""
        ...


class Recall(Protocol):
    """What a patch that stands alone knows of rows where it was in earlier steps, and what it is told before that."""

    def num_rows(self, level: int) -> int:
        """Rows at ``level`` beside the own ones, of which keys and values are known."""
        ...

    def beside(self, key: str, x: Tensor, level: int, margins: tuple[int, int], dim: int) -> list[Sides]:
        """What a convolution read when the patch was there: rows before and after each strip of ``x``.

        Args:
            key: the layer's.
            x: its input, own rows at ``level`` along ``dim``.
            level: of the model.
            margins: how many rows before, how many after.
            dim: of the rows.

        Returns:
            For each strip of the patch both sides; None where the picture ends, and where the patch has not been.
        """
        ...

    def note(
        self, key: str, x: Tensor, level: int, margins: tuple[int, int], dim: int, *, is_whole: bool = False
    ) -> None:
        """In the synchronous step before patches stand alone, each tells the others what they may come to stand beside.

        All ranks call this under the same keys in the same order. Arguments as of `beside`; ``is_whole``: ``x`` has the
        rows of the whole picture, as on every rank, and nothing travels.
        """
        ...


Sides = tuple[Tensor | None, Tensor | None]


class Named:
    """Names that stay unique when a module is called several times in one step."""

    recall: Recall | None = None

    def __init__(self) -> None:
        self._uses: Counter[str] = Counter()

    def begin(self) -> None:
        """Start a step."""
        self._uses.clear()

    def _name(self, key: str) -> str:
        self._uses[key] += 1
        return key if self._uses[key] == 1 else f"{key}#{self._uses[key]}"


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
        recvs = {peer: _rows_like(patch, dim, count) for peer, count in plan.recvs}
        travel = self._wire.swap(name, sends, recvs, kind=kind)
        if self._slots is not None:
            weight = plan.total_recvs * prod(_resized(patch.shape, dim, 1)) * patch.element_size()
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
        shapes = [_resized(words.shape, dim, size) for size in sizes]
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
        self._slots.post_shared(name, own)
        if self._group_norm == "stale":
            return combine(self._with_own(before, own))
        if self._group_norm == "carried":
            result, trail = carry(own, list(before.values()), self._slots.own[name])
            self._slots.keep_own(name, trail)
            return result
        own_before = self._slots.own[name]
        result = correct(own, own_before, self._with_own(before, own_before))
        self._slots.keep_own(name, own)
        return result

    def finish(self) -> bool:
        """See Exchange."""
        return self._slots.finish()

    def _with_own(self, others: dict[int, Tensor], own: Tensor) -> list[Tensor]:
        return [own if rank == self._rank else others[rank] for rank in range(len(others) + 1)]


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
        return Done({peer: _rows_like(patch, dim, count).zero_() for peer, count in plan.recvs})

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


class Summed(Fresh):
    """A step in which every rank has the whole picture, and a part of each layer's weights: all of this step."""

    def total(self, key: str, part: Tensor) -> Tensor:
        """The sum of all ranks' ``part``, which have one shape: the same to the last bit everywhere."""
        return self._comm.all_reduce(part, kind="sum")


def outgoing(patch: Tensor, plan: Halo, dim: int) -> dict[int, Tensor]:
    """The rows of ``patch`` that each peer asks for."""
    rows = {peer: [patch.narrow(dim, span.start, len(span)) for span in spans] for peer, spans in plan.sends}
    return {peer: parts[0] if len(parts) == 1 else torch.cat(parts, dim) for peer, parts in rows.items()}


def packed(own: Sequence[Tensor]) -> Tensor:
    """Tensors that differ in their last dim only as one message: side by side in that dim."""
    return torch.cat(list(own), dim=-1) if len(own) > 1 else own[0].contiguous()


def _resized(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _rows_like(patch: Tensor, dim: int, count: int) -> Tensor:
    return patch.new_empty(_resized(patch.shape, dim, count))
