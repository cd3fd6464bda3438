"""A stack of convolutions over a picture that every rank has whole: own rows out, nothing travels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModel
from ..exchange import concatenated
from ..geometry import Chain, Span, Window
from .base import FrameHolder, Layer
from .rows import rows_of


class PatchStem(Layer):
    """``[B, C, H, W]``, the whole picture -> ``[B, C', rows', W']``, own rows of level 0.

    The module runs as it is over the rows of the picture that the own rows of its output depend on: the few rows of
    halo are computed twice, on two ranks, instead of sent. ``windows`` are its convolutions, first to last, each along
    rows and along columns; None for a module that is not such a stack: it runs whole and its output is cut.
    """

    sees_edges = True

    def __init__(
        self, module: nn.Module, key: str, holder: FrameHolder, *, windows: Sequence[tuple[Window, Window]] | None
    ) -> None:
        super().__init__(module, key, holder)
        self._windows = windows

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, x: Tensor) -> Tensor:
        frame = self.frame
        dim, split = frame.dim, frame.split(0)
        if self._windows is None:
            if split.is_ring or frame.levels.is_ring_across:
                raise UnsupportedModel(f"{self.key} with an adapter in it is not known where the picture's ends meet")
            whole: Tensor = self.plain(self.module, x)
            self._check(whole.shape[dim], whole.shape[5 - dim])
            return frame.own(0, whole)
        along, across = ([pair[axis] for pair in self._windows] for axis in (dim - 2, 3 - dim))
        self._check(out_size(along, x.shape[dim]), out_size(across, x.shape[5 - dim]))
        # Lists: torch.compile follows no generator into `prod`.
        margin, stride = 0, prod([window.stride for window in across])
        if frame.levels.is_ring_across:
            need = Chain(tuple(across)).reads(Span(0, 1))
            margin = max(-(need.start // stride), -(-need.stop // stride) - 1) * stride
            size = x.shape[5 - dim]
            x = rows_of(x, Span(-margin, size + margin), 5 - dim)
        parts = [self._rows(x, along, run) for run in split.runs(frame.patch)]
        own = concatenated(parts, dim)
        return own.narrow(5 - dim, margin // stride, frame.levels.across[0])

    def _rows(self, x: Tensor, along: Sequence[Window], run: Span) -> Tensor:
        """Rows ``run`` of the module's output for the whole picture ``x``."""
        dim, size, stride = self.frame.dim, x.shape[self.frame.dim], prod([window.stride for window in along])
        needed = Chain(tuple(along)).reads(run)
        # On a multiple of the stride, the rows of the slice stay those of the picture through all of the stack; the
        # zeros around the slice reach no row that is needed.
        first, last = needed.start // stride * stride, -(-needed.stop // stride) * stride
        if self.frame.split(0).is_ring:
            rows = rows_of(x, Span(first, last), dim)
        else:
            first, last = max(first, 0), min(last, size)
            rows = x.narrow(dim, first, last - first)
        out: Tensor = self.plain(self.module, rows)
        return out.narrow(dim, run.start - first // stride, len(run))

    def _check(self, along: int, across: int) -> None:
        """Raise where the output does not have the latent's size."""
        wanted = (self.frame.split(0).size, self.frame.levels.across[0])
        if (along, across) != wanted:
            made, latent = (f"{a} x {b}" if self.frame.dim == 2 else f"{b} x {a}" for a, b in ((along, across), wanted))
            raise ConfigError(
                f"{self.key} makes {made} of its picture and the latent is {latent}: give a picture of the size of the "
                "result"
            )


def out_size(windows: Sequence[Window], size: int) -> int:
    """Output rows of a stack for ``size`` input rows."""
    for window in windows:
        size = window.out_size(size)
    return size
