"""A route through shared memory: peers read a rank's words where it wrote them, so nothing is copied on the way.

Each rank has its outbox in a file of /dev/shm, twice: while the peers read one half, the next turn's words are written
to the other. A launch only tells the peers, over the channel's lanes, that a turn's words are there. A half is written
again two turns later; by then its readers have launched the turn in between, and that they do when they are done
reading. They are heard first, since a turn is waited for before the next outbox is written, and every pair that
exchanges words in one direction exchanges tokens in both.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RanksDisagree
from .protocol import EVERYONE, Box, Pending
from .route import Layout
from .shared import FOLDER

PAGE = 4096  # bytes: messages have pages of their own

Tell = Callable[[Mapping[int, Tensor], Mapping[int, Tensor]], Pending[None]]
"""A swap that is not counted: tokens are part of the transport."""


@dataclass(frozen=True)
class _File:
    """Where one rank's outbox lies."""

    path: str
    places: dict[int, tuple[int, int]]  # by receiver: first byte of the message in a half, and how many
    half: int  # bytes of one half

    def messages(self, memory: mmap.mmap, half: int) -> dict[int, Tensor]:
        """The messages of one half, by receiver."""
        everything = torch.frombuffer(memory, dtype=torch.uint8)[half * self.half :]
        return {lane: everything[first : first + size] for lane, (first, size) in self.places.items()}


class SharedRoute:
    """See `Route`; made by `open_shared_route`.

    Args:
        outboxes: the two halves.
        inboxes: the peers' halves.
        peers: with whom tokens are exchanged.
        tell: see `Tell`.
        count: called at each launch.
        num_bytes: of both halves. What is received lies with the peers.
    """

    def __init__(
        self,
        outboxes: list[Box],
        inboxes: list[Box],
        peers: list[int],
        tell: Tell,
        count: Callable[[], None],
        num_bytes: int,
    ) -> None:
        self.num_bytes = num_bytes
        self._outboxes, self._inboxes = outboxes, inboxes
        self._tell, self._count = tell, count
        self._turn = 0  # number of launches
        self._pending: Pending[None] | None = None
        self._heard = {peer: torch.zeros(1, dtype=torch.int64) for peer in peers}

    @property
    def outbox(self) -> Box:
        """See `Route`."""
        return self._outboxes[self._turn % 2]

    def launch(self) -> None:
        """See `Route`."""
        self._turn += 1
        token = torch.tensor([self._turn])
        self._count()
        self._pending = self._tell(dict.fromkeys(self._heard, token), self._heard)

    def wait(self) -> Box:
        """See `Route`.

        Raises:
            RanksDisagree: a peer is at another turn.
        """
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            for peer, token in self._heard.items():
                if int(token) != self._turn:
                    raise RanksDisagree(
                        f"rank {peer} of the group is at turn {int(token)} of a route, not {self._turn}"
                    )
        return self._inboxes[(self._turn - 1) % 2]


def open_shared_route(
    layout: Layout,
    rank: int,
    everyone: Callable[[Any], list[Any]],
    tell: Tell,
    count: Callable[[], None],
) -> SharedRoute | None:
    """A route over ranks that share memory, or None where there is no room for it. Collective.

    ``everyone`` gathers a picklable value of all ranks.
    """
    places, end = {}, 0
    for lane, size in layout.outgoing(rank).items():
        places[lane] = (end, size)
        end += -(-size // PAGE) * PAGE
    path = FOLDER / f"distrifusion-{secrets.token_hex(8)}-route"
    memories: dict[int, mmap.mmap] = {}
    try:
        own = _File(str(path), places, end)
        with suppress(OSError):
            memories[rank] = _create(path, max(2 * end, PAGE))
        files: list[_File | None] = everyone(own if rank in memories else None)
        if all(files):
            with suppress(OSError):
                for peer, file in enumerate(files):
                    assert file is not None
                    if peer != rank:
                        memories[peer] = _open(Path(file.path))
        if not all(everyone(len(memories) == len(files))):
            return None
    finally:
        with suppress(OSError):
            path.unlink()  # the memory lives on in those who have mapped it
    with torch.inference_mode(False):  # written in whatever mode the caller's next step runs
        outboxes = [Box(own.messages(memories[rank], half)) for half in (0, 1)]
        inboxes = []
        for half in (0, 1):
            heard = {p: f.messages(memories[p], half) for p, f in enumerate(files) if f is not None and p != rank}
            direct = {peer: messages[rank] for peer, messages in heard.items() if rank in messages}
            shared = {peer: messages[EVERYONE] for peer, messages in heard.items() if EVERYONE in messages}
            inboxes.append(Box(direct, shared))
    peers = [peer for peer in range(len(files)) if peer != rank]
    linked = [p for p in peers if layout.says_to_all or p in layout.sends or p in layout.recvs]
    return SharedRoute(outboxes, inboxes, linked, tell, count, len(memories[rank]))


def _create(path: Path, size: int) -> mmap.mmap:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(file, 0, size)  # all of it now, or the kernel kills whoever finds no room for a page
        return _mapped(file, size)
    finally:
        os.close(file)


def _open(path: Path) -> mmap.mmap:
    file = os.open(path, os.O_RDWR)
    try:
        return _mapped(file, 0)
    finally:
        os.close(file)


def _mapped(file: int, size: int) -> mmap.mmap:
    """All pages at once: the first steps would stop at each one otherwise, for both halves."""
    return mmap.mmap(file, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
