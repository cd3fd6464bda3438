"""Autoencoders where the ends of the picture meet: their convolutions read on at the other one, in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.downsampling import Downsample2D
from torch import nn

from ..errors import UnsupportedModel
from ..layers import Layer, PatchDownsample
from ..layers.base import FrameHolder
from ..layers.wrap import Refused, WrapConv
from .blocks import pads_after
from .table import check_module, unsupported

VAES = (AutoencoderKL, AutoencoderTiny)

_TILED = ("tiled_decode", "_tiled_decode", "tiled_encode", "_tiled_encode")


def wrapping_layers(vae: Any, rings: tuple[bool, bool]) -> Iterator[Layer]:
    """What makes the ends of a VAE's pictures meet, along rows and columns; not attached.

    Raises:
        UnsupportedModel: another class, or a module in it that is not known.
    """
    if type(vae) not in VAES:
        known = ", ".join(each.__name__ for each in VAES)
        raise UnsupportedModel(f"{type(vae).__name__} makes no picture whose ends meet; known are {known}")
    extras: dict[int, tuple[int, int]] = {}
    for name, module in vae.named_modules():
        check_module(module, name)
        if isinstance(module, Downsample2D) and pads_after(module) != (0, 0):
            extras[id(module.conv)] = pads_after(module)
            yield PatchDownsample(module, name, FrameHolder())
        elif type(module) is nn.Conv2d:
            yield WrapConv(module, name, rings=rings, extra=extras.get(id(module), (0, 0)))
        elif isinstance(module, nn.modules.conv._ConvNd):
            raise unsupported(module, name)
    why = f"{type(vae).__name__} in tiles does not know of ends that meet; call disable_tiling()"
    for method in _TILED:
        if hasattr(type(vae), method):
            yield Refused(vae, method, why)
