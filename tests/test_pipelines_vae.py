"""Pipelines from prompt to pixels: their VAE goes by rows with the denoiser, and counts for itself."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import distrifusion as df
import test_pipelines_joint as joint
import test_pipelines_video as video
from models import distance
from pipelines import (
    ALWAYS_WARM,
    CFG,
    COLS,
    DISPLACED,
    EXACT,
    NUMPY_WARNINGS,
    SYNC,
    check,
    drawing,
    half_mask,
    own_vae,
    picture,
    quiet,
    sample,
    sd,
    sdxl,
)
from vaes import UNET, build_vae

pytestmark = [*NUMPY_WARNINGS, pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")]


def painted(pipe: Any, **arguments: Any) -> Tensor:
    return sample(pipe, output_type="pt", **arguments)


def tiny() -> Any:
    """TAESD in the place of a VAE: four pixels per row of latent."""
    with drawing(4):
        return (
            diffusers.AutoencoderTiny(
                encoder_block_out_channels=(4,) * 3,
                decoder_block_out_channels=(4,) * 3,
                num_encoder_blocks=(1,) * 3,
                num_decoder_blocks=(1,) * 3,
            )
            .eval()
            .requires_grad_(False)
        )


def flux2() -> Any:
    case = joint.CASES["FLUX.2"]
    with drawing(5):  # its transformer has four channels: a square of 2 x 2 latents
        vae = diffusers.AutoencoderKLFlux2(**{**UNET, "latent_channels": 1}).eval().requires_grad_(False)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 1.5)
    return replace(case, parts={**case.parts, "vae": vae}).make()


def qwen() -> Any:
    case, vae = joint.CASES["Qwen-Image"], build_vae("qwen")
    vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[0.9] * 4)
    return replace(case, parts={**case.parts, "vae": vae}).make()


def wan() -> Any:
    vae = build_vae("wan")
    vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[0.9] * 4)
    return video.wan(vae=vae)


PIPELINES: dict[str, tuple[Any, Any]] = {
    "SD": (sd, painted),
    "SD, sliced": (lambda: sliced(sd()), lambda pipe: painted(pipe, prompt=["a lake", "a field"])),
    "SD, image to image": (
        lambda: sd(diffusers.StableDiffusionImg2ImgPipeline),
        lambda pipe: painted(pipe, image=picture(), strength=0.7, height=..., width=...),
    ),
    "SD, image to image, TAESD": (
        lambda: sd(diffusers.StableDiffusionImg2ImgPipeline, vae=tiny()),
        lambda pipe: painted(pipe, image=picture(), strength=0.7, height=..., width=...),
    ),
    "SD, inpaint": (
        lambda: sd(diffusers.StableDiffusionInpaintPipeline, "inpaint"),
        lambda pipe: painted(pipe, image=picture(), mask_image=half_mask(), strength=0.8),
    ),
    "SDXL": (sdxl, painted),
    "FLUX.2": (flux2, lambda pipe: joint.CASES["FLUX.2"].call(pipe, output_type="pt")),
    "Qwen-Image": (qwen, lambda pipe: joint.CASES["Qwen-Image"].call(pipe, output_type="pt")),
    "Wan": (wan, lambda pipe: video.CASES["wan"](pipe, output_type="pt")),
    "Wan, image to video": (video.wan_image, lambda pipe: video.CASES["wan-image"](pipe, output_type="pt")),
}


def sliced(pipe: Any) -> Any:
    pipe.vae.enable_slicing()
    return pipe


@pytest.mark.parametrize("name", PIPELINES)
def test_the_pixels_are_those_of_one_device(name: str) -> None:
    check(*PIPELINES[name])


@pytest.mark.parametrize(("config", "world"), [(COLS, 5), (ALWAYS_WARM, 2), (CFG, 2), (CFG, 6)], ids=str)
def test_under_every_exact_configuration(config: df.ParallelConfig, world: int) -> None:
    check(sd, lambda pipe: painted(pipe, height=72, width=56), worlds=(world,), config=config)


def test_with_guidance_alone_on_two_ranks_the_vae_still_has_two_patches() -> None:
    def rank(comm: Any) -> Any:
        pipe = df.parallelize(sd(), CFG, comm)
        painted(pipe)
        return df.report(pipe)

    for report in df.run_ranks(2, rank):
        assert report.patches == (16,)
        assert report.vae["decode"].messages > 0


@pytest.mark.parametrize("strategy", ["naive", "displaced"])
def test_the_decode_is_exact_where_the_latents_are_not(strategy: Any) -> None:
    config = df.ParallelConfig(strategy=strategy, warmup_steps=0)

    def rank(comm: Any) -> tuple[Tensor, Tensor]:
        pipe = df.parallelize(sd(), config, comm)
        return painted(pipe), sample(pipe)

    truth = painted(sd())
    for pixels, latents in df.run_ranks(2, rank):
        vae = own_vae()
        alone = vae.decode(latents / vae.config.scaling_factor).sample
        assert distance(pixels, (alone / 2 + 0.5).clamp(0, 1)) <= EXACT
        assert distance(pixels, truth) > EXACT


def test_the_steps_are_counted_without_the_vae() -> None:
    """Two pictures in a row, the second from a picture: each report has its own picture's, in its own place."""

    def rank(comm: Any) -> list[Any]:
        pipe = df.parallelize(sd(), DISPLACED, comm)
        other = df.parallelize(sd(), DISPLACED, comm)
        edit = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, requires_safety_checker=False)
        reports = []
        for call in (
            lambda: sample(other),
            lambda: painted(pipe),
            lambda: painted(pipe),
            lambda: painted(quiet(edit), image=picture(), strength=1.0, height=..., width=...),
        ):
            call()
            reports.append(df.report(other if not reports else pipe))
        return reports

    for latents, first, second, edited in df.run_ranks(2, rank):
        assert latents.vae == {}
        for report in (first, second, edited):
            assert report.messages == latents.messages
            assert report.bytes == latents.bytes
            assert report.vae["decode"].calls == 1
            assert report.vae["decode"] == replace(first.vae["decode"], seconds=report.vae["decode"].seconds)
        assert list(first.vae) == list(second.vae) == ["decode"]
        assert list(edited.vae) == ["encode", "decode"]
        facts = edited.as_dict()["vae"]["encode"]
        assert facts["messages"] == edited.vae["encode"].messages > 0
        assert f"{facts['messages']} messages sent" in edited.line()


