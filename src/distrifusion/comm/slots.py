"""What the peers said one step ago, by name, and the few messages that carry this step's words to them.

Three phases. While steps are synchronous, ``keep`` stores what arrived under each name, and thereby learns the
layout: who sends what to whom, in which order. The first displaced step lays the names out in a few *chunks* of about
equal weight. From then on each name is read (``read``: waits, if need be, for the chunk that left one step ago) and
written (``post``) once per step; a chunk leaves as soon as its last name is written (the last one behind the step's
prediction), and has until its first name is read in the next step.

Each chunk is one message per neighbour for what only neighbours get, and one all-gather for what all get; with two
ranks these are the same peer, and one message carries both. A chunk travels on a `Route`, opened once per picture: what
is sent and what was received are different memory. The cut is computed from sizes that all ranks know, so all ranks
cut alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .codec import Codec
from .packing import Packing, Place, Spec
from .protocol import EVERYONE, Comm
from .residual import Receiver, Sender, frame_bytes
from .route import Layout

MAX_MESSAGES = 8  # per rank and displaced step, the gathered output included
MAX_CHUNKS = 4  # more would only add messages: with 4, each has at least three quarters of a step to arrive


@dataclass
class _Entry:
    """One name: what peers said under it, and what was said to them."""

    key: str
    received: dict[int, Tensor]  # peer -> its words of the step before
    outgoing: dict[int, Spec]  # peer, or EVERYONE alone
    codec: Codec | None
    links: frozenset[tuple[int, int]]  # every (sender, receiver) of the name over all ranks; empty: all to all
    weight: int  # bytes that travel under the name between all ranks, the same number on each
    chunk: int = -1
    posts: dict[int, int] = field(default_factory=dict)  # receiver -> index of the view in the chunk's outbox
    said: dict[int, Tensor] = field(default_factory=dict)  # with a codec: own words of the last synchronous step
    senders: dict[int, Sender] = field(default_factory=dict)
    receivers: dict[int, Receiver] = field(default_factory=dict)
    frames: dict[int, Tensor] = field(default_factory=dict)  # peer -> what has come and was not yet decoded

    def on_wire(self, spec: Spec) -> Spec:
        """As it travels."""
        if self.codec is None:
            return spec
        return Spec(torch.Size([frame_bytes(self.codec, spec.shape)]), torch.uint8)

    def seal(self) -> None:
        """From now on only changes travel, where there is a codec; the words of the last step are the first bases."""
        if self.codec is not None:
            self.senders = {lane: Sender(self.codec, self.key, words) for lane, words in self.said.items()}
            self.said.clear()
            for peer, words in self.received.items():
                self.receivers[peer] = Receiver(self.codec, self.key, words, peer)
                self.received[peer] = self.receivers[peer].base

    def write(self, lane: int, words: Sequence[Tensor], room: Tensor) -> None:
        """Put this step's words, side by side along their last dim, into their room."""
        if self.senders:
            self.senders[lane].write(torch.cat(list(words), -1) if len(words) > 1 else words[0], room)
        elif len(words) == 1:
            room.copy_(words[0])
        else:
            for part, own in zip(torch.split(room, [own.shape[-1] for own in words], -1), words, strict=True):
                part.copy_(own)

    def arrived(self, peer: int, words: Tensor) -> None:
        """Take what the chunk has brought."""
        (self.frames if self.receivers else self.received)[peer] = words

    def decode(self) -> None:
        """Add what has come since the last time to the bases."""
        for peer, frame in self.frames.items():
            self.receivers[peer].read(frame)
        self.frames.clear()


class _Chunk:
    """Names that travel together, on one route."""

    def __init__(self, comm: Comm, entries: list[_Entry]) -> None:
        self.num_posted = 0
        self.keys = [entry.key for entry in entries]
        self._is_under_way = False
        packings = sends, direct, shared = Packing(), Packing(), Packing()
        self._posts: list[Place] = []
        self._arrivals: list[tuple[_Entry, Place, bool]] = []  # whether it was said to all
        for entry in entries:
            to_all = EVERYONE in entry.outgoing
            for lane, spec in entry.outgoing.items():
                entry.posts[lane] = len(self._posts)
                self._posts.append(sends.place(lane, entry.on_wire(spec)))
            for peer, words in entry.received.items():
                place = packings[1 + to_all].place(peer, entry.on_wire(Spec(words.shape, words.dtype)))
                self._arrivals.append((entry, place, to_all))
            entry.seal()
        to_everyone = sends.sizes.pop(EVERYONE, 0)
        sizes = {**shared.sizes, comm.rank: to_everyone}
        layout = Layout(sends.filled, direct.filled, [sizes.get(rank, 0) for rank in range(comm.world)])
        self.num_bytes = sum(sends.sizes.values()) + to_everyone
        self._route = comm.route(layout, kind="chunk")
        self._nothing = torch.empty(0, dtype=torch.uint8, device=comm.device)

    @property
    def memory(self) -> int:
        """Bytes of memory for what is sent and received."""
        return self._route.num_bytes

    @property
    def is_full(self) -> bool:
        return self.num_posted == len(self.keys)

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
            entry.arrived(place.lane, words)


