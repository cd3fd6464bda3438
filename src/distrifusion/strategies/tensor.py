"""Slices of the weights on different ranks, all of which work on the whole picture."""

from __future__ import annotations

from ..comm import Comm
from ..config import ParallelConfig
from ..exchange import Exchange, Summed
from .base import Joined, State


class Tensor(Joined):
    """Tensor parallelism (Megatron-LM, arXiv 1909.08053): a rank has some heads of each attention, some hidden features
    of each feed-forward and some channels inside of each resnet, and the ranks add up what they make of them.

    Equal to one device. A whole feature map travels for each pair of layers, and everyone waits for it: the baseline of
    DistriFusion's table, and a way to split what a model weighs.
    """

    name = "tensor"

    def __init__(self, config: ParallelConfig, comm: Comm) -> None:
        self._comm = comm

    def start(self) -> State:
        """See Strategy."""
        return State()

    def policy(self, state: State) -> Exchange:
        """See Strategy."""
        return Summed(self._comm)
