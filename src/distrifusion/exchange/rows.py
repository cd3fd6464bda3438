"""What travels: rows for peers, and tensors side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import Halo


def outgoing(patch: Tensor, plan: Halo, dim: int) -> dict[int, Tensor]:
    """The rows of ``patch`` that each peer asks for."""
    rows = {peer: [patch.narrow(dim, span.start, len(span)) for span in spans] for peer, spans in plan.sends}
    return {peer: concatenated(parts, dim) for peer, parts in rows.items()}


def concatenated(parts: Sequence[Tensor], dim: int) -> Tensor:
    """``parts`` one after the other along ``dim``; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def packed(own: Sequence[Tensor]) -> Tensor:
    """Tensors that differ in their last dim only as one message: side by side in that dim."""
    return concatenated(own, -1).contiguous()


def resized(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    """``shape`` with ``size`` along ``dim``."""
    return (*shape[:dim], size, *shape[dim + 1 :])


def rows_like(patch: Tensor, dim: int, count: int) -> Tensor:
    """Room for ``count`` rows as those of ``patch``."""
    return patch.new_empty(resized(patch.shape, dim, count))
