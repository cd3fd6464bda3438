"""What is left of earlier places of a patch that moves: the rows that it has not seen since, and those near borders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain

from .spans import Span

Visit = tuple[Span, ...]
"""Rows of the picture at each level, from where they start and around its end."""


def newest(visits: Sequence[Visit], sizes: Sequence[int]) -> list[tuple[tuple[Span, ...], ...]]:
    """Of each visit, at each level, the rows that no later one has, counted from its first row.

    Args:
        visits: from the oldest to the newest.
        sizes: rows of the whole picture at each level.
    """
    by_level = [_newest([visit[level] for visit in visits], size) for level, size in enumerate(sizes)]
    return list(zip(*by_level, strict=True)) if by_level else [() for _ in visits]


def _newest(spans: Sequence[Span], size: int) -> list[tuple[Span, ...]]:
    taken: set[int] = set()
    left: list[tuple[Span, ...]] = []
    for span in reversed(spans):
        places = []
        for place in range(len(span)):
            row = (span.start + place) % size
            if row not in taken:
                taken.add(row)
                places.append(place)
        left.append(tuple(_runs(places)))
    return left[::-1]


def _runs(places: Iterable[int]) -> Iterable[Span]:
    start = stop = -1
    for place in chain(places, [None]):
        if place == stop:
            stop += 1
            continue
        if stop > start:
            yield Span(start, stop)
        if place is not None:
            start, stop = place, place + 1


@lru_cache(maxsize=1024)
def borders(size: int, grain: int, margins: tuple[int, int]) -> tuple[int, ...]:
    """Which of ``size`` rows lie in a margin before or after a multiple of ``grain``."""
    before, after = margins
    return tuple(row for row in range(size) if row % grain < after or row % grain >= grain - before)


@lru_cache(maxsize=1024)
def near(kept: tuple[int, ...], start: int, count: int, size: int) -> tuple[int, ...]:
    """Which of ``count`` rows from ``start`` on, counted from there, are ``kept``."""
    return tuple(i for i in range(count) if (start + i) % size in kept)
