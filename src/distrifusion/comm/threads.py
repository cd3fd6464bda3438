"""Ranks as threads of one process: tests and examples start in milliseconds and need no network.

Tensors are copied when they are launched and again when they arrive, so ranks never share memory, as on real devices.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError, PeerLost, RanksDisagree
from .base import BaseComm, Done, as_bytes, default_timeout
from .hub import Copy, Hub, Round
from .meter import Meter
from .protocol import Comm, Pending
from .tracer import Message

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
    hub = Hub(num_ranks)
    results: dict[int, T] = {}
    failures: list[BaseException] = []  # in order of time
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def body(rank: int) -> None:
        reason = f"rank {rank} has finished"
        try:
            if device.index is not None:
                torch.accelerator.set_device_index(device.index)
            with hub.turn(), torch.inference_mode(inference), torch.set_grad_enabled(grad):
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


def alone(device: torch.device) -> Comm:
    """A world of one, in the thread that asks."""
    return ThreadComm(Hub(1), (), (0,), 0, device, default_timeout(60.0), Meter())


class ThreadComm(BaseComm):
    """One rank of `run_ranks`. See `Comm` for the contract."""

    def __init__(
        self,
        hub: Hub,
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

    @property
    def wire(self) -> str:
        """See `Comm.wire`."""
        return "threads"

    def swap(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor], *, kind: str) -> Pending[None]:
        """See `Comm.swap`."""
        self._check_swap(sends, recvs)
        self._hub.check(self._me)
        for peer, tensor in sends.items():
            if tensor.numel():
                key = (self._scope, self.rank, peer, self._num_sent[peer])
                self._num_sent[peer] += 1
                self.meter.sent(kind, peer, tensor.numel() * tensor.element_size())
                self._hub.post(key, Copy.of(as_bytes(tensor)), self._ranks[peer])
        letters: list[tuple[Hashable, int, Tensor]] = []
        for peer, tensor in recvs.items():
            if tensor.numel():
                letters.append(((self._scope, peer, self.rank, self._num_received[peer]), peer, tensor))
                self._num_received[peer] += 1
        return _Swap(self, letters, kind)

    def all_gather(
        self, own: Tensor, sizes: Sequence[int], *, kind: str, into: Tensor | None = None
    ) -> Pending[list[Tensor]]:
        """See `Comm.all_gather`. Counts what torch.distributed would send: parts padded to the largest."""
        self._check_gather(own, sizes, into)
        self._hub.check(self._me)
        if self.world == 1 or not any(sizes):
            return Done([own.detach().clone()] + [own.new_empty(0) for _ in sizes[1:]])
        self.meter.gathered(kind, max(sizes) * own.element_size(), self.world - 1)
        return _Gather(self, self._join(Copy.of(own)), own.dtype, sizes, kind, into)

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """See `Comm.broadcast`."""
        assert tensor.is_contiguous()
        self._hub.check(self._me)
        if self.world == 1 or not tensor.numel():
            return
        if self.rank == root:
            self.meter.gathered("control", tensor.numel() * tensor.element_size(), self.world - 1)
            self._join(Copy.of(as_bytes(tensor)))
            self.meter.launched()
            return
        table = self._join(None)
        (part,) = self._waiting(
            lambda: self._hub.collect(table, [self._ranks[root]], self._me, self.timeout), "control", []
        )
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

    def _join(self, part: Copy | None) -> Round:
        key = (self._scope, self._num_rounds)
        self._num_rounds += 1
        return self._hub.join(key, part, self._ranks, self._me)

    def _waiting(self, wait: Callable[[], T], kind: str, flight: list[Message]) -> T:
        """Call ``wait`` on the clock; a loss is passed on by leaving."""
        start = self.meter.waits()
        try:
            return wait()
        except PeerLost as loss:
            self._hub.leave(self._me, f"rank {self._me} gave up ({loss})")
            raise
        finally:
            self.meter.has_waited(kind, start, flight)

    def _copy(self, part: Copy, into: Tensor, sender: int) -> None:
        source, target = part.ready(), as_bytes(into)
        if source.numel() != target.numel():
            raise RanksDisagree(
                f"rank {self._ranks[sender]} sent {source.numel()} bytes, rank {self._me} expected {target.numel()}"
            )
        target.copy_(source)


class _Swap:
    """Receives that are under way."""

    def __init__(self, comm: ThreadComm, letters: list[tuple[Hashable, int, Tensor]], kind: str) -> None:
        self._comm = comm
        self._kind, self._flight = kind, comm.meter.launched()
        self._letters = letters

    def wait(self) -> None:
        comm = self._comm
        while self._letters:
            key, peer, tensor = self._letters[0]
            sender = comm._ranks[peer]
            part = comm._waiting(
                lambda key=key, sender=sender: comm._hub.fetch(key, sender, comm._me, comm.timeout),  # type: ignore[misc]
                self._kind,
                self._flight,
            )
            comm._copy(part, tensor, peer)
            self._letters.pop(0)


class _Gather:
    """An all-gather that is under way."""

    def __init__(
        self,
        comm: ThreadComm,
        table: Round,
        dtype: torch.dtype,
        sizes: Sequence[int],
        kind: str,
        into: Tensor | None,
    ) -> None:
        self._comm = comm
        self._kind, self._flight = kind, comm.meter.launched()
        self._table = table
        self._like = dtype, list(sizes)
        self._into = into
        self._result: list[Tensor] | None = None

    def wait(self) -> list[Tensor]:
        comm = self._comm
        if self._result is None:
            table, (dtype, sizes) = self._table, self._like
            parts = comm._waiting(
                lambda: comm._hub.collect(table, comm._ranks, comm._me, comm.timeout), self._kind, self._flight
            )
            for rank, (part, size) in enumerate(zip(parts, sizes, strict=True)):
                if part.tensor.dtype != dtype or part.tensor.numel() != size:
                    raise RanksDisagree(
                        f"rank {comm._ranks[rank]} gathers {part.tensor.numel()} x {part.tensor.dtype}, "
                        f"rank {comm._me} expected {size} x {dtype}"
                    )
            if self._into is None:
                self._result = [part.ready().clone() for part in parts]
            else:
                rows = zip(self._into, parts, sizes, strict=True)
                self._result = [row[:size].copy_(part.ready()) for row, part, size in rows]
        return self._result
