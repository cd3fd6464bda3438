"""Pipelines of diffusers as they are: what they ask of the U-Net, and what changes from call to call."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import distrifusion as df
from models import TEXT_DIM, distance
from pipelines import (
    ALWAYS_WARM,
    CFG,
    COLS,
    DISPLACED,
    EXACT,
    NUMPY_WARNINGS,
    SYNC,
    check,
    half_mask,
    picture,
    quiet,
    sample,
    sd,
    sdxl,
    unet,
)
from transformers_tiny import noise

pytestmark = NUMPY_WARNINGS


def refined(pipe: Any) -> Tensor:
    return sample(pipe, image=picture(), strength=0.7, num_inference_steps=4, height=..., width=...)


def painted(pipe: Any) -> Tensor:
    return sample(pipe, image=picture(), mask_image=half_mask(), strength=0.8, num_inference_steps=4)


def edited(pipe: Any) -> Tensor:
    return sample(pipe, image=picture(), height=..., width=...)


def upscaled(pipe: Any) -> Tensor:
    return sample(pipe, image=picture(height=12, width=20), noise_level=20, height=..., width=...)


def upscalers_vae() -> Any:
    vae = copy.deepcopy(sd().vae)
    vae.register_to_config(scaling_factor=0.08333)
    return vae


def unconditional(scheduler: Any) -> Any:
    return lambda: quiet(diffusers.DDPMPipeline(unet("ddpm"), scheduler()))


def drawn(pipe: Any) -> Tensor:
    images = pipe(
        batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    return torch.from_numpy(images)


FAMILIES: dict[str, tuple[Any, Any]] = {
    "text to image": (sd, sample),
    "image to image": (lambda: sd(diffusers.StableDiffusionImg2ImgPipeline), refined),
    "inpaint, 4 channels": (lambda: sd(diffusers.StableDiffusionInpaintPipeline), painted),
    "inpaint, 9 channels": (lambda: sd(diffusers.StableDiffusionInpaintPipeline, "inpaint"), painted),
    "instruct": (lambda: sd(diffusers.StableDiffusionInstructPix2PixPipeline, "edit"), edited),
    "upscale": (
        lambda: sd(
            diffusers.StableDiffusionUpscalePipeline,
            "upscale",
            vae=upscalers_vae(),
            low_res_scheduler=diffusers.DDPMScheduler(),
            requires_safety_checker=...,
        ),
        upscaled,
    ),
    "latent consistency": (
        lambda: sd(diffusers.LatentConsistencyModelPipeline, "lcm", scheduler=diffusers.LCMScheduler()),
        sample,
    ),
    "SDXL": (sdxl, sample),
    "SDXL refiner": (lambda: sdxl(diffusers.StableDiffusionXLImg2ImgPipeline, refiner=True), refined),
    "SDXL inpaint": (lambda: sdxl(diffusers.StableDiffusionXLInpaintPipeline), painted),
    "DDPM": (unconditional(diffusers.DDPMScheduler), drawn),
    "DDIM": (lambda: quiet(diffusers.DDIMPipeline(unet("ddpm"), diffusers.DDIMScheduler())), drawn),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_gives_the_picture_of_one_device(name: str) -> None:
    make, call = FAMILIES[name]
    check(make, call)


@pytest.mark.parametrize("name", ["text to image", "SDXL", "DDPM"])
def test_displaced_is_exact_while_it_warms_up(name: str) -> None:
    make, call = FAMILIES[name]
    check(make, call, config=ALWAYS_WARM)


def test_columns_and_five_ranks_on_a_size_that_does_not_divide() -> None:
    check(sd, lambda pipe: sample(pipe, height=72, width=56), worlds=(5,), config=COLS)


def changing(pipe: Any) -> list[Tensor]:
    """Calls that differ in all that may differ from one to the next."""
    return [
        sample(pipe, num_inference_steps=2),
        sample(pipe, num_inference_steps=2),  # the same again
        sample(pipe, "a lake", num_inference_steps=2, guidance_scale=1.0),
        sample(pipe, ["a lake", "a field"], num_inference_steps=2, height=40, width=72),
        sample(pipe, ["a", "b"], num_inference_steps=2, num_images_per_prompt=2, guidance_scale=1.0),
        sample(pipe, num_inference_steps=2, num_images_per_prompt=3, negative_prompt="fog", guidance_rescale=0.5),
    ]


@pytest.mark.parametrize(("config", "world"), [(SYNC, 3), (ALWAYS_WARM, 2), (CFG, 2), (CFG, 4), (CFG, 6)], ids=str)
def test_calls_may_differ_in_size_batch_and_guidance(config: df.ParallelConfig, world: int) -> None:
    check(sd, changing, worlds=(world,), config=config)


def test_cfg_of_sdxl() -> None:
    check(sdxl, lambda pipe: [sample(pipe, ["a", "b"]), sample(pipe, guidance_scale=1.0)], worlds=(2, 4), config=CFG)


def test_two_displaced_pictures_in_a_row_are_each_that_of_a_fresh_start() -> None:
    def rank(comm: Any) -> tuple[list[Tensor], list[str]]:
        def fresh() -> Any:
            return df.parallelize(sd(), DISPLACED, comm)

        pipe = fresh()
        embeds = torch.randn(1, 9, 12, generator=torch.Generator().manual_seed(5))

        def without_text(pipe: Any) -> Tensor:  # the same conditioning object in each picture
            return sample(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=embeds, num_inference_steps=4)

        calls = [without_text, without_text, lambda pipe: sample(pipe, "a lake", seed=1, num_inference_steps=4)]
        pairs = [(call(pipe), call(fresh())) for call in calls]
        return [part for pair in pairs for part in pair], df.report(pipe).kinds

    for outputs, kinds in df.run_ranks(2, rank):
        assert kinds == ["sync", "displaced", "displaced", "displaced"]
        for again, alone in zip(outputs[::2], outputs[1::2], strict=True):
            assert torch.equal(again, alone)


def halved(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Guidance off after the second step, as in diffusers' own example, and the latents changed at each."""
    if step == 1:
        pipe._guidance_scale = 0.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
    tensors["latents"] = tensors["latents"] + 0.01 * step
    return tensors


