"""Rows of a tensor: those of a patch, those of its neighbours, and room for the latter around the former."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..exchange import concatenated
from ..geometry import Halo, Part, Span, Split, laps
from .compiled import empty_like_but, layout_of


def attach(patch: Tensor, plan: Halo, rank: int, dim: int, arrived: Callable[[], Mapping[int, Tensor]]) -> Tensor:
    """The rows of ``plan.parts``: own ones of ``patch`` along ``dim``, and those that ``arrived`` waits for."""
    room: Tensor | None = getattr(patch, _ROOM, None)
    own_whole = Part(rank, 0, patch.shape[dim])
    is_roomy = room is not None and [part.rows for part in plan.parts] == [1, own_whole.rows, 1]
    is_roomy = is_roomy and plan.parts[1] == own_whole
    rows = room if room is not None and is_roomy else empty_like_but(patch, dim % patch.ndim, plan.num_rows)
    places = list(zip(plan.parts, torch.split(rows, [part.rows for part in plan.parts], dim), strict=True))
    for part, place in places:  # while the halo travels
        if part.peer is None:
            place.zero_()
        elif part.peer == rank and not (is_roomy and part == own_whole):
            place.copy_(patch.narrow(dim, part.start, part.rows))
    received = arrived()
    for part, place in places:
        if part.peer is not None and part.peer != rank:
            place.copy_(received[part.peer].narrow(dim, part.start, part.rows))
    return rows


def between(patch: Tensor, before: Tensor | None, after: Tensor | None, pads: tuple[int, int], dim: int) -> Tensor:
    """``patch`` between rows of others along ``dim``, ``pads`` of them on its sides: zeros where there are none."""
    sides = {1: before, 2: after}
    peers = [peer if rows is not None else None for peer, rows in sides.items()]
    parts = Part(peers[0], 0, pads[0]), Part(0, 0, patch.shape[dim]), Part(peers[1], 0, pads[1])
    known = {peer: rows for peer, rows in sides.items() if rows is not None}
    return attach(patch, Halo(parts, (), (), frozenset(), 0), 0, dim, lambda: known)


def own_rows(whole: Tensor, split: Split, patch: int, dim: int) -> Tensor:
    """The rows of ``patch`` along ``dim`` of a tensor that has those of the whole picture."""
    return rows_of(whole, split.place(patch), dim)


def rows_of(whole: Tensor, window: Span, dim: int) -> Tensor:
    """Rows ``window`` of the picture, which may go on at its other end, more than once."""
    parts = [whole.narrow(dim, lap.start, len(lap)) for lap in laps(window, whole.shape[dim])]
    if not parts:
        return whole.narrow(dim, 0, 0)
    return concatenated(parts, dim)


def put_rows(whole: Tensor, rows: Tensor, window: Span, dim: int) -> None:
    """Write ``rows`` to where `rows_of` would read them."""
    first = 0
    for lap in laps(window, whole.shape[dim]):
        whole.narrow(dim, lap.start, len(lap)).copy_(rows.narrow(dim, first, len(lap)))
        first += len(lap)


_ROOM = "_distrifusion_room"  # on a patch: the tensor with one row more on each side in which it lies


def empty_with_room(like: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """An uninitialised patch of ``shape`` with a row of room on each side in memory.

    A 3 x 3 convolution of this very tensor then needs no copy of the patch: its halo is written into the room.
    """
    roomy = list(shape)
    roomy[dim] += 2
    room = torch.empty(roomy, dtype=like.dtype, device=like.device, memory_format=layout_of(like))
    own = room.narrow(dim, 1, shape[dim])
    setattr(own, _ROOM, room)
    return own
