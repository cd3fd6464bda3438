"""Models a few channels wide with the structure of the real ones, and the arguments of a call for each."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from mould import Mould

torch.set_num_threads(1)  # ranks are threads: with more, they would fight over the cores

TEXT_DIM, TEXT_TOKENS = 12, 5
POOLED_DIM, TIME_DIM = 16, 8
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
DOWN, UP = "DownBlock2D", "UpBlock2D"


@dataclass(frozen=True)
class Shape:
    """What a model is built of, and which arguments its call takes beside latents, time and text."""

    settings: dict[str, Any]
    extra: Callable[[int], dict[str, Any]] = field(default=lambda batch: {})  # batch -> arguments
    is_conditional: bool = True
    multiple: int = 1  # of the sides of the latents


def _conditional(
    extra: Callable[[int], dict[str, Any]] = lambda batch: {}, multiple: int = 1, **settings: Any
) -> Shape:
    common = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": (CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_DIM,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return Shape({**common, **settings}, extra, multiple=multiple)


def _unconditional(extra: Callable[[int], dict[str, Any]] = lambda batch: {}, **settings: Any) -> Shape:
    common = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "down_block_types": (DOWN, "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", UP),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return Shape({**common, **settings}, extra, is_conditional=False, multiple=2)


def _noise(*shape: int, seed: int = 77) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _added(num_ids: int) -> Callable[[int], dict[str, Any]]:
    return lambda batch: {
        "added_cond_kwargs": {"text_embeds": _noise(batch, POOLED_DIM), "time_ids": 100 * _noise(batch, num_ids).abs()}
    }


def _labels(*shape: int) -> Callable[[int], dict[str, Any]]:
    return lambda batch: {"class_labels": _noise(batch, *shape) if shape else torch.arange(batch) % 3}


def _text_time(num_ids: int) -> dict[str, Any]:
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_DIM,
        "projection_class_embeddings_input_dim": num_ids * TIME_DIM + POOLED_DIM,
        "use_linear_projection": True,
    }


FOUR_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16, 16, 16),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
}

SHAPES: dict[str, Shape] = {
    "sd15": _conditional(**FOUR_LEVELS),
    "sd21": _conditional(
        **FOUR_LEVELS,
        use_linear_projection=True,
        upcast_attention=True,
        attention_head_dim=(2, 4, 4, 4),
        layers_per_block=2,
    ),
    "sdxl": _conditional(
        _added(6),
        **_text_time(6),
        block_out_channels=(8, 16, 16),
        down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP, UP),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(2, 4, 4),
    ),
    "refiner": _conditional(
        _added(5),
        **_text_time(5),
        block_out_channels=(8, 16, 16, 16),
        down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
        up_block_types=(UP, CROSS_UP, CROSS_UP, UP),
        transformer_layers_per_block=2,
        attention_head_dim=(2, 4, 4, 4),
    ),
    "class-timestep": _conditional(
        lambda batch: {"class_labels": torch.full((batch,), 20.0)}, class_embed_type="timestep"
    ),
    "class-projection": _conditional(
        _labels(10), class_embed_type="projection", projection_class_embeddings_input_dim=10
    ),
    "class-identity": _conditional(_labels(32), class_embed_type="identity"),
    "class-labels": _conditional(_labels(), num_class_embeds=3),
    "time-cond": _conditional(lambda batch: {"timestep_cond": _noise(batch, 6)}, time_cond_proj_dim=6),
    "only-cross": _conditional(only_cross_attention=(True, False), mid_block_type=None),
    "resnet-resample": _conditional(
        block_out_channels=(8, 16, 16),
        down_block_types=("ResnetDownsampleBlock2D", CROSS_DOWN, DOWN),
        up_block_types=(UP, CROSS_UP, "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        multiple=4,
    ),
    "deepfloyd": _conditional(
        block_out_channels=(8, 16, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        cross_attention_norm="group_norm",
        encoder_hid_dim=TEXT_DIM,
        cross_attention_dim=32,  # its norm has 32 groups
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        norm_num_groups=8,
        act_fn="gelu",
        multiple=4,
    ),
    "ddpm": _unconditional(downsample_padding=0, flip_sin_to_cos=False, freq_shift=1),
    "ddim": _unconditional(
        downsample_padding=1,
        attn_norm_num_groups=2,
        block_out_channels=(8, 8, 16),
        down_block_types=(DOWN, "AttnDownBlock2D", DOWN),
        up_block_types=(UP, "AttnUpBlock2D", UP),
    ),
    "unconditional-resnet": _unconditional(
        _labels(),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=3,
    ),
}


_LOCK = threading.Lock()


@lru_cache(maxsize=32)
def _mould(name: str) -> Mould:
    shape = SHAPES[name]
    family = UNet2DConditionModel if shape.is_conditional else UNet2DModel
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = family(**shape.settings).eval().requires_grad_(False)
        for module in model.modules():  # or a wrong affine part of a norm would not show
            if isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
                module.weight.add_(0.2 * torch.randn_like(module.weight))
                module.bias.add_(0.2 * torch.randn_like(module.bias))
    return Mould(model)


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of its own, with the same weights each time."""
    with _LOCK:  # ranks are threads, which share the generator that weights are drawn from
        model = _mould(name).cast()
    # nn.Module's own `to`: that of diffusers logs a note about modules to keep in float32, of which there are none.
    return nn.Module.to(model, dtype)


def latents(name: str, batch: int = 1, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    """Noise ``[B, C, height, width]``, float32."""
    return _noise(batch, SHAPES[name].settings["in_channels"], height, width, seed=seed)


def conditioning(name: str, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """The arguments of a call beside latents and time, float32."""
    shape = SHAPES[name]
    text = (
        {"encoder_hidden_states": _noise(batch, TEXT_TOKENS, TEXT_DIM, seed=seed + 1000)}
        if shape.is_conditional
        else {}
    )
    return {**text, **shape.extra(batch)}


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The same arguments with every floating tensor in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return {key: in_dtype(item, dtype) for key, item in value.items()}


def distance(value: Tensor, truth: Tensor) -> float:
    """Relative L2, computed in float64; of numbers only, since the largest of several is lost behind a NaN."""
    assert value.shape == truth.shape, f"{tuple(value.shape)} is not {tuple(truth.shape)}"
    found = float((value.double() - truth.double()).norm() / truth.double().norm())
    assert not math.isnan(found), "a NaN, or nothing but zeros to compare with"
    return found
