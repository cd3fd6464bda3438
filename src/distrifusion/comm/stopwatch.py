"""How long a rank computes: a watch that stands still while the rank waits for its peers."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Protocol

import torch


class Stopwatch(Protocol):
    """Adds up spans of time, lap by lap. Hung on a `Meter`, it is stopped for each wait."""

    def start(self) -> None:
        """A span begins."""
        ...

    def stop(self) -> None:
        """It ends."""
        ...

    def lap(self) -> None:
        """What was measured since the last lap is a lap."""
        ...

    def clear(self) -> None:
        """Forget what was measured."""
        ...

    def laps(self) -> list[float]:
        """Seconds of each lap, which are forgotten. On an accelerator the host waits here, and only here."""
        ...


class HostStopwatch:
    """For a rank that computes on the CPU. ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._since = 0.0
        self._lap = 0.0
        self._laps: list[float] = []

    def start(self) -> None:
        """See Stopwatch."""
        self._since = self._clock()

    def stop(self) -> None:
        """See Stopwatch."""
        self._lap += self._clock() - self._since

    def lap(self) -> None:
        """See Stopwatch."""
        self._laps.append(self._lap)
        self._lap = 0.0

    def clear(self) -> None:
        """See Stopwatch."""
        self._laps, self._lap = [], 0.0

    def laps(self) -> list[float]:
        """See Stopwatch."""
        laps = self._laps
        self.clear()
        return laps


class DeviceStopwatch:
    """For a rank that computes on an accelerator: events on its stream, which a wait for peers holds up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since: torch.Event | None = None
        self._spans: list[tuple[torch.Event, torch.Event]] = []
        self._laps: list[list[tuple[torch.Event, torch.Event]]] = []

    def start(self) -> None:
        """See Stopwatch."""
        self._since = self._now()

    def stop(self) -> None:
        """See Stopwatch."""
        assert self._since is not None, "a span ends that has not begun"
        self._spans.append((self._since, self._now()))

    def lap(self) -> None:
        """See Stopwatch."""
        self._laps.append(self._spans)
        self._spans = []

    def clear(self) -> None:
        """See Stopwatch."""
        self._laps, self._spans = [], []

    def laps(self) -> list[float]:
        """See Stopwatch."""
        laps = self._laps
        self.clear()
        torch.accelerator.current_stream(self._device).synchronize()
        return [sum(start.elapsed_time(end) for start, end in spans) / 1000 for spans in laps]

    def _now(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        return event


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The watch for a rank that computes on ``device``."""
    return HostStopwatch() if device.type == "cpu" else DeviceStopwatch(device)
