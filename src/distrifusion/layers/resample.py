"""Down- and upsampling blocks of diffusers over a patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import Nearest, Split
from .base import Frame, FrameHolder, HaloLayer, Layer


class PatchUpsample(HaloLayer):
    """``Upsample2D``: nearest interpolation to the next finer level, then its convolution (a seam of its own).

    ``[B, C, rows, W]`` -> ``[B, C', rows', W']``. The target size is the finer level's, so the ``output_size`` that
    the model passes for odd sizes, which it reads off a patch, is not needed. Patches on even rows need no halo here.
    """

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder, *, level: int, level_out: int) -> None:
        super().__init__(module, key, holder)
        self.level, self.level_out = level, level_out

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        module = self.module
        if module.norm is not None:
            hidden_states = module.norm(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if module.interpolate:
            hidden_states = self._interpolate(hidden_states)
        if module.use_conv:
            hidden_states = module.conv(hidden_states) if module.name == "conv" else module.Conv2d_0(hidden_states)
        return hidden_states

    def reach(self, frame: Frame) -> tuple[Split, Split, Nearest]:
        """See HaloLayer."""
        inputs, outputs = frame.split(self.level), frame.split(self.level_out)
        return inputs, outputs, Nearest(inputs.size, outputs.size)

    def _interpolate(self, x: Tensor) -> Tensor:
        frame = self.frame
        if frame.levels.strips:
            sizes = [frame.sides(self.level_out, rows) for rows in frame.levels.strips[self.level_out]]
            strips = zip(frame.strips(self.level, x), sizes, strict=True)
            parts = [F.interpolate(strip, size=size, mode="nearest") for strip, size in strips]
            return parts[0] if len(parts) == 1 else torch.cat(parts, frame.dim)
        inputs, outputs, reader = self.reach(frame)
        rows = self.with_halo(frame, x)
        out = outputs.span(frame.patch)
        sides = frame.sides(self.level_out, len(out))
        if not len(out):
            return x.new_empty(*x.shape[:2], *sides)
        if len(out) == 2 * rows.shape[frame.dim] and outputs.size == 2 * inputs.size:
            return F.interpolate(rows, size=sides, mode="nearest")
        first = reader.source(out.start)
        index = torch.tensor([reader.source(row) - first for row in range(out.start, out.stop)], device=x.device)
        return F.interpolate(rows.index_select(frame.dim, index), size=sides, mode="nearest")


class PatchDownsample(Layer):
    """``Downsample2D`` of the kind that pads one zero row and column at the end before its convolution (``padding=0``).

    Its convolution knows of these zeros, so here only the rest of the block runs.
    """

    sees_edges = True

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module = self.module
        if module.norm is not None:
            hidden_states = module.norm(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out: Tensor = module.conv(hidden_states)
        return out
