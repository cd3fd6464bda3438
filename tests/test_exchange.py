"""The freshness policies, verb by verb: how old the answer is, and what is sent for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.comm import Comm
from distrifusion.comm.slots import Slots
from distrifusion.exchange import Absent, Exchange, Fresh, Stale, uses_old_moments
from distrifusion.geometry import Halo, Split, Window, halo
from distrifusion.moments import carry, combine, measure

SPLIT = Split((0, 3, 7, 9))  # three ranks, uneven
WORLD = 3


def picture(step: int) -> Tensor:
    """``[2, 3, 9, 4]``, another in every step."""
    return torch.randn(2, 3, SPLIT.size, 4, generator=torch.Generator().manual_seed(step))


def own(comm: Comm, step: int) -> Tensor:
    span = SPLIT.span(comm.rank)
    return picture(step)[:, :, span.start : span.stop]


def parts(step: int) -> list[Tensor]:
    return [picture(step)[:, :, span.start : span.stop] for span in map(SPLIT.span, range(WORLD))]


def plan_of(comm: Comm) -> Halo:
    return halo(SPLIT, SPLIT, Window(5, 1, (2, 2)), comm.rank)


def rows_of(plan: Halo, comm: Comm, step: int) -> dict[int, Tensor]:
    """The rows that two rows of halo on each side ask for, cut from the whole picture by hand."""
    span, whole, found = SPLIT.span(comm.rank), picture(step), {}
    for peer, count in plan.recvs:
        first = span.start - count if peer < comm.rank else span.stop
        found[peer] = whole[:, :, first : first + count]
    return found


def groups(x: Tensor) -> Tensor:
    return x.reshape(2, -1)


def assert_same(found: dict[int, Tensor], wanted: dict[int, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[peer], rows) for peer, rows in wanted.items())


def pass_seams(exchange: Exchange, comm: Comm, step: int) -> tuple[Any, Any, Any]:
    """One step through all three verbs; the halo is asked for twice under one name, as by a module called twice."""
    exchange.begin()
    plan, mine = plan_of(comm), own(comm, step)
    first = {peer: rows.clone() for peer, rows in exchange.neighbours("conv", mine, plan, 2).wait().items()}
    second = {peer: rows.clone() for peer, rows in exchange.neighbours("conv", 10 * mine, plan, 2).wait().items()}
    key_values = exchange.gather("attn", (mine, mine[..., :1] + 1), SPLIT.sizes, 2).wait()
    tensors = [tuple(part.clone() for part in parts) for parts in key_values]
    moments = exchange.moments("norm", measure(groups(mine)))
    assert exchange.finish()
    return (first, second), tensors, moments


def check_fresh(comm: Comm, step: int, passed: tuple[Any, Any, Any]) -> None:
    (first, second), tensors, (mean, var) = passed
    wanted = rows_of(plan_of(comm), comm, step)
    assert_same(first, wanted)
    assert_same(second, {peer: 10 * rows for peer, rows in wanted.items()})
    assert torch.equal(torch.cat([k for k, _ in tensors], 2), picture(step))
    assert torch.equal(torch.cat([v for _, v in tensors], 2), picture(step)[..., :1] + 1)
    parts = [measure(groups(picture(step)[:, :, a:b])) for a, b in zip(SPLIT.bounds, SPLIT.bounds[1:], strict=False)]
    assert torch.equal(torch.stack([mean, var]), combine(parts))


def on_ranks(fn: Callable[[Comm], None]) -> None:
    df.run_ranks(WORLD, fn, timeout=20)


def test_fresh_gives_this_step() -> None:
    def rank(comm: Comm) -> None:
        exchange = Fresh(comm)
        for step in range(2):
            check_fresh(comm, step, pass_seams(exchange, comm, step))
        assert comm.meter.messages["halo"] == 4 * len(plan_of(comm).sends)
        assert comm.meter.messages["context"] == comm.meter.messages["moments"] == 2

    on_ranks(rank)


def test_fresh_with_slots_gives_the_same() -> None:
    on_ranks(lambda comm: check_fresh(comm, 0, pass_seams(Fresh(comm, Slots(comm)), comm, 0)))


@pytest.mark.parametrize("num_warm", [1, 2])
def test_stale_gives_the_step_before_and_the_own_of_this(num_warm: int) -> None:
    def rank(comm: Comm) -> None:
        slots = Slots(comm)
        for step in range(num_warm):
            pass_seams(Fresh(comm, slots), comm, step)
        comm.meter.clear()
        for step in range(num_warm, num_warm + 3):
            (first, second), tensors, (mean, var) = pass_seams(Stale(comm, slots, "stale"), comm, step)
            before = rows_of(plan_of(comm), comm, step - 1)
            assert_same(first, before)
            assert_same(second, {peer: 10 * rows for peer, rows in before.items()})
            mixed = picture(step - 1)
            span = SPLIT.span(comm.rank)
            mixed[:, :, span.start : span.stop] = own(comm, step)
            assert torch.equal(torch.cat([k for k, _ in tensors], 2), mixed)
            assert torch.equal(torch.cat([v for _, v in tensors], 2), mixed[..., :1] + 1)
            torch.testing.assert_close(mean, groups(mixed).mean(1))
            torch.testing.assert_close(var, groups(mixed).var(1, unbiased=False))
        slots.drain()
        assert set(comm.meter.messages) == {"chunk"}

    on_ranks(rank)


@pytest.mark.parametrize(
    ("group_norm", "sends_now"), [("corrected", 0), ("carried", 0), ("stale", 0), ("separate", 0), ("sync", 3)]
)
def test_statistics_under_each_setting(group_norm: Any, sends_now: int) -> None:
    def rank(comm: Comm) -> None:
        slots = Slots(comm)
        pass_seams(Fresh(comm, slots, keeps_moments=uses_old_moments(group_norm)), comm, 0)
        comm.meter.clear()
        trail = measure(groups(own(comm, 0)))
        for step in (1, 2, 3):
            _, _, (mean, var) = pass_seams(Stale(comm, slots, group_norm), comm, step)
            before, now = groups(picture(step - 1)).double(), groups(picture(step)).double()
            mine, mine_before = groups(own(comm, step)).double(), groups(own(comm, step - 1)).double()
            if group_norm == "corrected":
                wanted_mean = before.mean(1) + mine.mean(1) - mine_before.mean(1)
                second = (before**2).mean(1) + (mine**2).mean(1) - (mine_before**2).mean(1)
                wanted_var = second - wanted_mean**2
                assert (wanted_var > 0).all()
            elif group_norm == "carried":  # what the formula makes of what is known: test_moments.py
                others = [measure(groups(part)) for rank, part in enumerate(parts(step - 1)) if rank != comm.rank]
                (wanted_mean, wanted_var), trail = carry(measure(groups(own(comm, step))), others, trail)
                wanted_mean, wanted_var = wanted_mean.double(), wanted_var.double()
            elif group_norm == "separate":
                wanted_mean, wanted_var = mine.mean(1), mine.var(1, unbiased=False)
            elif group_norm == "sync":
                wanted_mean, wanted_var = now.mean(1), now.var(1, unbiased=False)
            else:
                mixed, span = picture(step - 1), SPLIT.span(comm.rank)
                mixed[:, :, span.start : span.stop] = own(comm, step)
                wanted_mean, wanted_var = groups(mixed).mean(1).double(), groups(mixed).var(1, unbiased=False).double()
            torch.testing.assert_close(mean.double(), wanted_mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(var.double(), wanted_var, rtol=1e-5, atol=1e-5)
        slots.drain()
        assert comm.meter.messages["moments"] == sends_now

    on_ranks(rank)


def test_a_seam_that_the_synchronous_steps_did_not_pass_is_exchanged_at_once() -> None:
    def rank(comm: Comm) -> None:
        slots = Slots(comm)
        pass_seams(Fresh(comm, slots), comm, 0)
        exchange = Stale(comm, slots, "corrected")
        exchange.begin()
        rows = exchange.neighbours("new.conv", own(comm, 1), plan_of(comm), 2).wait()
        assert_same(rows, rows_of(plan_of(comm), comm, 1))
        tensors = exchange.gather("new.attn", (own(comm, 1),), SPLIT.sizes, 2).wait()
        assert torch.equal(torch.cat([parts[0] for parts in tensors], 2), picture(1))
        mean, _ = exchange.moments("new.norm", measure(groups(own(comm, 1))))
        torch.testing.assert_close(mean, groups(picture(1)).mean(1))

    on_ranks(rank)


def test_a_step_that_leaves_out_seams_cannot_be_built_on() -> None:
    def rank(comm: Comm) -> None:
        slots = Slots(comm)
        pass_seams(Fresh(comm, slots), comm, 0)
        exchange = Stale(comm, slots, "corrected")
        exchange.begin()
        exchange.neighbours("conv", own(comm, 1), plan_of(comm), 2).wait()
        assert not exchange.finish()
        slots.drain()
        comm.barrier()

    on_ranks(rank)


def test_absent_gives_zeros_for_rows_and_nothing_else_and_sends_nothing() -> None:
    def rank(comm: Comm) -> None:
        (first, second), tensors, (mean, var) = pass_seams(Absent(comm.rank), comm, 0)
        wanted = rows_of(plan_of(comm), comm, 0)
        assert first.keys() == second.keys() == wanted.keys()
        for peer, rows in wanted.items():
            assert first[peer].shape == rows.shape
            assert not first[peer].any()
        for peer, (k, v) in enumerate(tensors):
            if peer == comm.rank:
                assert torch.equal(k, own(comm, 0))
            else:
                assert k.shape[2] == v.shape[2] == 0
        torch.testing.assert_close(mean, groups(own(comm, 0)).mean(1))
        torch.testing.assert_close(var, groups(own(comm, 0)).var(1, unbiased=False))
        assert not comm.meter.messages

    on_ranks(rank)


def test_only_absent_hides_the_latents() -> None:
    assert (Fresh.sees_peers, Stale.sees_peers, Absent.sees_peers) == (True, True, False)
    assert (Fresh.kind, Stale.kind, Absent.kind) == ("sync", "displaced", "naive")


def test_columns_travel_like_rows() -> None:
    def rank(comm: Comm) -> None:
        plan, slots = plan_of(comm), Slots(comm)
        for step, exchange in enumerate([Fresh(comm, slots), Stale(comm, slots, "stale"), Stale(comm, slots, "stale")]):
            exchange.begin()
            rows = exchange.neighbours("conv", own(comm, step).transpose(2, 3), plan, 3).wait()
            wanted = rows_of(plan, comm, max(step - 1, 0))
            assert_same(rows, {peer: part.transpose(2, 3) for peer, part in wanted.items()})
            assert exchange.finish()
        slots.drain()

    on_ranks(rank)
