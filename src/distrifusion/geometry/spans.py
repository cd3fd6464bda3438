"""Spans of rows, and splits of a picture into them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from ..errors import ConfigError


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

    def cut(self, num: int) -> list[Span]:
        """The same rows in ``num`` spans as equal as possible, or in as many as there are rows."""
        bounds = _bounds(len(self), (1.0,) * min(num, len(self)), 1)
        return [Span(self.start + start, self.start + stop) for start, stop in pairwise(bounds)]

    def relative_to(self, origin: int) -> Span:
        """The same rows counted from ``origin``."""
        return Span(self.start - origin, self.stop - origin)


@dataclass(frozen=True)
class Split:
    """Rows ``0 .. size-1`` cut into consecutive patches, one per rank of the patch axis; a patch may be empty.

    Patch ``i`` is ``bounds[i] .. bounds[i+1]-1``, counted from row ``origin`` of the picture and around its end. With
    ``is_ring``, layers see the first row after the last one.
    """

    bounds: tuple[int, ...]
    is_ring: bool = False
    origin: int = 0

    @classmethod
    def even(cls, size: int, num_patches: int, unit: int = 1, what: str = "rows of latent") -> Split:
        """Patches as equal as possible. See `weighted`."""
        return cls.weighted(size, (1.0,) * num_patches, unit, what)

    @classmethod
    def weighted(cls, size: int, weights: tuple[float, ...], unit: int = 1, what: str = "rows of latent") -> Split:
        """Patches in proportion to ``weights``, on multiples of ``unit`` (a power of two) where that costs no balance.

        With weights that are speeds, no other split of whole units lets the slowest patch end sooner; each patch has
        rows (STADI, arXiv 2509.04719, has them in proportion to speed too). Patches on multiples of 2^levels stay
        aligned down the U-Net, which saves halos at its upsamplers. The unit is halved until no patch takes more than
        an eighth longer than in exact proportion: the slowest rank sets the pace.

        Args:
            size: rows in all.
            weights: one for each patch, positive.
            unit: rows.
            what: what messages call the rows.

        Raises:
            ConfigError: fewer rows than patches; says the largest world.
        """
        if size < len(weights):
            raise ConfigError(
                f"{size} {what} cannot be split over {len(weights)} ranks: the largest world for this picture is {size}"
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
        """Rows of ``patch``, counted from the origin."""
        return Span(self.bounds[patch], self.bounds[patch + 1])

    def place(self, patch: int) -> Span:
        """Rows of ``patch`` from where they start in the picture, which may go on at its other end."""
        if not self.sizes[patch]:
            return Span(0, 0)
        start = (self.origin + self.bounds[patch]) % self.size
        return Span(start, start + self.sizes[patch])

    def runs(self, patch: int) -> tuple[Span, ...]:
        """The same as rows of the picture: two spans where it goes on at the other end, none if it is empty."""
        return tuple(laps(self.place(patch), self.size))

    def owned(self, reach: Span) -> Iterator[tuple[int | None, Span]]:
        """Who owns the rows of the picture in ``reach``, in order: (patch, its rows, counted from its first one).

        Rows beyond the picture are the other end's on a ring, else nobody's: (None, as many rows).
        """
        row = reach.start
        while row < reach.stop:
            lap, place = divmod(row, self.size)
            if lap and not self.is_ring:
                stop = reach.stop if lap > 0 else min(reach.stop, 0)
                yield None, Span(0, stop - row)
            else:
                place = (place - self.origin) % self.size
                owner = bisect_right(self.bounds, place) - 1
                stop = min(reach.stop, row + self.bounds[owner + 1] - place)
                first = place - self.bounds[owner]
                yield owner, Span(first, first + stop - row)
            row = stop

    def shares(self, count: int) -> Split | None:
        """``count`` of something else, to be shared out like the rows; None where a patch would get none of them."""
        bounds = tuple(count * bound // self.size for bound in self.bounds)
        return Split(bounds) if all(start < stop for start, stop in pairwise(bounds)) else None

    def strided(self, stride: int, size: int) -> Split:
        """The split after a layer of ``stride`` that makes ``size`` rows of these."""
        assert not self.origin, "only patches that stand alone are moved, see Levels.alone"
        inner = [min(-(-bound // stride), size) for bound in self.bounds[:-1]]
        return Split((*inner, size), self.is_ring)


def laps(span: Span, size: int) -> Iterator[Span]:
    """``span``, from wherever it starts and however long, as spans of rows ``0 .. size-1``, in order."""
    row = span.start
    while row < span.stop:
        first = row % size
        stop = min(size, first + span.stop - row)
        yield Span(first, stop)
        row += stop - first


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
