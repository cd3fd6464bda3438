"""Wan's and Qwen-Image's: the same blocks under other names, over frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwen
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import nn

from ...layers import Layer, PatchCausalConv, PatchFrameAttention, PatchRegroup
from ...layers.conv import windows
from ..walk import Place, Rule, Walk, check_module, unsupported
from .plan import HALVING, Pairs, Plan, Tail
from .resample import interpolate


def _samplers(half: Any, kind: str | tuple[str, ...]) -> list[Any]:
    return [module for module in half.modules() if isinstance(module, RESAMPLES) and module.mode.startswith(kind)]


def _video_windows(encoder: Any) -> Pairs:
    return [windows(down.resample[1], PADS, "resample.1") for down in _samplers(encoder, "downsample")]


def _video_doublings(decoder: Any) -> Pairs:
    return [HALVING] * len(_samplers(decoder, "upsample"))


def _video_encoder(walk: Walk, encoder: Any, coarsest: int) -> Iterator[Layer]:
    yield from walk(encoder.conv_in, "conv_in", Place(0, 0, reads_whole=True))
    yield from _video_blocks(walk, encoder.down_blocks, "down_blocks", 0, +1)
    yield from walk(encoder.mid_block, "mid_block", Place(coarsest, coarsest))
    yield from _video_tail(walk, encoder, coarsest)


def _video_decoder(walk: Walk, decoder: Any, coarsest: int) -> Iterator[Layer]:
    yield from walk(decoder.conv_in, "conv_in", Place(coarsest, coarsest, reads_whole=True))
    yield from walk(decoder.mid_block, "mid_block", Place(coarsest, coarsest))
    yield from _video_blocks(walk, decoder.up_blocks, "up_blocks", coarsest, -1)
    yield from _video_tail(walk, decoder, 0)


def _video_blocks(walk: Walk, stack: Any, name: str, level: int, step: int) -> Iterator[Layer]:
    for i, module in enumerate(stack):
        level_out = level + step * len(_samplers(module, ("downsample", "upsample")))
        yield from walk(module, f"{name}.{i}", Place(level, level_out))
        level = level_out


def _video_tail(walk: Walk, half: Any, level: int) -> Iterator[Layer]:
    for name in ("norm_out", "nonlinearity", "conv_out"):
        yield from walk(getattr(half, name), name, Place(level, level))


def _video_tail_of_decoder(decoder: Any) -> Tail:
    """Of one picture; as Wan 2.2 doubles it, what goes around a block and what goes through it read in parallel."""
    modules: list[nn.Module] = [decoder.norm_out, decoder.nonlinearity, decoder.conv_out]
    for each in reversed(decoder.up_blocks):
        if getattr(each, "avg_shortcut", None) is not None:
            break
        modules[:0] = [*each.resnets, *(getattr(each, "upsamplers", None) or ())]
    return Tail(tuple(modules))


def _causal_conv(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    yield PatchCausalConv(module, name, walk.holder, level=place.level, reads_whole=place.reads_whole)


def _frame_attention(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    yield PatchFrameAttention(module, name, walk.holder, level=place.level)
    yield from walk.children(module, name, place)


def _video_block(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    """A block that resamples at its end, with a shortcut around it in Wan 2.2."""
    check_module(module, name)
    for child_name, child in module.named_children():
        resamples = child_name in ("avg_shortcut", "upsamplers", "upsampler", "downsampler")
        yield from walk(child, f"{name}.{child_name}", place if resamples else place.then(place.level))


def _regroup(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    if module.factor_s != (1 if place.level == place.level_out else 2):
        raise unsupported(module, name, f"by {module.factor_s} is not known")
    yield PatchRegroup(module, name, walk.holder, level=place.level, level_out=place.level_out)


def _resample(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    is_down = module.mode.startswith("downsample")
    if is_down and module.resample[0].padding != (*PADS, *PADS):
        raise unsupported(module, name, f"with zeros {module.resample[0].padding} around it is not known")
    for i, child in enumerate(module.resample):
        is_conv = isinstance(child, nn.Conv2d)
        if is_conv:
            at = Place(place.level, place.level_out, PADS) if is_down else place.then(place.level_out)
        yield from walk(child, f"{name}.resample.{i}", at if is_conv else place)
    if hasattr(module, "time_conv"):  # before an upsampling, after a downsampling
        yield from walk(module.time_conv, f"{name}.time_conv", place.then(max(place.level, place.level_out)))


PADS = (0, 1)  # zeros before and after, beside a downsampling convolution's own
RESAMPLES = (wan.WanResample, qwen.QwenImageResample)

SEAMS: dict[type, Rule] = {
    wan.WanCausalConv3d: _causal_conv,
    wan.WanAttentionBlock: _frame_attention,
    wan.WanUpBlock: _video_block,
    wan.WanResidualUpBlock: _video_block,
    wan.WanResidualDownBlock: _video_block,
    wan.AvgDown3D: _regroup,
    wan.DupUp3D: _regroup,
    wan.WanResample: _resample,
    wan.WanUpsample: interpolate,
    qwen.QwenImageCausalConv3d: _causal_conv,
    qwen.QwenImageAttentionBlock: _frame_attention,
    qwen.QwenImageUpBlock: _video_block,
    qwen.QwenImageResample: _resample,
    qwen.QwenImageUpsample: interpolate,
}

CONTAINERS: tuple[type, ...] = (
    wan.WanMidBlock,
    wan.WanResidualBlock,
    qwen.QwenImageMidBlock,
    qwen.QwenImageResidualBlock,
)

LOCAL: tuple[type, ...] = (wan.WanRMS_norm, qwen.QwenImageRMS_norm)

ENCODER = Plan(_video_windows, _video_encoder)
DECODER = Plan(_video_doublings, _video_decoder, _video_tail_of_decoder)
