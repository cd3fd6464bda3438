"""Patches that stream through the stages of a model: what a stage hands to the next one, and what it keeps of patches.

The blocks of a transformer are cut into stages, one per rank. The patches of a picture go through them one after the
other: while a stage computes one patch, the stage before it computes the next (PipeFusion, arXiv 2405.14430). The
model's own forward runs once per patch on each rank: a block of an earlier stage gives what has come of it, a block of
a later one a tensor of the right shape that nobody reads. A stage keeps the keys and values that its blocks made last
for each patch, of this step for those that went before, of the step before for those to come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .comm import Comm, Pending
from .comm.base import Done
from .comm.packing import Packing, Place, Spec
from .dataflow import Dataflow
from .errors import UnsupportedModel
from .exchange import Named, outgoing
from .geometry import Halo, Split

MARGIN = 2
"""Rows that are kept at each border of a patch, of the last step that was computed whole."""

_SAME_BLOCKS = ": while patches stream, the same blocks run for each of them and in every step of a picture"


class Links:
    """This rank's place in the chain of stages, and the way back from its end.

    All ranks make one at the same time.

    Args:
        comm: those of one branch of guidance, in order of their stages.
        everyone: all ranks; those of a branch are consecutive.
    """

    def __init__(self, comm: Comm, everyone: Comm) -> None:
        self.comm = comm
        self._everyone = everyone
        self._under_way: deque[tuple[Pending[None], Tensor]] = deque()
        self._open()

    def _open(self) -> None:
        # A communicator for each pair of neighbours, and one for the way back: on an accelerator, all messages of one
        # wait for each other in turn.
        first, second = (self.comm.split(_pairs(self.comm.world, start)) for start in (0, 1))
        is_even = self.comm.rank % 2 == 0
        self._before, self._after = (second, first) if is_even else (first, second)
        self.back = Back(self._everyone, self.comm.world)
        self.is_broken = False

    def mend(self) -> None:
        """After an error in the middle of a step, which all ranks have had: forget what was under way. Collective."""
        if self.is_broken:
            self._under_way.clear()
            self._open()

    def send(self, words: Tensor) -> None:
        """Hand bytes to the next rank, which are left alone from now on."""
        while len(self._under_way) > 1:
            self._under_way.popleft()[0].wait()
        self._under_way.append((self._after.swap({1: words}, {}, kind="boundary"), words))

    def receive(self, num_bytes: int) -> tuple[Pending[None], Tensor]:
        """Bytes of the rank before, which are there after the wait."""
        words = torch.empty(num_bytes, dtype=torch.uint8, device=self.comm.device)
        return self._before.swap({}, {0: words}, kind="boundary"), words

    def drain(self) -> None:
        """Wait until all that was sent has left."""
        while self._under_way:
            self._under_way.popleft()[0].wait()


class Back:
    """What the last stage has made of a patch, on its way to all ranks, who step on it.

    Args:
        comm: all ranks; those of a branch of guidance are consecutive, in order of their stages.
        num_stages: of each branch, which has its part of the batch.
    """

    def __init__(self, comm: Comm, num_stages: int) -> None:
        self._comm = comm.split([list(range(comm.world))])
        self._lasts = list(range(num_stages - 1, comm.world, num_stages))
        self._branch = comm.rank // num_stages

    def launch(self, own: Tensor, shares: Sequence[int]) -> Back.Coming:
        """Send or await one patch of a prediction; ``own`` is that of this rank's part of the batch, if it is the last
        of its branch, else of its shape. ``shares`` are the pictures of each branch. All ranks call this.
        """
        comm = self._comm
        own = own.contiguous()
        is_last = comm.rank in self._lasts
        parts = [own.new_empty(share, *own.shape[1:]) for share in shares]
        if is_last:
            parts[self._branch] = own
        sends = {rank: own for rank in range(comm.world) if is_last and rank != comm.rank}
        recvs = {rank: part for rank, part in zip(self._lasts, parts, strict=True) if rank != comm.rank}
        return Back.Coming(comm.swap(sends, recvs, kind="output"), parts)

    @dataclass(frozen=True)
    class Coming:
        """One patch of a prediction under way."""

        pending: Pending[None]
        parts: Sequence[Tensor]  # by branch

        def wait(self) -> Tensor:
            """That of the whole batch."""
            self.pending.wait()
            return self.parts[0] if len(self.parts) == 1 else torch.cat(list(self.parts))


def _pairs(world: int, start: int) -> list[list[int]]:
    pairs = [list(range(first, min(first + 2, world))) for first in range(start, world, 2)]
    return [[0], *pairs] if start else pairs


@dataclass(frozen=True)
class _Part:
    """A tensor among what a block returns."""

    name: str
    spec: Spec

    def room(self, device: torch.device) -> Tensor:
        """A tensor like it, with anything inside."""
        return torch.empty(self.spec.shape, dtype=self.spec.dtype, device=device)


@dataclass
class _Made:
    """What a block returns in one pass: a `_Part` for each tensor, other values as they are."""

    owner: int
    tree: TreeSpec
    leaves: list[Any]


@dataclass
class _Packet:
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
        self.made: dict[int | None, dict[str, _Made]] = {}  # by pass (None: of the whole picture), by call in order
        self.last_reader: dict[str, int] = {}  # name of a tensor -> the last stage that reads it
        self.expected: tuple[int | None, Pending[None], Tensor] | None = None  # the next pass's, where it was asked for
        self.layout: tuple[Split, int] | None = None  # of predictions under way: rows of each patch, and their dim
        self._coming: deque[Back.Coming] = deque()

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

    def packet(self, which: int | None, link: int) -> _Packet:
        """What goes from stage ``link`` to the next one in a pass: all that is made up to there and read after it."""
        packing = Packing()
        places = {
            part.name: packing.place(0, part.spec)
            for made in self.made[which].values()
            if made.owner <= link
            for part in made.leaves
            if isinstance(part, _Part) and self.last_reader.get(part.name, 0) > link
        }
        return _Packet(places, packing.sizes.get(0, 0))


class Pass(Named):
    """The policy of one pass: ``patch`` of the picture, or all of it (None), through all stages.

    Args:
        course: of the picture.
        patch: which one.
        split: rows of tokens of the patches.
        cut: a tensor with the tokens of the whole picture along a dim -> those of each patch.
        keeps: whether a pass of the whole picture keeps what a patch of the next step will ask for.
        following: the pass that comes next in this step, if there is one: its words are asked for early.
    """

    is_slow = False
    sees_peers = True

    def __init__(
        self,
        course: Course,
        patch: int | None,
        split: Split,
        cut: Callable[[Tensor, int], list[Tensor]],
        *,
        keeps: bool,
        following: int | None,
    ) -> None:
        super().__init__()
        self.kind = "sync" if patch is None else "pipelined"
        self._course, self._patch, self._split, self._cut = course, patch, split, cut
        self._keeps, self._following = keeps, following
        self._comm = course.links.comm
        self._rank = self._comm.rank
        self._flow: Dataflow | None = None
        self._reads: dict[str, frozenset[str]] = {}
        self._is_new = patch not in course.made
        self._inbox: dict[str, Tensor] = {}
        self._arriving: tuple[Pending[None], Tensor] | None = None
        self._outbox: dict[str, Tensor] = {}  # what is still to be written
        self._words: Tensor | None = None

    def run(self, model: Callable[..., Any], /, **arguments: Any) -> Any:
        """The pass: what ``model(**arguments)`` gives, which is the patch's on the last rank and of its shape on all.

        The first pass of a kind teaches all ranks the shapes of what the blocks return: each is told to all.
        """
        course = self._course
        if not self._is_new:
            self._open()
            result = model(**arguments)
            self._close()
            return result
        course.made[self._patch] = {}
        if self._patch is not None:
            return model(**arguments)
        with Dataflow() as flow:
            self._flow = flow
            result = model(**arguments)
        course.learn(self._reads, flow.sources(result))
        return result

    def finish(self) -> bool:
        """See Exchange."""
        return True

    # --- units ---

    def boundary(self, key: str, group: int, unit: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What ``unit(*args, **kwargs)`` gives on the rank that has it; what came of it, or anything, on the others."""
        name, owner = self._name(key), self._course.owners[group]
        is_mine = owner == self._rank
        if self._is_new:
            return self._teach(name, owner, unit, args, kwargs)
        made = self._course.made[self._patch].get(name)
        if made is None:
            raise UnsupportedModel(f"{name} runs in this step and did not in the first one{_SAME_BLOCKS}")
        if is_mine:
            result = unit(*args, **kwargs)
            for leaf, value in zip(made.leaves, tree_flatten(result)[0], strict=True):
                if isinstance(leaf, _Part):
                    self._write(leaf.name, value)
            return result
        if owner < self._rank:
            self._arrive()
        leaves = []
        for leaf in made.leaves:
            is_here = isinstance(leaf, _Part) and leaf.name in self._inbox
            room = leaf.room(self._comm.device) if isinstance(leaf, _Part) and not is_here else leaf
            leaves.append(self._inbox[leaf.name] if is_here else room)
        return tree_unflatten(leaves, made.tree)

    def _teach(self, name: str, owner: int, unit: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        course, known = self._course, self._course.made[self._patch]
        if self._patch is not None and name not in course.made[None]:
            raise UnsupportedModel(f"{name} runs in this step and did not in the first one{_SAME_BLOCKS}")
        if any(made.owner > owner for made in known.values()):
            raise UnsupportedModel(f"{name} runs after blocks of a later stage, so that patches cannot stream")
        if self._flow is not None:
            self._reads[name] = self._flow.sources(args, kwargs)
        is_mine = owner == self._rank
        result = unit(*args, **kwargs) if is_mine else None
        own, tree = tree_flatten(result)
        parts = [
            _Part(f"{name}:{i}", Spec(leaf.shape, leaf.dtype)) if isinstance(leaf, Tensor) else leaf
            for i, leaf in enumerate(own)
        ]
        described = self._comm.broadcast_object(tree_unflatten(parts, tree) if is_mine else None, owner)
        leaves, tree = tree_flatten(described)
        made = _Made(owner, tree, leaves)
        values = own if is_mine else list(made.leaves)
        for i, part in enumerate(made.leaves):
            if isinstance(part, _Part):
                if not is_mine:
                    values[i] = part.room(self._comm.device)
                self._comm.broadcast(values[i].contiguous(), owner)
                if self._flow is not None:
                    self._flow.mark(values[i], part.name)
        known[name] = made
        return result if is_mine else tree_unflatten(values, made.tree)

    def _open(self) -> None:
        """Ask for the words of the stage before, also for the pass that follows; make room for the own ones."""
        course = self._course
        if self._rank > 0:
            expected, course.expected = course.expected, None
            if expected is not None and expected[0] == self._patch:
                self._arriving = expected[1:]
            else:
                self._arriving = self._ask(self._patch)
            if self._following is not None and self._following in course.made:
                course.expected = (self._following, *self._ask(self._following))
        if self._rank < self._comm.world - 1:
            packet = course.packet(self._patch, self._rank)
            self._words = torch.empty(packet.num_bytes, dtype=torch.uint8, device=self._comm.device)
            self._outbox = {name: place.view({0: self._words}) for name, place in packet.places.items()}
            self._leave()

    def _ask(self, which: int | None) -> tuple[Pending[None], Tensor]:
        return self._course.links.receive(self._course.packet(which, self._rank - 1).num_bytes)

    def _arrive(self) -> None:
        """Wait for the words of the stage before; those that later stages read go on at once."""
        if self._arriving is None:
            return
        (pending, words), self._arriving = self._arriving, None
        pending.wait()
        packet = self._course.packet(self._patch, self._rank - 1)
        self._inbox = {name: place.view({0: words}) for name, place in packet.places.items()}
        for name, value in self._inbox.items():
            self._write(name, value)

    def _write(self, name: str, value: Tensor) -> None:
        # A copy at once: models add to what a block gave in its place.
        room = self._outbox.pop(name, None)
        if room is not None:
            room.copy_(value)
            self._leave()

    def _leave(self) -> None:
        """Send, once all is written."""
        if not self._outbox and self._words is not None:
            words, self._words = self._words, None
            self._course.links.send(words)

    def _close(self) -> None:
        self._arrive()
        if self._outbox:
            missing = next(iter(self._outbox)).rpartition(":")[0]
            raise UnsupportedModel(f"{missing} ran in the first step and does not in this one{_SAME_BLOCKS}")

    # --- the verbs of layers ---

    def gather(
        self, key: str, own: Sequence[Tensor], sizes: Sequence[int], dim: int, kind: str = "context"
    ) -> Pending[list[Sequence[Tensor]]]:
        """See Exchange: own parts of this pass, those of the other patches as this rank made them last."""
        name, context = self._name(key), self._course.context
        if self._patch is None:
            if self._keeps:
                context.keep(name, own, dim)
            return Done([own])
        return Done(context.gather(name, own, sizes, dim, self._patch, self._cut))

    def neighbours(
        self, key: str, patch: Tensor, plan: Halo, dim: int, kind: str = "halo"
    ) -> Pending[Mapping[int, Tensor]]:
        """See Exchange: rows of the other patches as this rank made them last."""
        name, context = self._name(key), self._course.context
        if self._patch is None:
            if self._keeps:
                context.keep_borders(name, patch, self._split, dim)
            return Done({})
        for peer, rows in outgoing(patch, plan, dim).items():
            context.rows[name, self._patch, peer] = rows
        return Done({peer: context.borders(name, peer, self._patch, count, dim) for peer, count in plan.recvs})

    def moments(self, key: str, own: Tensor) -> Tensor:
        """See Exchange."""
        raise AssertionError(f"{key}: no transformer has group norms")


class Context:
    """What a stage keeps of the patches: keys and values, or their sums, and rows at borders, as they were last."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int, int], Tensor] = {}  # (name, maker, reader)
        self._whole: dict[str, Sequence[Tensor]] = {}
        self._parts: dict[str, list[Sequence[Tensor] | None]] = {}
        self._edges: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # (name, patch) -> first and last rows

    def keep(self, name: str, own: Sequence[Tensor], dim: int) -> None:
        """Of the whole picture."""
        self._whole[name] = tuple(own)
        self._parts.pop(name, None)

    def gather(
        self,
        name: str,
        own: Sequence[Tensor],
        sizes: Sequence[int],
        dim: int,
        patch: int,
        cut: Callable[[Tensor, int], list[Tensor]],
    ) -> list[Sequence[Tensor]]:
        """Of all patches, of which ``own`` is the newest."""
        if len(sizes) == 1:
            return [own]
        if name not in self._parts:
            whole = self._whole.get(name)
            if whole is None:
                raise UnsupportedModel(f"{name} runs in this step and did not in the step before{_SAME_BLOCKS}")
            if whole[0].shape[dim] == sum(sizes):
                by_tensor = [cut(each, dim) for each in whole]
                self._parts[name] = list(zip(*by_tensor, strict=True))
                del self._whole[name]
            else:  # a sum over tokens, which cannot be taken apart
                self._parts[name] = [None] * len(sizes)
        parts = self._parts[name]
        parts[patch] = own
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            self._whole.pop(name, None)
            return known
        nothing = [part.narrow(dim, 0, 0) for part in own]
        return [self._whole[name], *[nothing] * (len(parts) - 1)]

    def keep_borders(self, name: str, whole: Tensor, split: Split, dim: int) -> None:
        """The first and the last rows of each patch, of a map of the whole picture."""
        for patch in range(split.num_patches):
            span = split.span(patch)
            count = min(MARGIN, len(span))
            first, last = (whole.narrow(dim, start, count).clone() for start in (span.start, span.stop - count))
            self._edges[name, patch] = first, last

    def borders(self, name: str, maker: int, reader: int, count: int, dim: int) -> Tensor:
        """The ``count`` rows of ``maker`` that lie next to ``reader``."""
        if (name, maker, reader) in self.rows:
            return self.rows[name, maker, reader]
        if (name, maker) not in self._edges:
            raise UnsupportedModel(f"{name} runs in this step and did not in the step before{_SAME_BLOCKS}")
        first, last = self._edges[name, maker]
        rows = last if maker < reader else first
        if rows.shape[dim] < count:
            raise UnsupportedModel(f"{name} reads {count} rows of a neighbour; while patches stream, {MARGIN} are kept")
        return rows.narrow(dim, rows.shape[dim] - count if maker < reader else 0, count)
