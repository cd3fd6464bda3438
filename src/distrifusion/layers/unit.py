"""A module whose output may come from another rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..boundary import Staged
from .base import FrameHolder, Layer


class StageUnit(Layer):
    """A unit of the stages of a model. Units of one ``group`` stay together."""

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder, *, group: int) -> None:
        super().__init__(module, key, holder)
        self._group = group

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        forward: Callable[..., Any] = self._forward
        return forward

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        stage = self.frame.exchange
        assert isinstance(stage, Staged)

        def unit(*args: Any, **kwargs: Any) -> Any:
            return type(self.module).forward(self.module, *args, **kwargs)

        return stage.boundary(self.key, self._group, unit, args, kwargs)
