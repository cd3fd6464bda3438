"""The CFG split: the branches of guidance on separate ranks, around any strategy for the patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..comm import Comm, Pending
from ..comm.residual import Arriving, Wire
from ..exchange import concatenated
from ..geometry import Span, Split
from ..mesh import Mesh

Halves = tuple[int, ...] | None
"""Branches of guidance."""


class Guidance:
    """Who computes which part of the batch, and how the predictions come together again.

    The batch is halved over the cfg axis: the unconditional and the conditional half where guidance is on, and just two
    halves of the pictures where it is off, which is exact too. A batch of one is computed by both halves of the ranks.
    """

    def __init__(self, mesh: Mesh, comm: Comm) -> None:
        self._mesh = mesh
        self._comm = comm
        self.patches = comm.split(mesh.branches()) if mesh.size("cfg") > 1 else comm
        self.branch = mesh.coordinate(comm.rank, "cfg")
        self._branches: Comm | None = None  # ranks with the same patch, by branch

    def share(self, batch: int) -> Span:
        """The part of the batch that is this rank's."""
        return self.shares(batch)[self.branch]

    def gather(
        self,
        own: Tensor,
        extra: Tensor,
        batch: int,
        split: Split,
        dim: int,
        halves: Halves = None,
        wire: Wire | None = None,
    ) -> Pending[tuple[Tensor, list[Tensor]]]:
        """The whole prediction, ``[batch, C, H, W]`` or as `Table.fold` has it, and everyone's ``extra`` ``[n]``.

        Made of the own part of it, in one message.

        ``halves`` are the branches whose ranks have a prediction of the batch, if these are not what `share` says: the
        result is theirs, one after the other, and what another rank gives as its own counts for its shape only.
        ``wire`` may have a codec for it; the own part of the result is then what the others have of it.
        """
        shares, alone = self._said(batch, halves)
        comm = self.patches if alone else self._comm
        branches = [0 if alone else self._mesh.coordinate(rank, "cfg") for rank in range(comm.world)]
        shapes = [
            _part_shape(own, shares[branch], split, rank % split.num_patches, dim)
            for rank, branch in enumerate(branches)
        ]
        part = own.reshape(-1)[: shapes[comm.rank].numel()].view(shapes[comm.rank])
        wire = wire if wire is not None else Wire(comm)
        said = wire.said("output", part, shapes, comm.rank, kind="output")
        beside = extra.to(own.dtype).contiguous().view(said.words.dtype)
        sizes = [size + beside.numel() for size in said.sizes]

        def joined(parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            patches = said.heard([words[:size] for words, size in zip(parts, said.sizes, strict=True)])
            wholes = [
                torch.cat(patches[first : first + split.num_patches], dim)
                for first in range(0, comm.world, split.num_patches)
                if shares[branches[first]] is not None
            ]
            whole = concatenated(wholes, 0)
            whole = whole.roll(split.origin, dim) if split.origin else whole
            extras = [words[size:].view(own.dtype) for words, size in zip(parts, said.sizes, strict=True)]
            return whole, extras

        return Arriving(comm.all_gather(torch.cat([said.words, beside]), sizes, kind="output"), joined)

    def open_branches(self) -> None:
        """Connect the ranks that have the same patch, for `join_branches`. All ranks call this."""
        if self._branches is None and self._mesh.size("cfg") > 1:
            self._branches = self._comm.split(self._mesh.groups("cfg"))

    def join_branches(self, own: Tensor, batch: int, halves: Halves = None) -> Tensor:
        """The own rows of the whole batch's prediction, from those of this rank's part of it. One message, or none.

        ``halves``: see `gather`.
        """
        shares, alone = self._said(batch, halves)
        if alone:
            return own
        assert self._branches is not None
        parts = [torch.Size((len(share) if share is not None else 0, *own.shape[1:])) for share in shares]
        flat = own.reshape(-1)[: parts[self.branch].numel()]
        gathered = self._branches.all_gather(flat, [part.numel() for part in parts], kind="output").wait()
        return torch.cat([part.view(shape) for part, shape in zip(gathered, parts, strict=True)])

    def _said(self, batch: int, halves: Halves) -> tuple[list[Span | None], bool]:
        """What each branch says of the batch, and whether it need not hear the other, which has computed the same."""
        shares: list[Span | None] = [*self.shares(batch)]
        alone = halves is None and shares[0] == shares[-1]
        if halves is not None:
            shares = [Span(0, batch) if branch in halves else None for branch in range(len(shares))]
        return shares, alone

    def shares(self, batch: int) -> Sequence[Span]:
        """The part of the batch of each branch."""
        num_branches = self._mesh.size("cfg")
        if batch < num_branches:
            return [Span(0, batch)] * num_branches
        halves = Split.even(batch, num_branches)
        return [halves.span(i) for i in range(num_branches)]


def _part_shape(own: Tensor, share: Span | None, split: Split, patch: int, dim: int) -> torch.Size:
    shape = [len(share) if share is not None else 0, *own.shape[1:]]
    shape[dim] = len(split.span(patch))
    return torch.Size(shape)
