"""Who owns which rows and who borrows which: checked by reading every row through the plan, for all kinds of layers."""

import itertools
from typing import Any

import pytest

from distrifusion.errors import ConfigError
from distrifusion.geometry import Levels, Nearby, Nearest, Span, Split, Window, halo

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
        rows: list[int | None] = [None] * plan.zeros[0]
        for peer in range(world):
            if peer == rank:
                rows += [inputs.span(rank).start + i for i in range(plan.own.start, plan.own.stop)]
            for target, span in plans[peer].sends:
                if target == rank:
                    rows += [inputs.span(peer).start + i for i in range(span.start, span.stop)]
        rows += [None] * plan.zeros[1]
        assert len(rows) == plan.num_rows
        if len(out):
            wanted = window.reads(out)
            assert rows == [i if 0 <= i < size else None for i in range(wanted.start, wanted.stop)]
            assert window.out_size(len(rows) - sum(window.padding)) == len(out)
        else:
            assert rows == []
        for peer, count in plan.recvs:  # what I expect of a peer is what it sends me
            assert len(dict(plans[peer].sends)[rank]) == count
        assert sum(count for _, count in plan.recvs) == plan.before + plan.after
    assert {plan.total_recvs for plan in plans} == {sum(plan.before + plan.after for plan in plans)}


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
        own = split.span(patch)
        if wanted is None:
            assert not plan.recvs
            assert not plan.sends
            continue
        assert (own.start - plan.before, own.stop + plan.after) == wanted
        assert plan.zeros == (0, 0)
        assert plan.own == Span(0, len(own))
        for peer, count in plan.recvs:
            (rows,) = [rows for receiver, rows in plans[peer].sends if receiver == patch]
            assert len(rows) == count
