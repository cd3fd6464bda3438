"""Patches whose borders move from step to step, and which may overlap."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .spans import Span, Split, laps


@dataclass(frozen=True)
class Moved:
    """Patches of one step that stand alone: each computes its window, which is its rows and ``overlap`` on each side.

    The rows of ``split`` may begin anywhere (its ``origin``); then one patch lies at both ends of the picture. A window
    does not reach beyond the picture unless its ends meet.
    """

    split: Split
    overlap: int = 0

    def window(self, patch: int) -> Span:
        """Rows of the picture that ``patch`` computes, from ``start`` on and around the end of the picture."""
        before, after = self.margins(patch)
        start = (self.split.origin + self.split.bounds[patch] - before) % self.split.size
        return Span(start, start + before + len(self.split.span(patch)) + after)

    def margins(self, patch: int) -> tuple[int, int]:
        """Rows that ``patch`` computes before its own ones and after them."""
        size, rows = self.split.size, len(self.split.span(patch))
        room = (self.overlap, self.overlap)
        if not self.split.is_ring:
            start = (self.split.origin + self.split.bounds[patch]) % size
            stop = start + rows
            room = (start, (size if stop <= size else size + start) - stop)
        most = (size - rows) // 2  # no row twice
        return min(self.overlap, room[0], most), min(self.overlap, room[1], most)

    @property
    def windows(self) -> tuple[Span, ...]:
        """All of them."""
        return tuple(self.window(patch) for patch in range(self.split.num_patches))


@dataclass(frozen=True)
class Blend:
    """How a patch's rows come of the windows that cover them."""

    sends: tuple[tuple[int, tuple[int, ...]], ...]  # (peer, rows of my window that it owns)
    recvs: tuple[tuple[int, tuple[int, ...]], ...]  # (window of, rows of mine that it covers), my own among them
    weights: tuple[tuple[float, ...], ...]  # of each of these rows; over all windows they add up to 1


@lru_cache(maxsize=1024)
def blend(moved: Moved, patch: int) -> Blend:
    """The weighted average of ``patch``'s rows over the windows (MultiDiffusion, arXiv 2302.08113, equation 5).

    Weights rise linearly over the rows that two windows share, so that no window ends all at once.
    """
    num, size = moved.split.num_patches, moved.split.size
    places = [{row: i for i, row in enumerate(_rows(window, size))} for window in moved.windows]
    own = [[row for run in moved.split.runs(i) for row in range(run.start, run.stop)] for i in range(num)]
    sends = tuple(
        (peer, tuple(places[patch][row] for row in own[peer] if row in places[patch]))
        for peer in range(num)
        if peer != patch and any(row in places[patch] for row in own[peer])
    )
    weights = [_weights(moved, i) for i in range(num)]
    total = [sum(weights[i][places[i][row]] for i in range(num) if row in places[i]) for row in own[patch]]
    recvs, shares = [], []
    for i in range(num):
        covered = [(place, places[i][row]) for place, row in enumerate(own[patch]) if row in places[i]]
        if covered:
            recvs.append((i, tuple(place for place, _ in covered)))
            shares.append(tuple(weights[i][there] / total[place] for place, there in covered))
    return Blend(sends, tuple(recvs), tuple(shares))


def _rows(window: Span, size: int) -> list[int]:
    return [row for run in laps(window, size) for row in range(run.start, run.stop)]


def _weights(moved: Moved, patch: int) -> list[float]:
    """Of the rows of ``patch``'s window: 1 but for where it has a margin, a ramp over that and as many rows inside."""
    rows, margins = len(moved.window(patch)), moved.margins(patch)
    ramps = [[min((i + 0.5) / (2 * margin), 1.0) if margin else 1.0 for i in range(rows)] for margin in margins]
    return [min(first, last) for first, last in zip(ramps[0], reversed(ramps[1]), strict=True)]
