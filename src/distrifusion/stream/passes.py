"""One patch, or the whole picture, through all stages: what a block of another stage gives, what a seam is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..comm import Pending
from ..comm.base import Done
from ..comm.packing import Spec
from ..dataflow import Dataflow
from ..errors import UnsupportedModel
from ..exchange import Named, outgoing
from ..geometry import Halo, Split
from .context import SAME_BLOCKS
from .course import Course, Made, Part


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
            raise UnsupportedModel(f"{name} runs in this step and did not in the first one{SAME_BLOCKS}")
        if is_mine:
            result = unit(*args, **kwargs)
            for leaf, value in zip(made.leaves, tree_flatten(result)[0], strict=True):
                if isinstance(leaf, Part):
                    self._write(leaf.name, value)
            return result
        if owner < self._rank:
            self._arrive()
        leaves = []
        for leaf in made.leaves:
            is_here = isinstance(leaf, Part) and leaf.name in self._inbox
            room = leaf.room(self._comm.device) if isinstance(leaf, Part) and not is_here else leaf
            leaves.append(self._inbox[leaf.name] if is_here else room)
        return tree_unflatten(leaves, made.tree)

    def _teach(self, name: str, owner: int, unit: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        course, known = self._course, self._course.made[self._patch]
        if self._patch is not None and name not in course.made[None]:
            raise UnsupportedModel(f"{name} runs in this step and did not in the first one{SAME_BLOCKS}")
        if any(made.owner > owner for made in known.values()):
            raise UnsupportedModel(f"{name} runs after blocks of a later stage, so that patches cannot stream")
        if self._flow is not None:
            self._reads[name] = self._flow.sources(args, kwargs)
        is_mine = owner == self._rank
        result = unit(*args, **kwargs) if is_mine else None
        own, tree = tree_flatten(result)
        parts = [
            Part(f"{name}:{i}", Spec(leaf.shape, leaf.dtype)) if isinstance(leaf, Tensor) else leaf
            for i, leaf in enumerate(own)
        ]
        described = self._comm.broadcast_object(tree_unflatten(parts, tree) if is_mine else None, owner)
        leaves, tree = tree_flatten(described)
        made = Made(owner, tree, leaves)
        values = own if is_mine else list(made.leaves)
        for i, part in enumerate(made.leaves):
            if isinstance(part, Part):
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
            raise UnsupportedModel(f"{missing} ran in the first step and does not in this one{SAME_BLOCKS}")

    # --- the verbs of layers ---

    def gather(
        self,
        key: str,
        own: Sequence[Tensor],
        sizes: Sequence[int],
        dim: int,
        kind: str = "context",
        *,
        level: int | None = None,
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
