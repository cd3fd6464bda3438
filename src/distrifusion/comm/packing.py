"""Where tensors lie in the bytes of messages that carry several of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

ALIGN = 16  # bytes: views of any dtype into one byte buffer stay aligned


class Spec(NamedTuple):
    """What is known of a tensor before it comes."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its weight."""
        return self.shape.numel() * self.dtype.itemsize


class Place(NamedTuple):
    """Where a tensor lies in the bytes of a message."""

    lane: int  # receiver (EVERYONE for what all get), or sender
    offset: int
    spec: Spec

    def view(self, messages: Mapping[int, Tensor]) -> Tensor:
        """The tensor in ``messages``, by lane."""
        with torch.inference_mode(False):  # written in whatever mode the caller's next step runs
            room = messages[self.lane][self.offset : self.offset + self.spec.num_bytes]
            return room.view(self.spec.dtype).view(self.spec.shape)


class Packing:
    """Gives tensors fixed places in messages."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}  # bytes of each message

    def place(self, lane: int, spec: Spec) -> Place:
        """Room for a tensor at the end of the lane's message."""
        offset = self.sizes.get(lane, 0)
        self.sizes[lane] = offset + -(-spec.num_bytes // ALIGN) * ALIGN
        return Place(lane, offset, spec)

    @property
    def filled(self) -> dict[int, int]:
        """Bytes of the messages that have any."""
        return {lane: size for lane, size in self.sizes.items() if size}
