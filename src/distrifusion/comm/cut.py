"""A communicator whose messages cut the recording of a step. See tape.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .base import BaseComm
from .protocol import Box, Comm, Pending, Route
from .route import Layout, PlainRoute
from .tape import Tape

T = TypeVar("T")


class CutComm(BaseComm):
    """Another communicator, whose messages are on the tape while one is recording, and their results in one memory.

    What a message brings lies where it lay when it was recorded. Objects, barriers and new routes are not for a tape.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.rank, self.world, self.device = comm.rank, comm.world, comm.device
        self.meter, self.timeout = comm.meter, comm.timeout
        self._tape: Tape | None = None

    @property
    def wire(self) -> str:
        """See `Comm.wire`."""
        return self._comm.wire

    @property
    def is_slow(self) -> bool:
        """See `Comm.is_slow`."""
        return self._comm.is_slow

    @contextmanager
    def on(self, tape: Tape) -> Iterator[None]:
        """Messages are on ``tape``, which is recording."""
        self._tape = tape
        try:
            yield
        finally:
            self._tape = None

    def host(self, action: Callable[[], None]) -> None:
        """Do something of the host's, on the tape if there is one."""
        if self._tape is None:
            action()
        else:
            self._tape.host(action)

    def swap(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor], *, kind: str) -> Pending[None]:
        """See `Comm.swap`."""
        return _Launched(self, lambda: self._comm.swap(sends, recvs, kind=kind), lambda _, __: None)

    def all_gather(
        self, own: Tensor, sizes: Sequence[int], *, kind: str, into: Tensor | None = None
    ) -> Pending[list[Tensor]]:
        """See `Comm.all_gather`."""
        rows = own.new_empty(self.world, max(sizes)) if into is None else into
        return _Launched(self, lambda: self._comm.all_gather(own, sizes, kind=kind, into=rows), _put_parts)

    def route(self, layout: Layout, *, kind: str) -> Route:
        """See `Comm.route`. One whose memory is always the same."""
        return _CutRoute(self, PlainRoute(self._comm, layout, kind))

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """See `Comm.broadcast`."""
        self._comm.broadcast(tensor, root)

    def split(self, groups: Sequence[Sequence[int]]) -> Comm:
        """See `Comm.split`."""
        return self._comm.split(groups)

    def abort(self) -> None:
        """See `Comm.abort`."""
        self._comm.abort()

    def close(self) -> None:
        """See `Comm.close`."""
        self._comm.close()


class _Launched(Generic[T]):
    """A message within a step. ``put`` writes what it has brought where the first time's result is."""

    def __init__(self, comm: CutComm, launch: Callable[[], Pending[T]], put: Callable[[T, T], None]) -> None:
        self._comm, self._launch, self._put = comm, launch, put
        self._results: list[T] = []
        comm.host(self._start)

    def wait(self) -> T:
        """See Pending."""
        self._comm.host(self._finish)
        return self._results[0]

    def _start(self) -> None:
        self._pending = self._launch()

    def _finish(self) -> None:
        result = self._pending.wait()
        if self._results:
            self._put(self._results[0], result)
        else:
            self._results.append(result)


def _put_parts(kept: list[Tensor], found: list[Tensor]) -> None:
    if any(one.data_ptr() != other.data_ptr() for one, other in zip(kept, found, strict=True)):
        torch._foreach_copy_(kept, [part.clone() for part in found])  # which may lie across each other


class _CutRoute:
    """A route whose turns begin in one step and end in the next."""

    def __init__(self, comm: CutComm, route: PlainRoute) -> None:
        self._comm, self._route = comm, route
        self._inbox: Box | None = None

    @property
    def num_bytes(self) -> int:
        """See `Route`."""
        return self._route.num_bytes

    @property
    def outbox(self) -> Box:
        """See `Route`."""
        return self._route.outbox

    def launch(self) -> None:
        """See `Route`."""
        self._comm.host(self._route.launch)

    def wait(self) -> Box:
        """See `Route`."""
        self._comm.host(self._wait)
        assert self._inbox is not None
        return self._inbox

    def _wait(self) -> None:
        self._inbox = self._route.wait()
