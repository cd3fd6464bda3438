"""Named axes of ranks: which coordinates a rank has and who its peers are. No process groups, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .config import ParallelConfig
from .errors import ConfigError

AXES = ("cfg", "pipe", "patch", "tensor")
"""Outermost first: the ranks of one guidance branch are consecutive, so they share a node where that is possible."""


@dataclass(frozen=True)
class Mesh:
    """Ranks 0 .. world-1 laid out over the axes, row-major, the last axis fastest."""

    sizes: tuple[int, ...]  # of the first names in AXES; the other axes are of size 1

    @classmethod
    def fit(cls, config: ParallelConfig, world: int) -> Mesh:
        """The mesh of ``config`` over ``world`` ranks.

        Raises:
            ConfigError: the product of the axes is not the world, or the weights are not one for each patch.
        """
        axis, given = {
            "pipelined": ("pipe", config.pipe),
            "tensor": ("tensor", None),
        }.get(config.strategy, ("patch", config.patch))
        num_patches = config.patch or 1 if axis == "pipe" else 1  # in each stage
        others = config.cfg * num_patches
        size = given if given is not None else max(world // others, 1)
        if others * size != world:
            asked = f"cfg={config.cfg} x {axis}={size if given is not None else 'any'}"
            asked += f" x patch={num_patches}" if num_patches > 1 else ""
            fits = f"{others * given} ranks" if given is not None else f"a multiple of {others} ranks"
            raise ConfigError(f"a world of {world} does not fit {asked}: start {fits}, or change the product")
        if axis == "tensor":
            return cls((config.cfg, 1, 1, size))
        mesh = cls((config.cfg, size, num_patches) if axis == "pipe" else (config.cfg, 1, size))
        weights, num_patches = config.weights, mesh.size("patch")
        if weights is not None and len(weights) != num_patches:
            raise ConfigError(
                f"balance={config.balance} has {len(weights)} weights for {num_patches} ranks along the picture: "
                "give one for each"
            )
        return mesh

    @property
    def world(self) -> int:
        """Number of ranks: the product of the axes."""
        return prod(self.sizes)

    def size(self, axis: str) -> int:
        """Number of ranks along ``axis``."""
        place = AXES.index(axis)
        return self.sizes[place] if place < len(self.sizes) else 1

    def coordinate(self, rank: int, axis: str) -> int:
        """Position of ``rank`` along ``axis``."""
        return rank // self._stride(axis) % self.size(axis)

    def groups(self, axis: str) -> list[list[int]]:
        """All groups of ranks that differ along ``axis`` only, each in order of their coordinate."""
        stride, size = self._stride(axis), self.size(axis)
        firsts = [rank for rank in range(self.world) if self.coordinate(rank, axis) == 0]
        return [[first + stride * i for i in range(size)] for first in firsts]

    def branches(self) -> list[list[int]]:
        """All groups of ranks that work on one branch of guidance."""
        num_ranks = self.world // self.size("cfg")
        return [list(range(first, first + num_ranks)) for first in range(0, self.world, num_ranks)]

    def _stride(self, axis: str) -> int:
        return prod(self.sizes[AXES.index(axis) + 1 :])

    def __str__(self) -> str:
        sizes = {axis: self.size(axis) for axis in AXES}
        return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if axis in ("cfg", "patch") or size > 1)
