"""A module whose output may come from another rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..boundary import Staged
from ..stream import Pass
from .base import FrameHolder, Layer


class StageUnit(Layer):
    """A unit of the stages of a model. Units of one ``group`` stay together."""

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder, *, group: int) -> None:
        super().__init__(module, key, holder)
        self.group = group
        self.inside: Layer | None = None
        """A layer that takes over the same module where the unit runs."""

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        forward: Callable[..., Any] = self._forward
        return forward

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        stage = self.frame.exchange
        assert isinstance(stage, Staged | Pass)

        def unit(*args: Any, **kwargs: Any) -> Any:
            if self.inside is not None:
                return self.inside.forward(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)

        return stage.boundary(self.key, self.group, unit, args, kwargs)
