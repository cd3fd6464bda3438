"""The VAEs that are known, by class, and what they are made of."""

from __future__ import annotations

from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan, AutoencoderTiny
from torch import nn

from .. import blocks, known
from ..walk import Rule
from . import tiny, unet, video
from .plan import Plan
from .resample import interpolate, pad

SEAMS: dict[type, Rule] = {**blocks.SEAMS, nn.Upsample: interpolate, nn.ZeroPad2d: pad, **video.SEAMS}

CONTAINERS: tuple[type, ...] = (*known.CONTAINERS, *tiny.CONTAINERS, *video.CONTAINERS)

LOCAL: tuple[type, ...] = (*known.LOCAL, *video.LOCAL)

PLANS: dict[type, tuple[Plan, Plan]] = {
    AutoencoderKL: (unet.ENCODER, unet.DECODER),
    AutoencoderKLFlux2: (unet.ENCODER, unet.DECODER),
    AutoencoderTiny: (tiny.ENCODER, tiny.DECODER),
    AutoencoderKLQwenImage: (video.ENCODER, video.DECODER),
    AutoencoderKLWan: (video.ENCODER, video.DECODER),
}
"""The classes that are known: plans of encoder and decoder."""

PICTURES: tuple[type, ...] = (AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny)
"""Those that know no frames: the ends of their pictures may meet."""
