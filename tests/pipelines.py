"""Pipelines a few channels wide, built without a hub, and the comparison of ranks with one device."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import distrifusion as df
from models import POOLED_DIM, SHAPES, TEXT_DIM, distance
from mould import Mould

NUMPY_WARNINGS = [  # of diffusers' schedulers under numpy 2.4
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

# See test_unet_exact.py: float32 sums in another order, over a few steps and a scheduler.
EXACT = 1e-5
VAE_SCALE = 4
IMAGE_DIM = 16

SYNC = df.ParallelConfig(strategy="sync")
COLS = df.ParallelConfig(strategy="sync", split="cols")
ALWAYS_WARM = df.ParallelConfig(strategy="displaced", warmup_steps=1000)
DISPLACED = df.ParallelConfig(strategy="displaced", warmup_steps=0)
CFG = df.ParallelConfig(strategy="sync", cfg=2)

Build = Callable[[], Any]
Call = Callable[[Any], Any]


def check(
    make: Build, call: Call, *, worlds: Sequence[int] = (2, 3), config: df.ParallelConfig = SYNC, limit: float = EXACT
) -> None:
    """Every rank's result of ``call(pipe)``, a tensor or several, equals that of one device."""
    truths = flat(call(make()))
    assert all(truth.isfinite().all() for truth in truths)
    for world in worlds:
        for results in df.run_ranks(world, lambda comm: flat(call(df.parallelize(make(), config, comm)))):
            assert len(results) == len(truths)
            for result, truth in zip(results, truths, strict=True):
                assert distance(result, truth) <= limit, f"world {world}, {config}: {distance(result, truth):.1e}"


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def sample(pipe: Any, prompt: Any = "a hill", *, seed: int = 0, **arguments: Any) -> Tensor:
    """The final latents of a call with few steps. ``arguments`` override."""
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "height": 64,
        "width": 64,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    if prompt is not None:
        settings["prompt"] = prompt
    settings.update(arguments)
    settings = {name: value for name, value in settings.items() if value is not ...}  # ...: leave it out
    images = pipe(**settings).images
    assert isinstance(images, Tensor)
    return images


def picture(seed: int = 0, height: int = 64, width: int = 64, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def half_mask(height: int = 64, width: int = 64) -> Image.Image:
    """White where the picture is to be painted anew: an uneven part of it."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 4 :, : width // 2] = 255
    return Image.fromarray(mask)


def _two_levels(name: str, **changes: Any) -> dict[str, Any]:
    """A shape of models.py with two levels: pipelines are about what surrounds the U-Net."""
    two = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
    }
    return {**SHAPES[name].settings, **two, **changes}


_XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
}

UNETS: dict[str, dict[str, Any]] = {
    "sd": _two_levels("sd15"),
    "sd-linear": _two_levels("sd15", use_linear_projection=True),
    "sd-pads-after": _two_levels("sd15", downsample_padding=0),
    "inpaint": _two_levels("sd15", in_channels=9),
    "edit": _two_levels("sd15", in_channels=8),
    "upscale": _two_levels("sd15", in_channels=7, num_class_embeds=1000),
    "lcm": _two_levels("sd15", time_cond_proj_dim=6),
    "sdxl": _two_levels("sdxl", **_XL),
    "refiner": _two_levels("refiner", **_XL),
    "ddpm": SHAPES["ddpm"].settings,
}


@cache
def _unet(name: str) -> Mould:
    family = UNet2DModel if name == "ddpm" else UNet2DConditionModel
    with drawing(1):
        return Mould(randomised(family(**UNETS[name]), seed=1))


def unet(name: str) -> Any:
    """A U-Net of its own, with the same weights each time."""
    with _LOCK:
        return _unet(name).cast()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


_LOCK = threading.RLock()


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Build with torch's global generator, which the ranks, being threads, share."""
    with _LOCK, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@cache
def _tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=9)


def _text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=len(_tokenizer()),
        max_position_embeddings=9,
        projection_dim=POOLED_DIM,
        bos_token_id=188,
        eos_token_id=189,
        pad_token_id=189,
    )


