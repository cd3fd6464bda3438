"""The CFG split: the branches of guidance on separate ranks, around any strategy for the patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..comm import Comm
from ..geometry import Levels, Span, Split
from ..mesh import Mesh


class Guidance:
    """Who computes which part of the batch, and how the predictions come together again.

    The batch is halved over the cfg axis: the unconditional and the conditional half where guidance is on, and just two
    halves of the pictures where it is off, which is exact too. A batch of one is computed by both halves of the ranks.
    """

    def __init__(self, mesh: Mesh, comm: Comm) -> None:
        self._mesh = mesh
        self._comm = comm
        self.patches = comm.split(mesh.groups("patch")) if mesh.size("cfg") > 1 else comm
        self._branch = mesh.coordinate(comm.rank, "cfg")

    def share(self, batch: int) -> Span:
        """The part of the batch that is this rank's."""
        return self._shares(batch)[self._branch]

    def gather(self, own: Tensor, extra: Tensor, batch: int, levels: Levels, dim: int) -> tuple[Tensor, list[Tensor]]:
        """The whole prediction ``[batch, C, H, W]`` from the own, and everyone's ``extra`` ``[n]``. One message."""
        shares = self._shares(batch)
        split = levels.splits[0]
        alone = shares[0] == shares[-1]  # both branches have computed the same: no need to hear the other
        comm = self.patches if alone else self._comm
        shapes = [
            _part_shape(
                own, shares[0 if alone else self._mesh.coordinate(rank, "cfg")], split, rank % split.num_patches, dim
            )
            for rank in range(comm.world)
        ]
        sizes = [shape.numel() + extra.numel() for shape in shapes]
        flat = torch.cat([own.reshape(-1), extra.to(own.dtype)])
        parts = comm.all_gather(flat, sizes, kind="output").wait()
        patches = [part[: shape.numel()].view(shape) for part, shape in zip(parts, shapes, strict=True)]
        branches = [
            torch.cat(patches[first : first + split.num_patches], dim)
            for first in range(0, comm.world, split.num_patches)
        ]
        whole = branches[0] if len(branches) == 1 else torch.cat(branches)
        return whole, [part[shape.numel() :] for part, shape in zip(parts, shapes, strict=True)]

    def _shares(self, batch: int) -> Sequence[Span]:
        num_branches = self._mesh.size("cfg")
        if batch < num_branches:
            return [Span(0, batch)] * num_branches
        halves = Split.even(batch, num_branches)
        return [halves.span(i) for i in range(num_branches)]


def _part_shape(own: Tensor, share: Span, split: Split, patch: int, dim: int) -> torch.Size:
    shape = [len(share), *own.shape[1:]]
    shape[dim] = len(split.span(patch))
    return torch.Size(shape)
