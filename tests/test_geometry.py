"""Who owns which rows and who borrows which: checked by reading every row through the plan, for all kinds of layers."""

import itertools
from typing import Any

import pytest

from distrifusion.errors import ConfigError
from distrifusion.geometry import Halo, Levels, Moved, Nearby, Nearest, Span, Split, Window, blend, halo, laps, moves

WINDOWS = [
    Window(3, 1, (1, 1)),
    Window(1, 1),
    Window(1, 2),
    Window(2, 2),
    Window(3, 2, (1, 1)),
    Window(3, 2, (0, 1)),
    Window(7, 1, (3, 3)),
    Window(3, 1, (2, 2), 2),
    Window(4, 2, (1, 1)),
    Window(5, 3, (2, 2)),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("size", [7, 8, 13, 24])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
def test_every_row_read_arrives_in_order(window: Window, size: int, world: int) -> None:
    inputs = Split.even(size, world)
    outputs = inputs.strided(window.stride, window.out_size(size))
    plans = [halo(inputs, outputs, window, rank) for rank in range(world)]
    for rank, plan in enumerate(plans):
        out = outputs.span(rank)
        rows = rows_of(plan, plans, inputs, rank)
        assert len(rows) == plan.num_rows
        if len(out):
            wanted = window.reads(out)
            assert rows == [i if 0 <= i < size else None for i in range(wanted.start, wanted.stop)]
            assert window.out_size(len(rows) - sum(window.padding)) == len(out)
        else:
            assert rows == []
    travelling = sum(count for plan in plans for _, count in plan.recvs)
    assert {plan.total_recvs for plan in plans} == {travelling}


def rows_of(plan: Halo, plans: list[Halo], inputs: Split, rank: int) -> list[int | None]:
    """The rows of the picture that ``plan`` puts together, from what the peers' plans send."""
    sent: dict[int, list[int]] = {}
    for peer, theirs in enumerate(plans):
        runs = [row for run in inputs.runs(peer) for row in range(run.start, run.stop)]
        for target, spans in theirs.sends:
            if target == rank:
                sent[peer] = [runs[i] for span in spans for i in range(span.start, span.stop)]
    assert {peer: len(rows) for peer, rows in sent.items()} == dict(plan.recvs)  # what I expect of a peer
    own = [row for run in inputs.runs(rank) for row in range(run.start, run.stop)]
    rows: list[int | None] = []
    for part in plan.parts:
        source = own if part.peer == rank else sent.get(part.peer, []) if part.peer is not None else [None] * part.rows
        rows += source[part.start : part.start + part.rows]
    return rows


@pytest.mark.parametrize("window", [w for w in WINDOWS if w.stride < 3 and w.out_size(24) * w.stride == 24], ids=str)
@pytest.mark.parametrize("size", [8, 24])
@pytest.mark.parametrize("bounds", [(0, 1), (0, 0.5, 1), (0, 0.25, 0.25, 1), (0, 0, 0.125, 0.75, 1, 1)], ids=str)
def test_on_a_ring_rows_beyond_the_picture_are_those_at_its_other_end(
    window: Window, size: int, bounds: tuple[float, ...]
) -> None:
    inputs = Split(tuple(int(bound * size) for bound in bounds), is_ring=True)
    outputs = inputs.strided(window.stride, window.out_size(size))
    world = inputs.num_patches
    plans = [halo(inputs, outputs, window, rank) for rank in range(world)]
    for rank, plan in enumerate(plans):
        out = outputs.span(rank)
        wanted = window.reads(out) if len(out) else Span(0, 0)
        assert rows_of(plan, plans, inputs, rank) == [i % size for i in range(wanted.start, wanted.stop)]


@pytest.mark.parametrize("is_ring", [False, True])
@pytest.mark.parametrize("overlap", [0, 2, 5])
@pytest.mark.parametrize("bounds", [(0, 6, 12, 16), (0, 8, 16), (0, 5, 9, 12, 14, 16)], ids=str)
def test_moved_patches_get_the_rows_that_they_do_not_have(bounds: tuple[int, ...], overlap: int, is_ring: bool) -> None:
    world, size = len(bounds) - 1, 16
    for before, after in itertools.product(range(0, 16, 3), repeat=2):
        split, moved = Split(bounds, is_ring, before), Moved(Split(bounds, is_ring, after), overlap)
        plans = [moves(split, moved.windows, rank) for rank in range(world)]
        held = [{row for run in split.runs(rank) for row in range(run.start, run.stop)} for rank in range(world)]
        for rank, plan in enumerate(plans):
            window = moved.window(rank)
            wanted = [row % size for row in range(window.start, window.stop)]
            assert len(wanted) == len(set(wanted))  # no row twice
            assert rows_of(plan, plans, split, rank) == wanted
            assert sum(count for _, count in plan.recvs) == len(set(wanted) - held[rank])  # no row that it had
            margins, own = moved.margins(rank), moved.split.runs(rank)
            inner = wanted[margins[0] : len(wanted) - margins[1]]
            assert inner == [row for run in own for row in range(run.start, run.stop)]
            if not is_ring:  # no window reaches over the picture's end, but for the patch that lies there itself
                assert len(list(laps(window, size))) == len(own)


@pytest.mark.parametrize("is_ring", [False, True])
@pytest.mark.parametrize("origin", [0, 3, 5])
@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_windows_are_blended_with_weights_that_add_up_to_one(overlap: int, origin: int, is_ring: bool) -> None:
    moved = Moved(Split((0, 6, 12, 16), is_ring, origin), overlap)
    plans = [blend(moved, rank) for rank in range(3)]
    for rank, plan in enumerate(plans):
        rows = moved.split.sizes[rank]
        total = [0.0] * rows
        for (source, places), weights in zip(plan.recvs, plan.weights, strict=True):
            assert all(weight > 0 for weight in weights)
            if source != rank:
                assert len(dict(plans[source].sends)[rank]) == len(places)
            for place, weight in zip(places, weights, strict=True):
                total[place] += weight
        assert total == pytest.approx([1.0] * rows)
        if not overlap:
            assert plan.recvs == ((rank, tuple(range(rows))),)
            assert plan.sends == ()


def test_a_patch_that_stands_alone_is_halved_from_its_own_first_row() -> None:
    windows = [Window(3, 2, (1, 1))] * 2
    levels = Levels.down(21, 8, (1.0,) * 3, windows, windows)
    alone = levels.alone(Span(3, 12))
    assert alone.strips == ((9,), (5,), (3,))
    assert [split.origin for split in alone.splits] == [3, 1, 0]
    assert [split.sizes[0] for split in alone.splits] == [9, 5, 3]
    divided = levels.alone(Span(18, 25))  # three rows at the end of the picture, four at its start
    assert divided.strips == ((3, 4), (2, 2), (1, 1))
    joined = Levels.down(20, 8, (1.0,) * 3, windows, windows).ring(True, False).alone(Span(18, 25))
    assert joined.strips == ((7,), (4,), (2,))


def test_a_ring_must_shrink_evenly() -> None:
    windows = [Window(3, 2, (1, 1))] * 2
    with pytest.raises(ConfigError, match=r"latent of 22 rows or columns cannot go around.*multiple of 4"):
        Levels.down(22, 8, (1.0,) * 3, windows, windows).ring(True, False)
    assert Levels.down(22, 8, (1.0,) * 3, windows, windows).ring(False, True).is_ring_across


def test_halos_reach_direct_neighbours_only_when_patches_are_thick_enough() -> None:
    split = Split.even(64, 7)
    for rank in range(7):
        plan = halo(split, split, Window(3, 1, (1, 1)), rank)
        assert {peer for peer, _ in plan.sends} == {rank - 1, rank + 1} & set(range(7))


@pytest.mark.parametrize(("low", "high"), [(4, 7), (4, 8), (4, 9), (13, 25), (1, 1), (1, 2), (1, 3)])
def test_nearest_agrees_with_torch(low: int, high: int) -> None:
    torch = pytest.importorskip("torch")
    rows = torch.arange(low, dtype=torch.float32).view(1, 1, low, 1)
    wanted = torch.nn.functional.interpolate(rows, size=(high, 1), mode="nearest").flatten().tolist()
    assert [Nearest(low, high).source(row) for row in range(high)] == wanted


@pytest.mark.parametrize("size", range(1, 70, 3))
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("unit", [1, 4, 8])
def test_even_covers_all_rows_and_stays_balanced(size: int, world: int, unit: int) -> None:
    if size < world:
        with pytest.raises(ConfigError, match=f"largest world for this picture is {size}"):
            Split.even(size, world, unit)
        return
    split = Split.even(size, world, unit)
    assert sum(split.sizes) == size == split.size
    assert min(split.sizes) >= 1
    assert max(split.sizes) <= max(-(-size // world), size * 9 / (8 * world))


def test_even_prefers_aligned_patches_where_balance_allows() -> None:
    assert Split.even(128, 3, 4).sizes == (44, 44, 40)
    assert Split.even(20, 2, 8).sizes == (10, 10)  # 16 + 4 would be aligned, and 60 % slower


@pytest.mark.parametrize("size", range(5, 70, 4))
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_equal_weights_hand_out_whole_units_one_after_the_other(size: int, world: int) -> None:
    base, extra = divmod(size, world)
    assert Split.weighted(size, (0.3,) * world).sizes == tuple(base + (i < extra) for i in range(world))


WEIGHTS = [(2.0, 1.0, 1.0), (1.0, 3.0), (5.0, 1.0, 1.0, 1.0, 2.0), (0.1, 7.0, 0.1), (1e-9, 1.0, 1e9)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("size", [5, 6, 7, 11, 16])
def test_no_other_rows_let_the_slowest_patch_end_sooner(weights: tuple[float, ...], size: int) -> None:
    """Of all ways to give each patch a row or more, tried one by one."""
    ends = itertools.combinations(range(1, size), len(weights) - 1)
    ways = [[b - a for a, b in itertools.pairwise((0, *inner, size))] for inner in ends]

    def pace(rows: Any) -> float:
        return max(count / weight for count, weight in zip(rows, weights, strict=True))

    found = Split.weighted(size, weights)
    assert found.size == size
    assert min(found.sizes) >= 1
    assert pace(found.sizes) == min(map(pace, ways))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("size", [16, 37, 64, 128])
def test_weighted_patches_are_aligned_only_where_that_costs_little(weights: tuple[float, ...], size: int) -> None:
    found, exact = Split.weighted(size, weights, 8), Split.weighted(size, weights)
    paces = [max(rows / w for rows, w in zip(split.sizes, weights, strict=True)) for split in (found, exact)]
    assert paces[0] <= max(paces[1], 9 / 8 * size / sum(weights))


def test_weighted_prefers_aligned_patches_where_balance_allows() -> None:
    assert Split.weighted(64, (2.0, 1.0, 1.0), 8).sizes == (32, 16, 16)
    assert Split.weighted(128, (5.0, 1.0, 1.0, 1.0, 2.0), 8).sizes == (68, 12, 12, 12, 24)
    assert Split.weighted(16, (1000.0, 1.0, 1.0), 8).sizes == (14, 1, 1)  # everyone has a row
    with pytest.raises(ConfigError, match="2 rows of latent cannot be split over 3 ranks"):
        Split.weighted(2, (2.0, 1.0, 1.0))


def test_levels_follow_the_downsamplers() -> None:
    three, valid = Window(3, 2, (1, 1)), Window(2, 2)
    levels = Levels.down(13, 9, (1.0, 1.0, 1.0), [three, valid], [three, valid])
    assert [split.size for split in levels.splits] == [13, 7, 3]
    assert levels.across == (9, 5, 2)
    for upper, lower in itertools.pairwise(levels.splits):
        assert upper.num_patches == lower.num_patches == 3
    with pytest.raises(ConfigError, match="too small"):
        Levels.down(2, 9, (1.0,), [valid, valid], [valid, valid])


def test_spans_intersect() -> None:
    assert Span(2, 9) & Span(5, 12) == Span(5, 9)
    assert len(Span(2, 4) & Span(7, 9)) == 0


@pytest.mark.parametrize(
    ("bounds", "share", "reads"),
    [
        ((0, 4, 8, 12), 0.5, [(0, 6), (2, 10), (6, 12)]),
        ((0, 3, 7, 9), 0.5, [(0, 5), (1, 8), (5, 9)]),  # halves of 3, 4 and 2 rows, rounded up
        ((0, 3, 7, 9), 0.0, [(0, 3), (3, 7), (7, 9)]),
        ((0, 3, 7, 9), 1.0, [(0, 7), (0, 9), (3, 9)]),
        ((0, 10, 20, 30), 0.3, [(0, 13), (7, 23), (17, 30)]),  # 0.3 * 10 is not 4, though floats say 3.0000000000000004
        ((0, 0, 4, 4, 8, 8), 0.25, [None, (0, 5), None, (3, 8), None]),  # patches without rows are passed over
    ],
)
def test_a_window_of_context_is_the_nearer_part_of_each_neighbour(
    bounds: tuple[int, ...], share: float, reads: list[tuple[int, int] | None]
) -> None:
    split = Split(bounds)
    plans = [halo(split, split, Nearby(split, share), patch) for patch in range(split.num_patches)]
    for patch, (plan, wanted) in enumerate(zip(plans, reads, strict=True)):
        if wanted is None:
            assert not plan.recvs
            assert not plan.sends
            continue
        assert rows_of(plan, plans, split, patch) == list(range(*wanted))


@pytest.mark.parametrize(
    ("bounds", "share", "reads"),
    [
        ((0, 4, 8, 12), 0.5, [(-2, 6), (2, 10), (6, 14)]),
        ((0, 6, 12), 0.5, [(-3, 9), (3, 15)]),
        ((0, 6, 12), 1.0, [(-6, 6), (0, 12)]),  # the neighbour on both sides is one and the same: no row twice
        ((0, 12), 0.5, [(0, 12)]),
    ],
)
def test_on_a_ring_the_last_patch_is_before_the_first(
    bounds: tuple[int, ...], share: float, reads: list[tuple[int, int]]
) -> None:
    split = Split(bounds, is_ring=True)
    plans = [halo(split, split, Nearby(split, share), patch) for patch in range(split.num_patches)]
    for patch, (plan, wanted) in enumerate(zip(plans, reads, strict=True)):
        assert rows_of(plan, plans, split, patch) == [row % split.size for row in range(*wanted)]
