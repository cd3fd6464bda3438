"""Layers that compute on a patch: a module of the model plus its seam. They say what they need, not when it travels."""

from .activation import PatchSiLU
from .attached import Attached
from .attention import PatchAttention
from .base import Band, Frame, FrameHolder, Layer
from .causal import PatchCausalConv, PatchRegroup
from .chunks import PatchFeedForward
from .conv import PatchConv
from .linear_attention import PatchLinearAttention
from .norm import PatchGroupNorm
from .prompt import PatchPrompt
from .resample import PatchDownsample, PatchInterpolate, PatchPad, PatchUpsample
from .seam import PatchFrameAttention, PatchSeam
from .slices import JoinedSlice, Sliced, SlicedNorm, SummedSlice
from .tokens import PatchArguments, PatchEntry, PatchExit, PatchSides
from .unit import StageUnit

__all__ = [
    "Attached",
    "Band",
    "Frame",
    "FrameHolder",
    "JoinedSlice",
    "Layer",
    "PatchArguments",
    "PatchAttention",
    "PatchCausalConv",
    "PatchConv",
    "PatchDownsample",
    "PatchEntry",
    "PatchExit",
    "PatchFeedForward",
    "PatchFrameAttention",
    "PatchGroupNorm",
    "PatchInterpolate",
    "PatchLinearAttention",
    "PatchPad",
    "PatchPrompt",
    "PatchRegroup",
    "PatchSeam",
    "PatchSiLU",
    "PatchSides",
    "PatchUpsample",
    "Sliced",
    "SlicedNorm",
    "StageUnit",
    "SummedSlice",
]
