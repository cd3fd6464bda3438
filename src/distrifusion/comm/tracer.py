"""When a rank sends and when it waits, span by span. Off unless a `Meter` is given one.

Times are ``perf_counter``'s: on one machine all processes read the same clock, so the spans of its ranks line up.
They are the host's. On an accelerator a launch and a wait only order its stream, and are as short as that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter


@dataclass
class Message:
    """One message of `Meter`: ``start`` to ``launched`` is the host's work, until ``arrived`` it is under way.

    ``arrived`` is when this rank's wait for the exchange returned: nobody looks earlier. None: not within the trace.
    """

    kind: str
    peer: int | None  # its rank in the communicator that sends; None: all of them
    num_bytes: int
    start: float
    launched: float = 0.0
    arrived: float | None = None


@dataclass
class Wait:
    """The host stood still for an exchange of this kind."""

    kind: str
    start: float
    end: float


@dataclass
class Work:
    """A call of the denoiser (``is_step``) or of one of its modules, waits included."""

    name: str
    start: float
    end: float
    is_step: bool = False


@dataclass
class Tracer:
    """The spans of one rank, in order of their ends."""

    messages: list[Message] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    _leaving: list[Message] = field(default_factory=list)

    def leaves(self, kind: str, peer: int | None, num_bytes: int) -> None:
        """A message is about to be launched."""
        self._leaving.append(Message(kind, peer, num_bytes, perf_counter()))

    def launched(self) -> list[Message]:
        """What was about to be launched now is."""
        flight, self._leaving = self._leaving, []
        now = perf_counter()
        for message in flight:
            message.launched = now
        self.messages += flight
        return flight

    def waited(self, kind: str, start: float, end: float, flight: list[Message]) -> None:
        """A wait for the exchange in which ``flight`` left has ended."""
        self.waits.append(Wait(kind, start, end))
        for message in flight:
            message.arrived = end
