"""Down- and upsampling blocks of diffusers over a patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import Nearest, Split
from .base import Frame, FrameHolder, HaloLayer, Layer
from .doubled import mark_doubled
from .rows import empty_with_room


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
            hidden_states = nearest(self, hidden_states)
        if module.use_conv:
            hidden_states = module.conv(hidden_states) if module.name == "conv" else module.Conv2d_0(hidden_states)
        return hidden_states

    def reach(self, frame: Frame) -> tuple[Split, Split, Nearest]:
        """See HaloLayer."""
        return finer(self, frame)


def finer(layer: PatchUpsample | PatchInterpolate, frame: Frame) -> tuple[Split, Split, Nearest]:
    """From ``layer.level`` to the next finer ``layer.level_out``. See HaloLayer."""
    inputs, outputs = frame.split(layer.level), frame.split(layer.level_out)
    return inputs, outputs, Nearest(inputs.size, outputs.size)


def nearest(layer: PatchUpsample | PatchInterpolate, x: Tensor) -> Tensor:
    """Nearest interpolation of a patch ``[B, C, rows, W]`` to the next finer level, ``[B, C, rows', W']``."""
    frame = layer.frame
    if frame.levels.strips:
        sizes = [frame.sides(layer.level_out, rows) for rows in frame.levels.strips[layer.level_out]]
        strips = zip(frame.strips(layer.level, x), sizes, strict=True)
        parts = [F.interpolate(strip, size=size, mode="nearest") for strip, size in strips]
        if len(parts) == 1:
            return mark_doubled(parts[0], x)
        return torch.cat(parts, frame.dim)
    inputs, outputs, reader = finer(layer, frame)
    rows = layer.with_halo(frame, x)
    out = outputs.span(frame.patch)
    sides = frame.sides(layer.level_out, len(out))
    if not len(out):
        return x.new_empty(*x.shape[:2], *sides)
    if len(out) == 2 * rows.shape[frame.dim] and outputs.size == 2 * inputs.size:
        if sides == (2 * rows.shape[2], 2 * rows.shape[3]) and not torch.compiler.is_compiling():
            return _doubled(rows, frame.dim)
        return F.interpolate(rows, size=sides, mode="nearest")
    first = reader.source(out.start)
    index = torch.tensor([reader.source(row) - first for row in range(out.start, out.stop)], device=x.device)
    return F.interpolate(rows.index_select(frame.dim, index), size=sides, mode="nearest")


def _doubled(rows: Tensor, dim: int) -> Tensor:
    """Twice the rows and columns, with room for a halo: a convolution comes next."""
    wide = F.interpolate(rows, size=(rows.shape[2], 2 * rows.shape[3]), mode="nearest")
    # As torch lays out what it interpolates: in the layout of some attentions, all norms and sums after it would copy.
    out = empty_with_room(wide, (*rows.shape[:2], 2 * rows.shape[2], wide.shape[3]), dim)
    for row in (0, 1):
        out[:, :, row::2].copy_(wide)
    return mark_doubled(out, rows)


class PatchInterpolate(HaloLayer):
    """``nn.Upsample`` by 2, nearest: ``[B, C, rows, W]`` -> ``[B, C, rows', W']``, any dtype."""

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder, *, level: int, level_out: int) -> None:
        super().__init__(module, key, holder)
        self.level, self.level_out = level, level_out

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def reach(self, frame: Frame) -> tuple[Split, Split, Nearest]:
        """See HaloLayer."""
        return finer(self, frame)

    def _forward(self, x: Tensor) -> Tensor:
        return nearest(self, x)


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


class PatchPad(Layer):
    """``nn.ZeroPad2d`` before a convolution that knows of its zeros: nothing is left to do."""

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, x: Tensor) -> Tensor:
        return x
