"""A Chrome trace of the ranks (chrome://tracing, ui.perfetto.dev): one process per rank, one lane per kind of time.

steps    each call of the denoiser, whole
compute  what is left of it without sends and waits, and in it the model's modules
sends    the host's work of launching a message; below it, until when the message is under way
waits    the host stands still for its peers
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from ..comm import Comm, Tracer
from ..comm.tracer import Work
from ..errors import ConfigError

LANES = ("steps", "compute", "sends", "waits")
STEPS, COMPUTE, SENDS, WAITS = range(4)
COLOURS = {COMPUTE: "thread_state_running", SENDS: "rail_load", WAITS: "terrible"}  # Chrome's names; the last is red

Event = dict[str, Any]


class Recorder:
    """What one rank does between `start` and `stop`, which may follow each other several times."""

    def __init__(self, comm: Comm) -> None:
        self._rank, self._meter = comm.rank, comm.meter
        self._tracer = Tracer()
        self._sent = [0, 0]  # messages, bytes
        self._waited = 0.0
        self._begun: tuple[int, int, float] = (0, 0, 0.0)

    def start(self) -> None:
        """Take notes from now on."""
        self._begun = (*self._meter.totals(but=()), self._meter.waited)
        self._meter.tracer = self._tracer

    def stop(self) -> None:
        """Take none any more."""
        self._meter.tracer = None
        messages, num_bytes = self._meter.totals(but=())
        self._sent[0] += messages - self._begun[0]
        self._sent[1] += num_bytes - self._begun[1]
        self._waited += self._meter.waited - self._begun[2]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One call of the denoiser."""
        start = perf_counter()
        yield
        if self._meter.tracer is not None:
            self._tracer.work.append(Work(name, start, perf_counter(), is_step=True))

    @contextmanager
    def modules(self, model: nn.Module) -> Iterator[None]:
        """Note the calls of the modules below ``model``, by hooks that are gone afterwards."""
        starts: list[float] = []

        def begin(module: nn.Module, arguments: Any) -> None:
            starts.append(perf_counter())

        with ExitStack() as hooks:
            for name, module in model.named_modules():

                def end(module: nn.Module, arguments: Any, result: Any, name: str = name) -> None:
                    start = starts.pop()
                    if self._meter.tracer is not None:
                        self._tracer.work.append(Work(name, start, perf_counter()))

                if name:
                    hooks.enter_context(module.register_forward_pre_hook(begin))
                    hooks.enter_context(module.register_forward_hook(end))
            yield

    def result(self) -> Event:
        """This rank's spans as events whose times are seconds of its clock, and what its meter has counted besides."""
        counted = {"rank": self._rank, "messages": self._sent[0], "bytes": self._sent[1], "waited": self._waited}
        return {"events": list(_events(self._tracer, self._rank)), "counted": counted}


def merge(results: Sequence[Event]) -> Event:
    """One trace of the results of all ranks, which begins at 0; Chrome's times are microseconds."""
    events = [event for result in results for event in result["events"]]
    zero = min((event["ts"] for event in events), default=0.0)
    for event in events:
        event["ts"] = round((event["ts"] - zero) * 1e6, 3)
        if "dur" in event:
            event["dur"] = round(event["dur"] * 1e6, 3)
    names: list[Event] = []
    for rank in range(len(results)):
        named = {"ph": "M", "pid": rank, "tid": 0}
        names.append({**named, "name": "process_name", "args": {"name": f"rank {rank}"}})
        names.append({**named, "name": "process_sort_index", "args": {"sort_index": rank}})
        for lane, name in enumerate(LANES):
            names.append({**named, "tid": lane, "name": "thread_name", "args": {"name": name}})
            names.append({**named, "tid": lane, "name": "thread_sort_index", "args": {"sort_index": lane}})
    counted = [result["counted"] for result in results]
    return {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": {"ranks": counted}}


def refuse_other_clocks(comm: Comm) -> None:
    """Whether the ranks read the same clock.

    Raises:
        ConfigError: they are on several machines; on every rank.
    """
    clocks = comm.all_gather_object(_clock())
    other = next((rank for rank, clock in enumerate(clocks) if clock != clocks[0]), None)
    if other is not None:
        raise ConfigError(
            f"--trace needs all ranks on one machine, since their spans are told by one clock: rank {other} is on "
            "another machine than rank 0"
        )


def _clock() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return platform.node()


def _events(tracer: Tracer, rank: int) -> Iterator[Event]:
    def span(lane: int, kind: str, name: str, start: float, end: float, **arguments: Any) -> Event:
        colour = {"cname": COLOURS[lane]} if lane in COLOURS else {}
        place = {"ph": "X", "pid": rank, "tid": lane, "cat": kind, "name": name, "ts": start, "dur": end - start}
        return {**place, **colour, "args": arguments}

    numbers = count()
    for message in tracer.messages:
        about = {"bytes": message.num_bytes, "to": "all" if message.peer is None else message.peer}
        yield span(SENDS, "send", message.kind, message.start, message.launched, **about)
        if message.arrived is not None:
            flight = {
                "pid": rank,
                "tid": SENDS,
                "cat": "under way",
                "name": message.kind,
                "id": f"{rank}.{next(numbers)}",
            }
            yield {**flight, "ph": "b", "ts": message.launched, "args": about}
            yield {**flight, "ph": "e", "ts": message.arrived}
    for wait in tracer.waits:
        yield span(WAITS, "wait", wait.kind, wait.start, wait.end)
    elsewhere = [(message.start, message.launched) for message in tracer.messages]
    elsewhere = sorted(elsewhere + [(wait.start, wait.end) for wait in tracer.waits])
    for work in tracer.work:
        if work.is_step:
            yield span(STEPS, "step", work.name, work.start, work.end)
        for start, end in _without(work.start, work.end, elsewhere):
            yield span(COMPUTE, "compute", "compute" if work.is_step else work.name, start, end)


def _without(start: float, end: float, others: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """The parts of a span that none of ``others`` covers. They are in order, and those before it have ended."""
    for begins, ends in others[bisect_left(others, (start, start)) :]:
        if begins >= end:
            break
        if begins > start:
            yield start, begins
        start = max(start, ends)
    if end > start:
        yield start, end
