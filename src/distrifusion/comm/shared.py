"""A wire through shared memory, for ranks that are processes of one machine and keep their tensors on the CPU.

Each ordered pair of ranks has a *lane*: a ring of bytes in a file of /dev/shm, written by one and read by the other,
with a counter of bytes written and one of bytes read. Ranks make the same calls in the same order, so the stream
needs no frames. A message is one copy in and one copy out, by the ranks themselves: no system call, and no transport
thread that takes the core from a rank that computes. (Gloo: about a millisecond per small message beside such a rank.)

Counters are plain 8-byte stores after the bytes they announce, which other cores see in that order on x86 only; on
other processors, other systems and across machines, Gloo carries everything.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import ConfigError

FOLDER = Path("/dev/shm")
BUDGET = 128 << 20  # bytes of rings in one communicator
LARGEST, SMALLEST = 32 << 20, 256 << 10  # bytes of one ring
HEADER = 4096  # bytes before the ring: counters, each in a cache line of its own
WRITTEN, READ, CLOSED = 0, 16, 32  # indices of 8-byte words
SHORTEST, LONGEST, PATIENCE = 1e-4, 1e-3, 1 / 16  # seconds of a sleep between looks; of the time waited so far
IDLE, IDLE_PATIENCE = 2e-2, 1 / 256  # the same beyond LONGEST: of a rank without a part in what others do for seconds
LOOK_AGAIN = 0.05  # seconds between two looks at whether a silent peer still lives


class Lane:
    """One direction between two ranks. The writer makes the file and holds a lock on it for as long as it lives."""

    def __init__(self, path: Path, size: int | None) -> None:
        self.path = path
        self._is_writer = size is not None
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if self._is_writer else 0)
        self._file = os.open(path, flags, 0o600)
        if size is not None:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:  # all of it now, or the kernel kills whoever touches a page that there is no room for
                os.posix_fallocate(self._file, 0, HEADER + size)
            except OSError:
                self.unlink()
                os.close(self._file)
                raise
        memory = mmap.mmap(self._file, 0)
        self._words = memoryview(memory).cast("Q")
        self._ring = np.frombuffer(memory, dtype=np.uint8)[HEADER:]
        self._queue: deque[_Parcel] = deque()

    def add(self, parcel: _Parcel) -> None:
        """Put a message behind those under way, and move what can be moved now."""
        self._queue.append(parcel)
        self.progress()

    def progress(self) -> bool:
        """Move as many bytes as the ring allows; whether any moved."""
        moved = False
        while self._queue:
            parcel = self._queue[0]
            at = self._words[WRITTEN if self._is_writer else READ]
            other = self._words[READ if self._is_writer else WRITTEN]
            room = self._ring.size - (at - other) if self._is_writer else other - at
            count = min(room, parcel.data.size - parcel.moved)
            if count:
                self._copy(at, parcel, count)
                # After the copy: this store is what lets the other rank touch these bytes.
                self._words[WRITTEN if self._is_writer else READ] = at + count
                moved = True
            if parcel.moved < parcel.data.size:
                break
            parcel.is_done = True
            self._queue.popleft()
        return moved

    @property
    def is_closed(self) -> bool:
        """Whether the writer has said that no more will come."""
        return bool(self._words[CLOSED])

    def writer_died(self) -> bool:
        """Whether the writer's process ended without closing. Asked by the reader."""
        if self.is_closed:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return not self.is_closed

    def close(self) -> None:
        """Say that no more will come. What is in the ring can still be read."""
        if self._file >= 0:
            if self._is_writer:
                self._words[CLOSED] = 1
                self.unlink()
            os.close(self._file)
            self._file = -1
            self._queue.clear()

    def unlink(self) -> None:
        """Remove the name; the memory lives on in those who have it open."""
        with suppress(OSError):
            self.path.unlink()

    def _copy(self, at: int, parcel: _Parcel, count: int) -> None:
        start = at % self._ring.size
        first = min(count, self._ring.size - start)
        for offset, length in ((start, first), (0, count - first)):
            if length:
                ring = self._ring[offset : offset + length]
                data = parcel.data[parcel.moved : parcel.moved + length]
                if self._is_writer:
                    ring[:] = data
                else:
                    data[:] = ring
                parcel.moved += length


class _Parcel:
    """One message on its way into or out of a ring."""

    def __init__(self, data: Tensor) -> None:
        # An array, not a tensor: one made in inference mode could not be written to after it.
        self.data = data.numpy()
        self.moved = 0
        self.is_done = False


