"""What thread ranks share: a letter box for each message and a table for each collective call, under one lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import PeerLost


@dataclass
class Copy:
    """A tensor as it was at its launch, and on an accelerator the event after which it is there."""

    tensor: Tensor
    event: torch.Event | None

    @classmethod
    def of(cls, tensor: Tensor) -> Copy:
        """The tensor as it is now."""
        copy = tensor.detach().clone()
        if copy.device.type == "cpu":
            return cls(copy, None)
        event = torch.Event(copy.device)
        event.record(torch.accelerator.current_stream(copy.device))
        return cls(copy, event)

    def ready(self) -> Tensor:
        """The tensor, for use on the caller's current stream."""
        if self.event is not None:
            stream = torch.accelerator.current_stream(self.tensor.device)
            self.event.wait(stream)
            self.tensor.record_stream(stream)  # the allocator of the sender's stream must not reuse it earlier
        return self.tensor


@dataclass
class Round:
    """One collective call: what each rank of the group has put down so far."""

    parts: dict[int, Copy] = field(default_factory=dict)
    num_here: int = 0


class Hub:
    """What the threads share. World ranks throughout; ``scope`` tells communicators made by ``split`` apart."""

    takes_turns = False
    """Whether one rank works at a time, until it waits.

    A step of a small model is many operations of a few microseconds, and ranks that all work wait for the interpreter
    before and after each. Larger models would leave cores idle.
    """

    def __init__(self, num_ranks: int) -> None:
        self._turn = threading.Lock()
        self._worker: int | None = None  # the thread whose turn it is
        self._lock = threading.Lock()
        self._news = [threading.Condition(self._lock) for _ in range(num_ranks)]  # who waits sleeps on its own
        self._mail: dict[Hashable, Copy] = {}
        self._rounds: dict[Hashable, Round] = {}
        self._gone: dict[int, str] = {}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Around the work of a rank."""
        if not self.takes_turns:
            yield
            return
        with self._turn:
            self._worker = threading.get_ident()
            try:
                yield
            finally:
                self._worker = None

    @contextmanager
    def _away(self, is_long: bool) -> Iterator[None]:
        """Around a wait: where it ``is_long``, another rank has its turn meanwhile."""
        me = threading.get_ident()
        if not is_long or self._worker != me:  # nobody takes turns, or this is no rank's own thread
            yield
            return
        self._worker = None
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()
            self._worker = me

    def leave(self, rank: int, reason: str) -> None:
        """Nothing more comes from ``rank``: whoever waits for it raises. The first reason stays."""
        with self._lock:
            if rank not in self._gone:
                self._gone[rank] = reason
                for news in self._news:
                    news.notify_all()

    def check(self, rank: int) -> None:
        """Raise PeerLost if ``rank`` has left."""
        if rank in self._gone:
            raise PeerLost(f"this communicator is closed: {self._gone[rank]}")

    def post(self, key: Hashable, copy: Copy, receiver: int) -> None:
        """Put the message ``key`` into the box of ``receiver``."""
        with self._lock:
            self._mail[key] = copy
            self._news[receiver].notify_all()

    def fetch(self, key: Hashable, sender: int, rank: int, timeout: float) -> Copy:
        """Wait for the message ``key`` from ``sender`` and take it out."""
        with self._away(key not in self._mail), self._lock:
            self._wait(rank, lambda: [] if key in self._mail else [sender], timeout)
            return self._mail.pop(key)

    def join(self, key: Hashable, part: Copy | None, ranks: Sequence[int], rank: int) -> Round:
        """Put ``part`` down in the collective call ``key`` of ``ranks``."""
        with self._lock:
            table = self._rounds.setdefault(key, Round())
            table.num_here += 1
            if part is not None:
                table.parts[rank] = part
                for other in ranks:
                    self._news[other].notify_all()
            if table.num_here == len(ranks):
                del self._rounds[key]  # who still waits holds the table itself
            return table

    def collect(self, table: Round, ranks: Sequence[int], rank: int, timeout: float) -> list[Copy]:
        """Wait for the parts of ``ranks`` in a collective call."""

        def missing() -> list[int]:
            return [other for other in ranks if other not in table.parts]

        with self._away(bool(missing())), self._lock:
            self._wait(rank, missing, timeout)
            return [table.parts[other] for other in ranks]

    def _wait(self, rank: int, missing: Callable[[], list[int]], timeout: float) -> None:
        """Sleep until nobody is missing.

        Raises:
            PeerLost: someone missing has left, ``rank`` itself has, or the time is over.
        """

        def settled() -> bool:
            lacking = missing()
            return not lacking or rank in self._gone or any(other in self._gone for other in lacking)

        in_time = self._news[rank].wait_for(settled, timeout)
        self.check(rank)
        lacking = missing()
        lost = [self._gone[other] for other in lacking if other in self._gone]
        if lost:
            raise PeerLost(f"rank {rank} waits in vain: {'; '.join(lost)}")
        if not in_time:
            names = ", ".join(map(str, lacking))
            raise PeerLost(f"rank {rank} heard nothing from rank {names} for {timeout:g} s")
