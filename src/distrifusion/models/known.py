"""Classes of diffusers that U-Nets and ControlNets consist of: processors, containers, and what treats pixels alone."""

from __future__ import annotations

from diffusers.models import activations, attention_processor, normalization
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.models.unets import unet_2d_blocks as blocks
from torch import nn

PROCESSORS: tuple[type, ...] = tuple(
    getattr(attention_processor, name)
    for name in (
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "XFormersAttnProcessor",
        "SlicedAttnProcessor",
        "AttnAddedKVProcessor",
        "AttnAddedKVProcessor2_0",
        "SlicedAttnAddedKVProcessor",
        "XFormersAttnAddedKVProcessor",
        "IPAdapterAttnProcessor",
        "IPAdapterAttnProcessor2_0",
        "IPAdapterXFormersAttnProcessor",
        "PAGIdentitySelfAttnProcessor2_0",
        "PAGCFGIdentitySelfAttnProcessor2_0",
    )
)
"""Processors that take K and V from ``attn.to_k`` and ``attn.to_v`` and treat queries one by one."""

GUIDANCE_IN_BATCH: tuple[type, ...] = tuple(processor for processor in PROCESSORS if "PAG" in processor.__name__)
"""Processors that expect all guidance branches in one batch, so that a CFG split would change what they do."""

CONTAINERS: tuple[type, ...] = (
    nn.ModuleList,
    nn.ModuleDict,
    nn.Sequential,
    nn.ParameterDict,
    blocks.DownBlock2D,
    blocks.DownEncoderBlock2D,
    blocks.UpBlock2D,
    blocks.UpDecoderBlock2D,
    blocks.CrossAttnDownBlock2D,
    blocks.CrossAttnUpBlock2D,
    blocks.AttnDownBlock2D,
    blocks.AttnDownEncoderBlock2D,
    blocks.AttnUpBlock2D,
    blocks.AttnUpDecoderBlock2D,
    blocks.ResnetDownsampleBlock2D,
    blocks.ResnetUpsampleBlock2D,
    blocks.SimpleCrossAttnDownBlock2D,
    blocks.SimpleCrossAttnUpBlock2D,
    blocks.UNetMidBlock2D,
    blocks.UNetMidBlock2DCrossAttn,
    blocks.UNetMidBlock2DSimpleCrossAttn,
    DualTransformer2DModel,
    BasicTransformerBlock,
    FeedForward,
)

LOCAL: tuple[type, ...] = (
    nn.Embedding,
    nn.LayerNorm,
    nn.Dropout,
    nn.Identity,
    nn.GELU,
    nn.ReLU,
    nn.Mish,
    activations.GELU,
    activations.GEGLU,
    activations.SwiGLU,
    activations.ApproximateGELU,
    activations.LinearActivation,
    activations.FP32SiLU,
    normalization.RMSNorm,
    normalization.FP32LayerNorm,
    normalization.LpNorm,
    normalization.AdaLayerNorm,
    normalization.AdaLayerNormZero,
    TimestepEmbedding,
)
