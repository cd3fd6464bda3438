"""More patches than ranks: the end of a decoder over bands of a rank's rows, one after the other, all exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ..comm import Pending
from ..exchange import Exchange, Recall, concatenated
from ..geometry import Chain, Halo, Levels, Span, Split, halo
from ..layers import Band, Frame, FrameHolder, Layer, PatchConv, PatchGroupNorm
from ..layers.base import HaloLayer
from ..layers.rows import rows_of
from ..moments import combine

if TYPE_CHECKING:
    from ..models.vae import Half
    from ..models.vaes.plan import Tail


@dataclass(frozen=True)
class Bands:
    """From module ``first`` of a decoder's tail on, a rank's rows are computed in ``num`` bands."""

    first: int
    num: int


class Reached(Exception):  # noqa: N818 - no error: where the first part of a decoder ends
    """The module at which bands begin, with what it was called with."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class _Unknown(Exception):  # noqa: N818 - no error: a band goes no further before all bands have come as far
    """A norm that needs moments of the whole picture, with those of one band."""

    def __init__(self, key: str, moments: Tensor) -> None:
        self.key, self.moments = key, moments


def run_half(
    half: Half,
    holder: FrameHolder,
    frame: Frame,
    arguments: Mapping[str, Any],
    bands: Bands | None,
    pretended: Exchange | None = None,
) -> Tensor:
    """Own rows of what an encoder or decoder makes of ``arguments``; its layers are attached, and see ``frame``.

    With ``pretended``, which gives norms any moments, it is a rehearsal: see `BandedTail.rehearse`.
    """

    def forward() -> Tensor:
        made: Tensor = type(half.module).forward(half.module, **arguments)
        return made

    if bands is None:
        return forward()
    tail = banded_tail(half, holder, bands.first)
    x = tail.head(forward)
    return tail.run(x, frame, bands.num) if pretended is None else tail.rehearse(x, frame, bands.num, pretended)


def banded_tail(half: Half, holder: FrameHolder, first: int) -> BandedTail:
    """The tail of ``half``, which has one, from its module ``first`` on."""
    tail = half.tail()
    assert tail is not None, "bands are of halves that have a tail"
    return BandedTail(tail, first, list(half.layers(holder)), holder)


def whole(own: Tensor, split: Split, dim: int, comm: Any) -> Tensor:
    """All rows along ``dim`` on every rank of ``comm``, in the dtype of the ``own`` ones."""
    if split.num_patches == 1:
        return own
    shapes = [(*own.shape[:dim], rows, *own.shape[dim + 1 :]) for rows in split.sizes]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = comm.all_gather(own.reshape(-1), sizes, kind="output").wait()
    return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim)