class Slots:
    """The received words of one picture (and guidance branch) by name, and the chunks that carry them. See above.

    Names of a kind in ``codecs`` travel as frames (see residual.py) from the first displaced step on. With
    ``in_place``, what is kept of own words lies where it did in the step before.
    """

    def __init__(self, comm: Comm, codecs: Mapping[str, Codec] | None = None, *, in_place: bool = False) -> None:
        self._comm = comm
        self._codecs = codecs or {}
        self._in_place = in_place
        self._entries: dict[str, _Entry] = {}
        self._chunks: list[_Chunk] = []
        self.due: _Chunk | None = None  # full, and to leave; whoever plays a recorded step says so here
        self.own: dict[str, Tensor] = {}  # what the policy keeps of own words of steps before
        self.sizes: dict[str, Any] = {}  # what the policy keeps of what stays as it is while the layout does

    def keep_own(self, key: str, words: Tensor) -> None:
        """Put ``words`` in the place of ``own[key]``, which is read no more in this step."""
        before = self.own[key]
        if self._in_place and before.shape == words.shape:
            before.copy_(words)
        else:
            self.own[key] = words

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    @property
    def is_empty(self) -> bool:
        """Whether no step has left words."""
        return not self._entries

    @property
    def num_bytes(self) -> int:
        """Bytes of one step's words, as they are sent."""
        return sum(chunk.num_bytes for chunk in self._chunks)

    @property
    def memory(self) -> int:
        """Bytes that this rank holds for messages: what it sends in one step and what it receives in one, at most."""
        return sum(chunk.memory for chunk in self._chunks)

    def keep(
        self,
        key: str,
        outgoing: Mapping[int, Tensor],
        received: Mapping[int, Tensor],
        *,
        links: frozenset[tuple[int, int]],
        weight: int,
        kind: str = "",
    ) -> None:
        """Store what a synchronous step received under ``key`` from each peer, and what it sent to each.

        ``links`` and ``weight`` (bytes between all ranks) are the same on all ranks. All ranks keep the same names in
        the same order, those too that have nothing to say under a name.
        """
        assert not self._chunks, "names are learned before the first displaced step"
        specs = {lane: Spec(words.shape, words.dtype) for lane, words in outgoing.items()}
        codec = self._codecs.get(kind)
        if codec is None:
            self._entries[key] = _Entry(key, dict(received), specs, None, links, weight)
            return
        weight = weight * codec.num_bytes((1024, 1024)) >> 22  # of what float32 would be; other sizes are alike
        # The model may go on in the memory of its own words, and the base must be what the peers have.
        said = {lane: words.clone() for lane, words in outgoing.items()}
        self._entries[key] = _Entry(key, dict(received), specs, codec, links, weight, said=said)

    def keep_shared(self, key: str, own: Tensor, parts: list[Tensor], kind: str = "") -> None:
        """Store what everyone said to everyone under ``key``: ``parts[rank]``, own part included."""
        comm = self._comm
        received = {peer: part for peer, part in enumerate(parts) if peer != comm.rank}
        weight = sum(part.numel() * part.element_size() for part in parts) * (comm.world - 1)
        if comm.world == 2:
            self.keep(key, {1 - comm.rank: own}, received, links=frozenset({(0, 1), (1, 0)}), weight=weight, kind=kind)
        else:
            self.keep(key, {EVERYONE: own}, received, links=frozenset(), weight=weight, kind=kind)

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
        entry.decode()
        return entry.received

    def beside(self, key: str) -> list[str]:
        """All names whose words come with those of ``key``, which was read already, in order of the step."""
        return self._chunks[self._entries[key].chunk].keys

    def post(self, key: str, outgoing: Mapping[int, Tensor]) -> None:
        """Write this step's words under ``key`` into the chunk, after ``read`` of the same name."""
        entry = self._entries[key]
        chunk = self._chunks[entry.chunk]
        for peer, words in outgoing.items():
            entry.write(peer, [words], chunk.post(entry.posts[peer]))
        self._posted(chunk)

    def post_shared(self, key: str, *words: Tensor) -> None:
        """Write this step's words for everyone under ``key``: tensors to stand side by side along their last dim."""
        entry = self._entries[key]
        chunk = self._chunks[entry.chunk]
        lane = 1 - self._comm.rank if self._comm.world == 2 else EVERYONE
        entry.write(lane, words, chunk.post(entry.posts[lane]))
        self._posted(chunk)

    def _posted(self, chunk: _Chunk) -> None:
        chunk.num_posted += 1
        if chunk.is_full:
            self.due = chunk

    def finish(self) -> bool:
        """End the step. False where a chunk was only partly written, and so will not leave."""
        return not any(chunk.num_posted for chunk in self._chunks if chunk is not self.due)

    def depart(self) -> None:
        """Let the last chunk leave: when the step's prediction has left, which the peers wait for, so it goes first."""
        self._launch_due()

    def drain(self) -> None:
        """Wait for everything under way. All ranks have launched the same, so this ends."""
        self._launch_due()
        for chunk in self._chunks:
            chunk.arrive()

    def _launch_due(self) -> None:
        if self.due is not None:
            self.due.launch()
            self.due = None

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
