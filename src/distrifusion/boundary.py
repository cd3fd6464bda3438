"""The seam between stages of a model: what the units of the other stages have made, fresh or of the step before.

A unit is a module whose output may go to another rank. In synchronous steps every rank computes all of them. In the
first one the ranks learn who reads whose output, and cut the units into stages of equal work. In a pipelined step a
rank computes the units of its stage; the others give what they have given one step ago, where this rank reads it, and
anything of the right shape where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .comm import Comm
from .comm.slots import Slots
from .dataflow import Dataflow
from .errors import UnsupportedModel
from .exchange import Fresh
from .geometry import Split
from .stages import Link, cut

_SAME_MODULES = ": under strategy='pipelined' the same modules run in every step of a picture"


@dataclass
class _Part:
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
class _Call:
    """One call of a unit within a step."""

    name: str
    group: int
    spec: TreeSpec | None = None
    leaves: list[Any] = field(default_factory=list)  # a _Part for each tensor
    reads: frozenset[str] = frozenset()  # names of parts
    cost: int = 0

    @property
    def parts(self) -> list[_Part]:
        """Its tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, _Part)]


class Stages:
    """Who computes what in one picture (and guidance branch), from its first synchronous step on.

    Units of one group stay together. Where units near the end read what units at the beginning have made, as over the
    skip connections of U-Nets, the first and the last units are one stage: what carries the detail is then never old
    (as AsyncDiff, arXiv 2406.06911, does for SDXL).
    """

    def __init__(self, comm: Comm, *, is_measured: bool = False) -> None:
        self.comm = comm
        self.slots = Slots(comm)
        self.is_measured = is_measured
        self.calls: dict[str, _Call] = {}
        self._owners: dict[int, int] = {}  # group -> rank
        self._output = 0  # the rank that has the prediction

    @property
    def is_cut(self) -> bool:
        """Whether the stages are known."""
        return bool(self._owners)

    def owner(self, call: _Call) -> int:
        """The rank that computes it."""
        return self._owners[call.group]

    def names(self) -> tuple[tuple[str, ...], ...]:
        """Calls of each stage, in order."""
        by_rank: list[list[str]] = [[] for _ in range(self.comm.world)]
        for name, call in self.calls.items():
            by_rank[self.owner(call)].append(name)
        return tuple(map(tuple, by_rank))

    def output_split(self, size: int) -> Split:
        """Who has which rows of the prediction: one rank has all."""
        return Split(tuple(size if rank > self._output else 0 for rank in range(self.comm.world + 1)))

    def cut(self, output: frozenset[str]) -> None:
        """Cut what `calls` has learned; ``output`` are the parts that the prediction is made of.

        Costs are the same on all ranks, or agreed upon by one message where they are measured.
        """
        if self.is_measured:
            measured = self.comm.all_gather_object([call.cost for call in self.calls.values()])
            for call, times in zip(self.calls.values(), zip(*measured, strict=True), strict=True):
                call.cost = sum(times)
        groups: dict[int, list[_Call]] = {}  # in the order they run
        for call in self.calls.values():
            groups.setdefault(call.group, []).append(call)
        found = cut([_link(calls) for calls in groups.values()], output, self.comm.world)
        self._owners = dict(zip(groups, found.stages, strict=True))
        self._output = found.output
        for call in self.calls.values():
            for part in call.parts:
                part.readers = found.readers.get(part.name, ())

    def call(self, name: str) -> _Call:
        """What is known of a call.

        Raises:
            UnsupportedModel: it was not made in the first step, so that nobody knows whose it is.
        """
        if name not in self.calls:
            raise UnsupportedModel(f"{name} runs in this step and did not in the first one{_SAME_MODULES}")
        return self.calls[name]


