"""What is said of the encoders, or the decoders, of one family of VAEs: where they shrink, their layers, their end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ...geometry import Window
from ...layers import Layer
from ..walk import Walk

Pairs = list[tuple[Window, Window]]
"""Windows along rows and along columns, from each level to the next coarser one."""

HALVING = (Window(2, 2), Window(2, 2))
"""From the finer to the coarser level, where a decoder doubles."""


@dataclass(frozen=True)
class Tail:
    """The end of a decoder, as modules that its forward calls one after the other with what the last one has made.

    Of a video's decoder it is so for a picture alone, of which nothing is kept for a next frame.
    ``finish`` is what is left to do after them.
    """

    modules: tuple[nn.Module, ...]
    finish: Callable[[Tensor], Tensor] = lambda x: x

    def run(self, first: int, x: Tensor) -> Tensor:
        """From module ``first`` on: rows ``[B, C, (1,) rows, W]`` -> rows of the picture."""
        for module in self.modules[first:]:
            x = module(x, temb=None) if isinstance(module, ResnetBlock2D) else module(x)
        return self.finish(x)


@dataclass(frozen=True)
class Plan:
    """How the encoders, or the decoders, of one family are made."""

    windows: Callable[[Any], Pairs]
    layers: Callable[[Walk, Any, int], Iterator[Layer]]  # (walk, module, the coarsest level)
    tail: Callable[[Any], Tail] | None = None
