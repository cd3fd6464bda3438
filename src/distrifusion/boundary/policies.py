"""The freshness policies of a model in stages."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..comm import Comm
from ..dataflow import Dataflow
from ..errors import UnsupportedModel
from ..exchange import Fresh
from .plan import SAME_MODULES, Part, Stages, UnitCall


class Staged(Fresh):
    """A step with units. ``patches`` are the ranks of one stage, which share the picture: exact among themselves."""

    def __init__(self, patches: Comm, stages: Stages) -> None:
        super().__init__(patches)
        self._stages = stages
        self._rank = stages.comm.rank

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Calls of units by the rank that computes them, in order, once the model has run."""
        return self._stages.names()

    @property
    def output_rank(self) -> int:
        """The rank of the stages' that has the prediction, once the model has run."""
        return self._stages.output_rank()

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

    def __init__(self, patches: Comm, stages: Stages, *, is_last: bool) -> None:
        super().__init__(patches, stages)
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
            call = UnitCall(name, group, reads=flow.sources(args, kwargs))
            work, start = flow.work, self._clock()
            result = unit(*args, **kwargs)
            call.cost = self._clock() - start if self._stages.is_measured else flow.work - work
            leaves, call.spec = tree_flatten(result)
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    part = Part(f"{name}:{i}", torch.empty_like(leaf, device="meta"), leaf.device)
                    flow.mark(leaf, part.name)
                    call.leaves.append(part)
                else:
                    call.leaves.append(leaf)
            self._stages.calls[name] = call
        if self._is_last:
            self._ran.add(name)
            # Copies: models add to what a unit gave in its place, and will do so again.
            for part, leaf in zip(self._stages.call(name).leaves, tree_flatten(result)[0], strict=True):
                if isinstance(part, Part) and (self._rank in part.readers or not self._stages.is_cut):
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
                raise UnsupportedModel(f"{call.name} ran in the first step and does not in this one{SAME_MODULES}")
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
        is_mine = self._stages.computes(call, self._rank)
        result = unit(*args, **kwargs) if is_mine else None
        own = tree_flatten(result)[0] if is_mine else call.leaves
        leaves: list[Any] = []
        for leaf, given in zip(call.leaves, own, strict=True):
            if not isinstance(leaf, Part):
                leaves.append(given)
                continue
            before = slots.read(leaf.name) if leaf.readers else {}
            if not is_mine:
                leaves.append(leaf.room())
                if owner in before:  # a copy: the slot is good until the next read only, and some parts are read late
                    leaves[-1].copy_(before[owner])
            if leaf.readers:
                slots.post(leaf.name, dict.fromkeys(leaf.readers, given) if owner == self._rank else {})
        assert call.spec is not None
        return result if is_mine else tree_unflatten(leaves, call.spec)

    def finish(self) -> bool:
        """See Exchange."""
        return self._stages.slots.finish()
