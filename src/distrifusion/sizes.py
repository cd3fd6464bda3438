"""How a pipeline counts the pixels of its pictures, as far as the configurations in its folder tell. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_UNET_VAES = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL", "ConsistencyDecoderVAE")


@dataclass(frozen=True)
class Sizes:
    """What is known of a pipeline's pictures.

    ``factor`` is pixels per latent row and column, ``patch`` rows of latent behind the smallest piece that a rank can
    own (1, or a row of tokens), ``unit`` what a side must be a multiple of, and ``default`` the model's own (height,
    width) in pixels. None: only the pipeline knows.
    """

    factor: int | None = None
    patch: int = 1
    unit: int = 1
    default: tuple[int, int] | None = None
    is_video: bool = False


@dataclass(frozen=True)
class _Counting:
    """How a pipeline of a transformer counts.

    ``patch`` is rows of latent to one of tokens (None: its configuration says so), the side of its own pictures is
    ``rows`` of latent or ``pixels`` (neither: its configuration says so), ``least`` a unit that it asks for whatever
    its VAE.
    """

    patch: int | None = None
    rows: int | None = None
    pixels: int | None = None
    least: int = 1


# Not those that paint at the size nearest to the given one that they were trained for (PixArt, Sana, HunyuanDiT), or
# take it from a picture.
_TRANSFORMERS: Mapping[str, _Counting] = {
    "StableDiffusion3Pipeline": _Counting(),
    "FluxPipeline": _Counting(patch=2, rows=128),
    "ChromaPipeline": _Counting(patch=2, rows=128),
    "Flux2Pipeline": _Counting(patch=2, rows=128),
    "Flux2KleinPipeline": _Counting(patch=2, rows=128),
    "QwenImagePipeline": _Counting(patch=2, rows=128),
    "AuraFlowPipeline": _Counting(pixels=1024),
    "CogView3PlusPipeline": _Counting(),
    "CogView4Pipeline": _Counting(least=16),
    "Lumina2Pipeline": _Counting(patch=2, pixels=1024, least=16),
    "ZImagePipeline": _Counting(patch=2, pixels=1024),
}


def sizes_of(pipeline: str, classes: Mapping[str, str], read: Callable[[str], Mapping[str, Any]]) -> Sizes:
    """The sizes of ``pipeline`` with components of ``classes``, by name; ``read`` gives a component's configuration."""
    if "unet" in classes and classes.get("vae") in _UNET_VAES:
        factor, sample = _factor(read("vae")), read("unet").get("sample_size")
        if factor is None:
            return Sizes()
        # The pipelines of U-Nets ask for multiples of 8 whatever their VAE.
        return Sizes(factor, unit=max(8, factor), default=_scaled(sample, factor))
    transformer = classes.get("transformer", "")
    if "3D" in transformer:
        return Sizes(is_video=True)
    counting = _TRANSFORMERS.get(pipeline)
    if counting is None or not transformer or "vae" not in classes:
        return Sizes()
    config, factor = read("transformer"), _factor(read("vae"))
    patch = counting.patch or config.get("patch_size")
    if factor is None or not isinstance(patch, int):
        return Sizes()
    default = _scaled(counting.rows or config.get("sample_size"), factor)
    if counting.pixels is not None:
        default = counting.pixels, counting.pixels
    return Sizes(factor, patch, max(factor * patch, counting.least), default)


def _factor(vae: Mapping[str, Any]) -> int | None:
    if "temperal_downsample" in vae:  # of Qwen-Image's, which has a level more than this
        return int(2 ** len(vae["temperal_downsample"]))
    blocks = vae.get("block_out_channels") or vae.get("decoder_block_out_channels")  # AutoencoderTiny's
    return int(2 ** (len(blocks) - 1)) if isinstance(blocks, list) else None


def _scaled(sample: Any, factor: int) -> tuple[int, int] | None:
    if not sample:
        return None
    rows, columns = sample if isinstance(sample, list) else (sample, sample)
    return rows * factor, columns * factor
