"""What is known of a picture's way through the stages: who makes what, who reads it, what is under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from ..comm import Pending
from ..comm.packing import Packing, Place, Spec
from ..geometry import Split
from .context import Context
from .links import Back, Links


@dataclass(frozen=True)
class Part:
    """A tensor among what a block returns."""

    name: str
    spec: Spec

    def room(self, device: torch.device) -> Tensor:
        """A tensor like it, with anything inside."""
        return torch.empty(self.spec.shape, dtype=self.spec.dtype, device=device)


@dataclass
class Made:
    """What a block returns in one pass: a `Part` for each tensor, other values as they are."""

    owner: int
    tree: TreeSpec
    leaves: list[Any]


@dataclass
class Packet:
    """The tensors that go over one link in one pass, by name."""

    places: dict[str, Place]
    num_bytes: int


class Course:
    """One picture's (and guidance branch's) passes through the stages, from its first step on.

    Args:
        links: the ranks in order of their stages.
        owners: the stage of each group of units.
    """

    def __init__(self, links: Links, owners: Sequence[int]) -> None:
        links.mend()
        self.links = links
        self.owners = owners
        self.context = Context()
        self.made: dict[int | None, dict[str, Made]] = {}  # by pass (None: of the whole picture), by call in order
        self.last_reader: dict[str, int] = {}  # name of a tensor -> the last stage that reads it
        self.expected: tuple[int | None, Pending[None], Tensor] | None = None  # the next pass's, where it was asked for
        self.layout: tuple[Split, int] | None = None  # of predictions under way: rows of each patch, and their dim
        self._coming: deque[Back.Coming] = deque()
        self._packets: dict[tuple[int | None, int], Packet] = {}

    def note(self, coming: Back.Coming, num_patches: int) -> None:
        """Remember a patch that is under way. Those of the step before the last one are here by now."""
        self._coming.append(coming)
        while len(self._coming) > 2 * num_patches:
            self._coming.popleft().pending.wait()

    def drain(self) -> None:
        """Wait for all that is under way, whether anyone asks for it or not."""
        self.links.drain()
        while self._coming:
            self._coming.popleft().pending.wait()

    def names(self) -> tuple[tuple[str, ...], ...]:
        """Blocks of each stage, in order."""
        by_rank: list[list[str]] = [[] for _ in range(self.links.comm.world)]
        for name, made in self.made[None].items():
            by_rank[made.owner].append(name)
        return tuple(map(tuple, by_rank))

    def learn(self, reads: Mapping[str, frozenset[str]], output: frozenset[str]) -> None:
        """Note who reads what: ``reads`` by block, and ``output`` at the end, which is the last stage's."""
        readers = [*((self.made[None][name].owner, parts) for name, parts in reads.items())]
        for stage, parts in [*readers, (self.links.comm.world - 1, output)]:
            for part in parts:
                self.last_reader[part] = max(stage, self.last_reader.get(part, 0))

    def packet(self, which: int | None, link: int) -> Packet:
        """What goes from stage ``link`` to the next one in a pass: all that is made up to there and read after it."""
        if (which, link) in self._packets:
            return self._packets[which, link]
        packing = Packing()
        places = {
            part.name: packing.place(0, part.spec)
            for made in self.made[which].values()
            if made.owner <= link
            for part in made.leaves
            if isinstance(part, Part) and self.last_reader.get(part.name, 0) > link
        }
        packet = self._packets[which, link] = Packet(places, packing.sizes.get(0, 0))
        return packet
