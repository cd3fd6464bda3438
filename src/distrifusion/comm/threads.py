"""Ranks as threads of one process: tests and examples start in milliseconds and need no network.

The ranks share one `_Hub`: a letter box for each message and a table for each collective call, under one lock. Tensors
are copied when they are launched and again when they arrive, so ranks never share memory, as on real devices.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError, PeerLost, RanksDisagree
from .base import BaseComm, Done, as_bytes, default_timeout
from .meter import Meter
from .protocol import Comm, Pending

T = TypeVar("T")


def run_ranks(
    num_ranks: int,
    fn: Callable[[Comm], T],
    *,
    timeout: float | None = None,
    device: torch.device | str = "cpu",
) -> list[T]:
    """Run ``fn(comm)`` on ranks that are threads of this process and return the results in order of rank.

    The threads start in the caller's grad or inference mode. They share torch's intra-op thread setting.

    Args:
        num_ranks: the world.
        fn: what each rank does; also the same calls of ``comm`` in the same order.
        timeout: seconds until a silent peer counts as lost; None: DISTRIFUSION_TIMEOUT, or 60. A rank that ended is
            noticed at once.
        device: of every rank.

    Raises:
        ConfigError: no ranks.
        Exception: the first one that a rank raised of its own; `PeerLost` only where no rank has another cause.
    """
    if isinstance(num_ranks, bool) or not isinstance(num_ranks, int) or num_ranks < 1:
        raise ConfigError(f"num_ranks={num_ranks!r} must be a whole number of at least 1")
    timeout = default_timeout(60.0) if timeout is None else timeout
    device = torch.device(device)
    hub = _Hub(num_ranks)
    results: dict[int, T] = {}
    failures: list[BaseException] = []  # in order of time
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def body(rank: int) -> None:
        reason = f"rank {rank} has finished"
        try:
            if device.index is not None:
                torch.accelerator.set_device_index(device.index)
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                results[rank] = fn(ThreadComm(hub, (), tuple(range(num_ranks)), rank, device, timeout, Meter()))
        except BaseException as failure:
            failures.append(failure)
            reason = f"rank {rank} failed: {type(failure).__name__}: {failure}"
        finally:
            hub.leave(rank, reason)

    threads = [threading.Thread(target=body, args=(rank,), name=f"rank-{rank}") for rank in range(num_ranks)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        # Ctrl-C lands in this thread: whoever waits is let go, so that no thread outlives the call.
        for rank in range(num_ranks):
            hub.leave(rank, f"rank {rank} was interrupted")
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failures:
        raise next((failure for failure in failures if not isinstance(failure, PeerLost)), failures[0])
    return [results[rank] for rank in range(num_ranks)]


@dataclass
class _Copy:
    """A tensor as it was at its launch, and on an accelerator the event after which it is there."""

    tensor: Tensor
    event: torch.Event | None

    @classmethod
    def of(cls, tensor: Tensor) -> _Copy:
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
class _Round:
    """One collective call: what each rank of the group has put down so far."""

    parts: dict[int, _Copy] = field(default_factory=dict)
    num_here: int = 0


class _Hub:
    """What the threads share. World ranks throughout; ``scope`` tells communicators made by ``split`` apart."""

    def __init__(self, num_ranks: int) -> None:
        self._lock = threading.Lock()
        self._news = [threading.Condition(self._lock) for _ in range(num_ranks)]  # who waits sleeps on its own
        self._mail: dict[Hashable, _Copy] = {}
        self._rounds: dict[Hashable, _Round] = {}
        self._gone: dict[int, str] = {}

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

    def post(self, key: Hashable, copy: _Copy, receiver: int) -> None:
        with self._lock:
            self._mail[key] = copy
            self._news[receiver].notify_all()

    def fetch(self, key: Hashable, sender: int, rank: int, timeout: float) -> _Copy:
        """Wait for the message ``key`` from ``sender`` and take it out."""
        with self._lock:
            self._wait(rank, lambda: [] if key in self._mail else [sender], timeout)
            return self._mail.pop(key)

    def join(self, key: Hashable, part: _Copy | None, ranks: Sequence[int], rank: int) -> _Round:
        """Put ``part`` down in the collective call ``key`` of ``ranks``."""
        with self._lock:
            table = self._rounds.setdefault(key, _Round())
            table.num_here += 1
            if part is not None:
                table.parts[rank] = part
                for other in ranks:
                    self._news[other].notify_all()
            if table.num_here == len(ranks):
                del self._rounds[key]  # who still waits holds the table itself
            return table

    def collect(self, table: _Round, ranks: Sequence[int], rank: int, timeout: float) -> list[_Copy]:
        """Wait for the parts of ``ranks`` in a collective call."""
        with self._lock:
            self._wait(rank, lambda: [other for other in ranks if other not in table.parts], timeout)
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


class ThreadComm(BaseComm):
    """One rank of `run_ranks`. See `Comm` for the contract."""

    def __init__(
        self,
        hub: _Hub,
        scope: tuple[int, ...],
        ranks: tuple[int, ...],
        rank: int,
        device: torch.device,
        timeout: float,
        meter: Meter,
    ) -> None:
        self.rank = rank
        self.world = len(ranks)
        self.device = device
        self.meter = meter
        self.timeout = timeout
        self._hub = hub
        self._scope = scope
        self._ranks = ranks  # of the world, by rank of this group
        self._me = ranks[rank]
        self._num_sent: Counter[int] = Counter()
        self._num_received: Counter[int] = Counter()
        self._num_rounds = 0
        self._num_splits = 0

    def swap(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor], *, kind: str) -> Pending[None]:
        """See `Comm.swap`."""
        self._check_swap(sends, recvs)
        self._hub.check(self._me)
        for peer, tensor in sends.items():
            if tensor.numel():
                key = (self._scope, self.rank, peer, self._num_sent[peer])
                self._num_sent[peer] += 1
                self.meter.sent(kind, peer, tensor.numel() * tensor.element_size())
                self._hub.post(key, _Copy.of(as_bytes(tensor)), self._ranks[peer])
        letters: list[tuple[Hashable, int, Tensor]] = []
        for peer, tensor in recvs.items():
            if tensor.numel():
                letters.append(((self._scope, peer, self.rank, self._num_received[peer]), peer, tensor))
                self._num_received[peer] += 1
        return _Swap(self, letters)

    def all_gather(self, own: Tensor, sizes: Sequence[int], *, kind: str) -> Pending[list[Tensor]]:
        """See `Comm.all_gather`. Counts what torch.distributed would send: parts padded to the largest."""
        self._check_gather(own, sizes)
        self._hub.check(self._me)
        if self.world == 1 or not any(sizes):
            return Done([own.detach().clone()] + [own.new_empty(0) for _ in sizes[1:]])
        self.meter.gathered(kind, max(sizes) * own.element_size(), self.world - 1)
        return _Gather(self, self._join(_Copy.of(own)), own.dtype, sizes)

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """See `Comm.broadcast`."""
        assert tensor.is_contiguous()
        self._hub.check(self._me)
        if self.world == 1 or not tensor.numel():
            return
        if self.rank == root:
            self.meter.gathered("control", tensor.numel() * tensor.element_size(), self.world - 1)
            self._join(_Copy.of(as_bytes(tensor)))
            return
        table = self._join(None)
        (part,) = self._waiting(lambda: self._hub.collect(table, [self._ranks[root]], self._me, self.timeout))
        self._copy(part, tensor, root)

    def split(self, groups: Sequence[Sequence[int]]) -> ThreadComm:
        """See `Comm.split`."""
        index = self._my_group(groups)
        group = groups[index]
        scope = (*self._scope, self._num_splits, index)
        self._num_splits += 1
        ranks = tuple(self._ranks[rank] for rank in group)
        rank = list(group).index(self.rank)
        return ThreadComm(self._hub, scope, ranks, rank, self.device, self.timeout, self.meter)

    def abort(self) -> None:
        """See `Comm.abort`."""
        self._hub.leave(self._me, f"rank {self._me} has left")

    def close(self) -> None:
        """See `Comm.close`. Closing a communicator that came from ``split`` leaves its origin open."""
        if not self._scope:
            self.abort()

    def _join(self, part: _Copy | None) -> _Round:
        key = (self._scope, self._num_rounds)
        self._num_rounds += 1
        return self._hub.join(key, part, self._ranks, self._me)

    def _waiting(self, wait: Callable[[], T]) -> T:
        """Call ``wait`` on the clock; a loss is passed on by leaving."""
        start = perf_counter()
        try:
            return wait()
        except PeerLost as loss:
            self._hub.leave(self._me, f"rank {self._me} gave up ({loss})")
            raise
        finally:
            self.meter.waited += perf_counter() - start

    def _copy(self, part: _Copy, into: Tensor, sender: int) -> None:
        source, target = part.ready(), as_bytes(into)
        if source.numel() != target.numel():
            raise RanksDisagree(
                f"rank {self._ranks[sender]} sent {source.numel()} bytes, rank {self._me} expected {target.numel()}"
            )
        target.copy_(source)


class _Swap:
    """Receives that are under way."""

    def __init__(self, comm: ThreadComm, letters: list[tuple[Hashable, int, Tensor]]) -> None:
        self._comm = comm
        self._letters = letters

    def wait(self) -> None:
        comm = self._comm
        while self._letters:
            key, peer, tensor = self._letters[0]
            sender = comm._ranks[peer]
            part = comm._waiting(lambda key=key, sender=sender: comm._hub.fetch(key, sender, comm._me, comm.timeout))  # type: ignore[misc]
            comm._copy(part, tensor, peer)
            self._letters.pop(0)


class _Gather:
    """An all-gather that is under way."""

    def __init__(self, comm: ThreadComm, table: _Round, dtype: torch.dtype, sizes: Sequence[int]) -> None:
        self._comm = comm
        self._table = table
        self._like = dtype, list(sizes)
        self._result: list[Tensor] | None = None

    def wait(self) -> list[Tensor]:
        comm = self._comm
        if self._result is None:
            table, (dtype, sizes) = self._table, self._like
            parts = comm._waiting(lambda: comm._hub.collect(table, comm._ranks, comm._me, comm.timeout))
            for rank, (part, size) in enumerate(zip(parts, sizes, strict=True)):
                if part.tensor.dtype != dtype or part.tensor.numel() != size:
                    raise RanksDisagree(
                        f"rank {comm._ranks[rank]} gathers {part.tensor.numel()} x {part.tensor.dtype}, "
                        f"rank {comm._me} expected {size} x {dtype}"
                    )
            self._result = [part.ready().clone() for part in parts]
        return self._result
