"""Autoencoders: an encoder and a decoder, each a program of its own that reads a whole picture and makes own rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan, AutoencoderTiny
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwen
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock, UpDecoderBlock2D
from torch import Tensor, nn

from ..errors import ConfigError
from ..geometry import Levels, Window
from ..layers import (
    FrameHolder,
    Layer,
    PatchCausalConv,
    PatchFrameAttention,
    PatchInterpolate,
    PatchPad,
    PatchRegroup,
)
from ..layers.conv import windows
from . import blocks
from .blocks import block, down_and_mid, downsampling_windows, walk_over
from .table import Place, Rule, Walk, check_module, unsupported

Pairs = list[tuple[Window, Window]]
"""Windows along rows and along columns, from each level to the next coarser one."""


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


@dataclass(frozen=True)
class Half:
    """The encoder or the decoder of a VAE. Level 0 is that of the pixels; an encoder goes down, a decoder up."""

    kind: Literal["encode", "decode"]
    vae: Any
    module: Any
    plan: Plan

    @property
    def is_tiled(self) -> bool:
        """Whether the user has asked for tiles, so that a call may be about one of them."""
        return bool(getattr(self.vae, "use_tiling", False))

    @property
    def input_name(self) -> str:
        """What its forward calls the sample."""
        return list(inspect.signature(type(self.module).forward).parameters)[1]

    def levels(self, sample: Tensor, num_patches: int, dim: int, rings: tuple[bool, bool] = (False, False)) -> Levels:
        """The splits of a call with ``sample`` ``[B, C, (frames,) H, W]`` along ``dim`` (2 rows, 3 cols).

        ``rings``: whether rows, and whether columns, go around the picture.

        Patches are even in pixels, where the time goes, so that a patch of a small picture may have no row of latent.

        Raises:
            ConfigError: a picture too small for the encoder, or with fewer rows of pixels than patches.
        """
        pairs = self.plan.windows(self.module)
        scale = 1 if self.kind == "encode" else 2 ** len(pairs)
        height, width = scale * sample.shape[-2], scale * sample.shape[-1]
        rows, cols = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        size = height if dim == 2 else width
        if size < num_patches:
            what = "rows" if dim == 2 else "columns"
            raise ConfigError(
                f"{size} {what} of pixels cannot be split over {num_patches} ranks: the largest world for this picture "
                f"is {size}"
            )
        even = (1.0,) * num_patches
        if dim == 2:
            levels = Levels.down(height, width, even, rows, cols)
        else:
            levels = Levels.down(width, height, even, cols, rows)
        return levels.with_rings(*rings, dim)

    def level_out(self, levels: Levels) -> int:
        """The level of what it makes."""
        return len(levels.splits) - 1 if self.kind == "encode" else 0

    def layers(self, holder: FrameHolder) -> Iterator[Layer]:
        """The patch layers as the module is now, in order, not attached.

        Raises:
            UnsupportedModel: a module that may read beyond its rows and is not known.
        """
        walk = replace(walk_over(holder), known_seams=SEAMS, containers=CONTAINERS, local=LOCAL)
        yield from self.plan.layers(walk, self.module, len(self.plan.windows(self.module)))

    def without_past(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of its forward; where the sample is a picture alone, without room for what a next frame reads.

        A video's VAE calls its halves with some frames at a time, which are views of all; only of tiles they are not.
        What it keeps of them, the input of each convolution, takes as much memory as the work itself.
        """
        sample = arguments[self.input_name]
        is_alone = not self.is_tiled and sample.untyped_storage().nbytes() == sample.nbytes
        if arguments.get("feat_cache") is None or not is_alone:
            return arguments
        return {**arguments, "feat_cache": None}

    def tail(self) -> Tail | None:
        """What may be computed in bands of rows; None: nothing of this half is known to."""
        return self.plan.tail(self.module) if self.plan.tail is not None else None


def halves(vae: Any) -> tuple[Half, ...]:
    """Encoder and decoder, whichever the VAE still has; its class is in `PLANS`."""
    encoder, decoder = PLANS[type(vae)]
    both = (
        Half("encode", vae, getattr(vae, "encoder", None), encoder),
        Half("decode", vae, getattr(vae, "decoder", None), decoder),
    )
    return tuple(half for half in both if half.module is not None)


# AutoencoderKL and its like: U-Net blocks


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


HALVING = (Window(2, 2), Window(2, 2))
"""From the finer to the coarser level, where a decoder doubles."""


# AutoencoderTiny: a stack of convolutions


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


# Wan and Qwen-Image: the same blocks under other names, over frames


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


def _interpolate(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    factor = module.scale_factor
    factors = factor if isinstance(factor, tuple) else (factor, factor)
    # The two kinds of nearest are the same where it doubles.
    if module.mode not in ("nearest", "nearest-exact") or factors != (2, 2):
        raise unsupported(
            module, name, f"with mode={module.mode!r} scale_factor={factor} is not known, only nearest by 2"
        )
    yield PatchInterpolate(module, name, walk.holder, level=place.level, level_out=place.level_out)


def _pad(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    yield PatchPad(module, name, walk.holder)


PADS = (0, 1)  # zeros before and after, beside a downsampling convolution's own
RESAMPLES = (wan.WanResample, qwen.QwenImageResample)

SEAMS: dict[type, Rule] = {
    **blocks.SEAMS,
    nn.Upsample: _interpolate,
    nn.ZeroPad2d: _pad,
    wan.WanCausalConv3d: _causal_conv,
    wan.WanAttentionBlock: _frame_attention,
    wan.WanUpBlock: _video_block,
    wan.WanResidualUpBlock: _video_block,
    wan.WanResidualDownBlock: _video_block,
    wan.AvgDown3D: _regroup,
    wan.DupUp3D: _regroup,
    wan.WanResample: _resample,
    wan.WanUpsample: _interpolate,
    qwen.QwenImageCausalConv3d: _causal_conv,
    qwen.QwenImageAttentionBlock: _frame_attention,
    qwen.QwenImageUpBlock: _video_block,
    qwen.QwenImageResample: _resample,
    qwen.QwenImageUpsample: _interpolate,
}

CONTAINERS: tuple[type, ...] = (
    *blocks.CONTAINERS,
    AutoencoderTinyBlock,
    wan.WanMidBlock,
    wan.WanResidualBlock,
    qwen.QwenImageMidBlock,
    qwen.QwenImageResidualBlock,
)

LOCAL: tuple[type, ...] = (*blocks.LOCAL, wan.WanRMS_norm, qwen.QwenImageRMS_norm)

_UNET = (Plan(_unet_windows, _unet_encoder), Plan(_doublings, _unet_decoder, _unet_tail))
_TINY = (Plan(_tiny_windows, _tiny_encoder), Plan(_tiny_doublings, _stack, _tiny_tail))
_VIDEO = (Plan(_video_windows, _video_encoder), Plan(_video_doublings, _video_decoder, _video_tail_of_decoder))

PLANS: dict[type, tuple[Plan, Plan]] = {
    AutoencoderKL: _UNET,
    AutoencoderKLFlux2: _UNET,
    AutoencoderTiny: _TINY,
    AutoencoderKLQwenImage: _VIDEO,
    AutoencoderKLWan: _VIDEO,
}
"""The classes that are known: plans of encoder and decoder."""

PICTURES: tuple[type, ...] = (AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny)
"""Those that know no frames: the ends of their pictures may meet."""
