"""Layers of a model that is not cut: where the ends of its picture meet, convolutions read on at the other one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModel
from .base import FrameHolder, Layer
from .conv import Pads, apply, padded, windows


class WrapConv(Layer):
    """``nn.Conv2d`` ``[B, C, H, W]``, whose padding is of the other end along rows or columns.

    Args:
        module: the convolution.
        key: its name.
        rings: whether rows, and whether columns, go around.
        extra: zeros that the module around it pads.
    """

    def __init__(self, module: nn.Module, key: str, *, rings: tuple[bool, bool], extra: Pads = (0, 0)) -> None:
        super().__init__(module, key, FrameHolder())
        rows, cols = windows(module, extra, key)
        self._pads, self._rings = (rows.padding, cols.padding), rings

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, x: Tensor) -> Tensor:
        return apply(self.module, *padded(x, self._pads, self._rings))


class Refused(Layer):
    """A method that would be wrong while the model is as it is: it raises UnsupportedModel with ``why``."""

    def __init__(self, module: nn.Module, method: str, why: str) -> None:
        self.method, self._why = method, why
        super().__init__(module, method, FrameHolder())

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._refuse

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModel(self._why)
