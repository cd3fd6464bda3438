"""Layers of autoencoders for videos ``[B, C, frames, H, W]``: causal in time, split along rows or columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import Nearest, Reader, Split, Window
from .base import FrameHolder, Layer, with_halo
from .conv import rows_read


class PatchCausalConv(Layer):
    """A causal ``nn.Conv3d`` of Wan and Qwen-Image: ``[B, C, frames, rows, W]`` -> ``[B, C', frames', rows, W]``.

    Frames of the past that the model kept (``cache_x``) are of the own patch too, and travel with the halo again: a
    rank keeps nothing of its peers. With ``reads_whole`` the input is the whole picture, and so is what is kept.
    """

    def __init__(
        self, module: nn.Module, key: str, holder: FrameHolder, *, level: int, reads_whole: bool = False
    ) -> None:
        super().__init__(module, key, holder)
        self.level = level
        self._reads_whole = reads_whole
        cols, rows, self._time = (self.module._padding[i : i + 2] for i in (0, 2, 4))
        self._windows = tuple(
            Window(self.module.kernel_size[i], self.module.stride[i], padding, self.module.dilation[i])
            for i, padding in ((1, rows), (2, cols))
        )

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        frame, module, missing = self.frame, self.module, self._time[0]
        if cache_x is not None and missing > 0:
            x = torch.cat([cache_x.to(x.device), x], dim=2)
            missing -= cache_x.shape[2]
        if missing:
            x = F.pad(x, (0, 0, 0, 0, missing, 0))
        split, dim = frame.split(self.level), frame.dim
        pictures, window = x.flatten(1, 2), self._windows[dim - 2]  # [B, C x frames, rows, W]
        rows = rows_read(frame, self.key, pictures, split, split, window, reads_whole=self._reads_whole)
        if not rows.numel():
            reach = module.dilation[0] * (module.kernel_size[0] - 1) + 1
            num_frames = (x.shape[2] - reach) // module.stride[0] + 1
            return x.new_empty(x.shape[0], module.out_channels, num_frames, *frame.sides(self.level, 0))
        across = self._windows[3 - dim].padding[0]
        padding = (0, 0, across) if dim == 2 else (0, across, 0)
        return F.conv3d(
            rows.view(*x.shape[:3], *rows.shape[2:]),
            module.weight,
            module.bias,
            module.stride,
            padding,
            module.dilation,
            module.groups,
        )


class PatchRegroup(Layer):
    """Pixels into channels or back by 2, as Wan 2.2's shortcuts do: ``AvgDown3D`` (to a coarser level), ``DupUp3D``.

    ``[B, C, frames, rows, W]`` -> ``[B, C', frames', rows', W']``. The module runs as it is, on the rows behind its own
    rows of output; where a patch begins or ends within a pair, a row of the neighbour's is among them.
    """

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder, *, level: int, level_out: int) -> None:
        super().__init__(module, key, holder)
        self.level, self.level_out = level, level_out

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        frame = self.frame
        inputs, outputs = frame.split(self.level), frame.split(self.level_out)
        reader, first = self._reader(inputs, outputs)
        rows = with_halo(frame, self.key, x.flatten(1, 2), inputs, outputs, reader)
        frames = rows.view(*x.shape[:3], *rows.shape[2:])
        made: Tensor = type(self.module).forward(self.module, frames, *args, **kwargs)
        out = outputs.span(frame.patch)
        return made.narrow(frame.dim + 1, first(out.start) if len(out) else 0, len(out))

    def _reader(self, inputs: Split, outputs: Split) -> tuple[Reader, Callable[[int], int]]:
        """What it reads, and the first of the rows it makes that is own, by the first own row."""
        if self.level_out > self.level:
            return Window(2, 2), lambda row: 0
        if self.level_out == self.level:
            return Window(1), lambda row: 0
        return Nearest(inputs.size, outputs.size), lambda row: row % 2
