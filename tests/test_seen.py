"""Which rows a patch that moves has not seen again since."""

from __future__ import annotations

from random import Random

from distrifusion.geometry import Span, borders, near, newest


def test_each_row_is_the_newest_visit_s() -> None:
    visits = [(Span(0, 4),), (Span(4, 8),), (Span(2, 5),)]
    assert newest(visits, [8]) == [((Span(0, 2),),), ((Span(1, 4),),), ((Span(0, 3),),)]


def test_a_visit_goes_on_at_the_other_end() -> None:
    assert newest([(Span(0, 3),), (Span(6, 9),)], [8]) == [((Span(1, 3),),), ((Span(0, 3),),)]


def test_a_row_in_the_middle_leaves_two_spans() -> None:
    assert newest([(Span(0, 6),), (Span(2, 4),)], [6])[0] == ((Span(0, 2), Span(4, 6)),)


def test_levels_are_apart() -> None:
    visits = [(Span(0, 4), Span(0, 2)), (Span(0, 4), Span(2, 4))]
    assert newest(visits, [4, 4]) == [((), (Span(0, 2),)), ((Span(0, 4),), (Span(0, 2),))]


def test_all_rows_that_were_seen_are_left_once() -> None:
    random, size = Random(0), 13
    for _ in range(50):
        starts = [random.randrange(size) for _ in range(random.randrange(1, 9))]
        spans = [Span(start, start + random.randrange(1, size + 1)) for start in starts]
        left = newest([(span,) for span in spans], [size])
        last = {}  # row -> the visit that has seen it last
        for number, span in enumerate(spans):
            last |= {(span.start + place) % size: number for place in range(len(span))}
        found = {
            (spans[number].start + place) % size: number
            for number, (runs,) in enumerate(left)
            for run in runs
            for place in range(run.start, run.stop)
        }
        assert found == last
        assert sum(len(run) for (runs,) in left for run in runs) == len(last)


def test_only_rows_near_a_border_are_kept() -> None:
    assert borders(16, 8, (1, 1)) == (0, 7, 8, 15)
    assert borders(8, 4, (2, 1)) == (0, 2, 3, 4, 6, 7)
    assert borders(4, 1, (1, 1)) == (0, 1, 2, 3)
    assert near((0, 7, 8, 15), 8, 8, 16) == (0, 7)
    assert near((0, 7, 8, 15), 15, 2, 16) == (0, 1)
