"""What counts as computing: all but the waits for peers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import distrifusion as df
from distrifusion.comm import Comm, Meter
from distrifusion.comm.stopwatch import DeviceStopwatch, HostStopwatch, stopwatch_for


def ticking(*times: float) -> Iterator[float]:
    return iter(times)


def test_spans_add_up_lap_by_lap() -> None:
    times = ticking(0.0, 2.0, 10.0, 11.0, 20.0, 24.0)
    watch = HostStopwatch(lambda: next(times))
    for end_lap in (False, True, True):
        watch.start()
        watch.stop()
        if end_lap:
            watch.lap()
    assert watch.laps() == [3.0, 4.0]
    assert watch.laps() == []


def test_what_is_cleared_does_not_count() -> None:
    times = ticking(0.0, 5.0, 6.0, 7.0)
    watch = HostStopwatch(lambda: next(times))
    watch.start()
    watch.stop()
    watch.clear()
    watch.start()
    watch.stop()
    watch.lap()
    assert watch.laps() == [1.0]


def test_the_watch_of_a_meter_stands_still_in_waits() -> None:
    times = ticking(0.0, 1.0, 50.0, 52.0)
    meter = Meter(watch=HostStopwatch(lambda: next(times)))
    watch = meter.watch
    assert watch is not None
    watch.start()
    meter.has_waited("halo", meter.waits(), [])  # from 1 to 50
    watch.stop()
    watch.lap()
    assert watch.laps() == [3.0]


def test_every_wait_of_a_communicator_stops_the_watch() -> None:
    """A rank waits in vain for no time of its own: its clock moves in waits alone, and the watch shows nothing."""

    def rank(comm: Comm) -> tuple[float, int]:
        running: list[bool] = []
        watch = HostStopwatch()
        start, stop = watch.start, watch.stop
        watch.start = lambda: (running.append(True), start())[1]  # type: ignore[method-assign]
        watch.stop = lambda: (running.append(False), stop())[1]  # type: ignore[method-assign]
        comm.meter.watch = watch
        watch.start()
        peer, own = 1 - comm.rank, torch.zeros(3)
        comm.swap({peer: own}, {peer: torch.empty(3)}, kind="halo").wait()
        comm.all_gather(own, [3, 3], kind="context").wait()
        comm.barrier()
        return running == [True] + [False, True] * 3, len(running)

    assert df.run_ranks(2, rank) == [(True, 7)] * 2


def test_the_host_is_timed_where_the_host_computes() -> None:
    assert isinstance(stopwatch_for(torch.device("cpu")), HostStopwatch)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator here")
def test_an_accelerator_is_timed_by_events_on_its_stream() -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    watch = stopwatch_for(device)
    assert isinstance(watch, DeviceStopwatch)
    x = torch.ones(2048, 2048, device=device)
    for num in (1, 50):
        watch.start()
        for _ in range(num):
            x = x @ x * 1e-4
        watch.stop()
        watch.lap()
    short, long = watch.laps()
    assert 0 < short < long
