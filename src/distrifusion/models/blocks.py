"""The blocks that the U-Nets and ControlNets of diffusers share: which seams they have."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ..geometry import Levels, Window
from ..layers import (
    FrameHolder,
    Layer,
    PatchAttention,
    PatchConv,
    PatchDownsample,
    PatchFeedForward,
    PatchGroupNorm,
    PatchPrompt,
    PatchSiLU,
    PatchUpsample,
)
from ..layers.conv import windows
from .known import CONTAINERS, GUIDANCE_IN_BATCH, LOCAL, PROCESSORS
from .walk import Place, Rule, Walk, check_module, unsupported


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


def _silu(walk: Walk, module: nn.Module, name: str, place: Place) -> Iterator[Layer]:
    yield PatchSiLU(module, name, walk.holder)


def _attention(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    processor = type(module.processor)
    if processor not in PROCESSORS:
        advice = "; call unfuse_qkv_projections()" if processor.__name__.startswith("Fused") else ""
        raise unsupported(module, name, f"has the processor {processor.__name__}, which is not known{advice}")
    if module.spatial_norm is not None:
        raise unsupported(module.spatial_norm, f"{name}.spatial_norm")
    yield PatchAttention(
        module,
        name,
        walk.holder,
        level=place.level,
        mask_to_tokens=IPAdapterMaskProcessor.downsample,
        only_calls_processor=type(module).forward is Attention.forward,
    )
    for name_of_prompt, module_of_prompt in _prompt(module):
        yield PatchPrompt(module_of_prompt, f"{name}.{name_of_prompt}", walk.holder)
    # norm_cross normalises the text, which every rank has whole.
    yield from walk.children(module, name, place, skip=("processor", "norm_cross"))


def _prompt(attn: Any) -> Iterator[tuple[str, nn.Module]]:
    """What an attention makes of the text, and of an IP-Adapter's pictures, by name."""
    names = []
    if attn.added_kv_proj_dim is not None:
        names = ["add_k_proj", "add_v_proj"]
    elif attn.is_cross_attention:
        names = ["to_k", "to_v"]
    for name in (*names, "norm_cross"):
        if isinstance(getattr(attn, name, None), nn.Module):
            yield name, getattr(attn, name)
    for name in ("to_k_ip", "to_v_ip"):
        for i, each in enumerate(getattr(attn.processor, name, None) or ()):
            yield f"processor.{name}.{i}", each


