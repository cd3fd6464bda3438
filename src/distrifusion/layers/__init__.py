"""Layers that compute on a patch: a module of the model plus its seam. They say what they need, not when it travels."""

from .activation import PatchSiLU
from .attention import PatchAttention
from .base import Frame, FrameHolder, Layer
from .conv import PatchConv
from .linear_attention import PatchLinearAttention
from .norm import PatchGroupNorm
from .resample import PatchDownsample, PatchUpsample
from .seam import PatchSeam
from .tokens import PatchArguments, PatchEntry, PatchExit, PatchSides
from .unit import StageUnit

__all__ = [
    "Frame",
    "FrameHolder",
    "Layer",
    "PatchArguments",
    "PatchAttention",
    "PatchConv",
    "PatchDownsample",
    "PatchEntry",
    "PatchExit",
    "PatchGroupNorm",
    "PatchLinearAttention",
    "PatchSeam",
    "PatchSiLU",
    "PatchSides",
    "PatchUpsample",
    "StageUnit",
]
