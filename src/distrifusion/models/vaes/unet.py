"""AutoencoderKL and its like: U-Net blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from torch import nn

from ...layers import Layer
from ..blocks import block, down_and_mid, downsampling_windows
from ..walk import Place, Walk
from .plan import HALVING, Pairs, Plan, Tail


def _tail(walk: Walk, module: Any, level: int) -> Iterator[Layer]:
    for name in ("conv_norm_out", "conv_act", "conv_out"):
        yield from walk(getattr(module, name), name, Place(level, level))


def _unet_windows(encoder: Any) -> Pairs:
    return list(zip(*downsampling_windows(encoder), strict=True))


def _unet_encoder(walk: Walk, encoder: Any, coarsest: int) -> Iterator[Layer]:
    yield from down_and_mid(encoder, walk)
    yield from _tail(walk, encoder, coarsest)


def _doublings(decoder: Any) -> Pairs:
    return [HALVING] * sum(each.upsamplers is not None for each in decoder.up_blocks)


def _unet_decoder(walk: Walk, decoder: Any, coarsest: int) -> Iterator[Layer]:
    yield from walk(decoder.conv_in, "conv_in", Place(coarsest, coarsest, reads_whole=True))
    yield from walk(decoder.mid_block, "mid_block", Place(coarsest, coarsest))
    level = coarsest
    for i, each in enumerate(decoder.up_blocks):
        level = yield from block(walk, each, f"up_blocks.{i}", level, "upsamplers", -1)
    yield from _tail(walk, decoder, level)


def _unet_tail(decoder: Any) -> Tail:
    """From the first block on after which nothing looks at the whole picture but norms."""
    modules: list[nn.Module] = [decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]
    for each in reversed(decoder.up_blocks):
        if type(each) is not UpDecoderBlock2D:
            break
        modules[:0] = [*each.resnets, *(each.upsamplers or ())]
    return Tail(tuple(modules))


ENCODER = Plan(_unet_windows, _unet_encoder)
DECODER = Plan(_doublings, _unet_decoder, _unet_tail)
