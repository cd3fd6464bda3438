"""The activation before a convolution: it writes to where the convolution will read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Layer
from .early import early_of
from .rows import empty_with_room


class PatchSiLU(Layer):
    """``nn.SiLU``: any shape and dtype -> the same; a patch ``[B, C, rows, W]`` gets room for a halo around it.

    Attaching a halo to a patch costs a copy of it, which here is the activation's own write.
    """

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            plain: Tensor = self.plain(self.module, x)
            return plain
        early = early_of(x)  # before it is written to
        out = self._activated(x)
        if early is not None:
            early.made(F.silu).put_on(out)
        return out

    def _activated(self, x: Tensor) -> Tensor:
        module = self.module
        # Not the time embedding, a patch without rows, or one without a halo.
        is_picture = x.ndim == 4 and x.numel() and not self.frame.levels.strips
        if not is_picture or module.inplace:
            plain: Tensor = self.plain(module, x)
            return plain
        out = empty_with_room(x, x.shape, self.frame.dim)
        torch.ops.aten.silu.out(x, out=out)
        return out
