"""What a layer reads along one dim: convolutions, interpolation, attention to the neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from .spans import Span, Split


class Reader(Protocol):
    """A layer's appetite along one dim."""

    def reads(self, out: Span) -> Span:
        """The input rows behind output rows ``out`` (not empty); may reach beyond the picture, where zeros are."""
        ...

    def __hash__(self) -> int:
        """Plans are remembered by reader."""
        ...


@dataclass(frozen=True)
class Window:
    """A convolution or pooling along one dim."""

    kernel: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)  # zeros before the first and after the last row of the picture
    dilation: int = 1

    @property
    def reach(self) -> int:
        """Rows from the first to the last tap."""
        return self.dilation * (self.kernel - 1) + 1

    def out_size(self, size: int) -> int:
        """Output rows for ``size`` input rows."""
        return (size + sum(self.padding) - self.reach) // self.stride + 1

    def lack(self, size: int, outputs: int) -> int:
        """Rows that ``outputs`` ask for beyond ``size`` input rows and the padding after them."""
        return max((outputs - 1) * self.stride + self.reach - size - sum(self.padding), 0)

    def reads(self, out: Span) -> Span:
        """See Reader."""
        start = out.start * self.stride - self.padding[0]
        return Span(start, (out.stop - 1) * self.stride - self.padding[0] + self.reach)


@dataclass(frozen=True)
class Nearest:
    """Nearest-neighbour interpolation from ``in_size`` to ``out_size`` rows, as ``torch.nn.functional.interpolate``.

    torch computes floor(row * float32(in/out)); the exact quotient used here floors to the same row for every out of
    2 in - 1, 2 in, 2 in + 1, since it is never within rounding of a whole number except where it is exact in float32.
    """

    in_size: int
    out_size: int

    def source(self, row: int) -> int:
        """The input row that output ``row`` copies."""
        return row * self.in_size // self.out_size

    def reads(self, out: Span) -> Span:
        """See Reader."""
        return Span(self.source(out.start), self.source(out.stop - 1) + 1)


@dataclass(frozen=True)
class Chain:
    """Several layers, one after the other, as one: what the first reads so that the last can make its rows.

    ``readers`` are theirs, in order. With ``size``, the rows of input, it reads none beyond the picture, where each
    layer has zeros of its own.
    """

    readers: tuple[Reader, ...]
    size: int | None = None

    def reads(self, out: Span) -> Span:
        """See Reader."""
        for reader in reversed(self.readers):
            out = reader.reads(out)
        return out if self.size is None else out & Span(0, self.size)


@dataclass(frozen=True)
class Nearby:
    """Attention to a patch and the nearer ``share`` (0 to 1) of the patch on each side of it.

    Patches without rows are passed over: the next that has some is the neighbour. On a ring, the last patch is before
    the first; no row is read twice.
    """

    split: Split
    share: float

    def reads(self, out: Span) -> Span:
        """See Reader. ``out`` is one of the patches."""
        patches = [span for span in map(self.split.span, range(self.split.num_patches)) if len(span)]
        place = patches.index(out)
        before, after = patches[max(place - 1, 0) : place], patches[place + 1 : place + 2]
        if self.split.is_ring and len(patches) > 1:
            before, after = before or patches[-1:], after or patches[:1]
        num_before = self._rows(before)
        num_after = min(self._rows(after), self.split.size - len(out) - num_before)
        return Span(out.start - num_before, out.stop + num_after)

    def _rows(self, neighbour: Sequence[Span]) -> int:
        # Rounded up, but not by the last bit of a product that should be whole.
        return ceil(round(self.share * sum(map(len, neighbour)), 6))
