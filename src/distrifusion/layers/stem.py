"""A stack of convolutions over a picture that every rank has whole: own rows out, nothing travels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..geometry import Span, Window
from .base import FrameHolder, Layer


class PatchStem(Layer):
    """``[B, C, H, W]``, the whole picture -> ``[B, C', rows', W']``, own rows of level 0.

    The module runs as it is over the rows of the picture that the own rows of its output depend on: the few rows of
    halo are computed twice, on two ranks, instead of sent. ``windows`` are its convolutions, first to last, each along
    rows and along columns; None for a module that is not such a stack: it runs whole and its output is cut.
    """

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
        own = split.span(frame.patch)
        if self._windows is None:
            whole: Tensor = self.plain(self.module, x)
            self._check(whole.shape[dim], whole.shape[5 - dim])
            return whole.narrow(dim, own.start, len(own))
        along, across = ([pair[axis] for pair in self._windows] for axis in (dim - 2, 3 - dim))
        size, stride = x.shape[dim], prod(window.stride for window in along)
        self._check(out_size(along, size), out_size(across, x.shape[5 - dim]))
        needed = reads(along, own) & Span(0, size)
        # On a multiple of the stride, the rows of the slice stay those of the picture through all of the stack; the
        # zeros around the slice reach no row that is needed.
        first, last = needed.start // stride * stride, min(-(-needed.stop // stride) * stride, size)
        rows: Tensor = self.plain(self.module, x.narrow(dim, first, last - first))
        return rows.narrow(dim, own.start - first // stride, len(own))

    def _check(self, along: int, across: int) -> None:
        """Raise where the output does not have the latent's size."""
        wanted = (self.frame.split(0).size, self.frame.levels.across[0])
        if (along, across) != wanted:
            made, latent = (f"{a} x {b}" if self.frame.dim == 2 else f"{b} x {a}" for a, b in ((along, across), wanted))
            raise ConfigError(
                f"{self.key} makes {made} of its picture and the latent is {latent}: give a picture of the size of the "
                "result"
            )


def reads(windows: Sequence[Window], out: Span) -> Span:
    """The input rows behind output rows ``out`` of a stack; may reach beyond the picture."""
    for window in reversed(windows):
        out = window.reads(out)
    return out


def out_size(windows: Sequence[Window], size: int) -> int:
    """Output rows of a stack for ``size`` input rows."""
    for window in windows:
        size = window.out_size(size)
    return size
