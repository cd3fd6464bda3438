"""Values that travel as what has changed since the last time, in few bytes.

Sender and receiver keep the same *base*: what the receiver has. The sender encodes value - base, decodes its own
frame, and both add the decoded residual to their base. What the codec lost is in the next residual (error feedback), so
a value that is held arrives in the end. The first time a value travels whole, in its own dtype, as the first base.

A frame is a header of 16 bytes (turn, size, what it is of, sum of its words) and a codec's payload. A frame that is of
another turn or another name, too short, or damaged, does not become part of a base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, TypeVar
from zlib import crc32

import torch
from torch import Tensor

from ..errors import RanksDisagree
from .codec import Codec
from .protocol import Comm, Pending

T = TypeVar("T")

HEADER = 16  # bytes: four int32
_FIELDS = ("turn", "bytes", "name, shape and codec", "checksum")


def frame_bytes(codec: Codec, shape: Sequence[int]) -> int:
    """Bytes of a frame; 0 where there is nothing to say. All ranks know them before the values."""
    return HEADER + -(-codec.num_bytes(shape) // HEADER) * HEADER if prod(shape) else 0


class _Lane:
    """One value on its way from one rank to another (or to all): the base, and the header that is due next."""

    def __init__(self, codec: Codec, name: str, first: Tensor) -> None:
        self._codec = codec
        self._name = name
        self.num_bytes = frame_bytes(codec, first.shape)
        tag = crc32(f"{name} {codec.name} {list(first.shape)} {first.dtype}".encode()) & 0x7FFFFFFF
        with torch.inference_mode(False):  # written in whatever mode the caller's next step runs
            self.base = torch.empty(first.shape, dtype=first.dtype, device=first.device)
            self._due = torch.tensor([0, self.num_bytes, tag, 0], dtype=torch.int32, device=first.device)
        self.base.copy_(first)

    def _next(self, frame: Tensor) -> None:
        """Make ``_due`` the header of ``frame`` in this turn. On the device: the host does not wait."""
        self._due[0] += 1
        self._due[3] = frame[HEADER:].view(torch.int32).sum()

    def _add(self, frame: Tensor) -> None:
        self.base.add_(self._decoded(frame))

    def _decoded(self, frame: Tensor) -> Tensor:
        payload = frame[HEADER : HEADER + self._codec.num_bytes(self.base.shape)]
        return self._codec.decode(payload, self.base.shape)


class Sender(_Lane):
    """The sender's side; ``base`` is what the receivers have."""

    def write(self, value: Tensor, frame: Tensor) -> None:
        """Fill ``frame`` ``[num_bytes]`` of uint8, and move the base to what it will make of the receivers'."""
        if not self.num_bytes:
            return
        wide = torch.promote_types(value.dtype, torch.float32)
        payload = self._codec.encode((value.to(wide) - self.base.to(wide)).float())
        frame[HEADER : HEADER + payload.numel()].copy_(payload)
        frame[HEADER + payload.numel() :].zero_()
        self._next(frame)
        frame[:HEADER].view(torch.int32).copy_(self._due)
        self._add(frame)


class Receiver(_Lane):
    """The receiver's side; ``base`` is the sender's value, about."""

    def __init__(self, codec: Codec, name: str, first: Tensor, peer: int) -> None:
        super().__init__(codec, name, first)
        self._peer = peer

    def read(self, frame: Tensor) -> Tensor:
        """The base, moved by ``frame``.

        Raises:
            RanksDisagree: the frame is not the one that is due. On an accelerator, where the host must not wait, the
                value becomes NaN instead, and with it the picture.
        """
        if frame.numel() != self.num_bytes:
            raise RanksDisagree(self._complaint(f"{frame.numel()} bytes", f"{self.num_bytes}"))
        if not self.num_bytes:
            return self.base
        self._next(frame)
        found = frame[:HEADER].view(torch.int32)
        if frame.device.type != "cpu":
            wrong = found.ne(self._due).any()
            self.base.add_(self._decoded(frame)).masked_fill_(wrong, torch.nan)
            return self.base
        if not torch.equal(found, self._due):
            for field, theirs, due in zip(_FIELDS, found.tolist(), self._due.tolist(), strict=True):
                if theirs != due:
                    raise RanksDisagree(self._complaint(f"{field} {theirs}", f"{field} {due}"))
        self._add(frame)
        return self.base

    def _complaint(self, found: str, due: str) -> str:
        return f"{self._name}: the {self._codec.name} frame of rank {self._peer} has {found}, and {due} is due"


class Arriving(Generic[T]):
    """What a launch will bring, once ``finish`` has turned it into what was asked for. A frame is read once only."""

    def __init__(self, travel: Pending[Any], finish: Callable[[Any], T]) -> None:
        self._travel = travel
        self._finish = finish
        self._results: list[T] = []

    def wait(self) -> T:
        """See Pending."""
        if not self._results:
            self._results.append(self._finish(self._travel.wait()))
        return self._results[0]


