"""What is open and under way of a communicator and those split from it, and how the loss of a peer spreads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from traceback import clear_frames
from typing import Any

from torch import Tensor

from ..errors import PeerLost
from .channels import Channel
from .meter import Meter

Work = tuple[Any, list[int]]
"""Of a channel, with the ranks that it waits for."""


class UnderWay:
    """Works that were launched together, with the buffers they use."""

    def __init__(self, channel: Channel, works: list[Work], buffers: Sequence[Tensor]) -> None:
        self.channel = channel
        self.works = works
        self.buffers = buffers


class Lines:
    """All channels and works of one communicator and of those split from it: they break together.

    Works stay here until they are waited for: Gloo needs them alive, even if the caller forgets them.
    """

    def __init__(self) -> None:
        self.channels: list[Channel] = []
        self.under_way: set[UnderWay] = set()
        self.broken: str | None = None

    def check(self) -> None:
        """Raise PeerLost once the lines are broken."""
        if self.broken is not None:
            raise PeerLost(f"this communicator is closed: {self.broken}")

    def sever(self, reason: str, *, abort: bool) -> None:
        """Drop everything; the first reason stays."""
        if self.broken is None:
            self.broken = reason
        for launched in self.under_way:
            launched.works.clear()  # a work holds its group's sockets open
        self.under_way.clear()
        self.release(self.channels, abort=abort)

    def release(self, channels: Sequence[Channel], *, abort: bool) -> None:
        """Drop some channels."""
        for channel in list(channels):
            if channel in self.channels:
                self.channels.remove(channel)
                channel.drop(abort=abort)

    @contextmanager
    def losing(self, me: int, whom: Callable[[], str], timeout: float) -> Iterator[None]:
        """Failures of the transport inside become `PeerLost`, and rank ``me`` leaves, so that the loss spreads."""
        try:
            yield
        except RuntimeError as failure:
            clear_frames(failure.__traceback__)  # their locals hold works, and these the sockets
            loss = f"rank {me} lost {whom()} (waits are limited to {timeout:g} s): {first_line(failure)}"
            self.sever(loss, abort=True)
            raise PeerLost(loss) from failure


class Launched:
    """A `Pending` over works of a channel. Holds their buffers until they have ended.

    Args:
        lines: of the communicator.
        meter: of the communicator.
        launched: the works.
        timeout: seconds of one wait.
        losing: the communicator's `Lines.losing`, of the ranks that a work waits for.
        result: what ``wait`` returns.
        kind: see `Comm`.
    """

    def __init__(
        self,
        lines: Lines,
        meter: Meter,
        launched: UnderWay,
        timeout: float,
        losing: Callable[[list[int]], AbstractContextManager[None]],
        result: Any,
        kind: str,
    ) -> None:
        self._lines, self._meter, self._launched = lines, meter, launched
        self._timeout, self._losing = timeout, losing
        self._done = False
        self._result = result
        self._kind, self._flight = kind, meter.launched()
        lines.under_way.add(launched)

    def wait(self) -> Any:
        """See Pending."""
        if self._done:
            return self._result
        self._lines.check()
        start, works, channel = self._meter.waits(), self._launched.works, self._launched.channel
        try:
            while works:  # no local name for a work: it would keep the sockets open after a loss
                with self._losing(works[0][1]):
                    channel.finish(works[0][0], self._timeout)
                works.pop(0)
        finally:
            self._meter.has_waited(self._kind, start, self._flight)
        self._done = True
        self._lines.under_way.discard(self._launched)
        del self._launched
        return self._result


def first_line(failure: BaseException) -> str:
    """Of what it says, as far as it fits into a message; its class where it says nothing."""
    text = str(failure).strip().splitlines()
    return text[0][:200] if text else type(failure).__name__
