"""The trace says what the meter counts: every message, every wait, and compute in what is left of a step."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch

import distrifusion as df
from distrifusion.bench import trace
from distrifusion.bench.measure import Bench
from distrifusion.bench.plan import Case, Plan
from distrifusion.bench.shapes import SHAPES
from distrifusion.bench.trace import COMPUTE, LANES, SENDS, STEPS, WAITS, _without, refuse_other_clocks
from distrifusion.comm import Comm, Tracer
from distrifusion.comm.route import Layout

Event = dict[str, Any]


def talks(comm: Comm) -> None:
    """One exchange of every kind, of which the first waits for rank 0; and one launch that is waited for late."""
    if comm.rank == 0:
        torch.ones(300, 300) @ torch.ones(300, 300)
    peers = [peer for peer in (comm.rank - 1, comm.rank + 1) if 0 <= peer < comm.world]
    sends, recvs = ({peer: torch.ones(8) for peer in peers} for _ in range(2))
    comm.swap(sends, recvs, kind="halo").wait()
    late = comm.all_gather(torch.ones(4), [4] * comm.world, kind="context")
    comm.broadcast(torch.ones(3), root=1)
    route = comm.route(Layout(dict.fromkeys(peers, 16), dict.fromkeys(peers, 16), [8] * comm.world), kind="chunk")
    route.launch()
    late.wait()
    route.wait()
    comm.split([[rank] for rank in range(comm.world)]).barrier()
    pair = comm.split([list(reversed(range(comm.world)))])
    pair.barrier()


def talks_traced(comm: Comm) -> tuple[Tracer, dict[str, int], dict[str, int], float]:
    talks(comm)
    comm.meter.clear()
    comm.meter.tracer = tracer = Tracer()
    talks(comm)
    comm.meter.tracer = None
    counted = dict(comm.meter.messages), dict(comm.meter.bytes), comm.meter.waited
    talks(comm)
    return tracer, *counted


@pytest.mark.parametrize("world", [2, 3])
def test_the_tracer_has_every_message_and_every_wait_and_nothing_after_it(ranks, world):
    for tracer, messages, num_bytes, waited in ranks.run(world, talks_traced):
        assert Counter(message.kind for message in tracer.messages) == messages
        assert {"halo", "context", "chunk", "control"} == set(messages)
        weights = Counter()
        for message in tracer.messages:
            weights[message.kind] += message.num_bytes
            assert message.start < message.launched
        assert weights == num_bytes
        assert sum(wait.end - wait.start for wait in tracer.waits) == pytest.approx(waited, abs=1e-9)
        waits = sorted(tracer.waits, key=lambda wait: wait.start)
        assert all(one.end <= other.start for one, other in pairwise(waits))
        # The gather was waited for after the route had been opened and launched.
        (late,) = [message for message in tracer.messages if message.kind == "context"]
        (chunk,) = [message for message in tracer.messages if message.kind == "chunk" and message.peer is None]
        assert late.launched < chunk.start < late.arrived < chunk.arrived


def benched(comm: Comm) -> Event | None:
    SHAPES["tiny"] = {**SHAPES["sdxl-mini"], "block_out_channels": (32, 32, 32), "attention_head_dim": 1}
    cases = (Case(None), Case("sync", 2), Case("displaced", 3), Case("naive", 3))
    plan = Plan("tiny", ((128, 64),), 1, cases, rounds=1, steps=2, traces=True)
    told: list[tuple[int, int]] = []
    bench = Bench(plan, comm, lambda done, total: told.append((done, total)))
    bench.measure()
    found = bench.trace()
    assert comm.meter.tracer is None
    assert told == [(done, 8) for done in range(1, 9)]
    modules = [module for work in bench._work.values() for module in work.model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    return found


def spans(found: Event, rank: int, lane: int) -> list[Event]:
    events = found["traceEvents"]
    return [event for event in events if (event["ph"], event["pid"], event["tid"]) == ("X", rank, lane)]


def seconds(events: list[Event]) -> float:
    return sum(event["dur"] for event in events) / 1e6


def test_the_trace_of_a_benchmark(ranks):
    results = ranks.run(3, benched)
    assert results[1:] == [None, None]
    found = json.loads(json.dumps(results[0]))
    events = found["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1, 2}
    named = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert named == {(rank, lane): name for rank in range(3) for lane, name in enumerate(LANES)}
    assert min(event["ts"] for event in events if event["ph"] != "M") == 0
    assert all(event["dur"] > 0 for event in events if event["ph"] == "X")
    for rank, counted in enumerate(found["otherData"]["ranks"]):
        assert counted["rank"] == rank
        sends, waits = spans(found, rank, SENDS), spans(found, rank, WAITS)
        assert len(sends) == counted["messages"] > 0
        assert sum(send["args"]["bytes"] for send in sends) == counted["bytes"]
        assert seconds(waits) == pytest.approx(counted["waited"], abs=1e-9 * (len(waits) + 1))
        assert {wait["cname"] for wait in waits} == {"terrible"}
        steps = spans(found, rank, STEPS)
        assert [step["name"] for step in steps] == [
            *["bare model, 1 rank, 128 x 64"] * (2 if rank == 0 else 0),
            *["sync, 2 ranks, 128 x 64"] * (2 if rank < 2 else 0),
            *["displaced, 3 ranks, 128 x 64"] * 2,
            *["naive, 3 ranks, 128 x 64"] * 2,
        ]
        for step in steps:
            inside = {lane: [s for s in spans(found, rank, lane) if is_in(s, step)] for lane in (COMPUTE, SENDS, WAITS)}
            own = [event for event in inside[COMPUTE] if event["name"] == "compute"]
            # Messages of one launch overlap: theirs is the time that any of them takes.
            parts = sorted((event["ts"], event["ts"] + event["dur"]) for event in own + inside[SENDS] + inside[WAITS])
            assert parts[0][0] == pytest.approx(step["ts"], abs=2e-3)
            for (_, end), (start, _) in pairwise(parts):
                assert start <= end + 2e-3  # no hole in a step: compute, send or wait
            others = sorted((event["ts"], event["ts"] + event["dur"]) for event in inside[SENDS] + inside[WAITS])
            assert all(
                not (a < event["ts"] + event["dur"] - 2e-3 and event["ts"] + 2e-3 < b)
                for event in own
                for a, b in others
            )
            assert {event["name"] for event in inside[COMPUTE]} >= {"compute", "conv_out", "mid_block.attentions.0"}
    # What is displaced is under way while the rank computes the next step; what is fresh is waited for at its seam.
    chunks = under_way(found, 0, "chunk")
    halos = under_way(found, 0, "halo")
    assert chunks
    assert halos
    (first, second) = [step for step in spans(found, 0, STEPS) if step["name"].startswith("displaced")]
    assert any(start < first["ts"] + first["dur"] and end > second["ts"] for start, end in chunks)
    bounds = [(step["ts"], step["ts"] + step["dur"]) for step in spans(found, 0, STEPS)]
    assert all(any(a <= start and end <= b for a, b in bounds) for start, end in halos)


def is_in(event: Event, step: Event) -> bool:
    return step["ts"] <= event["ts"] and event["ts"] + event["dur"] <= step["ts"] + step["dur"] + 2e-3


def under_way(found: Event, rank: int, kind: str) -> list[tuple[float, float]]:
    events = [event for event in found["traceEvents"] if event["pid"] == rank and event["name"] == kind]
    begun = {event["id"]: event["ts"] for event in events if event["ph"] == "b"}
    ended = {event["id"]: event["ts"] for event in events if event["ph"] == "e"}
    assert begun.keys() == ended.keys()
    assert all(begun[key] < ended[key] for key in begun)
    return [(begun[key], ended[key]) for key in begun]


def test_a_span_without_others():
    assert list(_without(0.0, 10.0, [])) == [(0.0, 10.0)]
    others = [(-2.0, -1.0), (1.0, 3.0), (1.5, 3.0), (3.0, 4.0), (6.0, 7.0), (12.0, 13.0)]
    assert list(_without(0.0, 10.0, others)) == [(0.0, 1.0), (4.0, 6.0), (7.0, 10.0)]
    assert list(_without(1.0, 3.0, others)) == []
    assert list(_without(6.5, 7.0, [(6.5, 7.0)])) == []


def test_ranks_of_several_machines_have_no_trace(monkeypatch):
    clocks = iter(["one", "one", "another"])
    monkeypatch.setattr(trace, "_clock", lambda: next(clocks))

    def refused(comm: Comm) -> str:
        with pytest.raises(df.ConfigError) as caught:
            refuse_other_clocks(comm)
        return str(caught.value)

    said = df.run_ranks(3, refused)
    assert all("--trace needs all ranks on one machine" in text for text in said)
