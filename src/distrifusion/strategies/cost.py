"""What calls of a model took on this rank."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from ..comm import Comm


@dataclass
class Cost:
    """Calls of a model, and what they took on this rank."""

    num_calls: int = 0
    seconds: float = 0.0
    messages: int = 0
    num_bytes: int = 0

    def add(self, other: Cost) -> None:
        """Add another's."""
        self.num_calls += other.num_calls
        self.seconds += other.seconds
        self.messages += other.messages
        self.num_bytes += other.num_bytes


class Counting:
    """What has been sent, and how long it took, since this was made."""

    def __init__(self, comm: Comm) -> None:
        self._meter = comm.meter
        self._started, self._before = perf_counter(), comm.meter.totals()

    def cost(self) -> Cost:
        """So far, of no call."""
        messages, num_bytes = self._meter.totals()
        seconds = perf_counter() - self._started
        return Cost(0, seconds, messages - self._before[0], num_bytes - self._before[1])