@cache
def _parts() -> dict[str, Any]:
    """Components that all pipelines share: read only."""
    with drawing(2):
        parts = {
            "text": CLIPTextModel(_text_config(TEXT_DIM)),
            "narrow": CLIPTextModel(_text_config(TEXT_DIM // 2)),
            "narrow_2": CLIPTextModelWithProjection(_text_config(TEXT_DIM // 2)),
            "refiner": CLIPTextModelWithProjection(_text_config(TEXT_DIM)),
            "vision": CLIPVisionModelWithProjection(
                CLIPVisionConfig(
                    hidden_size=16,
                    intermediate_size=16,
                    num_attention_heads=2,
                    num_hidden_layers=1,
                    image_size=16,
                    patch_size=8,
                    projection_dim=IMAGE_DIM,
                )
            ),
            "vae": diffusers.AutoencoderKL(
                in_channels=3,
                out_channels=3,
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(4, 4, 8),
                latent_channels=4,
                norm_num_groups=2,
            ),
        }
        return {name: part.eval().requires_grad_(False) for name, part in parts.items()}


@cache
def _mould(name: str) -> Mould:
    return Mould(_parts()[name])


def _part(name: str) -> Any:
    """A component with the same weights each time and a module tree of its own, since ranks take forwards over."""
    with _LOCK:
        return _mould(name).cast()


def ddim(**changes: Any) -> Any:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return diffusers.DDIMScheduler(**{**settings, "clip_sample": False, "set_alpha_to_one": False, **changes})


def own_vae() -> Any:
    """The VAE of these pipelines."""
    return _part("vae")


def sd(family: Any = diffusers.StableDiffusionPipeline, kind: str = "sd", **more: Any) -> Any:
    """A Stable Diffusion pipeline of ``family`` with a U-Net of its own."""
    settings: dict[str, Any] = {
        "vae": own_vae(),
        "text_encoder": _part("text"),
        "tokenizer": copy.deepcopy(_tokenizer()),  # not for several threads
        "unet": unet(kind),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    settings.update(more)
    settings = {name: value for name, value in settings.items() if value is not ...}
    return quiet(family(**settings))


def sdxl(family: Any = diffusers.StableDiffusionXLPipeline, *, refiner: bool = False, **more: Any) -> Any:
    """An SDXL pipeline of ``family``, base or refiner, with a U-Net of its own."""
    settings: dict[str, Any] = {
        "vae": own_vae(),
        "text_encoder": None if refiner else _part("narrow"),
        "text_encoder_2": _part("refiner" if refiner else "narrow_2"),
        "tokenizer": None if refiner else copy.deepcopy(_tokenizer()),
        "tokenizer_2": copy.deepcopy(_tokenizer()),
        "unet": unet("refiner" if refiner else "sdxl"),
        "scheduler": diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        "add_watermarker": False,
    }
    if refiner:
        settings["requires_aesthetics_score"] = True
    settings.update(more)
    settings = {name: value for name, value in settings.items() if value is not ...}
    return quiet(family(**settings))


def randomised(model: Any, seed: int) -> Any:
    """The model with what starts at zero (zero convolutions, LoRA's B) drawn at random, and affine norms too."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.numel() and not weight.any():
            weight.data.copy_(0.2 * torch.randn(weight.shape, generator=generator))
        elif name.endswith("bias"):
            weight.data.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval().requires_grad_(False)


@cache
def _controlnet(name: str, seed: int, pools: bool) -> Mould:
    with drawing(seed):
        model = diffusers.ControlNetModel.from_unet(
            unet(name), conditioning_embedding_out_channels=(4, 6, 8), load_weights_from_unet=False
        )
    model.register_to_config(global_pool_conditions=pools)
    for weight in model.controlnet_cond_embedding.parameters():
        weight.data.mul_(3)  # or little of the condition would come through
    return Mould(randomised(model, seed))


def controlnet(name: str = "sd", seed: int = 3, *, pools: bool = False) -> Any:
    """A ControlNet beside the U-Net of that name, with weights of its own."""
    with _LOCK:
        return _controlnet(name, seed, pools).cast()


def vision() -> Any:
    return _parts()["vision"]


def adapter_weights(unet: Any, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter of four tokens for ``unet``, as its files hold it, drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights = {}
    cross = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for i, name in enumerate(cross):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        for kind in ("k", "v"):
            weights[f"{2 * i + 1}.to_{kind}_ip.weight"] = draw(width, TEXT_DIM)
    projection = {"proj.weight": draw(4 * TEXT_DIM, IMAGE_DIM), "proj.bias": draw(4 * TEXT_DIM)}
    norm = {"norm.weight": 1 + draw(TEXT_DIM), "norm.bias": draw(TEXT_DIM)}
    return {"image_proj": {**projection, **norm}, "ip_adapter": weights}
