"""The wires under `TorchComm`: process groups of torch.distributed, and how they are let go.

CPU tensors travel over Gloo groups that this module opens for itself, even where the user brought a group: nobody
else's messages can get between, the timeout is ours, and they can be dropped. Dropping is how a loss spreads: Gloo
closes its sockets when the last reference to the group and to its works goes (its ``abort`` and ``shutdown`` leave them
open), and then whoever waits for this rank fails at once. Accelerator tensors travel over the accelerator's backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

Parcel = tuple[int, Tensor]  # rank of the communicator, bytes


class Channel(Protocol):
    """Moves bytes between the ranks of one group. Every method launches; works are finished by `finish`."""

    name: str  # for reports

    def swap(self, sends: Sequence[Parcel], recvs: Sequence[Parcel]) -> list[tuple[Any, list[int]]]:
        """Launch sends and receives; works, each with the ranks that it waits for."""
        ...

    def gather(self, own: Tensor, into: Tensor) -> tuple[Any, list[Tensor]]:
        """Launch an all-gather of equal numbers of bytes; the work, and everyone's part in order of rank.

        ``into`` ``[world, bytes]`` is where the parts will be, in any order.
        """
        ...

    def broadcast(self, tensor: Tensor, root: int) -> Any:
        """Launch a broadcast; the work."""
        ...

    def finish(self, work: Any, timeout: float) -> None:
        """Wait for a work: the host for at most ``timeout`` seconds, or the stream."""
        ...

    def drop(self, *, abort: bool) -> None:
        """Let go of what was opened here."""
        ...


class GlooChannel:
    """A Gloo group of our own, for CPU tensors. It is in no registry of torch: our references are the only ones."""

    name = "gloo"

    def __init__(self, ranks: Sequence[int], position: int, timeout: float) -> None:
        store = c10d._get_default_store()
        name = "_".join(map(str, ranks))
        # Members open groups of the same ranks equally often, so their own counts agree; a name is never used twice,
        # since the addresses of a closed group would be found there.
        count = store.add(f"distrifusion/opened/{name}/{position}", 1)
        prefix = c10d.PrefixStore(f"distrifusion/gloo/{name}/{count}", store)
        self._group: Any = c10d.ProcessGroupGloo(prefix, position, len(ranks), timedelta(seconds=timeout))
        self._position = position

    def swap(self, sends: Sequence[Parcel], recvs: Sequence[Parcel]) -> list[tuple[Any, list[int]]]:
        """See `Channel.swap`. Gloo pairs messages of two ranks in order; collectives have slots of their own."""
        works: list[tuple[Any, list[int]]] = [(self._group.recv([data], peer, 0), [peer]) for peer, data in recvs]
        works += [(self._group.send([data], peer, 0), [peer]) for peer, data in sends]
        return works

    def gather(self, own: Tensor, into: Tensor) -> tuple[Any, list[Tensor]]:
        """See `Channel.gather`. Two ranks just swap, which spares Gloo's collective machinery a third of its time."""
        parts = list(into.unbind())
        if len(parts) > 2:
            return self._group.allgather([parts], [own]), parts
        parts[self._position].copy_(own)  # the caller may overwrite its own after the wait
        peer = 1 - self._position
        return _Both(self._group.recv([parts[peer]], peer, 1), self._group.send([own], peer, 1)), parts

    def broadcast(self, tensor: Tensor, root: int) -> Any:
        """See `Channel.broadcast`."""
        return self._group.broadcast(tensor, root)

    def finish(self, work: Any, timeout: float) -> None:
        """See `Channel.finish`: the host waits."""
        work.wait(timedelta(seconds=timeout))

    def drop(self, *, abort: bool) -> None:
        """See `Channel.drop`."""
        del self._group


class _Both:
    """A receive and a send of torch, waited for together."""

    def __init__(self, *works: Any) -> None:
        self._works = works

    def wait(self, timeout: timedelta) -> None:
        """Wait for each for at most ``timeout``."""
        for work in self._works:
            work.wait(timeout)


class DeviceChannel:
    """A group of an accelerator's backend (NCCL, XCCL): the stream waits, the host does not."""

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int], *, ours: bool) -> None:
        self._group = group
        self.name: str = dist.get_backend(group)
        self._ours = ours
        # torch sorts the ranks of a new group; ours may be in any order.
        self._order = [dist.get_group_rank(group, rank) for rank in ranks]

    def swap(self, sends: Sequence[Parcel], recvs: Sequence[Parcel]) -> list[tuple[Any, list[int]]]:
        """See `Channel.swap`. One batch: NCCL would deadlock on sends and receives launched one by one."""
        group, order = self._group, self._order
        ops = [dist.P2POp(dist.irecv, data, group=group, group_peer=order[peer]) for peer, data in recvs]
        ops += [dist.P2POp(dist.isend, data, group=group, group_peer=order[peer]) for peer, data in sends]
        peers = sorted({peer for peer, _ in (*sends, *recvs)})
        return [(work, peers) for work in dist.batch_isend_irecv(ops)] if ops else []

    def gather(self, own: Tensor, into: Tensor) -> tuple[Any, list[Tensor]]:
        """See `Channel.gather`."""
        # torch 2.13 has renamed all_gather_into_tensor and warns of the old name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(into.view(-1), own, group=self._group, async_op=True)
        parts = into.unbind()
        return work, [parts[position] for position in self._order]

    def broadcast(self, tensor: Tensor, root: int) -> Any:
        """See `Channel.broadcast`."""
        return dist.broadcast(tensor, group=self._group, group_src=self._order[root], async_op=True)

    def finish(self, work: Any, timeout: float) -> None:
        """See `Channel.finish`. A timeout here would make the host wait: the backend's watchdog keeps the time."""
        work.wait()

    def drop(self, *, abort: bool) -> None:
        """See `Channel.drop`. A group that the user brought is aborted with the rest, but not destroyed."""
        if abort:
            with suppress(RuntimeError, AttributeError):
                self._group.abort()
        if self._ours:
            with suppress(RuntimeError, ValueError):  # the user may have destroyed all groups already
                dist.destroy_process_group(self._group)
        del self._group