CALLBACK = {"callback_on_step_end": halved, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


@pytest.mark.parametrize(("config", "world"), [(SYNC, 2), (CFG, 4)], ids=str)
def test_a_callback_may_change_latents_and_switch_guidance_off(config: df.ParallelConfig, world: int) -> None:
    check(sd, lambda pipe: sample(pipe, num_inference_steps=4, **CALLBACK), worlds=(world,), config=config)


def test_without_guidance_the_rest_of_a_displaced_picture_warms_up_anew() -> None:
    def rank(comm: Any) -> list[str]:
        pipe = df.parallelize(sd(), DISPLACED, comm)
        sample(pipe, num_inference_steps=5, **CALLBACK)
        return df.report(pipe).kinds

    assert df.run_ranks(2, rank) == [["sync", "displaced", "sync", "displaced", "displaced"]] * 2


def variants(pipe: Any) -> list[Tensor]:
    """Pipelines made of a parallel one share its U-Net."""
    other = quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, requires_safety_checker=False))
    third = quiet(diffusers.StableDiffusionInpaintPipeline.from_pipe(pipe, requires_safety_checker=False))
    assert other.unet is pipe.unet
    return [refined(other), painted(third), sample(pipe), refined(other)]


@pytest.mark.parametrize("config", [SYNC, ALWAYS_WARM], ids=str)
def test_pipelines_made_from_a_parallel_one_are_parallel(config: df.ParallelConfig) -> None:
    check(sd, variants, worlds=(2,), config=config)


def test_a_pipeline_made_from_a_parallel_one_outlives_it() -> None:
    def rank(comm: Any) -> list[str]:
        pipe = df.parallelize(sd(), DISPLACED, comm)
        other = quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, requires_safety_checker=False))
        del pipe
        kinds = []
        for _ in range(2):
            refined(other)
            kinds += df.report(other).kinds
        return kinds

    assert df.run_ranks(2, rank) == [["sync", "displaced"] * 2] * 2


