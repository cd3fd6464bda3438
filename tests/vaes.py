"""VAEs a few channels wide with the structure of the real ones, and what they encode and decode."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import diffusers
import torch
from torch import Tensor

from mould import Mould

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"

UNET: dict[str, Any] = {
    "down_block_types": (DOWN,) * 3,
    "up_block_types": (UP,) * 3,
    "block_out_channels": (4, 4, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 2,
}
VIDEO: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
TINY: dict[str, Any] = {
    "encoder_block_out_channels": (4,) * 4,
    "decoder_block_out_channels": (4,) * 4,
    "num_encoder_blocks": (1, 1, 1, 2),
    "num_decoder_blocks": (2, 1, 1, 1),
}


@dataclass(frozen=True)
class Small:
    """How to build one, pixels per row of latent, and whether it is for videos."""

    build: Callable[[], Any]
    scale: int
    is_video: bool = False


VAES: dict[str, Small] = {
    "kl": Small(lambda: diffusers.AutoencoderKL(**UNET), 4),
    "kl-attention": Small(
        lambda: diffusers.AutoencoderKL(
            down_block_types=(DOWN, "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", UP),
            block_out_channels=(4, 8),
            latent_channels=4,
            norm_num_groups=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        2,
    ),
    "flux2": Small(lambda: diffusers.AutoencoderKLFlux2(**UNET, decoder_block_out_channels=(4, 6, 8)), 4),
    "tiny": Small(lambda: diffusers.AutoencoderTiny(**TINY), 8),
    "tiny-swish": Small(lambda: diffusers.AutoencoderTiny(**TINY, act_fn="silu"), 8),
    "qwen": Small(lambda: diffusers.AutoencoderKLQwenImage(**VIDEO), 8, is_video=True),
    "wan": Small(lambda: diffusers.AutoencoderKLWan(**VIDEO), 8, is_video=True),
    "wan-2.2": Small(
        lambda: diffusers.AutoencoderKLWan(
            **VIDEO, is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16
        ),
        16,
        is_video=True,
    ),
}


_LOCK = threading.Lock()


@lru_cache(maxsize=16)
def _mould(name: str) -> Mould:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = VAES[name].build().eval().requires_grad_(False)
        for key, weight in vae.named_parameters():  # or a wrong affine part of a norm would not show
            weight.add_(0.1 * torch.randn_like(weight))
            if VAES[name].is_video and key.startswith("decoder.conv_out"):
                weight.mul_(0.1)  # or most of the picture would be clamped
    return Mould(vae)


def build_vae(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A VAE of its own, with the same weights each time."""
    with _LOCK:  # ranks are threads, which share the generator that weights are drawn from
        return torch.nn.Module.to(_mould(name).cast(), dtype)


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents_of(name: str, batch: int = 1, height: int = 6, width: int = 5, frames: int = 1) -> Tensor:
    """Noise ``[B, C, (frames,) height, width]``, float32."""
    return _noise(batch, 4, *((frames,) if VAES[name].is_video else ()), height, width, seed=0)


def pixels_of(name: str, batch: int = 1, height: int = 24, width: int = 20, frames: int = 1) -> Tensor:
    """A picture ``[B, 3, (frames,) height, width]``, float32."""
    noise = _noise(batch, 3, *((frames,) if VAES[name].is_video else ()), height, width, seed=1)
    return noise.clamp(-1, 1)


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """What the VAE makes of latents."""
    sample: Tensor = vae.decode(latents).sample
    return sample


def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """What the VAE makes of a picture: latents, or the mean and variance of their distribution."""
    output = vae.encode(pixels)
    return output.latents if hasattr(output, "latents") else output.latent_dist.parameters
