"""Which rows belong to whom, and which rows a layer must borrow. Integers only: no tensors, no communication.

Everything is said along one dim, rows or columns; "row" below stands for either. The one rule that carries the rest
(distdl's): what a rank borrows follows from the rows of *output* that it owns, so stride, uneven patches and kernels
larger than a patch need no special case, and what I send is my peer's need by the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from math import ceil
from typing import Protocol

from .errors import ConfigError


@dataclass(frozen=True, order=True)
class Span:
    """Rows ``start .. stop-1``; empty where ``stop <= start``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __and__(self, other: Span) -> Span:
        start = max(self.start, other.start)
        return Span(start, max(min(self.stop, other.stop), start))

    def relative_to(self, origin: int) -> Span:
        """The same rows counted from ``origin``."""
        return Span(self.start - origin, self.stop - origin)


@dataclass(frozen=True)
class Split:
    """Rows ``0 .. size-1`` cut into consecutive patches, one per rank of the patch axis; a patch may be empty.

    Patch ``i`` is ``bounds[i] .. bounds[i+1]-1``.
    """

    bounds: tuple[int, ...]

    @classmethod
    def even(cls, size: int, num_patches: int, unit: int = 1) -> Split:
        """Patches as equal as possible. See `weighted`."""
        return cls.weighted(size, (1.0,) * num_patches, unit)

    @classmethod
    def weighted(cls, size: int, weights: tuple[float, ...], unit: int = 1) -> Split:
        """Patches in proportion to ``weights``, on multiples of ``unit`` (a power of two) where that costs no balance.

        With weights that are speeds, no other split of whole units lets the slowest patch end sooner; each patch has
        rows (STADI, arXiv 2509.04719, has them in proportion to speed too). Patches on multiples of 2^levels stay
        aligned down the U-Net, which saves halos at its upsamplers. The unit is halved until no patch takes more than
        an eighth longer than in exact proportion: the slowest rank sets the pace.

        Args:
            size: rows in all.
            weights: one for each patch, positive.
            unit: rows.

        Raises:
            ConfigError: fewer rows than patches; says the largest world.
        """
        if size < len(weights):
            raise ConfigError(
                f"{size} rows of latent cannot be split over {len(weights)} ranks: "
                f"the largest world for this picture is {size}"
            )
        return cls(_bounds(size, weights, unit))

    @property
    def size(self) -> int:
        """Rows in all."""
        return self.bounds[-1]

    @property
    def num_patches(self) -> int:
        """Number of patches, empty ones included."""
        return len(self.bounds) - 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each patch."""
        return tuple(len(self.span(i)) for i in range(self.num_patches))

    def span(self, patch: int) -> Span:
        """Rows of ``patch``."""
        return Span(self.bounds[patch], self.bounds[patch + 1])

    def strided(self, stride: int, size: int) -> Split:
        """The split after a layer of ``stride`` that makes ``size`` rows of these."""
        inner = [min(-(-bound // stride), size) for bound in self.bounds[:-1]]
        return Split((*inner, size))


@lru_cache(maxsize=1024)
def _bounds(size: int, weights: tuple[float, ...], unit: int) -> tuple[int, ...]:
    """See `Split.weighted`."""
    while True:
        counts = _shares(-(-size // unit), weights)
        bounds = (0, *(min(unit * end, size) for end in accumulate(counts)))
        rows = [stop - start for start, stop in pairwise(bounds)]
        is_balanced = all(8 * r * sum(weights) <= 9 * size * w for r, w in zip(rows, weights, strict=True))
        if unit == 1 or (min(counts) > 0 and is_balanced):
            return bounds
        unit //= 2


def _shares(num_units: int, weights: tuple[float, ...]) -> list[int]:
    """Units of each patch: one at least where there are so many, and each further one where it is done first."""
    counts = [int(i < num_units) for i in range(len(weights))]
    for _ in range(num_units - len(weights)):
        ends = [(count + 1) / weight for count, weight in zip(counts, weights, strict=True)]
        counts[ends.index(min(ends))] += 1
    return counts


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
        return min(row * self.in_size // self.out_size, self.in_size - 1)

    def reads(self, out: Span) -> Span:
        """See Reader."""
        return Span(self.source(out.start), self.source(out.stop - 1) + 1)


@dataclass(frozen=True)
class Nearby:
    """Attention to a patch and the nearer ``share`` (0 to 1) of the patch on each side of it.

    Patches without rows are passed over: the next that has some is the neighbour.
    """

    split: Split
    share: float

    def reads(self, out: Span) -> Span:
        """See Reader. ``out`` is one of the patches."""
        patches = [span for span in map(self.split.span, range(self.split.num_patches)) if len(span)]
        place = patches.index(out)
        before, after = patches[max(place - 1, 0) : place], patches[place + 1 : place + 2]
        return Span(out.start - self._rows(before), out.stop + self._rows(after))

    def _rows(self, neighbour: Sequence[Span]) -> int:
        # Rounded up, but not by the last bit of a product that should be whole.
        return ceil(round(self.share * sum(map(len, neighbour)), 6))


@dataclass(frozen=True)
class Halo:
    """What one rank must do so that its layer can make the output rows it owns.

    The rows the layer reads are, in order: ``zeros[0]`` rows of zeros, the rows received from lower ranks, the own rows
    ``own`` (relative to the patch; a strided layer may skip its first or last), the rows received from higher ranks,
    ``zeros[1]`` rows of zeros.
    """

    zeros: tuple[int, int]
    own: Span
    sends: tuple[tuple[int, Span], ...]  # (peer, rows relative to my patch)
    recvs: tuple[tuple[int, int], ...]  # (peer, number of rows), in order of rank
    links: frozenset[tuple[int, int]]  # every (sender, receiver) over all ranks
    total_recvs: int  # rows that travel between all ranks
    before: int  # rows received from lower ranks
    after: int  # rows received from higher ranks

    @property
    def num_rows(self) -> int:
        """Rows the layer reads in all."""
        return sum(self.zeros) + self.before + len(self.own) + self.after

    @property
    def is_whole_patch(self) -> bool:
        """Whether the layer reads own rows only: nothing travels and nothing is attached."""
        return not self.recvs and self.zeros == (0, 0)


@lru_cache(maxsize=4096)
def halo(inputs: Split, outputs: Split, reader: Reader, patch: int) -> Halo:
    """The halo of ``patch`` for a layer that turns ``inputs`` into ``outputs``."""
    needs = [_need(inputs, outputs, reader, i) for i in range(inputs.num_patches)]
    mine = inputs.span(patch)
    reach = reader.reads(outputs.span(patch)) if len(outputs.span(patch)) else Span(mine.start, mine.start)
    own = needs[patch] & mine
    sends = tuple(
        (peer, (need & mine).relative_to(mine.start))
        for peer, need in enumerate(needs)
        if peer != patch and len(need & mine)
    )
    recvs = tuple(
        (peer, len(needs[patch] & inputs.span(peer)))
        for peer in range(inputs.num_patches)
        if peer != patch and len(needs[patch] & inputs.span(peer))
    )
    links = frozenset(
        (sender, receiver)
        for receiver, need in enumerate(needs)
        for sender in range(inputs.num_patches)
        if sender != receiver and len(need & inputs.span(sender))
    )
    total = sum(len(need) - len(need & inputs.span(i)) for i, need in enumerate(needs))
    return Halo(
        zeros=(max(-reach.start, 0), max(reach.stop - inputs.size, 0)) if len(reach) else (0, 0),
        own=own.relative_to(mine.start),
        sends=sends,
        recvs=recvs,
        links=links,
        total_recvs=total,
        before=sum(count for peer, count in recvs if peer < patch),
        after=sum(count for peer, count in recvs if peer > patch),
    )


def _need(inputs: Split, outputs: Split, reader: Reader, patch: int) -> Span:
    out = outputs.span(patch)
    if not len(out):
        return Span(0, 0)
    return reader.reads(out) & Span(0, inputs.size)


@dataclass(frozen=True)
class Levels:
    """One picture at every resolution of a model: the split along one dim and the size of the other."""

    splits: tuple[Split, ...]
    across: tuple[int, ...]

    @classmethod
    def down(
        cls, size: int, across: int, weights: tuple[float, ...], along: Sequence[Window], other: Sequence[Window]
    ) -> Levels:
        """Levels of a model that shrinks by ``along`` (and ``other`` across) from each level to the next.

        The patches have rows in proportion to ``weights``, see `Split.weighted`.

        Raises:
            ConfigError: fewer rows than patches, or a picture too small for the model's downsamplings.
        """
        unit = 1
        for window in along:
            unit *= window.stride
        splits, widths = [Split.weighted(size, weights, unit)], [across]
        for window, window_across in zip(along, other, strict=True):
            smaller, narrower = window.out_size(splits[-1].size), window_across.out_size(widths[-1])
            if smaller < 1 or narrower < 1:
                raise ConfigError(f"a latent of {size} x {across} is too small for {len(along)} downsamplings")
            splits.append(splits[-1].strided(window.stride, smaller))
            widths.append(narrower)
        return cls(tuple(splits), tuple(widths))
