"""Who owns which rows and who borrows which: checked by reading every row through the plan, for all kinds of layers."""

import itertools

import pytest

from distrifusion.errors import ConfigError
from distrifusion.geometry import Levels, Nearest, Span, Split, Window, halo

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


def test_levels_follow_the_downsamplers() -> None:
    three, valid = Window(3, 2, (1, 1)), Window(2, 2)
    levels = Levels.down(13, 9, 3, [three, valid], [three, valid])
    assert [split.size for split in levels.splits] == [13, 7, 3]
    assert levels.across == (9, 5, 2)
    for upper, lower in itertools.pairwise(levels.splits):
        assert upper.num_patches == lower.num_patches == 3
    with pytest.raises(ConfigError, match="too small"):
        Levels.down(2, 9, 1, [valid, valid], [valid, valid])


def test_spans_intersect() -> None:
    assert Span(2, 9) & Span(5, 12) == Span(5, 9)
    assert len(Span(2, 4) & Span(7, 9)) == 0
