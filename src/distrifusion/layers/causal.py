"""Layers of autoencoders for videos ``[B, C, frames, H, W]``: causal in time, split along rows or columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import Nearest, Reader, Split, Window
from .base import Frame, FrameHolder, HaloLayer
from .conv import rows_read


class PatchCausalConv(HaloLayer):
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

    def reach(self, frame: Frame) -> tuple[Split, Split, Reader]:
        """See HaloLayer."""
        split = frame.split(self.level)
        return split, split, self._windows[frame.dim - 2]

    def _forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        frame, module, missing = self.frame, self.module, self._time[0]
        if cache_x is not None and missing > 0:
            x = torch.cat([cache_x.to(x.device), x], dim=2)
            missing -= cache_x.shape[2]
        if missing:
            x = F.pad(x, (0, 0, 0, 0, missing, 0))
        rows = rows_read(self, frame, x.flatten(1, 2), reads_whole=self._reads_whole)  # [B, C x frames, rows, W]
        if not rows.numel():
            reach = module.dilation[0] * (module.kernel_size[0] - 1) + 1
            num_frames = (x.shape[2] - reach) // module.stride[0] + 1
            return x.new_empty(x.shape[0], module.out_channels, num_frames, *frame.sides(self.level, 0))
        across = self._windows[3 - frame.dim].padding[0]
        padding = (0, 0, across) if frame.dim == 2 else (0, across, 0)
        return F.conv3d(
            rows.view(*x.shape[:3], *rows.shape[2:]),
            module.weight,
            module.bias,
            module.stride,
            padding,
            module.dilation,
            module.groups,
        )


class PatchRegroup(HaloLayer):
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

    def reach(self, frame: Frame) -> tuple[Split, Split, Reader]:
        """See HaloLayer."""
        inputs, outputs = frame.split(self.level), frame.split(self.level_out)
        if self.level_out > self.level:
            return inputs, outputs, Window(2, 2)
        return inputs, outputs, Window(1) if self.level_out == self.level else Nearest(inputs.size, outputs.size)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        frame = self.frame
        rows = self.with_halo(frame, x.flatten(1, 2))
        frames = rows.view(*x.shape[:3], *rows.shape[2:])
        made: Tensor = type(self.module).forward(self.module, frames, *args, **kwargs)
        out = frame.split(self.level_out).span(frame.patch)
        first = (
            out.start % 2 if self.level_out < self.level and len(out) else 0
        )  # the second of a pair made from one row
        return made.narrow(frame.dim + 1, first, len(out))
