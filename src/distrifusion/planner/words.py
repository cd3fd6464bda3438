"""What one rank says at each seam of a step, to whom, and how many bytes that is, as numbers or as a codec's frame.

Written from the definitions, and not with the code that sends: see `traffic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

from ..config import ParallelConfig
from ..geometry import Levels
from .anatomy import Anatomy, Context, Conv, Crossing, Joint, Norm, Seam, Sums, Total, Upsampling

WORD = 16  # bytes: what lies in a chunk, and what a frame is made of, is whole words


@dataclass(frozen=True)
class Said:
    """What one rank says at one seam: numbers of a shape, to some peers or to all."""

    kind: str
    shapes: dict[int | None, tuple[int, ...]]  # by receiver; None: everyone
    item: int
    codec: str | None

    def num_bytes(self, receiver: int | None, coded: bool) -> int:
        """As they travel."""
        shape = self.shapes[receiver]
        return frame(shape, self.codec) if coded and self.codec is not None else prod(shape) * self.item


class Rank:
    """One rank's words of a step, seam by seam. ``shares_out``: it computes its share of what is not of the picture."""

    def __init__(
        self, anatomy: Anatomy, levels: Levels, config: ParallelConfig, batch: int, patch: int, shares_out: bool
    ) -> None:
        self._anatomy, self._levels, self.config = anatomy, levels, config
        self._batch, self.patch, self._shares_out = batch, patch, shares_out
        self.num_patches = levels.splits[0].num_patches

    @cached_property
    def words(self) -> list[Said]:
        """At each seam; without shapes where it has nothing to say."""
        return [self._at(seam) for seam in self._anatomy.seams]

    def _at(self, seam: Seam) -> Said:
        assert not isinstance(seam, Total | Joint | Crossing), "an anatomy of slices, or of stages"
        batch, item, codecs = self._batch, self._anatomy.item, self.config.codecs
        if isinstance(seam, Norm):
            return Said("moments", {None: (1 + 2 * batch * seam.groups,)}, 4, None)
        if isinstance(seam, Sums):
            return Said("context", {None: (batch, *seam.shape)}, item, codecs.get("context"))
        across = self._levels.across[seam.level]
        if isinstance(seam, Context) and self.config.context_window is None:
            tokens = seam.frames * self._levels.splits[seam.level].sizes[self.patch] * across
            tokens += sum(self._share(count) for count in seam.others)
            shape = (batch, *seam.before, tokens, *seam.after, seam.width)
            return Said("context", {None: shape}, item, codecs.get("context"))
        shapes: dict[int | None, tuple[int, ...]] = {}
        for peer in range(self.num_patches):
            rows = self._rows_for(seam, peer) if peer != self.patch else 0
            if rows:
                sides = (rows, across) if self.config.split == "rows" else (across, rows)
                shapes[peer] = (
                    (batch, *sides, seam.width) if isinstance(seam, Context) else (batch, seam.channels, *sides)
                )
        kind = "context" if isinstance(seam, Context) else "halo"
        return Said(kind, shapes, item, codecs.get(kind))

    def _share(self, count: int) -> int:
        """Tokens of ``count`` that this rank computes for all, in proportion to its rows; 0 where all compute all."""
        shares = self._levels.splits[-1].shares(count) if self._shares_out else None
        return 0 if shares is None else shares.sizes[self.patch]

    def _rows_for(self, seam: Conv | Upsampling | Context, peer: int) -> int:
        """How many of the own rows ``peer`` reads."""
        split = self._levels.splits[seam.level]
        mine, theirs = split.span(self.patch), split.span(peer)
        if isinstance(seam, Context):
            filled = [patch for patch, size in enumerate(split.sizes) if size]
            both = {self.patch, peer} <= set(filled)
            is_next = both and abs(filled.index(self.patch) - filled.index(peer)) == 1
            share = self.config.context_window or 0.0
            return ceil(round(share * len(mine), 6)) if is_next else 0
        outputs = self._levels.splits[seam.level_out]
        theirs = outputs.span(peer)
        if not len(theirs):
            return 0
        first, last = (self._reads(seam, row) for row in (theirs.start, theirs.stop - 1))
        start, stop = max(first[0], mine.start), min(last[1] + 1, mine.stop)
        return max(stop - start, 0)

    def _reads(self, seam: Conv | Upsampling, row: int) -> tuple[int, int]:
        """The first and the last row of input that output ``row`` is made of."""
        if isinstance(seam, Upsampling):
            size, out_size = (self._levels.splits[level].size for level in (seam.level, seam.level_out))
            source = min(row * size // out_size, size - 1)
            return source, source
        window = seam.windows[self.config.split == "cols"]
        taps = [row * window.stride - window.padding[0] + window.dilation * tap for tap in range(window.kernel)]
        return taps[0], taps[-1]


def frame(shape: Sequence[int], codec: str) -> int:
    """Bytes of a residual of ``shape`` as a codec writes it: a header of a word, then its payload in whole words."""
    return WORD + in_whole_words(payload(shape, codec)) if prod(shape) else 0


def payload(shape: Sequence[int], codec: str) -> int:
    """Its bytes: codes of a few bits; beside them the factors of rows and columns of the nearest matrix to a square."""
    count = prod(shape)
    factors = min(prod(shape[:i]) + prod(shape[i:]) for i in range(len(shape) + 1))
    return {
        "fp16": 2 * count,
        "bf16": 2 * count,
        "int8": count + 2 * factors,
        "int4": ceil(count / 2) + 2 * factors,
        "int2": ceil(count / 4) + 2 + factors,
        "1bit": ceil(count / 8) + 2 + factors,
    }[codec]


def in_whole_words(num_bytes: int) -> int:
    """Bytes with the zeros after them."""
    return -(-num_bytes // WORD) * WORD
