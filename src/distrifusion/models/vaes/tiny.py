"""AutoencoderTiny: a stack of convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn

from ...layers import Layer
from ...layers.conv import windows
from ..walk import Place, Walk
from .plan import HALVING, Pairs, Plan, Tail


def _is_strided(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.stride != (1, 1)


def _tiny_windows(encoder: Any) -> Pairs:
    return [windows(module, name="layers") for module in encoder.layers if _is_strided(module)]


def _tiny_doublings(decoder: Any) -> Pairs:
    return [HALVING] * sum(isinstance(module, nn.Upsample) for module in decoder.layers)


def _tiny_tail(decoder: Any) -> Tail:
    return Tail(tuple(decoder.layers), lambda x: x.mul(2).sub(1))


def _tiny_encoder(walk: Walk, encoder: Any, coarsest: int) -> Iterator[Layer]:
    return _stack(walk, encoder, 0)


def _stack(walk: Walk, half: Any, level: int) -> Iterator[Layer]:
    for i, module in enumerate(half.layers):
        level_out = level + _is_strided(module) - isinstance(module, nn.Upsample)
        yield from walk(module, f"layers.{i}", Place(level, level_out, reads_whole=i == 0))
        level = level_out


CONTAINERS: tuple[type, ...] = (AutoencoderTinyBlock,)

ENCODER = Plan(_tiny_windows, _tiny_encoder)
DECODER = Plan(_tiny_doublings, _stack, _tiny_tail)