@dataclass(frozen=True)
class Said:
    """One rank's words of a gathering."""

    words: Tensor  # [sizes[rank]]: numbers, or a frame of uint8
    sizes: list[int]  # of everyone's words
    heard: Callable[[list[Tensor]], list[Tensor]]
    """Everyone's words -> the parts as all ranks have them. The own one too is what the others make of its frame."""


class Wire:
    """Values of one picture (and guidance branch) that travel at once, by name; those of a kind with a codec as frames.

    Without codecs it is the communicator and keeps nothing.
    """

    def __init__(self, comm: Comm, codecs: Mapping[str, Codec] | None = None) -> None:
        self._comm = comm
        self._codecs = codecs or {}
        # A name under another shape is another value: it starts anew on both sides.
        self._senders: dict[Any, Sender] = {}
        self._receivers: dict[Any, Receiver] = {}

    def clear(self) -> None:
        """Let the next of each value be whole, and the first base of those after it. All ranks do."""
        self._senders.clear()
        self._receivers.clear()

    def swap(
        self, name: str, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor], *, kind: str
    ) -> Pending[Mapping[int, Tensor]]:
        """As `Comm.swap`; the result is ``recvs``, or what stands in their place until the next time."""
        codec = self._codecs.get(kind)
        if codec is None:
            return Arriving(self._comm.swap(sends, recvs, kind=kind), lambda _: recvs)
        outgoing = {peer: self._outgoing(codec, (name, peer), value) for peer, value in sends.items()}
        keys = {peer: _key((name, peer), room) for peer, room in recvs.items()}
        incoming = {peer: self._room(key, recvs[peer]) for peer, key in keys.items()}
        return Arriving(
            self._comm.swap(outgoing, incoming, kind=kind),
            lambda _: {peer: self._arrived(codec, keys[peer], words, peer) for peer, words in incoming.items()},
        )

    def all_gather(
        self, name: str, own: Tensor, shapes: Sequence[Sequence[int]], *, kind: str
    ) -> Pending[list[Tensor]]:
        """As `Comm.all_gather`, of tensors of any shape: ``own`` is ``shapes[rank]``, contiguous."""
        rank = self._comm.rank
        said = self.said(name, own, shapes, rank, kind=kind)

        def parts(flat: list[Tensor]) -> list[Tensor]:
            heard = said.heard(flat)
            return [*heard[:rank], own, *heard[rank + 1 :]] if kind in self._codecs else heard

        return Arriving(self._comm.all_gather(said.words, said.sizes, kind=kind), parts)

    def said(self, name: str, own: Tensor, shapes: Sequence[Sequence[int]], rank: int, *, kind: str) -> Said:
        """What ``rank`` says in a gathering of parts of ``shapes``, of which ``own`` is its own.

        The caller launches it, beside other words or on a communicator of more ranks, and hands over what came.
        """
        codec = self._codecs.get(kind)
        if codec is None:
            whole = own.reshape(-1)
            return Said(whole, [prod(shape) for shape in shapes], lambda flat: _shaped(flat, shapes))
        # All ranks know all shapes, and see a new one at the same time.
        lane = (name, tuple(map(tuple, shapes)))
        keys = [(lane, peer, tuple(shape), own.dtype) for peer, shape in enumerate(shapes)]
        own_key = _key(lane, own)
        is_known = own_key in self._senders
        frame = self._outgoing(codec, lane, own).reshape(-1)
        heard_of = self._senders[own_key].base

        def heard(flat: list[Tensor]) -> list[Tensor]:
            words = flat if is_known else _shaped(flat, shapes)
            return [
                heard_of if peer == rank else self._arrived(codec, keys[peer], part, peer)
                for peer, part in enumerate(words)
            ]

        return Said(frame, [frame_bytes(codec, shape) if is_known else prod(shape) for shape in shapes], heard)

    def _outgoing(self, codec: Codec, lane: Any, value: Tensor) -> Tensor:
        """The frame; the first time the value."""
        key = _key(lane, value)
        sender = self._senders.get(key)
        if sender is None:
            self._senders[key] = Sender(codec, lane[0], value)
            return value
        frame = torch.empty(sender.num_bytes, dtype=torch.uint8, device=value.device)
        sender.write(value, frame)
        return frame

    def _room(self, key: Any, value: Tensor) -> Tensor:
        """Where a frame is received; the first time the value."""
        receiver = self._receivers.get(key)
        return value if receiver is None else value.new_empty(receiver.num_bytes, dtype=torch.uint8)

    def _arrived(self, codec: Codec, key: Any, words: Tensor, peer: int) -> Tensor:
        receiver = self._receivers.get(key)
        if receiver is not None:
            return receiver.read(words)
        self._receivers[key] = Receiver(codec, key[0][0], words, peer)
        return words


def _shaped(flat: list[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    return [part.view(*shape) for part, shape in zip(flat, shapes, strict=True)]


def _key(lane: Any, value: Tensor) -> Any:
    return lane, None, tuple(value.shape), value.dtype