def _upsample(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    if module.use_conv_transpose:
        raise unsupported(module, name, "with a transposed convolution is not known")
    yield PatchUpsample(module, name, walk.holder, level=place.level, level_out=place.level_out)
    yield from walk.children(module, name, place.then(place.level_out))


def _downsample(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    extra = pads_after(module)
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


def _lora_conv(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    # peft computes base(x) + B(A(x)): A has the base's window, B is 1 x 1 on what A has made.
    for child_name, child in module.named_children():
        after = child_name == "lora_B"
        yield from walk(child, f"{name}.{child_name}", place.then(place.level_out) if after else place)


def _adapter(module: nn.Module) -> Rule | None:
    """The rule for a module of peft, which may not be installed.

    Adapters of linear layers treat every token alone. Of the convolutions only LoRA's is made of modules; the others
    (LoHa, LoKr, DoRA) convolve by hand, with zeros around the patch.
    """
    owner, kind = type(module).__module__, type(module).__name__
    if not owner.startswith("peft.tuners."):
        return None
    if "Linear" in kind:
        return Walk.children
    return _lora_conv if (owner, kind) == ("peft.tuners.lora.layer", "Conv2d") else None


SEAMS: dict[type, Rule] = {
    nn.Conv2d: _conv,
    nn.AvgPool2d: _conv,
    nn.GroupNorm: _group_norm,
    nn.SiLU: _silu,
    Attention: _attention,
    Upsample2D: _upsample,
    Downsample2D: _downsample,
    ResnetBlock2D: _resnet,
    Transformer2DModel: _transformer,
}


def walk_over(holder: FrameHolder) -> Walk:
    """A walk that knows the modules of this file."""
    return Walk(holder, SEAMS, CONTAINERS, LOCAL, _adapter)


def down_and_mid(model: Any, walk: Walk) -> Iterator[Layer]:
    """Layers of the half that U-Nets and ControlNets share: ``conv_in``, the down blocks, the mid block."""
    if getattr(model, "encoder_hid_proj", None) is not None:
        yield PatchPrompt(model.encoder_hid_proj, "encoder_hid_proj", walk.holder)
    yield from walk(model.conv_in, "conv_in", Place(0, 0, reads_whole=True))
    level = 0
    for i, each in enumerate(model.down_blocks):
        level = yield from block(walk, each, f"down_blocks.{i}", level, "downsamplers", +1)
    if model.mid_block is not None:
        yield from walk(model.mid_block, "mid_block", Place(level, level))


def block(walk: Walk, module: Any, name: str, level: int, samplers: str, step: int) -> Generator[Layer, None, int]:
    """Layers of a down or up block; returns the level after it."""
    check_module(module, name)
    if type(module) not in CONTAINERS:
        raise unsupported(module, name)
    yield from walk.children(module, name, Place(level, level), skip=(samplers,))
    if getattr(module, samplers, None) is None:
        return level
    yield from walk.children(getattr(module, samplers), f"{name}.{samplers}", Place(level, level + step))
    return level + step


def skip_levels(model: Any) -> list[int]:
    """The level of each feature map that the down blocks hand on, ``conv_in``'s first: where ControlNets add theirs."""
    level, levels = 0, [0]
    for each in model.down_blocks:
        levels += [level] * len(each.resnets)
        if each.downsamplers is not None:
            level += 1
            levels.append(level)
    return levels


def downsampling_windows(model: Any) -> tuple[list[Window], list[Window]]:
    """The windows along rows and along columns that lead from each level to the next."""
    along, across = [], []
    for each in model.down_blocks:
        for sampler in getattr(each, "downsamplers", None) or ():
            down = sampler.downsample if isinstance(sampler, ResnetBlock2D) else sampler
            if down is None or not isinstance(down, nn.Module):
                continue  # a FIR kernel, which the walk refuses by name
            op = next(m for m in down.modules() if isinstance(m, nn.Conv2d | nn.AvgPool2d))
            rows, cols = windows(op, pads_after(down))
            along.append(rows)
            across.append(cols)
    return along, across


def levels_of(model: Any, height: int, width: int, weights: tuple[float, ...], dim: int) -> Levels:
    """The splits of a latent at every level of ``model``. See Table."""
    rows, cols = downsampling_windows(model)
    if dim == 2:
        return Levels.down(height, width, weights, rows, cols)
    return Levels.down(width, height, weights, cols, rows)


def branches_share_batch(model: Any) -> bool:
    """Whether a processor needs all branches of guidance in one batch."""
    return any(type(processor) in GUIDANCE_IN_BATCH for processor in model.attn_processors.values())


class Fingerprint:
    """What tells that adapters were loaded or unloaded: they bring modules, which need layers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._configs: list[Any] = []

    def __call__(self) -> tuple[Any, ...]:
        """Another value after every load, of an adapter with the same name too."""
        configs = getattr(self._model, "peft_config", None) or {}
        self._configs = list(configs.values())  # held, so that no later one gets the id of one of these
        return tuple((name, id(config)) for name, config in configs.items())


def pads_after(down: Any) -> tuple[int, int]:
    """Zeros that a Downsample2D pads before and after, beside its convolution's own."""
    return (0, 1) if getattr(down, "use_conv", False) and down.padding == 0 else (0, 0)


def feed_forwards(model: nn.Module, holder: FrameHolder) -> Iterator[Layer]:
    """Layers of ``model`` whose temporaries are several times as large as what they make; not attached."""
    for name, module in model.named_modules():
        if type(module) is FeedForward:
            yield PatchFeedForward(module, name, holder)
