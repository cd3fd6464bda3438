"""Communicators: how tensors travel between ranks. Threads of one process, or torch.distributed."""

from .meter import Meter
from .protocol import Comm, Pending
from .threads import run_ranks

__all__ = ["Comm", "Meter", "Pending", "run_ranks"]
