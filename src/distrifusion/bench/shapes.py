"""The models that can be timed by name, whose weights are random, and which names are none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

TEXT_TOKENS = 77  # of CLIP's encoders

_SDXL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}

SHAPES: dict[str, dict[str, Any]] = {
    "sdxl": {
        **_SDXL,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sdxl-mini": {
        **_SDXL,
        "sample_size": 128,
        "block_out_channels": (64, 128, 256),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 256,
        "addition_time_embed_dim": 64,
        "projection_class_embeddings_input_dim": 640,
    },
    "sd15": {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
}
"""Arguments of ``UNet2DConditionModel`` by name; ``sdxl-mini`` has 33 M parameters."""

TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux-mini": (
        "FluxTransformer2DModel",
        {
            "in_channels": 64,
            "num_layers": 2,
            "num_single_layers": 8,
            "attention_head_dim": 64,
            "num_attention_heads": 8,
            "joint_attention_dim": 256,
            "pooled_projection_dim": 256,
            "axes_dims_rope": (8, 28, 28),
        },
    ),
    "pixart-mini": (
        "PixArtTransformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 12,
            "attention_head_dim": 64,
            "num_attention_heads": 8,
            "cross_attention_dim": 512,
            "caption_channels": 256,
            "out_channels": 8,
            "use_additional_conditions": False,
        },
    ),
}
"""A class of diffusers and its arguments by name; both have about 50 M parameters, and 4096 tokens at 1024 px."""

_AUTOENCODER: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}

VAES: dict[str, dict[str, Any]] = {
    "vae-sd": {**_AUTOENCODER, "block_out_channels": (128, 256, 512, 512)},
    "vae-mini": {**_AUTOENCODER, "block_out_channels": (32, 64, 128, 128)},
}
"""Arguments of ``AutoencoderKL`` by name: Stable Diffusion's, and one a quarter as wide. A step is a decode."""


def is_shape(name: str) -> bool:
    """Whether ``name`` is that of a shape, whose weights are random, and not a folder."""
    return any(name in shapes for shapes in (SHAPES, TRANSFORMERS, VAES))


def check_name(name: str) -> None:
    """Refuse what `load` cannot load.

    Raises:
        ConfigError: neither a shape nor a folder with a ``unet`` or ``transformer``; lists the shapes.
    """
    shapes = (*SHAPES, *TRANSFORMERS, *VAES)
    if name not in shapes and not (has_part(name, "unet") or has_part(name, "transformer")):
        raise ConfigError(
            f"model {name!r} is neither a folder with a unet or transformer nor one of the shapes {', '.join(shapes)}"
        )


def check_streams(name: str, patches: int) -> None:
    """Refuse patches that would stream through what is no transformer.

    Raises:
        ConfigError: names a model that would be right.
    """
    if name in (*SHAPES, *VAES) or not (name in TRANSFORMERS or has_part(name, "transformer")):
        raise ConfigError(
            f"--patches {patches} stream through transformers, and {name!r} is none: take {', '.join(TRANSFORMERS)} "
            "or the folder of one"
        )


def check_stages(name: str, options: Mapping[str, Any]) -> None:
    """Refuse ``options`` about stages, values by name, for a decode, which all ranks share.

    Raises:
        ConfigError: one is given.
    """
    for option, given in options.items():
        if given and name in VAES:
            raise ConfigError(f"{option} is about stages of a denoiser, and {name!r} is a VAE's decode: leave it out")


def has_part(name: str, part: str) -> bool:
    """Whether ``name`` is the folder of a pipeline that has this part."""
    return (Path(name) / part / "config.json").is_file()
