"""Ranks as processes over torch.distributed: Gloo on CPU, NCCL on CUDA, XCCL on XPU.

Objects and barriers go over Gloo on every device, where the host can wait with a timeout.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from ..errors import ConfigError, PeerLost
from .base import BaseComm, Done, as_bytes, default_timeout
from .channels import Channel, DeviceChannel, GlooChannel
from .environment import backend_of, device_of, pick_device, read_environment
from .lines import Launched, Lines, UnderWay, Work, first_line
from .meter import Meter
from .protocol import Pending, Route
from .route import Layout
from .shared import SharedChannel, is_allowed, open_shared
from .shared_route import open_shared_route

_OPEN: set[TorchComm] = set()  # those not split off, until they are closed
RENDEZVOUS_SECONDS = 300.0  # ranks may arrive minutes apart: they import, compile, download


class TorchComm(BaseComm):
    """This process as one rank of a group of torch.distributed. See `Comm` for the contract.

    Making one is a collective call of the group's ranks.

    Args:
        group: of torch.distributed; None: the default group. It stays the caller's.
        device_type: what the tensors live on (``"cpu"``, ``"cuda"``, ``"xpu"``); None: what the group's backend is for.
        timeout: seconds of one wait until a silent peer counts as lost; None: DISTRIFUSION_TIMEOUT, or 25.

    Raises:
        ConfigError: this process is not in the group, or the group cannot carry tensors of that device.
        PeerLost: the other ranks did not come.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device_type: str | None = None,
        timeout: float | None = None,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError("torch.distributed has no process group yet: start with torchrun, or make one first")
        if dist.get_rank(group) < 0:
            raise ConfigError(f"rank {dist.get_rank()} of the default group is not in the given one: leave it out")
        self.device = device_of(group, device_type)
        self.timeout = default_timeout(25.0) if timeout is None else timeout
        is_allowed()  # a bad variable is refused before the ranks wait for each other
        self.meter = Meter()
        self._lines = Lines()
        self._default_is_ours = False
        self._join(dist.get_process_group_ranks(group), None)
        if self.device.type != "cpu" and self.world > 1:
            given = group or c10d._get_default_group()
            self._open(lambda: DeviceChannel(given, self._ranks, ours=False))

    @classmethod
    def from_environment(cls, device_type: str | None = None, timeout: float | None = None) -> TorchComm | None:
        """The default group that exists, or one made from torchrun's variables; None outside torchrun.

        Args:
            device_type: as for the class; None: an accelerator if there is one, else the CPU. LOCAL_RANK is its index.
            timeout: as for the class. Coming together has at least 300 s.

        Raises:
            ConfigError: variables, devices or a build of torch that do not fit.
            PeerLost: the ranks did not come together.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(device_type=device_type, timeout=timeout)
        launched = read_environment()
        if launched is None:
            return None
        timeout = default_timeout(25.0) if timeout is None else timeout
        is_allowed()
        device = pick_device(device_type, launched)
        backend = backend_of(device.type)
        if backend == "nccl":
            # A lost peer should end in PeerLost: by default NCCL's watchdog ends the process. Mode 2 only aborts.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        try:
            dist.init_process_group(
                backend,
                rank=launched.rank,
                world_size=launched.world,
                timeout=timedelta(seconds=max(timeout, RENDEZVOUS_SECONDS)),
            )
        except (RuntimeError, ValueError) as failure:  # transport, store; a malformed address
            raise PeerLost(
                f"the {launched.world} ranks did not come together at {launched.address} "
                f"(this is rank {launched.rank}): {first_line(failure)}"
            ) from failure
        try:
            comm = cls._over_default(device, timeout)
        except BaseException:
            dist.destroy_process_group()
            raise
        return comm

    @classmethod
    def _over_default(cls, device: torch.device, timeout: float) -> TorchComm:
        """All ranks of a default group that was made here, on groups of our own (with our timeout)."""
        comm = cls._bare(device, timeout, Meter(), Lines())
        comm._default_is_ours = True
        everyone = list(range(dist.get_world_size()))
        comm._join(everyone, None)
        comm._join_device([everyone])
        return comm

    @classmethod
    def _bare(cls, device: torch.device, timeout: float, meter: Meter, lines: Lines) -> TorchComm:
        comm = cls.__new__(cls)
        comm.device, comm.timeout, comm.meter, comm._lines = device, timeout, meter, lines
        comm._default_is_ours = False
        return comm

    @property
    def wire(self) -> str:
        """See `Comm.wire`."""
        return self._wire.name if self._wire is not None else "nothing"

    @property
    def is_slow(self) -> bool:
        """See `Comm.is_slow`. Gloo is: it goes over a network, or through a thread that must get a core first."""
        return isinstance(self._wire, GlooChannel)

    def _join(self, ranks: Sequence[int], names: Sequence[int] | None) -> None:
        """Take the place in a group of global ``ranks``; ``names`` are what errors call them."""
        self._ranks = list(ranks)
        self._names = list(names if names is not None else range(len(ranks)))
        self._is_root = names is None
        self.world = len(self._ranks)
        self.rank = self._ranks.index(dist.get_rank())
        if self._is_root:
            _OPEN.add(self)
        self._host: Channel | None = None
        self._wire: Channel | None = None  # for tensors on self.device
        if self.world > 1:
            with self._losing([rank for rank in range(self.world) if rank != self.rank]):
                self._host = self._wire = GlooChannel(self._ranks, self.rank, self.timeout)
            self._lines.channels.append(self._host)
            shared = open_shared(self._host, self.rank, self.world, self.all_gather_object)
            if shared is not None:
                self._lines.channels[-1] = self._host = self._wire = shared

    def _join_device(self, groups: Sequence[Sequence[int]]) -> None:
        """Open the accelerator's group of global ranks that holds this rank. All ranks make all groups, in order."""
        if self.device.type == "cpu":
            return
        whole = sum(map(len, groups)) == dist.get_world_size()
        backend, limit = backend_of(self.device.type), timedelta(seconds=self.timeout)
        for ranks in groups:
            mine = dist.get_rank() in ranks
            if whole or mine:  # in a part of the world, only the members of a group are there to make it
                group = dist.new_group(list(ranks), timeout=limit, backend=backend, use_local_synchronization=not whole)
                if mine and len(ranks) > 1:
                    self._open(lambda group=group: DeviceChannel(group, self._ranks, ours=True))  # type: ignore[misc]

    def _open(self, make: Callable[[], Channel]) -> None:
        with self._losing("the ranks of the accelerator's group"):
            self._wire = make()
            self._lines.channels.append(self._wire)
            # NCCL connects in the first call, which must not be a swap: some ranks take no part in it.
            byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
            ready, _ = self._wire.gather(byte, byte.new_empty(self.world, 1))
            self._wire.finish(ready, self.timeout)

    def swap(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor], *, kind: str) -> Pending[None]:
        """See `Comm.swap`."""
        self._check_swap(sends, recvs)
        self._lines.check()
        out = [(peer, as_bytes(tensor)) for peer, tensor in sends.items() if tensor.numel()]
        into = [(peer, as_bytes(tensor)) for peer, tensor in recvs.items() if tensor.numel()]
        if not out and not into:
            return Done(None)
        for peer, data in out:
            self.meter.sent(kind, peer, data.numel())
        return self._swap(out, into, kind)

    def _swap(self, out: list[tuple[int, Tensor]], into: list[tuple[int, Tensor]], kind: str) -> Pending[None]:
        wire = self._channel((out or into)[0][1])
        with self._losing([peer for peer, _ in (*out, *into)]):
            works = wire.swap(out, into)
        return self._launched(wire, works, [data for _, data in (*out, *into)], None, kind)

    def all_gather(
        self, own: Tensor, sizes: Sequence[int], *, kind: str, into: Tensor | None = None
    ) -> Pending[list[Tensor]]:
        """See `Comm.all_gather`. Parts travel padded to the largest; without a copy where all sizes are equal."""
        self._check_gather(own, sizes, into)
        self._lines.check()
        if self.world == 1 or not any(sizes):
            return Done([own.detach().clone()] + [own.new_empty(0) for _ in sizes[1:]])
        data, item = as_bytes(own), own.element_size()
        is_padded = min(sizes) < max(sizes)
        if is_padded:
            data = data.new_empty(max(sizes) * item)
            data[: own.numel() * item] = as_bytes(own)
        self.meter.gathered(kind, data.numel(), self.world - 1)
        wire = self._channel(data)
        others = [rank for rank in range(self.world) if rank != self.rank]
        with self._losing(others):
            rows = data.new_empty(self.world, data.numel()) if into is None else into.view(torch.uint8)
            work, parts = wire.gather(data, rows)
        ours = [part[: size * item] for part, size in zip(parts, sizes, strict=True)] if is_padded else parts
        result = [part.view(own.dtype) for part in ours]
        return self._launched(wire, [(work, others)], [data, *parts], result, kind)

    def route(self, layout: Layout, *, kind: str) -> Route:
        """See `Comm.route`. Ranks that share memory read each other's words in place."""
        if isinstance(self._wire, SharedChannel):
            route = open_shared_route(
                layout,
                self.rank,
                self.all_gather_object,
                partial(self._tell, kind=kind),
                partial(self._count, layout, kind),
            )
            if route is not None:
                return route
        return super().route(layout, kind=kind)

    def _tell(self, sends: Mapping[int, Tensor], recvs: Mapping[int, Tensor], *, kind: str) -> Pending[None]:
        self._lines.check()
        out, into = ([(peer, as_bytes(tensor)) for peer, tensor in side.items()] for side in (sends, recvs))
        return self._swap(out, into, kind) if sends or recvs else Done(None)

    def _count(self, layout: Layout, kind: str) -> None:
        for peer, num_bytes in layout.sends.items():
            self.meter.sent(kind, peer, num_bytes)
        if layout.says_to_all:
            self.meter.gathered(kind, max(layout.shared), self.world - 1)

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """See `Comm.broadcast`."""
        assert tensor.is_contiguous()
        self._lines.check()
        if self.world == 1 or not tensor.numel():
            return
        data = as_bytes(tensor)
        if self.rank == root:
            self.meter.gathered("control", data.numel(), self.world - 1)
        wire = self._channel(data)
        others = [rank for rank in range(self.world) if rank != self.rank] if self.rank == root else [root]
        with self._losing(others):
            works = [(wire.broadcast(data, root), others)]  # a list: it is emptied when the lines are severed
        self._launched(wire, works, [data], None, "control").wait()
        if tensor.device.type != "cpu":
            torch.accelerator.current_stream(tensor.device).synchronize()

    def split(self, groups: Sequence[Sequence[int]]) -> TorchComm:
        """See `Comm.split`."""
        group = groups[self._my_group(groups)]
        self._lines.check()
        comm = self._bare(self.device, self.timeout, self.meter, self._lines)
        comm._join([self._ranks[rank] for rank in group], [self._names[rank] for rank in group])
        with self._losing("the ranks of a split"):
            comm._join_device([[self._ranks[rank] for rank in each] for each in groups])
        return comm

    def abort(self) -> None:
        """See `Comm.abort`. Everything split from the same communicator goes with it."""
        self._lines.sever(f"rank {self._names[self.rank]} has left", abort=True)
        self._leave()

    def close(self) -> None:
        """See `Comm.close`. Closing a communicator that came from ``split`` leaves its origin open."""
        if self._is_root:
            self._lines.sever("it was closed", abort=False)
            self._leave()
        else:
            self._lines.release([wire for wire in (self._host, self._wire) if wire is not None], abort=False)
            self._host = self._wire = None

    def _leave(self) -> None:
        _OPEN.discard(self)
        if self._default_is_ours:
            self._default_is_ours = False
            with suppress(RuntimeError, ValueError, AssertionError):  # the script may have destroyed it already
                dist.destroy_process_group()

    def _channel(self, data: Tensor) -> Channel:
        channel = self._host if data.device.type == "cpu" else self._wire
        assert channel is not None, "this communicator is closed"
        return channel

    def _losing(self, whom: str | Sequence[int]) -> AbstractContextManager[None]:
        """See `Lines.losing`. ``whom``: the ranks of this communicator that are waited for, or words for them."""
        return self._lines.losing(self._names[self.rank], partial(self._called, whom), self.timeout)

    def _called(self, whom: str | Sequence[int]) -> str:
        if isinstance(whom, str):
            return whom
        return "rank " + ", ".join(str(self._names[peer]) for peer in sorted(set(whom)))

    def _launched(
        self, wire: Channel, works: list[Work], buffers: Sequence[Tensor], result: Any, kind: str
    ) -> Launched:
        launched = UnderWay(wire, works, buffers)
        return Launched(self._lines, self.meter, launched, self.timeout, self._losing, result, kind)


@atexit.register
def _leave_all() -> None:
    """For scripts that end without a word: Gloo threads that still run then abort the interpreter now and again."""
    for comm in list(_OPEN):
        comm.abort()
