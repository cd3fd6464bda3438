"""What both communicators share: objects and barriers on top of tensors, and the checks of what they are given."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .meter import Meter
from .protocol import Pending, Route
from .route import Layout, PlainRoute

T = TypeVar("T")


class Done(Generic[T]):
    """A `Pending` that was finished at its launch: nothing had to travel."""

    def __init__(self, result: T) -> None:
        self._result = result

    def wait(self) -> T:
        """The result."""
        return self._result


class BaseComm:
    """Objects, barriers and checks for communicators that know how to gather and to broadcast tensors.

    Only what leaves the rank is counted: empty tensors, and collectives of a group of one, neither travel nor count; a
    broadcast counts at its root. What carries no picture (objects, broadcasts, barriers) is of kind ``"control"``.
    """

    rank: int
    world: int
    device: torch.device
    meter: Meter
    timeout: float

    def swap(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor], *, kind: str) -> Pending[None]:
        """See `Comm.swap`."""
        raise NotImplementedError

    def all_gather(
        self, own: Tensor, sizes: Sequence[int], *, kind: str, into: Tensor | None = None
    ) -> Pending[list[Tensor]]:
        """See `Comm.all_gather`."""
        raise NotImplementedError

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """See `Comm.broadcast`."""
        raise NotImplementedError

    def all_reduce(self, own: Tensor, *, kind: str) -> Tensor:
        """See `Comm.all_reduce`."""
        flat, count = own.reshape(-1), own.numel()
        if self.world == 2:
            return _sum(self.all_gather(flat, [count, count], kind=kind).wait()).view(own.shape)
        sizes = [count * (rank + 1) // self.world - count * rank // self.world for rank in range(self.world)]
        pieces = dict(enumerate(torch.split(flat, sizes)))
        mine = pieces.pop(self.rank)
        heard = {peer: torch.empty_like(mine) for peer in pieces}
        self.swap(pieces, heard, kind=kind).wait()
        total = _sum([heard.get(rank, mine) for rank in range(self.world)])
        return torch.cat(self.all_gather(total, sizes, kind=kind).wait()).view(own.shape)

    def route(self, layout: Layout, *, kind: str) -> Route:
        """See `Comm.route`."""
        return PlainRoute(self, layout, kind)

    @property
    def is_slow(self) -> bool:
        """See `Comm.is_slow`."""
        return False

    @property
    def _control(self) -> torch.device:
        """Where the bytes of objects live while they travel."""
        return torch.device("cpu")

    def all_gather_object(self, value: Any) -> list[Any]:
        """See `Comm.all_gather_object`. Two messages: the lengths, then the pickled bytes."""
        own = self._pickled(value)
        lengths = self._gather_numbers(own.numel())
        return [_unpickled(part) for part in self.all_gather(own, lengths, kind="control").wait()]

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """See `Comm.broadcast_object`. Two messages: the length, then the pickled bytes."""
        own = self._pickled(value if self.rank == root else None)
        length = torch.tensor([own.numel()], dtype=torch.int64, device=self._control)
        self.broadcast(length, root)
        if self.rank != root:
            own = torch.empty(int(length.item()), dtype=torch.uint8, device=self._control)
        self.broadcast(own, root)
        return _unpickled(own)

    def barrier(self) -> None:
        """See `Comm.barrier`."""
        self._gather_numbers(self.rank)

    def _gather_numbers(self, number: int) -> list[int]:
        own = torch.tensor([number], dtype=torch.int64, device=self._control)
        parts = self.all_gather(own, [1] * self.world, kind="control").wait()
        return [
            int(part.item()) for part in parts
        ]  # .item() also makes the host wait where .wait() orders a stream only

    def _pickled(self, value: Any) -> Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self._control)

    def _my_group(self, groups: Sequence[Sequence[int]]) -> int:
        """Index of the group that holds this rank.

        Raises:
            ConfigError: the groups are not a partition of the world.
        """
        if sorted(chain.from_iterable(groups)) != list(range(self.world)):
            raise ConfigError(f"groups {[list(g) for g in groups]} must hold each rank of 0..{self.world - 1} once")
        return next(index for index, group in enumerate(groups) if self.rank in group)

    def _check_swap(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor]) -> None:
        for peer, tensor in chain(sends.items(), recvs.items()):
            assert 0 <= peer < self.world, f"no rank {peer} in a world of {self.world}"
            assert peer != self.rank, "a rank does not send to itself"
            assert tensor.is_contiguous(), f"a tensor of shape {tuple(tensor.shape)} is not contiguous"

    def _check_gather(self, own: Tensor, sizes: Sequence[int], into: Tensor | None) -> None:
        assert len(sizes) == self.world, f"{len(sizes)} sizes for a world of {self.world}"
        assert own.shape == (sizes[self.rank],), f"own is {tuple(own.shape)}, sizes say {sizes[self.rank]}"
        assert own.is_contiguous()
        if into is not None:
            assert into.shape == (self.world, max(sizes)), f"into is {tuple(into.shape)}, sizes say {max(sizes)}"
            assert into.dtype == own.dtype
            assert into.is_contiguous()


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """In order, which all ranks share."""
    dtype = parts[0].dtype
    total = parts[0].to(torch.float32) if dtype.itemsize < 4 else parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.to(dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as ``[num_bytes]`` of uint8, shared: so every dtype travels."""
    return (tensor.detach() if tensor.requires_grad else tensor).view(-1).view(torch.uint8)


def default_timeout(otherwise: float) -> float:
    """Seconds until a silent peer counts as lost: DISTRIFUSION_TIMEOUT, or ``otherwise``.

    Raises:
        ConfigError: the variable is not a positive number.
    """
    text = os.environ.get("DISTRIFUSION_TIMEOUT", "").strip()
    if not text:
        return otherwise
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"DISTRIFUSION_TIMEOUT={text!r} must be a positive number of seconds")
    return seconds


def _unpickled(part: Tensor) -> Any:
    return pickle.loads(part.cpu().numpy().tobytes())
