"""The U-Nets of diffusers: what they are made of, which level each module works on, and how their arguments are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models import activations, attention_processor, normalization
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ..errors import ConfigError, UnsupportedModel
from ..geometry import Levels, Window
from ..layers import Frame, FrameHolder, Layer, PatchAttention, PatchConv, PatchDownsample, PatchGroupNorm, PatchUpsample
from ..layers.conv import windows
from .table import Call, Place, Walk, bind, own_part, unsupported

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
    blocks.UpBlock2D,
    blocks.CrossAttnDownBlock2D,
    blocks.CrossAttnUpBlock2D,
    blocks.AttnDownBlock2D,
    blocks.AttnUpBlock2D,
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
    nn.SiLU,
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


def _conv(walk: Walk, module: nn.Module, name: str, place: Place) -> Iterator[Layer]:
    # 1 x 1 convolutions too: torch refuses a patch without rows, which deep levels of small pictures have.
    yield PatchConv(
        module,
        name,
        walk.holder,
        level=place.level,
        level_out=place.level_out,
        extra=place.extra,
        reads_whole=place.reads_whole,
    )


def _group_norm(walk: Walk, module: nn.Module, name: str, place: Place) -> Iterator[Layer]:
    yield PatchGroupNorm(module, name, walk.holder)


def _attention(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    if module.fused_projections:
        raise unsupported(module, name, "has fused projections; call unfuse_qkv_projections() first")
    if type(module.processor) not in PROCESSORS:
        raise unsupported(module, name, f"has the processor {type(module.processor).__name__}, which is not known")
    if module.spatial_norm is not None:
        raise unsupported(module.spatial_norm, f"{name}.spatial_norm")
    yield PatchAttention(
        module, name, walk.holder, level=place.level, mask_to_tokens=IPAdapterMaskProcessor.downsample
    )
    # norm_cross normalises the text, which every rank has whole.
    yield from walk.children(module, name, place, skip=("processor", "norm_cross"))


def _upsample(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    if module.use_conv_transpose:
        raise unsupported(module, name, "with a transposed convolution is not known")
    yield PatchUpsample(module, name, walk.holder, level=place.level, level_out=place.level_out)
    yield from walk.children(module, name, place.then(place.level_out))


def _downsample(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    extra = _extra(module)
    if extra != (0, 0):
        yield PatchDownsample(module, name, walk.holder)
    yield from walk.children(module, name, Place(place.level, place.level_out, extra))


def _resnet(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    for resample in (module.upsample, module.downsample):
        if resample is not None and not isinstance(resample, nn.Module):
            raise unsupported(module, name, "resamples with a FIR kernel, which is not known")
    yield from walk(module.norm1, f"{name}.norm1", place.then(place.level))
    for child in ("upsample", "downsample"):
        if getattr(module, child) is not None:
            yield from walk(getattr(module, child), f"{name}.{child}", place)
    skip = ("norm1", "upsample", "downsample")
    yield from walk.children(module, name, place.then(place.level_out), skip)


def _transformer(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    if not module.is_input_continuous:
        raise unsupported(module, name, "over patches or discrete tokens is not known")
    yield from walk.children(module, name, place)


SEAMS: dict[type, Callable[[Walk, nn.Module, str, Place], Iterator[Layer]]] = {
    nn.Conv2d: _conv,
    nn.AvgPool2d: _conv,
    nn.GroupNorm: _group_norm,
    Attention: _attention,
    Upsample2D: _upsample,
    Downsample2D: _downsample,
    ResnetBlock2D: _resnet,
    Transformer2DModel: _transformer,
}


def down_and_mid(model: Any, walk: Walk) -> Iterator[Layer]:
    """Layers of the half that U-Nets and ControlNets share: ``conv_in``, the down blocks, the mid block."""
    yield from walk(model.conv_in, "conv_in", Place(0, 0, reads_whole=True))
    level = 0
    for i, block in enumerate(model.down_blocks):
        level = yield from _block(walk, block, f"down_blocks.{i}", level, "downsamplers", +1)
    if model.mid_block is not None:
        yield from walk(model.mid_block, "mid_block", Place(level, level))


def _block(
    walk: Walk, block: Any, name: str, level: int, samplers: str, step: int
) -> Iterator[Layer]:
    """Layers of a down or up block; returns the level after it."""
    if type(block) not in CONTAINERS:
        raise unsupported(block, name)
    yield from walk.children(block, name, Place(level, level), skip=(samplers,))
    if getattr(block, samplers, None) is None:
        return level
    yield from walk.children(getattr(block, samplers), f"{name}.{samplers}", Place(level, level + step))
    return level + step


def downsampling_windows(model: Any) -> tuple[list[Window], list[Window]]:
    """The windows along rows and along columns that lead from each level to the next."""
    along, across = [], []
    for block in model.down_blocks:
        for sampler in getattr(block, "downsamplers", None) or ():
            down = sampler.downsample if isinstance(sampler, ResnetBlock2D) else sampler
            op = next(m for m in down.modules() if isinstance(m, nn.Conv2d | nn.AvgPool2d))
            rows, cols = windows(op, _extra(down))
            along.append(rows)
            across.append(cols)
    return along, across


class UNetTable:
    """``UNet2DConditionModel`` and ``UNet2DModel``."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._forward = type(model).forward
        self._is_conditional = isinstance(model, UNet2DConditionModel)
        upsamplers = [up for block in model.up_blocks for up in getattr(block, "upsamplers", None) or ()]
        # Only Upsample2D is told the size to reach; the other upsamplers double, whatever the skip connection has.
        self._only_doubles = not self._is_conditional or any(isinstance(up, ResnetBlock2D) for up in upsamplers)

    def levels(self, height: int, width: int, num_patches: int, dim: int) -> Levels:
        """See Table."""
        rows, cols = downsampling_windows(self.model)
        unit = 2 ** len(rows)
        if self._only_doubles and (height % unit or width % unit):
            raise ConfigError(f"a latent of {height} x {width} does not fit this model: both must be multiples of {unit}")
        if dim == 2:
            return Levels.down(height, width, num_patches, rows, cols)
        return Levels.down(width, height, num_patches, cols, rows)

    def layers(self, holder: FrameHolder) -> Iterator[Layer]:
        """See Table."""
        model = self.model
        walk = Walk(holder, SEAMS, CONTAINERS, LOCAL)
        yield from down_and_mid(model, walk)
        level = len(downsampling_windows(model)[0])
        for i, block in enumerate(model.up_blocks):
            if all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")):
                raise unsupported(block, f"up_blocks.{i}", "has FreeU on, a Fourier filter over the picture; call disable_freeu()")
            level = yield from _block(walk, block, f"up_blocks.{i}", level, "upsamplers", -1)
        if model.conv_norm_out is not None:
            yield from walk(model.conv_norm_out, "conv_norm_out", Place(0, 0))
        yield from walk(model.conv_out, "conv_out", Place(0, 0))

    def fingerprint(self) -> tuple[Any, ...]:
        """See Table."""
        return fingerprint(self.model)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See Table."""
        return Call(bind(self._forward, self.model, args, kwargs))

    def conditioning(self, call: Call) -> Any:
        """See Table."""
        return call.arguments.get("encoder_hidden_states" if self._is_conditional else "class_labels")

    def localise(self, call: Call, frame: Frame) -> Call:
        """See Table."""
        changes: dict[str, Any] = {}
        for name in ("down_block_additional_residuals", "down_intrablock_additional_residuals"):
            residuals = call.arguments.get(name)
            if residuals is not None:
                changes[name] = type(residuals)(own_part(residual, frame) for residual in residuals)
        residual = call.arguments.get("mid_block_additional_residual")
        if residual is not None:
            changes["mid_block_additional_residual"] = own_part(residual, frame)
        return call.having(**changes)

    def splits_guidance(self) -> bool:
        """Whether the branches of guidance may run apart."""
        if not self._is_conditional:
            return True
        return not any(type(processor) in GUIDANCE_IN_BATCH for processor in self.model.attn_processors.values())


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Names of the loaded adapters: a new one brings new modules."""
    return tuple(getattr(model, "peft_config", None) or ())


def _extra(down: Any) -> tuple[int, int]:
    """Zeros that a Downsample2D pads before and after, beside its convolution's own."""
    return (0, 1) if down.use_conv and down.padding == 0 else (0, 0)


FAMILIES = (UNet2DConditionModel, UNet2DModel)
