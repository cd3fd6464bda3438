"""Communicators: how tensors travel between ranks. Threads of one process, or torch.distributed."""

from .meter import Meter
from .protocol import Comm, Pending
from .threads import alone, run_ranks
from .tracer import Tracer

__all__ = ["Comm", "Meter", "Pending", "Tracer", "alone", "run_ranks"]
