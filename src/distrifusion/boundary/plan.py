"""What is known of a picture's units: who computes them, and who reads what they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from ..comm import Comm
from ..comm.slots import Slots
from ..errors import UnsupportedModel
from ..stages import Link, cut

SAME_MODULES = ": under strategy='pipelined' the same modules run in every step of a picture"


@dataclass
class Part:
    """One tensor of what a unit returns."""

    name: str
    template: Tensor  # on no device: shape, dtype and order of memory
    device: torch.device
    readers: tuple[int, ...] = ()  # ranks of other stages

    @property
    def num_bytes(self) -> int:
        """Its weight."""
        return self.template.numel() * self.template.element_size()

    def room(self) -> Tensor:
        """A tensor like it, with anything inside."""
        return torch.empty_like(self.template, device=self.device)


@dataclass
class UnitCall:
    """One call of a unit within a step."""

    name: str
    group: int
    spec: TreeSpec | None = None
    leaves: list[Any] = field(default_factory=list)  # a Part for each tensor
    reads: frozenset[str] = frozenset()  # names of parts
    cost: int = 0

    @property
    def parts(self) -> list[Part]:
        """Its tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Part)]


class Stages:
    """Who computes what in one picture (and guidance branch), from its first synchronous step on.

    Units of one group stay together. Where units near the end read what units at the beginning have made, as over the
    skip connections of U-Nets, the first and the last units are one stage: what carries the detail is then never old
    (as AsyncDiff, arXiv 2406.06911, does for SDXL).

    Args:
        comm: ranks of which each has a stage; of one patch of the picture, where there are several.
        everyone: these of all patches, which must agree where each sees its own.
        is_measured: whether stages take equal time, and not equal arithmetic.
        is_doubled: whether the last rank has no stage of its own, but the one that gives the prediction once more.
    """

    def __init__(self, comm: Comm, everyone: Comm, *, is_measured: bool = False, is_doubled: bool = False) -> None:
        self.comm = comm
        self.slots = Slots(comm)
        self.is_measured = is_measured
        self.calls: dict[str, UnitCall] = {}
        self._everyone = everyone
        self._double = comm.world - 1 if is_doubled else None
        self._owners: dict[int, int] = {}  # group -> rank
        self._output = 0  # the rank that has the prediction

    @property
    def is_cut(self) -> bool:
        """Whether the stages are known."""
        return bool(self._owners)

    def owner(self, call: UnitCall) -> int:
        """The rank that computes it, and tells the others."""
        return self._owners[call.group]

    def computes(self, call: UnitCall, rank: int) -> bool:
        """Whether ``rank`` computes it, be it as one of two."""
        owner = self.owner(call)
        return owner == (self._output if rank == self._double else rank)

    def names(self) -> tuple[tuple[str, ...], ...]:
        """Calls of each rank, in order."""
        ranks = range(self.comm.world)
        return tuple(tuple(name for name, call in self.calls.items() if self.computes(call, rank)) for rank in ranks)

    def output_rank(self, *, is_ahead: bool = False) -> int:
        """The rank that has the prediction, or, of two that have one, that of the step ahead (``is_ahead``)."""
        return self._output if is_ahead or self._double is None else self._double

    def cut(self, output: frozenset[str]) -> None:
        """Cut what `calls` has learned; ``output`` are the parts that the prediction is made of.

        All ranks must cut alike. What they count is the same on all of them, but where they measure time, or have
        patches of their own: there the sum over all counts, by one message.

        Raises:
            UnsupportedModel: fewer groups of units have run than there are stages.
        """
        groups: dict[int, list[UnitCall]] = {}  # in the order they run
        for call in self.calls.values():
            groups.setdefault(call.group, []).append(call)
        num_stages = self.comm.world - (self._double is not None)
        if len(groups) < num_stages:  # of those of the model, which are enough, some have not
            raise UnsupportedModel(
                f"{num_stages} stages for the {len(groups)} parts of the model that run in this call"
            )
        links = [_link(calls) for calls in groups.values()]
        if self.is_measured or self._everyone.world > self.comm.world:
            links = [_sum(each) for each in zip(*self._everyone.all_gather_object(links), strict=True)]
        found = cut(links, output, num_stages)
        self._owners = dict(zip(groups, found.stages, strict=True))
        self._output = found.output
        for call in self.calls.values():
            for part in call.parts:
                readers = found.readers.get(part.name, ())
                if self._double is not None and found.output in readers:
                    readers = (*readers, self._double)
                part.readers = readers

    def call(self, name: str) -> UnitCall:
        """What is known of a call.

        Raises:
            UnsupportedModel: it was not made in the first step, so that nobody knows whose it is.
        """
        if name not in self.calls:
            raise UnsupportedModel(f"{name} runs in this step and did not in the first one{SAME_MODULES}")
        return self.calls[name]


def _link(calls: Sequence[UnitCall]) -> Link:
    """What the calls of one group are in the chain of the model."""
    makes = {part.name: part.num_bytes for call in calls for part in call.parts}
    reads = frozenset[str]().union(*(call.reads for call in calls)) - makes.keys()
    return Link(sum(call.cost for call in calls), reads, makes)


def _sum(links: Sequence[Link]) -> Link:
    """One link of all ranks' pictures, which differ in size and in time."""
    makes = {name: sum(link.makes[name] for link in links) for name in links[0].makes}
    return replace(links[0], cost=sum(link.cost for link in links), makes=makes)
