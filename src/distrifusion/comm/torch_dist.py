"""Ranks as processes over torch.distributed: Gloo on CPU, NCCL on CUDA, XCCL on XPU.

CPU tensors travel over Gloo groups that this module opens for itself, even where the user brought a group: nobody else's
messages can get between, the timeout is ours, and they can be dropped. Dropping is how a loss spreads: Gloo closes its
sockets when the last reference to the group and its works goes (``abort`` and ``shutdown`` do nothing there), and then
whoever waits for this rank fails at once. Accelerator tensors travel over the accelerator's backend; objects and barriers
stay on Gloo, where the host can wait with a timeout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from time import perf_counter
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, PeerLost
from .base import BaseComm, Done, as_bytes, default_timeout
from .environment import Launched, check_device, read_environment
from .meter import Meter
from .protocol import Pending

T = TypeVar("T")

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
RENDEZVOUS_SECONDS = 300.0  # ranks may arrive minutes apart: they import, compile, download


@dataclass
class _Channel:
    """A process group and the order of our ranks in it: torch sorts the ranks of a new group, `split` does not."""

    group: dist.ProcessGroup
    order: list[int]  # rank of the communicator -> rank in the group
    ours: bool

    @classmethod
    def over(cls, group: dist.ProcessGroup, ranks: Sequence[int], ours: bool) -> _Channel:
        return cls(group, [dist.get_group_rank(group, rank) for rank in ranks], ours)


class _Line:
    """All channels and everything under way of one communicator and those split from it: they break together."""

    def __init__(self) -> None:
        self.channels: list[_Channel] = []
        self.under_way: dict[_Work, None] = {}  # gloo needs its works alive until they end, also if nobody waits
        self.recent: deque[dist.Work] = deque(maxlen=64)
        self.broken: str | None = None

    def check(self) -> None:
        if self.broken is not None:
            raise PeerLost(f"this communicator is closed: {self.broken}")

    def drop(self, reason: str, channels: Sequence[_Channel] | None = None, *, abort: bool) -> None:
        """Let go of all channels, or of those of one communicator only (then the rest stays usable)."""
        if channels is None:
            channels, self.broken = list(self.channels), self.broken or reason
        if abort:
            for work in list(self.under_way):
                work.works.clear()
            self.under_way.clear()
        for channel in channels:
            if channel not in self.channels:
                continue
            self.channels.remove(channel)
            group = channel.group
            del channel.group  # the last references go with this frame
            if abort and group.name() != "gloo":
                with suppress(RuntimeError, AttributeError):
                    group.abort()
            if channel.ours:
                with suppress(RuntimeError, ValueError, AssertionError):
                    dist.destroy_process_group(group)
