"""Rows of the neighbours that come before they are made, and are made here.

In a synchronous step a group norm waits for the statistics of the picture, and the convolution after it for its halo.
What lies between the two treats every value alone. So the halo travels beside the statistics, as it was before the
norm, and what is done to the patch is done to it as well: one wait instead of two, and the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_EARLY = "_distrifusion_early"  # on a patch: `Early`, and the writes to the patch until then


class Early(NamedTuple):
    """Rows of peers, made like the patch that has them with it."""

    reader: str  # the name of the layer that they are for
    rows: Mapping[int, Tensor]  # peer -> [B, C, rows, W]

    def put_on(self, patch: Tensor) -> None:
        """Let ``patch`` have them with it, until something is written to it."""
        setattr(patch, _EARLY, (self, patch._version))

    def made(self, make: Callable[[Tensor], Tensor]) -> Early:
        """What ``make`` gives for each, which treats every value alone."""
        return Early(self.reader, {peer: make(rows) for peer, rows in self.rows.items()})


def can_have_early(patch: Tensor) -> bool:
    """Whether `early_of` will be able to tell that nothing was written to what is made of ``patch``."""
    return not torch.compiler.is_compiling() and not patch.is_inference()


def early_of(patch: Tensor) -> Early | None:
    """What ``patch`` has with it."""
    early: Early | None
    early, version = getattr(patch, _EARLY, (None, None))
    return early if early is not None and version == patch._version else None
