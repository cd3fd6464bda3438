"""What is timed: a denoiser or a VAE, and the arguments of a call. Random weights do where only the shape matters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models import Call
from .plan import LATENT
from .shapes import SHAPES, TEXT_TOKENS, TRANSFORMERS, VAES, check_name, has_part, is_shape

TIME = 500

Given = tuple[tuple[int, ...], dict[str, Any]]
"""The shape of the latents of a call, and its other arguments by name."""

Noise = Callable[..., Tensor]
"""Normal numbers of a shape."""


@dataclass
class Workload:
    """A model and the arguments of one call; its latents are drawn anew for each step.

    ``given(height, width)`` makes shape and arguments for another size of latent. ``method`` is the one to call.
    """

    model: nn.Module
    arguments: dict[str, Any]
    sample_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    given: Callable[[int, int], Given]
    sample_name: str
    method: str
    time_name: str = "timestep"

    def resized(self, height: int, width: int) -> Workload:
        """The same model and words, with latents of ``height`` x ``width``."""
        shape, arguments = self.given(height, width)
        return replace(self, arguments=arguments, sample_shape=shape)

    def sample(self, step: int) -> Tensor:
        """Latents that drift a little from step to step, the same on all ranks."""
        first, drift = (
            torch.randn(self.sample_shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1 + step)
        )
        return (first + 0.01 * drift).to(self.device, self.dtype)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of a denoiser that are compiled one by one: those in its lists, and a U-Net's in the middle."""
        lists = [child for child in self.model.children() if isinstance(child, nn.ModuleList)]
        return [*(block for each in lists for block in each), *filter(None, [getattr(self.model, "mid_block", None)])]

    def run(self, sample: Tensor, share: Tensor | None = None) -> Any:
        """Call the model, at ``share`` of the time that it was given; None: at that time."""
        given = self.arguments
        if share is not None:
            given = {**given, self.time_name: given[self.time_name] * share}
        return getattr(self.model, self.method)(**{self.sample_name: sample}, **given)


def load(
    name: str,
    height: int,
    width: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    text_tokens: int = TEXT_TOKENS,
) -> Workload:
    """The model called ``name`` (a shape, or a pipeline's folder) and its arguments, the same on all ranks.

    ``height`` and ``width`` are those of the latents, in pixels / 8.

    Raises:
        ConfigError: neither a shape nor such a folder; lists the shapes.
        UnsupportedModel: see `transformer_of`.
    """
    import diffusers

    check_name(name)
    if has_part(name, "transformer") and not is_shape(name):
        return _of_folder(name, height, width, batch, dtype, device)
    torch.manual_seed(0)
    if name in TRANSFORMERS:
        kind, settings = TRANSFORMERS[name]
        model = getattr(diffusers, kind)(**settings)
    elif name in VAES:
        model = diffusers.AutoencoderKL(**VAES[name])
        model.encoder = None  # which no step calls, and whose weights would count as memory
    elif name in SHAPES:
        model = diffusers.UNet2DConditionModel(**SHAPES[name])
    else:
        model = diffusers.UNet2DConditionModel.from_pretrained(name, subfolder="unet", torch_dtype=dtype)
    model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    words, *called = _CALLS[type(model).__name__]
    given = words(model.config, batch, text_tokens, noise)
    shape, arguments = given(height, width)
    return Workload(model, arguments, shape, dtype, torch.device(device), given, *called)


def _of_folder(name: str, height: int, width: int, batch: int, dtype: torch.dtype, device: str) -> Workload:
    from .capture import transformer_of

    model, first_call = transformer_of(name, batch, dtype, device)

    def given(height: int, width: int) -> Given:
        return _parts(first_call(LATENT * height, LATENT * width))

    first = first_call(LATENT * height, LATENT * width)
    shape, arguments = _parts(first)
    return Workload(
        model, arguments, shape, dtype, torch.device(device), given, first.sample_name, "__call__", first.time_name
    )


def _parts(call: Call) -> Given:
    return tuple(call.sample.shape), {name: value for name, value in call.arguments.items() if name != call.sample_name}


def _decode(config: Any, batch: int, _: int, noise: Noise) -> Callable[[int, int], Given]:
    return lambda height, width: ((batch, config.latent_channels, height, width), {})


def _unet(config: Any, batch: int, text_tokens: int, noise: Noise) -> Callable[[int, int], Given]:
    text = noise(batch, text_tokens, config.cross_attention_dim)
    is_sdxl = config.addition_embed_type == "text_time"
    pooled = (
        noise(batch, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
        if is_sdxl
        else None
    )

    def given(height: int, width: int) -> Given:
        arguments: dict[str, Any] = {"timestep": torch.tensor(TIME), "encoder_hidden_states": text}
        if pooled is not None:
            # SDXL's words on size: original, corner and target, in pixels.
            sizes = [float(8 * height), float(8 * width), 0.0, 0.0, float(8 * height), float(8 * width)]
            arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": pooled.new_tensor([sizes] * batch)}
        return (batch, config.in_channels, height, width), arguments

    return given


def _flux(config: Any, batch: int, text_tokens: int, noise: Noise) -> Callable[[int, int], Given]:
    text, pooled = noise(batch, text_tokens, config.joint_attention_dim), noise(batch, config.pooled_projection_dim)
    words = {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": text.new_zeros(text_tokens, 3)}

    def given(height: int, width: int) -> Given:
        rows, cols = (torch.arange(side // 2, device=text.device, dtype=text.dtype) for side in (height, width))
        places = torch.cartesian_prod(rows, cols)
        ids = torch.cat([torch.zeros_like(places[:, :1]), places], dim=1)
        time = torch.full((batch,), TIME / 1000, device=text.device, dtype=text.dtype)
        return (batch, len(ids), config.in_channels), {"timestep": time, "img_ids": ids, **words}

    return given


def _pixart(config: Any, batch: int, text_tokens: int, noise: Noise) -> Callable[[int, int], Given]:
    text = noise(batch, text_tokens, config.caption_channels)
    words = {
        "timestep": torch.full((batch,), TIME, device=text.device),
        "encoder_hidden_states": text,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return lambda height, width: ((batch, config.in_channels, height, width), words)


_CALLS: dict[str, Any] = {
    "UNet2DConditionModel": (_unet, "sample", "__call__"),
    "FluxTransformer2DModel": (_flux, "hidden_states", "__call__"),
    "PixArtTransformer2DModel": (_pixart, "hidden_states", "__call__"),
    "AutoencoderKL": (_decode, "z", "decode"),
}
"""By class: the other arguments of a call, the name of the latents among them, and the method to call."""
