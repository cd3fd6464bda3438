"""One picture at every resolution of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, prod

from ..errors import ConfigError
from .readers import Window
from .spans import Span, Split, laps


@dataclass(frozen=True)
class Levels:
    """The split along one dim and the size of the other, at every level.

    Args:
        splits: who owns which rows.
        across: the size of the dim that is not split.
        strides: rows of each level but the last behind one of the next.
        is_ring_across: whether the dim that is not split goes around, too.
        strips: of a patch that stands alone, the rows of each part of it that the picture's end divides; empty where
            patches are parts of one picture.
    """

    splits: tuple[Split, ...]
    across: tuple[int, ...]
    strides: tuple[int, ...] = ()
    is_ring_across: bool = False
    strips: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def down(
        cls, size: int, across: int, weights: tuple[float, ...], along: Sequence[Window], other: Sequence[Window]
    ) -> Levels:
        """Levels of a model that shrinks by ``along`` (and ``other`` across) from each level to the next.

        The patches have rows in proportion to ``weights``, see `Split.weighted`.

        Raises:
            ConfigError: fewer rows than patches, or a picture too small for the model's downsamplings.
        """
        strides = tuple(window.stride for window in along)
        splits, widths = [Split.weighted(size, weights, prod(strides))], [across]
        for window, window_across in zip(along, other, strict=True):
            smaller, narrower = window.out_size(splits[-1].size), window_across.out_size(widths[-1])
            if smaller < 1 or narrower < 1:
                raise ConfigError(f"a latent of {size} x {across} is too small for {len(along)} downsamplings")
            splits.append(splits[-1].strided(window.stride, smaller))
            widths.append(narrower)
        return cls(tuple(splits), tuple(widths), strides)

    @property
    def unit(self) -> int:
        """Rows of the first level behind one of the last."""
        return prod(self.strides)

    def grains(self, grain: int) -> tuple[int, ...]:
        """Rows of each level that ``grain`` rows of the first one are; at least 1."""
        return tuple(max(grain // prod(self.strides[:level]), 1) for level in range(len(self.splits)))

    def grain(self, *, by_patch: bool, overlap: int) -> int:
        """Rows of the first level of which all borders are multiples, of patches that move by multiples of `whole_rows`
        or, ``by_patch``, by `rows_of_a_patch`; their windows begin ``overlap`` rows before.
        """
        if not by_patch:
            return gcd(self.whole_rows, overlap)
        steps = self.rows_of_a_patch(self.whole_rows), self.rows_of_a_patch(self.unit)
        return gcd(*steps, *self.splits[0].bounds, overlap)

    def rows_of_a_patch(self, unit: int) -> int:
        """Of the smallest one, by which it too comes by all rows, in multiples of ``unit``."""
        return max(min(self.splits[0].sizes) // unit, 1) * unit

    @property
    def whole_rows(self) -> int:
        """Rows of the first level by whose multiples patches move without coming between two rows of a deeper level,
        where their own borders are not there already.
        """
        return gcd(self.unit, *self.splits[0].bounds)

    def ring(self, along: bool, across: bool) -> Levels:
        """The same picture with ends that meet.

        Raises:
            ConfigError: a side that goes around and does not shrink evenly.
        """
        for size, is_ring in ((self.splits[0].size, along), (self.across[0], across)):
            if is_ring and size % self.unit:
                raise ConfigError(
                    f"a latent of {size} rows or columns cannot go around: this model needs a multiple of {self.unit}"
                )
        splits = tuple(replace(split, is_ring=along) for split in self.splits)
        return replace(self, splits=splits, is_ring_across=across)

    def with_rings(self, rows: bool, cols: bool, dim: int) -> Levels:
        """`ring` by sides of the picture, of which dim 2 is cut along its rows and dim 3 along its columns."""
        if not rows and not cols:
            return self
        return self.ring(rows, cols) if dim == 2 else self.ring(cols, rows)

    def alone(self, window: Span) -> Levels:
        """A patch that is a picture of its own: rows ``window`` of this one, which may go on at the other end.

        It is patch 0 of two, the other one being the rest. Its rows are halved from its own first row on, whatever the
        rows of the picture would be, so that no layer of it asks for rows beyond; and from the picture's end on again
        where that divides it, unless the ends meet.
        """
        whole = self.splits[0]
        strips = [len(run) for run in ((window,) if whole.is_ring else laps(window, whole.size))]
        splits, all_strips, start = [], [], window.start
        for level, split in enumerate(self.splits):
            if level:
                stride = self.strides[level - 1]
                strips, start = [-(-rows // stride) for rows in strips], start // stride
            size = max(split.size, sum(strips))
            splits.append(Split((0, sum(strips), size), whole.is_ring, start))
            all_strips.append(tuple(strips))
        return replace(self, splits=tuple(splits), strips=tuple(all_strips))
