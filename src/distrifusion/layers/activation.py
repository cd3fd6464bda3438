"""The activation before a convolution: it writes to where the convolution will read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..products import without_products
from .base import Layer
from .rows import empty_with_room


class PatchSiLU(Layer):
    """``nn.SiLU``: any shape and dtype -> the same; a patch ``[B, C, rows, W]`` gets room for a halo around it.

    Attaching a halo to a patch costs a copy of it, which here is the activation's own write.
    """

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    @without_products
    def _forward(self, x: Tensor) -> Tensor:
        module = self.module
        # Not the time embedding, a patch without rows, or one without a halo; and a compiler sees to such copies.
        is_picture = x.ndim == 4 and x.numel() and not self.frame.levels.strips
        if not is_picture or module.inplace or torch.compiler.is_compiling():
            plain: Tensor = self.plain(module, x)
            return plain
        out = empty_with_room(x, x.shape, self.frame.dim)
        torch.ops.aten.silu.out(x, out=out)
        return out
