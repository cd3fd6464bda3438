"""What is timed: a denoiser and the arguments of its call. Random weights do where only a model's shape matters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError

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

TEXT_TOKENS = 77


@dataclass
class Workload:
    """A denoiser and the arguments of one call; ``sample`` ``[B, C, H, W]`` is drawn anew for each step."""

    model: nn.Module
    arguments: dict[str, Any]
    sample_shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device

    def resized(self, height: int, width: int) -> Workload:
        """The same model and words, with latents of ``height`` x ``width``."""
        arguments = dict(self.arguments)
        if "added_cond_kwargs" in arguments:
            known = arguments["added_cond_kwargs"]
            arguments["added_cond_kwargs"] = {**known, "time_ids": _time_ids(height, width, known["time_ids"])}
        return replace(self, arguments=arguments, sample_shape=(*self.sample_shape[:2], height, width))

    def sample(self, step: int) -> Tensor:
        """Latents that drift a little from step to step, the same on all ranks."""
        first, drift = (
            torch.randn(self.sample_shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1 + step)
        )
        return (first + 0.01 * drift).to(self.device, self.dtype)


def check_name(name: str) -> None:
    """Refuse what `load` cannot load.

    Raises:
        ConfigError: neither a shape nor a folder with a ``unet``; lists the shapes.
    """
    if name not in SHAPES and not (Path(name) / "unet" / "config.json").is_file():
        raise ConfigError(f"model {name!r} is neither a folder with a unet nor one of the shapes {', '.join(SHAPES)}")


def load(
    name: str, height: int, width: int, batch: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Workload:
    """The denoiser called ``name`` (a shape, or a folder with a ``unet``) and its arguments, the same on all ranks.

    Raises:
        ConfigError: neither a shape nor such a folder; lists the shapes.
    """
    from diffusers import UNet2DConditionModel

    check_name(name)
    torch.manual_seed(0)
    if name in SHAPES:
        model = UNet2DConditionModel(**SHAPES[name])
    else:
        model = UNet2DConditionModel.from_pretrained(name, subfolder="unet", torch_dtype=dtype)
    model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    arguments: dict[str, Any] = {"encoder_hidden_states": noise(batch, TEXT_TOKENS, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {
            "text_embeds": noise(batch, pooled),
            "time_ids": _time_ids(height, width, torch.empty(batch, 6, device=device, dtype=dtype)),
        }
    return Workload(model, arguments, (batch, config.in_channels, height, width), dtype, torch.device(device))


def _time_ids(height: int, width: int, like: Tensor) -> Tensor:
    """SDXL's words on size: original, corner and target, in pixels, ``[batch, 6]``."""
    sizes = [float(8 * height), float(8 * width), 0.0, 0.0, float(8 * height), float(8 * width)]
    return like.new_tensor([sizes] * like.shape[0])
