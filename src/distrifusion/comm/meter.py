"""Counts of what a rank sent. Tests assert them, reports print them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from time import perf_counter

from .stopwatch import Stopwatch
from .tracer import Message, Tracer


@dataclass
class Meter:
    """Messages and bytes that left this rank, by kind of seam and by receiver.

    A message is one point-to-point send, or one collective call. The bytes of a collective are what this rank's part
    weighs once for every peer that gets it (padding included). ``waited`` is host time spent in ``Pending.wait``.
    """

    messages: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    links: Counter[tuple[str, int]] = field(default_factory=Counter)  # (kind, peer) -> point-to-point sends
    waited: float = 0.0  # seconds
    tracer: Tracer | None = None  # while there is one, every send and wait is noted there too
    watch: Stopwatch | None = None  # while there is one, it stands still in waits

    def sent(self, kind: str, peer: int, num_bytes: int) -> None:
        """Record one point-to-point send to ``peer`` (its rank in the communicator that sends)."""
        self.messages[kind] += 1
        self.bytes[kind] += num_bytes
        self.links[kind, peer] += 1
        if self.tracer is not None:
            self.tracer.leaves(kind, peer, num_bytes)

    def gathered(self, kind: str, num_bytes: int, num_peers: int) -> None:
        """Record one collective call in which this rank contributes ``num_bytes``."""
        self.messages[kind] += 1
        self.bytes[kind] += num_bytes * num_peers
        if self.tracer is not None:
            self.tracer.leaves(kind, None, num_bytes * num_peers)

    def launched(self) -> list[Message]:
        """The messages recorded since the last launch are under way. For `has_waited`; empty without a tracer."""
        return self.tracer.launched() if self.tracer is not None else []

    def waits(self) -> float:
        """A wait begins: its ``start`` for `has_waited`."""
        if self.watch is not None:
            self.watch.stop()
        return perf_counter()

    def has_waited(self, kind: str, start: float, flight: list[Message]) -> None:
        """Record a wait since ``start`` of ``perf_counter``, for the exchange whose launch gave ``flight``."""
        end = perf_counter()
        if self.watch is not None:
            self.watch.start()
        self.waited += end - start
        if self.tracer is not None:
            self.tracer.waited(kind, start, end, flight)

    def totals(self, *, but: tuple[str, ...] = ("control",)) -> tuple[int, int]:
        """(messages, bytes) over all kinds except ``but``."""
        messages = sum(n for kind, n in self.messages.items() if kind not in but)
        return messages, sum(n for kind, n in self.bytes.items() if kind not in but)

    def clear(self) -> None:
        """Start counting anew."""
        self.messages.clear()
        self.bytes.clear()
        self.links.clear()
        self.waited = 0.0