class Staged(Fresh):
    """A step with units. Within a stage there is one patch, so that the other verbs have no peers (``alone``)."""

    def __init__(self, alone: Comm, stages: Stages) -> None:
        super().__init__(alone)
        self._stages = stages
        self._rank = stages.comm.rank

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Calls of units by the rank that computes them, in order, once the model has run."""
        return self._stages.names()

    def output_split(self, size: int) -> Split:
        """Who has which of the prediction's ``size`` rows, once the model has run: one rank has all."""
        return self._stages.output_split(size)

    def run(self, model: Callable[..., Any], /, **arguments: Any) -> Any:
        """The step: what ``model(**arguments)`` gives."""
        return model(**arguments)

    def boundary(self, key: str, group: int, unit: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What ``unit(*args, **kwargs)`` gives, in this step or in the one before."""
        raise NotImplementedError


class Whole(Staged):
    """Every rank computes every unit: exact. The first such step learns what there is to cut; the last one before a
    pipelined step (``is_last``) keeps what that one starts from.
    """

    kind = "sync"

    def __init__(self, alone: Comm, stages: Stages, *, is_last: bool) -> None:
        super().__init__(alone, stages)
        self._is_last = is_last
        self._ran: set[str] = set()
        self._kept: dict[str, Tensor] = {}
        self._flow: Dataflow | None = None

    def run(self, model: Callable[..., Any], /, **arguments: Any) -> Any:
        """See Staged."""
        if self._stages.is_cut:
            result = model(**arguments)
        else:
            with Dataflow() as flow:
                self._flow = flow
                result = model(**arguments)
            self._stages.cut(flow.sources(result))
        if self._is_last:
            self._keep()
        return result

    def boundary(self, key: str, group: int, unit: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """See Staged."""
        name, flow = self._name(key), self._flow
        if flow is None:
            result = unit(*args, **kwargs)
        else:
            call = _Call(name, group, reads=flow.sources(args, kwargs))
            work, start = flow.work, self._clock()
            result = unit(*args, **kwargs)
            call.cost = self._clock() - start if self._stages.is_measured else flow.work - work
            leaves, call.spec = tree_flatten(result)
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    part = _Part(f"{name}:{i}", torch.empty_like(leaf, device="meta"), leaf.device)
                    flow.mark(leaf, part.name)
                    call.leaves.append(part)
                else:
                    call.leaves.append(leaf)
            self._stages.calls[name] = call
        if self._is_last:
            self._ran.add(name)
            # Copies: models add to what a unit gave in its place, and will do so again.
            for part, leaf in zip(self._stages.call(name).leaves, tree_flatten(result)[0], strict=True):
                if isinstance(part, _Part) and (self._rank in part.readers or not self._stages.is_cut):
                    self._kept[part.name] = leaf.clone()
        return result

    def _clock(self) -> int:
        """Nanoseconds; 0 where costs are counted."""
        if not self._stages.is_measured:
            return 0
        if self._stages.comm.device.type != "cpu":
            torch.accelerator.synchronize()  # in one step of a picture
        return round(1e9 * perf_counter())

    def _keep(self) -> None:
        for call in self._stages.calls.values():
            if call.name not in self._ran:
                raise UnsupportedModel(f"{call.name} ran in the first step and does not in this one{_SAME_MODULES}")
            owner = self._stages.owner(call)
            for part in call.parts:
                if part.readers:
                    said = dict.fromkeys(part.readers, part.template) if owner == self._rank else {}
                    heard = {owner: self._kept[part.name]} if self._rank in part.readers else {}
                    links = frozenset((owner, reader) for reader in part.readers)
                    weight = part.num_bytes * len(links)
                    self._stages.slots.keep(part.name, said, heard, links=links, weight=weight, kind="boundary")
        self._kept.clear()


class Late(Staged):
    """Own units of this step, those of other stages of the step before. Sends leave in the background."""

    kind = "pipelined"

    def boundary(self, key: str, group: int, unit: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """See Staged."""
        call = self._stages.call(self._name(key))
        slots, owner = self._stages.slots, self._stages.owner(call)
        is_mine = owner == self._rank
        result = unit(*args, **kwargs) if is_mine else None
        own = tree_flatten(result)[0] if is_mine else call.leaves
        leaves: list[Any] = []
        for leaf, given in zip(call.leaves, own, strict=True):
            if not isinstance(leaf, _Part):
                leaves.append(given)
                continue
            before = slots.read(leaf.name) if leaf.readers else {}
            if not is_mine:
                leaves.append(leaf.room())
                if owner in before:  # a copy: the slot is good until the next read only, and some parts are read late
                    leaves[-1].copy_(before[owner])
            if leaf.readers:
                slots.post(leaf.name, dict.fromkeys(leaf.readers, given) if is_mine else {})
        assert call.spec is not None
        return result if is_mine else tree_unflatten(leaves, call.spec)

    def finish(self) -> bool:
        """See Exchange."""
        return self._stages.slots.finish()


def _link(calls: Sequence[_Call]) -> Link:
    """What the calls of one group are in the chain of the model."""
    makes = {part.name: part.num_bytes for call in calls for part in call.parts}
    reads = frozenset[str]().union(*(call.reads for call in calls)) - makes.keys()
    return Link(sum(call.cost for call in calls), reads, makes)
