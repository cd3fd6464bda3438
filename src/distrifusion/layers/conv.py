"""Convolution and pooling over a patch: the halo comes from the neighbours, the arithmetic is torch's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..exchange import concatenated
from ..geometry import Reader, Span, Split, Window
from .base import Frame, FrameHolder, HaloLayer
from .chunks import Pads, convolved
from .doubled import convolved_doubled, source_of, with_edges
from .rows import between, rows_of


def windows(module: Any, extra: Pads = (0, 0), name: str = "") -> tuple[Window, Window]:
    """The windows of a Conv2d or AvgPool2d, ``name`` in the model, along rows and along columns.

    ``extra`` rows and columns of zeros, before and after, are what the module around it pads.

    Raises:
        UnsupportedModel: padding that is not zeros, or pooling that rounds up or leaves the padding out of its mean.
    """
    if isinstance(module, nn.AvgPool2d):
        if module.ceil_mode or module.padding not in (0, (0, 0)):
            raise UnsupportedModel(
                f"{name} (AvgPool2d) with padding={module.padding} ceil_mode={module.ceil_mode}: use neither"
            )
        kernel, stride = _pair(module.kernel_size), _pair(module.stride)
        return Window(kernel[0], stride[0], extra), Window(kernel[1], stride[1], extra)
    if module.padding_mode != "zeros" and any(_pads(module)[0] + _pads(module)[1]):
        raise UnsupportedModel(
            f"{name} (Conv2d) with padding_mode={module.padding_mode!r}: only 'zeros' is known in patches"
        )
    both = []
    for axis in (0, 1):
        before, after = _pads(module)[axis]
        padding = (before + extra[0], after + extra[1])
        both.append(Window(module.kernel_size[axis], module.stride[axis], padding, module.dilation[axis]))
    return both[0], both[1]


class PatchConv(HaloLayer):
    """``nn.Conv2d`` or ``nn.AvgPool2d``: ``[B, C, rows, W]`` -> ``[B, C', rows', W']``, own rows in and out.

    ``level`` and ``level_out`` are the model's levels before and after. With ``reads_whole`` the input is the whole
    picture, which every rank has (the first convolution): nothing travels. Where the policy lets no patch see its
    neighbours, the rest of the picture is zeros here too.
    """

    sees_edges = True

    def __init__(
        self,
        module: nn.Module,
        key: str,
        holder: FrameHolder,
        *,
        level: int,
        level_out: int,
        extra: Pads = (0, 0),
        reads_whole: bool = False,
    ) -> None:
        super().__init__(module, key, holder)
        self.level, self.level_out = level, level_out
        self.windows = windows(module, extra, key)  # along rows, along columns
        self._extra = extra
        self.reads_whole = reads_whole

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def reach(self, frame: Frame) -> tuple[Split, Split, Reader]:
        """See HaloLayer."""
        return frame.split(self.level), frame.split(self.level_out), self.windows[frame.dim - 2]

    def _forward(self, x: Tensor) -> Tensor:
        frame = self.frame
        if frame.levels.strips:
            return self._alone(x, frame)
        outputs = frame.split(self.level_out)
        if self.reads_whole:
            self._note(frame, x)
        source = source_of(x, self.module, frame)  # before a halo is written to the room around it
        rows = rows_read(self, frame, x, reads_whole=self.reads_whole)
        if not len(outputs.span(frame.patch)):
            channels = x.shape[1] if isinstance(self.module, nn.AvgPool2d) else self.module.out_channels
            return x.new_empty(x.shape[0], channels, *frame.sides(self.level_out, 0))
        return self._padded(rows, frame, (0, 0), source)

    def _alone(self, x: Tensor, frame: Frame) -> Tensor:
        if self.reads_whole:
            x = frame.own(self.level, x)
        dim, window = frame.dim, self.windows[frame.dim - 2]
        pads, strips = window.padding, frame.strips(self.level, x)
        sources = [source_of(strip, self.module, frame) for strip in strips]
        # Half of an odd number of rows is rounded up, and not all models would do so.
        sizes = zip(strips, frame.levels.strips[self.level_out], strict=True)
        ends = [window.lack(strip.shape[dim], rows) for strip, rows in sizes]
        if isinstance(self.module, nn.AvgPool2d):  # whose mean is of rows that are there
            strips = [_lengthened(strip, end, dim) for strip, end in zip(strips, ends, strict=True)]
            ends = [0] * len(ends)
        every = list(zip(strips, sources, ends, strict=True))
        if frame.recall is None or not any(pads):
            parts = [self._padded(strip, frame, (pads[0], pads[1] + end), source) for strip, source, end in every]
        elif torch.compiler.is_compiling():
            rows = [strip.shape[dim] + sum(pads) for strip in strips]
            wider = torch.split(self.ask([x], [sum(rows)], dim)[0], rows, dim)
            parts = [self._padded(strip, frame, (0, end)) for strip, end in zip(wider, ends, strict=True)]
        else:
            sides = frame.recall.beside(self.key, x, self.level, pads, dim)
            parts = [
                self._padded(between(strip, *both, pads, dim), frame, (0, end), source)
                if any(rows is not None for rows in both)
                else self._padded(strip, frame, (pads[0], pads[1] + end), source)  # torch's own zeros: the same bits
                for (strip, source, end), both in zip(every, sides, strict=True)
            ]
        return concatenated(parts, dim)

    def with_halo(self, frame: Frame, patch: Tensor) -> Tensor:
        """See HaloLayer."""
        if not self.reads_whole:
            self._note(frame, patch)
        return super().with_halo(frame, patch)

    def _note(self, frame: Frame, x: Tensor) -> None:
        pads = self.windows[frame.dim - 2].padding
        if frame.recall is not None and any(pads) and not torch.compiler.is_compiling():
            frame.recall.note(self.key, x, self.level, pads, frame.dim, is_whole=self.reads_whole)

    def answer(self, tensors: list[Tensor], dim: int, question: int) -> Sequence[Tensor]:
        """See Layer."""
        frame, x = self.frame, tensors[0]
        if not frame.levels.strips:
            return super().answer(tensors, dim, question)
        assert frame.recall is not None
        pads = self.windows[frame.dim - 2].padding
        sides = frame.recall.beside(self.key, x, self.level, pads, frame.dim)
        strips = zip(frame.strips(self.level, x), sides, strict=True)
        return [torch.cat([between(strip, *both, pads, frame.dim) for strip, both in strips], frame.dim)]

    def _padded(self, rows: Tensor, frame: Frame, along: Pads, source: Tensor | None = None) -> Tensor:
        """The module's arithmetic, with ``along`` zeros before and after along the split dim and its own across.

        ``source``: see `source_of`, of the patch whose rows these are, with or without a halo.
        """
        if source is not None:
            rows = source if any(along) else with_edges(source, rows, frame.dim)
        pads, rings = (along, self.windows[3 - frame.dim].padding), (False, frame.levels.is_ring_across)
        if frame.dim == 3:
            pads, rings = pads[::-1], rings[::-1]
        rows, padding = padded(rows, pads, rings)
        if source is not None:
            return convolved_doubled(self.module, rows, padding, frame, self.key)
        return self._apply(rows, padding)

    def _apply(self, rows: Tensor, padding: Pads) -> Tensor:
        frame = self.frame
        if frame.chunk is None or torch.compiler.is_compiling() or not rows.numel():
            return apply(self.module, rows, padding)
        along = self.windows[frame.dim - 2]
        return convolved(functools.partial(apply, self.module), rows, padding, along, frame.dim, frame.chunk)


def rows_read(layer: HaloLayer, frame: Frame, x: Tensor, *, reads_whole: bool) -> Tensor:
    """The rows that a convolution needs for its own rows of output, zeros beyond the picture included.

    ``x`` is the own patch ``[B, C, rows, W]``, or with ``reads_whole`` the whole picture: nothing travels then.
    """
    if reads_whole and frame.sees_peers:
        return _window_of_whole(x, frame, *layer.reach(frame))
    return layer.with_halo(frame, frame.own(layer.level, x) if reads_whole else x)


def apply(module: Any, x: Tensor, padding: Pads) -> Tensor:
    """The arithmetic of a Conv2d or AvgPool2d with other ``padding``, of rows and columns."""
    if isinstance(module, nn.AvgPool2d):
        return F.avg_pool2d(x, module.kernel_size, module.stride, padding, divisor_override=module.divisor_override)
    return F.conv2d(x, module.weight, module.bias, module.stride, padding, module.dilation, module.groups)


def _lengthened(x: Tensor, num: int, dim: int) -> Tensor:
    """With its last row ``num`` times more."""
    return torch.cat([x] + [x.narrow(dim, x.shape[dim] - 1, 1)] * num, dim) if num else x


def padded(x: Tensor, pads: tuple[Pads, Pads], rings: tuple[bool, bool]) -> tuple[Tensor, Pads]:
    """``x`` with padding of rows and of columns, from the other end where ``rings`` says so, else of zeros.

    What torch's convolution can do by itself, the same zeros on both sides, is left to it: (x, its padding).
    """
    for dim, (both, is_ring) in enumerate(zip(pads, rings, strict=True), 2):
        if is_ring and any(both):
            x = rows_of(x, Span(-both[0], x.shape[dim] + both[1]), dim)
    rows, cols = ((0, 0) if is_ring else both for both, is_ring in zip(pads, rings, strict=True))
    if rows[0] == rows[1] and cols[0] == cols[1]:
        return x, (rows[0], cols[0])
    return F.pad(x, (*cols, *rows)), (0, 0)


def _window_of_whole(x: Tensor, frame: Frame, inputs: Split, outputs: Split, window: Reader) -> Tensor:
    out, dim = outputs.span(frame.patch), frame.dim
    if not len(out):
        return x.narrow(dim, 0, 0)
    reads = window.reads(out)
    if inputs.is_ring:
        return rows_of(x, reads, dim)
    inside = reads & Span(0, x.shape[dim])
    rows = x.narrow(dim, inside.start, len(inside))
    before, after = inside.start - reads.start, reads.stop - inside.stop
    return F.pad(rows, (0, 0, before, after) if dim == 2 else (before, after, 0, 0))


def _pads(module: nn.Conv2d) -> tuple[Pads, Pads]:
    if module.padding == "same":
        both = []
        for kernel, dilation in zip(module.kernel_size, module.dilation, strict=True):
            total = dilation * (kernel - 1)
            both.append((total // 2, total - total // 2))
        return both[0], both[1]
    if module.padding == "valid":
        return (0, 0), (0, 0)
    rows, cols = _pair(module.padding)
    return (rows, rows), (cols, cols)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