class SharedChannel:
    """See `Channel`. Broadcasts, which are rare, stay with the channel below."""

    name = "shared memory"

    def __init__(self, below: Any, outgoing: dict[int, Lane], incoming: dict[int, Lane], position: int) -> None:
        self._below = below
        self._outgoing, self._incoming = outgoing, incoming
        self._lanes = [*outgoing.values(), *incoming.values()]
        self._position = position

    def swap(
        self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]
    ) -> list[tuple[Any, list[int]]]:
        """See `Channel.swap`."""
        works: list[tuple[Any, list[int]]] = []
        for lanes, parcels in ((self._outgoing, sends), (self._incoming, recvs)):
            for peer, data in parcels:
                parcel = _Parcel(data)
                lanes[peer].add(parcel)
                works.append(((parcel, peer), [peer]))
        return works

    def gather(self, own: Tensor, into: Tensor) -> tuple[Any, list[Tensor]]:
        """See `Channel.gather`."""
        parts = list(into.unbind())
        parts[self._position].copy_(own)
        peers = [peer for peer in range(len(parts)) if peer != self._position]
        works = self.swap([(peer, own) for peer in peers], [(peer, parts[peer]) for peer in peers])
        return [work for work, _ in works], parts

    def broadcast(self, tensor: Tensor, root: int) -> Any:
        """See `Channel.broadcast`."""
        return _Below(self._below.broadcast(tensor, root))

    def finish(self, work: Any, timeout: float) -> None:
        """See `Channel.finish`: the host moves the bytes itself, of every message under way in turn."""
        if isinstance(work, _Below):
            self._below.finish(work.work, timeout)
            return
        for parcel, peer in work if isinstance(work, list) else [work]:
            self._wait(parcel, peer, timeout)

    def drop(self, *, abort: bool) -> None:
        """See `Channel.drop`."""
        for lane in self._lanes:
            lane.close()
        self._below.drop(abort=abort)

    def _wait(self, parcel: _Parcel, peer: int, timeout: float) -> None:
        idle, since, looked = 0, 0.0, 0.0
        while not parcel.is_done:
            if self._progress():
                idle = 0
                continue
            idle += 1
            if idle == 1:
                since = looked = perf_counter()
            elif 20 < idle <= 200:
                os.sched_yield()  # ranks may outnumber the cores
            now = perf_counter()
            if idle > 200:  # looking costs the core as much as a sixth of a short sleep; a peer's compute is long
                sleep(_nap(now - since))
            if now - looked > LOOK_AGAIN:
                looked = now
                dead = [rank for rank, lane in self._incoming.items() if lane.writer_died()]
                # Moving once more after the look: a peer's last words may have come in between.
                if (dead or self._incoming[peer].is_closed) and not self._progress():
                    raise RuntimeError(f"connection closed by rank {(dead or [peer])[0]} of the group")
                if now - since > timeout:
                    raise RuntimeError(f"no bytes for {timeout:g} s")

    def _progress(self) -> bool:
        """Move what can be moved on all lanes; whether anything moved."""
        moved = [lane.progress() for lane in self._lanes]
        return any(moved)


def _nap(waited: float) -> float:
    """Seconds to sleep for one that has ``waited`` for that many: what a late look costs stays a small part of it."""
    return max(min(max(waited * PATIENCE, SHORTEST), LONGEST), min(waited * IDLE_PATIENCE, IDLE))


class _Below:
    """A work of the channel below."""

    def __init__(self, work: Any) -> None:
        self.work = work


def is_allowed() -> bool:
    """Whether this process may use shared memory: DISTRIFUSION_SHARED_MEMORY is not 0.

    Raises:
        ConfigError: the variable is neither 0 nor 1.
    """
    text = os.environ.get("DISTRIFUSION_SHARED_MEMORY", "").strip()
    if text not in ("", "0", "1"):
        raise ConfigError(f"DISTRIFUSION_SHARED_MEMORY={text!r} must be 0 (all goes over Gloo) or 1")
    return text != "0"


def ring_bytes(world: int) -> int:
    """Of the ring between each two ranks, for one direction."""
    return max(min(BUDGET // (world * (world - 1)), LARGEST), SMALLEST) // HEADER * HEADER


def open_shared(below: Any, position: int, world: int, everyone: Callable[[Any], list[Any]]) -> SharedChannel | None:
    """A channel through shared memory over the ranks of ``below``, or None where they cannot have one. Collective.

    ``everyone`` gathers a picklable value of all ranks. Where one rank may not (`is_allowed`), none does.
    """
    size = ring_bytes(world)
    token = secrets.token_hex(8)
    outgoing: dict[int, Lane] = {}
    if is_allowed() and platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64"):
        with suppress(OSError):  # no such folder, or not enough room in it
            for peer in range(world):
                if peer != position:
                    outgoing[peer] = Lane(FOLDER / f"distrifusion-{token}-{peer}", size)
    is_ready = len(outgoing) == world - 1
    incoming: dict[int, Lane] = {}
    try:
        names = everyone({peer: str(lane.path) for peer, lane in outgoing.items()} if is_ready else None)
        if all(name is not None for name in names):
            with suppress(OSError):  # another machine, or another container
                incoming = {peer: Lane(Path(names[peer][position]), None) for peer in range(world) if peer != position}
        if all(everyone(len(incoming) == world - 1)):
            return SharedChannel(below, outgoing, incoming, position)
    finally:
        for lane in outgoing.values():
            lane.unlink()
    for lane in (*outgoing.values(), *incoming.values()):
        lane.close()
    return None