def test_views_of_a_panorama_are_not_taken_for_steps() -> None:
    """Several calls of the U-Net with one text and one timestep: features of one view are no good in another."""

    def denoised(pipe: Any, views: list[Tensor], text: Tensor) -> list[Tensor]:
        pipe.scheduler.set_timesteps(4)
        for t in pipe.scheduler.timesteps:
            predictions = [pipe.unet(view, t, text).sample for view in views]
            views = [pipe.scheduler.step(p, t, view).prev_sample for p, view in zip(predictions, views, strict=True)]
        return views

    def rank(comm: Any) -> tuple[list[Tensor], list[Tensor], list[str]]:
        pipe = df.parallelize(sd(), DISPLACED, comm)
        generator = torch.Generator().manual_seed(3)
        views, text = (
            list(torch.randn(3, 1, 4, 16, 16, generator=generator)),
            torch.randn(1, 9, 12, generator=generator),
        )
        together = denoised(pipe, views, text)
        kinds = df.report(pipe).kinds
        return together, [denoised(pipe, [view], text)[0] for view in views], kinds

    for together, alone, kinds in df.run_ranks(2, rank):
        assert kinds == ["sync"] * 3 + ["displaced"] * 9
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one, other)


def test_restore_gives_back_the_pipeline() -> None:
    def rank(comm: Any) -> None:
        pipe = sd()
        before = sample(pipe)
        weights = copy.deepcopy(pipe.unet.state_dict())
        df.parallelize(pipe, SYNC, comm)
        assert hasattr(pipe.unet, "_distrifusion")
        sample(pipe)
        assert df.restore(pipe) is pipe
        assert torch.equal(sample(pipe), before)
        assert all(torch.equal(weight, weights[name]) for name, weight in pipe.unet.state_dict().items())
        assert not any("forward" in module.__dict__ for module in pipe.unet.modules())
        assert not hasattr(pipe.unet, "_distrifusion")
        with pytest.raises(df.ConfigError, match="parallel already"):
            df.parallelize(df.parallelize(pipe, SYNC, comm), SYNC, comm)

    df.run_ranks(2, rank)


def test_a_swapped_unet_is_no_longer_parallel_and_says_so() -> None:
    def rank(comm: Any) -> None:
        pipe = df.parallelize(sd(), SYNC, comm)
        old, pipe.unet = pipe.unet, unet("sd")
        assert df.report(pipe).strategy == "none"
        truth = sample(pipe)
        pipe.unet = old
        assert distance(sample(pipe), truth) <= EXACT
        assert df.report(pipe).strategy == "sync"

    df.run_ranks(2, rank)


def test_other_seeds_prompts_and_sizes_on_a_rank_are_an_error_that_names_both() -> None:
    def rank(comm: Any, **changes: Any) -> None:
        sample(df.parallelize(sd(), SYNC, comm), **{name: values[comm.rank] for name, values in changes.items()})

    with pytest.raises(df.RanksDisagree, match="seed"):
        df.run_ranks(2, lambda comm: rank(comm, seed=[0, 1]))
    with pytest.raises(df.RanksDisagree, match=r"16 x 16.*18 x 16"):
        df.run_ranks(2, lambda comm: rank(comm, height=[64, 72]))
    with pytest.raises(df.RanksDisagree, match=r"the prompt\) differs"):
        df.run_ranks(2, lambda comm: rank(comm, prompt=["a hill", "a lake"]))
    with pytest.raises(df.RanksDisagree, match=r"conditions differ.*prompt"):
        df.run_ranks(
            2, lambda comm: rank(comm, prompt=[...] * 2, prompt_embeds=[noise(1, 9, TEXT_DIM, seed=i) for i in (1, 2)])
        )
    with pytest.raises(df.RanksDisagree, match="batch differs: rank 0 has 2, rank 1 has 4"):
        df.run_ranks(2, lambda comm: rank(comm, num_images_per_prompt=[1, 2]))
    with pytest.raises(df.RanksDisagree, match="configuration"):
        df.run_ranks(2, lambda comm: sample(df.parallelize(sd(), (SYNC, DISPLACED)[comm.rank], comm)))