class Another(diffusers.AutoencoderKL):
    """A class without a table."""


def without_table() -> Any:
    pipe = sd()
    pipe.vae.__class__ = Another
    return pipe


def wrapped() -> Any:
    pipe = sd()
    pipe.vae.decoder.forward = pipe.vae.decoder.forward
    return pipe


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (without_table, "Another runs whole on every rank"),
        (wrapped, "AutoencoderKL runs whole on every rank: decoder (Decoder): another library has replaced"),
    ],
)
def test_a_vae_that_cannot_be_parallel_runs_whole_and_the_report_says_so(make: Any, note: str) -> None:
    truth = painted(sd())

    def rank(comm: Any) -> tuple[Tensor, Any]:
        pipe = df.parallelize(make(), SYNC, comm)
        result = painted(pipe)
        report = df.report(pipe)
        df.restore(pipe)
        return result, report

    for result, report in df.run_ranks(2, rank):
        assert distance(result, truth) <= EXACT
        assert [text for text in report.notes if text.startswith(note)] == report.notes != []
        assert report.vae == {}


def test_a_vae_that_only_some_ranks_can_spread_is_told_before_the_first_step() -> None:
    def rank(comm: Any) -> None:
        with pytest.raises(df.RanksDisagree, match=r"VAE differs: rank 0 has parallel, rank 1 has Another runs whole"):
            df.parallelize(pipe := without_table() if comm.rank else sd(), SYNC, comm)
        assert [name for name, module in pipe.vae.named_modules() if "forward" in vars(module)] == []

    df.run_ranks(2, rank)