class BandedTail:
    """The tail of one decoder from a module on.

    A band reads its rows and as many around them as the layers of the tail reach, so that no layer has a halo. What
    needs the whole picture is a norm's moments: for each norm all bands run that far, and once more for the result.
    So memory is that of one band, and arithmetic grows with the norms in the tail.

    Args:
        tail: of the decoder.
        first: the module at which bands begin.
        layers: of the decoder, all.
        holder: of these layers.
    """

    def __init__(self, tail: Tail, first: int, layers: Sequence[Layer], holder: FrameHolder) -> None:
        self._tail, self._first, self._holder = tail, first, holder
        inside = {id(module) for each in tail.modules[first:] for module in each.modules()}
        self._layers = [layer for layer in layers if id(layer.module) in inside]
        halos = [layer for layer in self._layers if isinstance(layer, HaloLayer)]
        self._level = halos[0].level
        self._reads_whole = isinstance(halos[0], PatchConv) and halos[0].reads_whole

    def head(self, forward: Callable[[], Any]) -> Tensor:
        """What the first module of the tail is called with in ``forward``, which goes no further."""
        handle = self._tail.modules[self._first].register_forward_pre_hook(_reached)
        try:
            forward()
        except Reached as reached:
            return reached.x
        finally:
            handle.remove()
        raise AssertionError("the decoder did not come to its tail")

    def reader(self, frame: Frame) -> Chain:
        """What the whole tail reads."""
        split = frame.split(self._level)
        readers = [layer.reach(frame)[2] for layer in self._layers if isinstance(layer, HaloLayer)]
        return Chain(tuple(readers), None if split.is_ring else split.size)

    @property
    def num_passes(self) -> int:
        """How often all bands run."""
        return 1 + sum(isinstance(layer, PatchGroupNorm) for layer in self._layers)

    def num_around(self, frame: Frame) -> int:
        """Rows of the picture that are computed for a band beyond its own."""
        unit = 1 << self._level
        row = frame.split(0).size // 2 // unit * unit
        reads = Chain(self.reader(frame).readers).reads(Span(row, row + unit))
        return (len(reads) << self._level) - unit

    def run(self, x: Tensor, frame: Frame, num: int) -> Tensor:
        """Own rows of the picture from own rows ``x`` at the first module (the whole where that reads it)."""
        reader, own = self.reader(frame), frame.split(0).span(frame.patch)
        source = self._source(x, frame, reader, own)
        moments: dict[str, Tensor] = {}
        asking = _Asking()
        while True:
            made: Tensor | None = None
            parts: list[Tensor] = []
            key = ""
            for span in own.cut(num):
                try:
                    rows = self._band(source, frame, reader, span, moments, asking)
                except _Unknown as unknown:
                    key = unknown.key
                    parts.append(unknown.moments)
                    continue
                made = self._room(rows, frame, len(own)) if made is None else made
                made.narrow(_dim(frame, rows), span.start - own.start, len(span)).copy_(rows)
                del rows
            if made is not None:
                return made
            moments[key] = frame.exchange.moments(key, _together(parts))

    def rehearse(self, x: Tensor, frame: Frame, num: int, pretending: Exchange) -> Tensor:
        """As `run`, of one band with as much around it as any, and once: as much memory, and little work."""
        reader, own = self.reader(frame), frame.split(0).span(frame.patch)
        source = self._source(x, frame, reader, own)
        longest = max(own.cut(num), key=lambda span: (len(span), len(reader.reads(span))))
        rows = self._band(source, frame, reader, longest, {}, pretending)
        made = self._room(rows, frame, len(own))
        made.narrow(_dim(frame, rows), 0, len(longest)).copy_(rows)
        return made

    def _room(self, rows: Tensor, frame: Frame, num_own: int) -> Tensor:
        shape = list(rows.shape)
        shape[_dim(frame, rows)] = num_own
        return rows.new_empty(shape)

    def _source(self, x: Tensor, frame: Frame, reader: Chain, own: Span) -> _Source:
        """What the bands of ``own`` read, halos of the neighbours included."""
        dim = _dim(frame, x)
        if self._reads_whole:
            return _Source(dim, whole=x)
        inputs, outputs = frame.split(self._level), frame.split(0)
        plan = halo(inputs, outputs, reader, frame.patch)
        arrived: Mapping[int, Tensor] = {}
        if plan.links:
            arrived = frame.exchange.neighbours("bands", x, plan, dim).wait()
        pieces, row = [], reader.reads(own).start
        for part in plan.parts:
            assert part.peer is not None, "a chain reads no rows beyond the picture"
            mine = part.peer == frame.patch
            rows = (x if mine else arrived[part.peer]).narrow(dim, part.start, part.rows)
            pieces.append((row, rows if mine else rows.clone()))  # what arrived is the exchange's
            row += part.rows
        return _Source(dim, pieces)

    def _band(
        self, source: _Source, frame: Frame, reader: Chain, out: Span, moments: dict[str, Tensor], exchange: Exchange
    ) -> Tensor:
        """Rows ``out`` of the picture."""
        reads, level = reader.reads(out), self._level
        rows = [len(reads) << (level - i) if i <= level else 0 for i in range(len(frame.levels.splits))]
        cores = {}
        for i in range(level + 1):
            start = reads.start << (level - i)
            # As patches are halved, so that each row of a level belongs to one band.
            cores[rows[i]] = Span(-(-out.start >> i), -(-out.stop >> i)).relative_to(start)
        levels = Levels(
            tuple(Split((0, size)) for size in rows),
            frame.levels.across,
            frame.levels.strides,
            frame.levels.is_ring_across,
            tuple((size,) for size in rows),
        )
        self._holder.frame = Frame(0, frame.dim, levels, exchange, band=Band(cores, moments))
        try:
            made = self._tail.run(self._first, source.rows(reads))
        finally:
            self._holder.frame = frame
        return made.narrow(_dim(frame, made), out.start - (reads.start << level), len(out))


class _Source:
    """Rows in pieces, each with the row of the picture that it begins with; or ``whole``, all of them."""

    def __init__(self, dim: int, pieces: Sequence[tuple[int, Tensor]] = (), whole: Tensor | None = None) -> None:
        self._dim, self._pieces, self._whole = dim, pieces, whole

    def rows(self, span: Span) -> Tensor:
        """Rows ``span``; without a copy where one piece has them all."""
        if self._whole is not None:
            return rows_of(self._whole, span, self._dim)
        found = []
        for start, rows in self._pieces:
            inside = span & Span(start, start + rows.shape[self._dim])
            if len(inside):
                found.append(rows.narrow(self._dim, inside.start - start, len(inside)))
        return concatenated(found, self._dim)


class _Asking:
    """See Exchange: of a band, which has all the rows that it reads, and of whose norms the moments are asked for."""

    kind = "sync"
    sees_peers = False
    is_slow = False
    recall: Recall | None = None

    def begin(self) -> None:
        """See Exchange."""

    def neighbours(
        self, key: str, patch: Tensor, plan: Halo, dim: int, kind: str = "halo"
    ) -> Pending[Mapping[int, Tensor]]:
        """See Exchange."""
        raise AssertionError(f"{key} of a band asks for rows")

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
        raise AssertionError(f"{key} of a band asks for the whole picture")

    def moments(self, key: str, own: Tensor) -> NoReturn:
        """See Exchange."""
        raise _Unknown(key, own)

    def finish(self) -> bool:
        """See Exchange."""
        return True


def _dim(frame: Frame, x: Tensor) -> int:
    """The split dim of a picture ``[B, C, H, W]``, or of one with frames before its sides."""
    return x.ndim - 4 + frame.dim


def _reached(module: Any, args: tuple[Any, ...]) -> NoReturn:
    raise Reached(args[0])


def _together(parts: Sequence[Tensor]) -> Tensor:
    """Moments ``[1 + 2K]`` of several bands as those of one patch, see moments.py; a band may have no rows."""
    counts = torch.stack([part[0] for part in parts])
    total = counts.sum()
    values = combine(parts).reshape(-1)
    return torch.cat([total.reshape(1), torch.where(total > 0, values, 0.0)])  # without any row, 0 / 0 is put right
