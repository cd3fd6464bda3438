"""The rows that travel between patches so that each has what it needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from .readers import Reader
from .spans import Span, Split


@dataclass(frozen=True)
class Part:
    """Consecutive rows from one place: ``peer``'s, from row ``start`` of what it sends; the own patch's, from its row
    ``start``; or zeros, where ``peer`` is None.
    """

    peer: int | None
    start: int
    rows: int


@dataclass(frozen=True)
class Halo:
    """What one rank must do so that its layer can make the output rows it owns.

    The rows the layer reads are ``parts``, in order.
    """

    parts: tuple[Part, ...]
    sends: tuple[tuple[int, tuple[Span, ...]], ...]  # (peer, rows relative to my patch, one span after the other)
    recvs: tuple[tuple[int, int], ...]  # (peer, number of rows), in order of rank
    links: frozenset[tuple[int, int]]  # every (sender, receiver) over all ranks
    total_recvs: int  # rows that travel between all ranks

    @property
    def num_rows(self) -> int:
        """Rows the layer reads in all."""
        return sum(part.rows for part in self.parts)

    def own_alone(self, patch: int) -> Span | None:
        """The own rows, where the layer of ``patch`` reads consecutive ones and nothing else; else None."""
        if not self.parts:
            return Span(0, 0)
        first = self.parts[0]
        is_alone = len(self.parts) == 1 and first.peer == patch
        return Span(first.start, first.start + first.rows) if is_alone else None


@lru_cache(maxsize=4096)
def halo(inputs: Split, outputs: Split, reader: Reader, patch: int) -> Halo:
    """The halo of ``patch`` for a layer that turns ``inputs`` into ``outputs``."""
    spans = [outputs.span(i) for i in range(inputs.num_patches)]
    return _plan(inputs, [reader.reads(out) if len(out) else None for out in spans], patch)


@lru_cache(maxsize=4096)
def moves(split: Split, windows: tuple[Span, ...], patch: int) -> Halo:
    """What travels so that each rank of ``split`` has the rows of its window, wherever these are in the picture."""
    return _plan(replace(split, is_ring=True), windows, patch)


def _plan(inputs: Split, reaches: Sequence[Span | None], patch: int) -> Halo:
    needs = [list(inputs.owned(reach)) if reach is not None else [] for reach in reaches]
    travels = Counter[tuple[int, int]]()  # (sender, receiver) -> rows
    parts = []
    for receiver, need in enumerate(needs):
        for owner, span in need:
            start = span.start if owner == receiver else 0
            if owner is not None and owner != receiver:
                start = travels[owner, receiver]
                travels[owner, receiver] += len(span)
            if receiver == patch:
                parts.append(Part(owner, start, len(span)))
    sends = tuple(
        (receiver, tuple(span for owner, span in needs[receiver] if owner == patch))
        for sender, receiver in sorted(travels)
        if sender == patch
    )
    return Halo(
        parts=tuple(parts),
        sends=sends,
        recvs=tuple((sender, travels[sender, patch]) for sender, receiver in sorted(travels) if receiver == patch),
        links=frozenset(travels),
        total_recvs=travels.total(),
    )
