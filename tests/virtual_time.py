"""Ranks on a clock of arithmetic: a step takes as long as its multiplications, a message as a throttled wire."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from distrifusion.comm import Comm, Pending
from distrifusion.comm.base import BaseComm


class Clock(TorchFunctionMode):
    """Of one rank, while it is entered: the multiplications of its own convolutions, and its waits."""

    now = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "conv2d":
            self.now += result.numel() * (args[1].numel() // args[1].shape[0])
        return result

    def wait_until(self, time: float) -> None:
        self.now = max(time, self.now)


class Wire:
    """What all ranks know of each other's messages. Each link carries one after the other, ``rate`` bytes in a time of
    one multiplication.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.arrivals: dict[Any, float] = {}
        self._free: dict[Any, float] = defaultdict(float)

    def send(self, message: Any, link: Any, now: float, num_bytes: int) -> None:
        self._free[link] = self.arrivals[message] = max(now, self._free[link]) + num_bytes / self.rate


class TimedComm(BaseComm):
    """``inner``, whose waits last until the words are there by the ``wire``. Objects and broadcasts take no time."""

    def __init__(
        self, inner: Comm, clock: Clock, wire: Wire, ranks: Sequence[int] | None = None, path: Any = ()
    ) -> None:
        self._inner, self._clock, self._wire, self._path = inner, clock, wire, path
        self._ranks = ranks or range(inner.world)
        self._counts: Counter[Any] = Counter()
        self.rank, self.world, self.device = inner.rank, inner.world, inner.device
        self.meter, self.timeout = inner.meter, inner.timeout

    def swap(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor], *, kind: str) -> Pending[None]:
        for peer, words in sends.items():
            self._send("swap", self.rank, peer, words)
        return _Timed(self._inner.swap(sends, recvs, kind=kind), self._arrivals("swap", recvs))

    def all_gather(
        self, own: Tensor, sizes: Sequence[int], *, kind: str, into: Tensor | None = None
    ) -> Pending[list[Tensor]]:
        if kind == "control":
            return self._inner.all_gather(own, sizes, kind=kind, into=into)
        peers = [peer for peer in range(self.world) if peer != self.rank]
        for peer in peers:
            self._send("gather", self.rank, peer, own)
        return _Timed(self._inner.all_gather(own, sizes, kind=kind, into=into), self._arrivals("gather", peers))

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        self._inner.broadcast(tensor, root)

    def split(self, groups: Sequence[Sequence[int]]) -> TimedComm:
        mine = next(group for group in groups if self.rank in group)
        ranks = [self._ranks[rank] for rank in mine]
        self._counts["splits"] += 1
        path = (*self._path, self._counts["splits"])
        return TimedComm(self._inner.split(groups), self._clock, self._wire, ranks, path)

    def _message(self, kind: str, sender: int, receiver: int) -> Any:
        link = self._ranks[sender], self._ranks[receiver]
        self._counts[kind, link] += 1
        return self._path, kind, link, self._counts[kind, link]

    def _send(self, kind: str, sender: int, receiver: int, words: Tensor) -> None:
        message = self._message(kind, sender, receiver)
        self._wire.send(message, message[2], self._clock.now, words.numel() * words.element_size())

    def _arrivals(self, kind: str, senders: Any) -> Callable[[], None]:
        messages = [self._message(kind, sender, self.rank) for sender in senders]

        def wait() -> None:
            for message in messages:
                self._clock.wait_until(self._wire.arrivals[message])

        return wait


class _Timed:
    def __init__(self, pending: Pending[Any], arrive: Callable[[], None]) -> None:
        self._pending, self._arrive = pending, arrive

    def wait(self) -> Any:
        result = self._pending.wait()
        self._arrive()
        return result
