"""What the peers said one step ago, by name, and the few messages that carry this step's words to them.

Three phases. While steps are synchronous, ``keep`` stores what arrived under each name, and thereby learns the
layout: who sends what to whom, in which order. The first displaced step lays the names out in a few *chunks* of about
equal weight. From then on each name is read (``read``: waits, if need be, for the chunk that left one step ago) and
written (``post``) once per step; a chunk leaves as soon as its last name is written, and has until its first name is
read in the next step.

Each chunk is one message per neighbour for what only neighbours get, and one all-gather for what all get; with two
ranks these are the same peer, and one message carries both. A chunk travels on a `Route`, opened once per picture: what
is sent and what was received are different memory. The cut is computed from sizes that all ranks know, so all ranks
cut alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .protocol import EVERYONE, Comm
from .route import Layout

MAX_MESSAGES = 8  # per rank and displaced step, the gathered output included
MAX_CHUNKS = 4  # more would only add messages: with 4, each has at least three quarters of a step to arrive
ALIGN = 16  # bytes: views of any dtype into one byte buffer stay aligned


class _Spec(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class _Place(NamedTuple):
    """Where a tensor lies in the bytes of a message."""

    lane: int  # receiver (EVERYONE for what all get), or sender
    offset: int
    spec: _Spec

    def view(self, messages: Mapping[int, Tensor]) -> Tensor:
        room = messages[self.lane][self.offset : self.offset + self.spec.num_bytes]
        return room.view(self.spec.dtype).view(self.spec.shape)


class _Packing:
    """Gives tensors fixed places in messages."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}  # bytes of each message

    def place(self, lane: int, spec: _Spec) -> _Place:
        offset = self.sizes.get(lane, 0)
        self.sizes[lane] = offset + -(-spec.num_bytes // ALIGN) * ALIGN
        return _Place(lane, offset, spec)

    @property
    def filled(self) -> dict[int, int]:
        """Bytes of the messages that have any."""
        return {lane: size for lane, size in self.sizes.items() if size}


@dataclass
class _Entry:
    """One name: what peers said under it, and the layout of what is said to them."""

    received: dict[int, Tensor]  # peer -> its words of the step before
    outgoing: dict[int, _Spec]  # peer, or EVERYONE alone
    links: frozenset[tuple[int, int]]  # every (sender, receiver) of the name over all ranks; empty: all to all
    weight: int  # bytes that travel under the name between all ranks, the same number on each
    chunk: int = -1
    posts: dict[int, int] = field(default_factory=dict)  # receiver -> index of the view in the chunk's outbox


class _Chunk:
    """Names that travel together, on one route."""

    def __init__(self, comm: Comm, entries: list[_Entry]) -> None:
        self.num_posted = 0
        self._num_entries = len(entries)
        self._is_under_way = False
        packings = sends, direct, shared = _Packing(), _Packing(), _Packing()
        self._posts: list[_Place] = []
        self._arrivals: list[tuple[_Entry, _Place, bool]] = []  # whether it was said to all
        for entry in entries:
            for lane, spec in entry.outgoing.items():
                entry.posts[lane] = len(self._posts)
                self._posts.append(sends.place(lane, spec))
            for peer, words in entry.received.items():
                to_all = EVERYONE in entry.outgoing
                place = packings[1 + to_all].place(peer, _Spec(words.shape, words.dtype))
                self._arrivals.append((entry, place, to_all))
        to_everyone = sends.sizes.pop(EVERYONE, 0)
        sizes = {**shared.sizes, comm.rank: to_everyone}
        layout = Layout(sends.filled, direct.filled, [sizes.get(rank, 0) for rank in range(comm.world)])
        self.num_bytes = sum(sends.sizes.values()) + to_everyone
        self._route = comm.route(layout, kind="chunk")
        self._nothing = torch.empty(0, dtype=torch.uint8, device=comm.device)

    @property
    def is_full(self) -> bool:
        return self.num_posted == self._num_entries

    def post(self, index: int) -> Tensor:
        """Where the words of `_Entry.posts` are written in this step."""
        box = self._route.outbox
        if box.views is None:
            messages = defaultdict(lambda: self._nothing, box.direct)
            box.views = [place.view(messages) for place in self._posts]
        return box.views[index]

    def launch(self) -> None:
        """Send what was written and receive what the peers wrote, in the background."""
        self._route.launch()
        self._is_under_way = True
        self.num_posted = 0

    def arrive(self) -> None:
        """Wait for what was launched, if anything is under way, and hand each name its words."""
        if not self._is_under_way:
            return
        box, self._is_under_way = self._route.wait(), False
        if box.views is None:
            direct, shared = (defaultdict(lambda: self._nothing, part) for part in (box.direct, box.shared))
            box.views = [place.view(shared if to_all else direct) for _, place, to_all in self._arrivals]
        for (entry, place, _), words in zip(self._arrivals, box.views, strict=True):
            entry.received[place.lane] = words


class Slots:
    """The received words of one picture (and guidance branch) by name, and the chunks that carry them. See above."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._entries: dict[str, _Entry] = {}
        self._chunks: list[_Chunk] = []
        self._due: _Chunk | None = None
        self.own: dict[str, Tensor] = {}  # own words of the step before, where the policy asks for them

    def emptied(self) -> Slots:
        """New ones, over the same ranks."""
        return Slots(self._comm)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    @property
    def num_bytes(self) -> int:
        """Bytes of one step's words, as they are sent."""
        return sum(chunk.num_bytes for chunk in self._chunks)

    def keep(
        self,
        key: str,
        outgoing: Mapping[int, Tensor],
        received: Mapping[int, Tensor],
        *,
        links: frozenset[tuple[int, int]],
        weight: int,
    ) -> None:
        """Store what a synchronous step received under ``key`` from each peer, and what it sent to each.

        ``links`` and ``weight`` (bytes between all ranks) are the same on all ranks. All ranks keep the same names in
        the same order, those too that have nothing to say under a name.
        """
        assert not self._chunks, "names are learned before the first displaced step"
        specs = {peer: _Spec(words.shape, words.dtype) for peer, words in outgoing.items()}
        self._entries[key] = _Entry(dict(received), specs, links, weight)

    def keep_shared(self, key: str, own: Tensor, parts: list[Tensor]) -> None:
        """Store what everyone said to everyone under ``key``: ``parts[rank]``, own part included."""
        comm = self._comm
        received = {peer: part for peer, part in enumerate(parts) if peer != comm.rank}
        weight = sum(part.numel() * part.element_size() for part in parts) * (comm.world - 1)
        if comm.world == 2:
            self.keep(key, {1 - comm.rank: own}, received, links=frozenset({(0, 1), (1, 0)}), weight=weight)
        else:
            self.keep(key, {EVERYONE: own}, received, links=frozenset(), weight=weight)

    def read(self, key: str) -> dict[int, Tensor]:
        """Peer -> its words under ``key`` in the step before.

        They are views into the slot and may be used until the next ``read``: a chunk whose last name was posted leaves
        then, not earlier, because its slots fill with the peers' next words as soon as it has left.
        """
        self._launch_due()
        if not self._chunks:
            self._seal()
        entry = self._entries[key]
        self._chunks[entry.chunk].arrive()
        return entry.received

    def post(self, key: str, outgoing: Mapping[int, Tensor]) -> None:
        """Write this step's words under ``key`` into the chunk, after ``read`` of the same name."""
        entry = self._entries[key]
        chunk = self._chunks[entry.chunk]
        for peer, words in outgoing.items():
            chunk.post(entry.posts[peer]).copy_(words)
        self._posted(chunk)

    def post_shared(self, key: str, *words: Tensor) -> None:
        """Write this step's words for everyone under ``key``: tensors to stand side by side along their last dim."""
        entry = self._entries[key]
        chunk = self._chunks[entry.chunk]
        room = chunk.post(entry.posts[1 - self._comm.rank if self._comm.world == 2 else EVERYONE])
        for part, own in zip(torch.split(room, [own.shape[-1] for own in words], -1), words, strict=True):
            part.copy_(own)
        self._posted(chunk)

    def _posted(self, chunk: _Chunk) -> None:
        chunk.num_posted += 1
        if chunk.is_full:
            self._due = chunk

    def finish(self) -> bool:
        """End the step: the last chunk leaves. False where a chunk was only partly written, and so did not leave."""
        self._launch_due()
        return not any(chunk.num_posted for chunk in self._chunks)

    def drain(self) -> None:
        """Wait for everything under way. All ranks have launched the same, so this ends."""
        self._launch_due()
        for chunk in self._chunks:
            chunk.arrive()

    def _launch_due(self) -> None:
        if self._due is not None:
            self._due.launch()
            self._due = None

    def _seal(self) -> None:
        entries = list(self._entries.values())
        links = frozenset[tuple[int, int]]().union(*(entry.links for entry in entries))
        fan_out = max((sum(sender == rank for sender, _ in links) for rank in range(self._comm.world)), default=0)
        shared = any(not entry.links for entry in entries)
        per_chunk = max(fan_out + shared, 1)
        num_chunks = max(min(MAX_CHUNKS, (MAX_MESSAGES - 1) // per_chunk), 1)
        ends = list(accumulate(entry.weight for entry in entries))
        groups: list[list[_Entry]] = [[] for _ in range(num_chunks)]
        for entry, end in zip(entries, ends, strict=True):
            entry.chunk = min((end - entry.weight // 2) * num_chunks // max(ends[-1], 1), num_chunks - 1)
            groups[entry.chunk].append(entry)
        self._chunks = [_Chunk(self._comm, group) for group in groups]