def test_restore_gives_the_vae_back_with_the_denoiser_and_alone() -> None:
    truth = painted(sd())

    def rank(comm: Any) -> list[Tensor]:
        pipe = df.parallelize(sd(), SYNC, comm)
        df.restore(pipe.vae)
        whole = painted(pipe)
        assert df.report(pipe).vae == {}
        assert len(df.report(pipe).kinds) == 3
        df.restore(pipe)
        assert [name for name, module in pipe.vae.named_modules() if "forward" in vars(module)] == []
        return [whole, painted(pipe)]

    for whole, restored in df.run_ranks(2, rank):
        assert distance(whole, truth) <= EXACT
        assert torch.equal(restored, truth)


def test_two_pipelines_may_share_a_vae_but_two_ranks_may_not() -> None:
    truth, shared = painted(sd()), own_vae()
    kept: list[Any] = []

    def rank(comm: Any) -> None:
        base, vae = sd(), own_vae()
        base.vae = vae
        refiner = sd(diffusers.StableDiffusionImg2ImgPipeline, vae=vae)
        df.parallelize(base, SYNC, comm)
        df.parallelize(refiner, SYNC, comm)
        assert distance(painted(base), truth) <= EXACT
        painted(refiner, image=picture(), strength=0.7, height=..., width=...)
        assert list(df.report(refiner).vae) == ["encode", "decode"]
        df.restore(refiner)
        assert distance(painted(base), truth) <= EXACT  # whole on every rank from now on
        for turn in range(2):
            if turn == comm.rank == 0:
                kept.append(df.parallelize(sd(vae=shared), SYNC, Alone(comm)))
            comm.barrier()
            if turn == comm.rank == 1:
                with pytest.raises(df.ConfigError, match="parallel already, as rank 0 of 2, and this is rank 1 of 2"):
                    df.parallelize(sd(vae=shared), SYNC, Alone(comm))
            comm.barrier()

    df.run_ranks(2, rank)
    df.restore(kept[0])


class Alone:
    """A communicator whose peers agree with whatever they are asked: to come as far as the models alone."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value] * self._comm.world


def test_a_pipeline_that_is_refused_leaves_its_vae_alone() -> None:
    def rank(comm: Any) -> None:
        pipe = sd()
        pipe.unet.up_blocks[0].resnets[0].forward = lambda *args: args[0]
        with pytest.raises(df.UnsupportedModel, match="another library"):
            df.parallelize(pipe, SYNC, comm)
        assert [name for name, module in pipe.vae.named_modules() if "forward" in vars(module)] == []
        assert not hasattr(pipe.vae, "_distrifusion")

    df.run_ranks(2, rank)


def test_a_compiled_vae_is_taken_over_too() -> None:
    truth = painted(sd())

    def rank(comm: Any) -> tuple[Tensor, Any]:
        pipe = sd()
        pipe.vae = torch.compile(pipe.vae, backend="eager")
        df.parallelize(pipe, SYNC, comm)
        result, report = painted(pipe), df.report(pipe)
        df.restore(pipe)
        return result, report

    for result, report in df.run_ranks(2, rank):
        assert distance(result, truth) <= EXACT
        assert report.vae["decode"].messages > 0


@pytest.mark.filterwarnings("ignore:.*upcast_vae:FutureWarning")
def test_float16_latents_are_decoded_in_float32_where_the_vae_asks_for_it() -> None:
    """SDXL's VAE overflows in float16: its pipeline casts it before the decode and back after it."""

    def half() -> Any:
        pipe = sdxl()
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            setattr(pipe, name, copy.deepcopy(getattr(pipe, name)).half())
        pipe.vae.register_to_config(force_upcast=True)
        return pipe

    truth = painted(half())

    def rank(comm: Any) -> tuple[Tensor, Any]:
        pipe = df.parallelize(half(), SYNC, comm)
        return painted(pipe), pipe.vae.dtype

    for result, dtype in df.run_ranks(2, rank):
        assert dtype == torch.float16
        # The latents went through three steps in float16, which one device does not repeat to the bit either.
        assert distance(result, truth) <= 5e-3
