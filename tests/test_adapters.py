"""What is added to a U-Net: T2I-Adapter's features, IP-Adapter's attention, perturbed attention guidance."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from torch import Tensor

import distrifusion as df
from models import build, distance
from pipelines import (
    ALWAYS_WARM,
    CFG,
    COLS,
    IMAGE_DIM,
    NUMPY_WARNINGS,
    SYNC,
    adapter_weights,
    check,
    controlnet,
    drawing,
    half_mask,
    picture,
    randomised,
    sample,
    sd,
    sdxl,
    unet,
    vision,
)

pytestmark = NUMPY_WARNINGS


def t2i(seed: int = 0, **more: Any) -> Any:
    settings = {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 4, "adapter_type": "full_adapter"}
    with drawing(seed):
        return randomised(diffusers.T2IAdapter(in_channels=3, **{**settings, **more}), seed)


def with_t2i() -> Any:
    return sd(diffusers.StableDiffusionAdapterPipeline, adapter=t2i())


def with_two() -> Any:
    return sd(diffusers.StableDiffusionAdapterPipeline, adapter=diffusers.MultiAdapter([t2i(0), t2i(1)]))


def with_t2i_xl() -> Any:
    adapter = t2i(channels=[8, 16, 16, 16], downscale_factor=8, adapter_type="full_adapter_xl")
    return sdxl(diffusers.StableDiffusionXLAdapterPipeline, unet=build("sdxl"), adapter=adapter, add_watermarker=...)


def drawn(pipe: Any) -> Tensor:
    return sample(pipe, image=picture())


def test_t2i_adapter_changes_the_picture() -> None:
    assert distance(drawn(with_t2i()), sample(sd())) > 0.05


@pytest.mark.parametrize("config", [SYNC, COLS, ALWAYS_WARM], ids=str)
def test_t2i_adapter(config: df.ParallelConfig) -> None:
    check(with_t2i, drawn, config=config)


def test_t2i_adapter_and_branches_of_guidance_on_separate_ranks() -> None:
    check(with_t2i, drawn, worlds=(4,), config=CFG)


def test_several_t2i_adapters() -> None:
    check(
        with_two,
        lambda pipe: sample(pipe, image=[picture(1), picture(2)], adapter_conditioning_scale=[0.7, 0.3]),
        worlds=(3,),
    )


@pytest.mark.filterwarnings("ignore:Passing intrablock residual connections:FutureWarning")
def test_features_passed_the_old_way() -> None:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 9, 12, generator=generator)
    features = [torch.randn(1, width, size, size, generator=generator) for width, size in ((8, 16), (16, 8))]
    check(
        lambda: unet("sd"),
        lambda model: model(x, 5, text, down_block_additional_residuals=list(features)).sample,
        worlds=(3,),
    )


def test_t2i_adapter_of_sdxl() -> None:
    check(with_t2i_xl, drawn)


def embeds(seed: int = 0, images: int = 1) -> Tensor:
    """Negative and positive image embeddings ``[2, images, dim]``."""
    return torch.randn(2, images, IMAGE_DIM, generator=torch.Generator().manual_seed(seed))


def load(pipe: Any, *seeds: int) -> Any:
    weights = [adapter_weights(pipe.unet, seed) for seed in seeds]
    # accelerate's loading without memory swaps a method of nn.Module for all threads, and ranks are threads here.
    pipe.load_ip_adapter(weights, subfolder="", weight_name=[""] * len(seeds), low_cpu_mem_usage=False)
    return pipe


def with_ip(*seeds: int) -> Any:
    return load(sd(image_encoder=vision()), *seeds)


def alike(pipe: Any, **more: Any) -> Tensor:
    return sample(pipe, **{"ip_adapter_image_embeds": [embeds()], **more})


def test_ip_adapter_changes_the_picture() -> None:
    assert distance(alike(with_ip(0)), sample(sd())) > 0.05


@pytest.mark.parametrize("config", [SYNC, ALWAYS_WARM, df.ParallelConfig(strategy="tensor")], ids=str)
def test_ip_adapter_loaded_before(config: df.ParallelConfig) -> None:
    check(lambda: with_ip(0), alike, config=config)


def test_ip_adapter_given_a_picture() -> None:
    check(lambda: with_ip(0), lambda pipe: sample(pipe, ip_adapter_image=picture(3)), worlds=(2,))


@pytest.mark.parametrize("config", [SYNC, df.ParallelConfig(strategy="tensor")], ids=str)
def test_ip_adapter_loaded_scaled_and_unloaded_after(config: df.ParallelConfig) -> None:
    def later(pipe: Any) -> list[Tensor]:
        plain = sample(pipe, num_inference_steps=2)
        load(pipe, 0)
        whole = alike(pipe, num_inference_steps=2)
        pipe.set_ip_adapter_scale(0.4)
        less = alike(pipe, num_inference_steps=2)
        pipe.unload_ip_adapter()
        return [plain, whole, less, sample(pipe, num_inference_steps=2)]

    check(lambda: sd(image_encoder=vision()), later, worlds=(3,), config=config)


def masked(pipe: Any, height: int = 64, width: int = 64, *, swapped: bool = False) -> Tensor:
    left = half_mask(height, width)
    pair = [left, left.transpose(0)]
    masks = IPAdapterMaskProcessor().preprocess(pair[::-1] if swapped else pair, height=height, width=width)
    return sample(
        pipe,
        ip_adapter_image_embeds=[embeds(0, 2)],
        cross_attention_kwargs={"ip_adapter_masks": [masks.reshape(1, 2, height, width)]},
        height=height,
        width=width,
    )


def test_masks_change_the_picture() -> None:
    pipe = with_ip(0)
    pipe.set_ip_adapter_scale([[0.9, 0.5]])
    assert distance(masked(pipe, swapped=True), masked(pipe)) > 0.005


@pytest.mark.parametrize(("config", "world"), [(SYNC, 2), (SYNC, 3), (COLS, 3), (CFG, 4)], ids=str)
def test_ip_adapter_with_masks(config: df.ParallelConfig, world: int) -> None:
    def make() -> Any:
        pipe = with_ip(0)
        pipe.set_ip_adapter_scale([[0.9, 0.5]])
        return pipe

    check(make, masked, worlds=(world,), config=config)
    check(make, lambda pipe: masked(pipe, 56, 72), worlds=(world,), config=config)


def masks_by_adapter(pipe: Any) -> Tensor:
    """The older form: one tensor with as many masks as adapters, and here as pictures in the batch."""
    masks = IPAdapterMaskProcessor().preprocess([half_mask(), half_mask().transpose(0)], height=64, width=64)
    return sample(
        pipe,
        ip_adapter_image_embeds=[embeds(0), embeds(1)],
        cross_attention_kwargs={"ip_adapter_masks": masks},
    )


@pytest.mark.parametrize(("config", "world"), [(SYNC, 3), (CFG, 2), (CFG, 4)], ids=str)
def test_several_ip_adapters_with_masks(config: df.ParallelConfig, world: int) -> None:
    check(lambda: with_ip(0, 1), masks_by_adapter, worlds=(world,), config=config)


def test_ip_adapter_of_sdxl_and_branches_on_separate_ranks() -> None:
    check(lambda: load(sdxl(image_encoder=vision()), 0), alike, worlds=(4,), config=CFG)


def test_ip_adapter_with_the_older_processor() -> None:
    """IPAdapterAttnProcessor, that of torch without scaled_dot_product_attention."""

    def make() -> Any:
        pipe = with_ip(0)
        for module in pipe.unet.modules():
            new = getattr(module, "processor", None)
            if type(new).__name__ == "IPAdapterAttnProcessor2_0":
                old = diffusers.models.attention_processor.IPAdapterAttnProcessor(
                    new.hidden_size, new.cross_attention_dim, new.num_tokens, new.scale
                )
                old.load_state_dict(new.state_dict())
                module.processor = old
        return pipe

    check(make, alike, worlds=(2,))


def pag(pipe: Any, **more: Any) -> Tensor:
    return sample(pipe, pag_scale=3.0, **more)


def with_pag() -> Any:
    return sd(diffusers.StableDiffusionPAGPipeline, pag_applied_layers=["mid", "down_blocks"])


def with_pag_and_controlnet() -> Any:
    return sd(diffusers.StableDiffusionControlNetPAGPipeline, controlnet=controlnet(), pag_applied_layers=["mid"])


def test_perturbed_attention_guidance() -> None:
    assert distance(pag(with_pag()), sample(with_pag(), pag_scale=0.0)) > 0.02
    check(with_pag, lambda pipe: [pag(pipe), pag(pipe, guidance_scale=1.0), sample(pipe, pag_scale=0.0)])
    check(with_pag, pag, worlds=(2,), config=ALWAYS_WARM)


def test_perturbed_attention_guidance_of_sdxl() -> None:
    check(lambda: sdxl(diffusers.StableDiffusionXLPAGPipeline, pag_applied_layers=["mid"]), pag, worlds=(3,))


def test_perturbed_attention_guidance_with_a_controlnet() -> None:
    check(with_pag_and_controlnet, lambda pipe: pag(pipe, image=picture(), height=..., width=...), worlds=(2,))


def test_perturbed_attention_guidance_shares_a_batch() -> None:
    def rank(comm: Any) -> None:
        pag(df.parallelize(with_pag(), CFG, comm))

    with pytest.raises(df.ConfigError, match=r"cfg=2 does not work with PAG.*use cfg=1"):
        df.run_ranks(2, rank)
