"""Pipelines of videos as they are: final latents of ranks and of one device, and what runs per guidance branch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from transformers import BatchFeature

import distrifusion as df
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
    picture,
    quiet,
    vision,
)
from transformers_tiny import build, noise
from transformers_video import FRAMES, POOLED, TEXT, TEXT_DIM, VIDEO, WAN_TEXT

pytestmark = NUMPY_WARNINGS

ROWS, COLUMNS, STEPS = 5, 4, 4
TWO_TO_ONE = 4 * (2 * FRAMES - 1) + 1  # frames, where two of latents make one of tokens
OTHER = 78  # the seed of the negative prompt


def _text(seed: int = 77) -> Tensor:
    return noise(1, TEXT, TEXT_DIM, seed=seed)


def _prompts(name: str = "prompt_embeds") -> dict[str, Tensor]:
    return {name: _text(), f"negative_{name}": _text(OTHER)}


def _masks() -> dict[str, Tensor]:
    mask = torch.ones(1, TEXT)
    mask[:, 4:] = 0
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.roll(-1).sort(1, True).values}


def _flow(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def _without_encoders(family: Any, name: str, scheduler: Any, **more: Any) -> Any:
    """A pipeline of ``family`` around the tiny transformer ``name``, for prompts that are embedded and latents."""
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "transformer": build(VIDEO[name]), **more}
    return quiet(family(**parts, scheduler=scheduler))


@cache
def _vae(kind: str) -> Any:
    """A video VAE for the images that a video starts from: 8 times smaller, 4 channels."""
    if kind == "wan":
        stats = {"latents_mean": [0.1] * 4, "latents_std": [0.9] * 4}
        vae: Any = diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, **stats)
    else:
        family = diffusers.AutoencoderKLCogVideoX if kind == "CogVideoX" else diffusers.AutoencoderKLHunyuanVideo
        vae = family(
            down_block_types=(f"{kind}DownBlock3D",) * 4,
            up_block_types=(f"{kind}UpBlock3D",) * 4,
            block_out_channels=(4,) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        )
    return vae.eval().requires_grad_(False)


def vae(kind: str) -> Any:
    """One of its own, since some keep what they have seen, with the same weights each time."""
    with drawing(1):
        return copy.deepcopy(_vae(kind))


def wan(name: str = "wan", family: Any = diffusers.WanPipeline, **more: Any) -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    return _without_encoders(family, name, scheduler, **more)


def wan_image() -> Any:
    more = {"vae": vae("wan"), "image_encoder": vision(), "image_processor": _pixels}
    return wan("wan-image", diffusers.WanImageToVideoPipeline, **more)


def _pixels(images: Any, return_tensors: str) -> Any:
    return BatchFeature({"pixel_values": noise(1, 3, 16, 16)})


def wan_of_two(**more: Any) -> Any:
    """Wan 2.2: one transformer for the first steps and one for the last."""
    second = build(VIDEO["wan"])
    for weight in second.parameters():
        weight.mul_(0.9)
    return wan(transformer_2=second, boundary_ratio=0.8, **more)


def _hunyuan(family: Any = diffusers.HunyuanVideoPipeline, name: str = "hunyuan-video", **more: Any) -> Any:
    more = {"text_encoder_2": None, "tokenizer_2": None, **more}
    return _without_encoders(family, name, _flow(shift=7.0), **more)


def _hunyuan_prompts() -> dict[str, Any]:
    return {
        **_prompts(),
        **_masks(),
        "pooled_prompt_embeds": noise(1, POOLED),
        "negative_pooled_prompt_embeds": noise(1, POOLED, seed=OTHER),
        "true_cfg_scale": 3.0,
        "num_frames": TWO_TO_ONE,
    }


def _wan_image() -> dict[str, Any]:
    text = {
        "prompt_embeds": noise(1, WAN_TEXT, TEXT_DIM),
        "negative_prompt_embeds": noise(1, WAN_TEXT, TEXT_DIM, seed=1),
    }
    return {**text, "image": picture(), "num_frames": TWO_TO_ONE}


@dataclass(frozen=True)
class Case:
    """A pipeline, and the arguments of a call beside those of every video.

    ``scale`` and ``scale_t`` are rows of pixels to a row of tokens, and frames.
    """

    make: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    scale: int = 16
    scale_t: int = 4

    def __call__(self, pipe: Any, **changes: Any) -> Tensor:
        """The final latents."""
        settings = {
            "height": ROWS * self.scale,
            "width": COLUMNS * self.scale,
            "num_frames": (FRAMES - 1) * self.scale_t + 1,
            "num_inference_steps": STEPS,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "latent",
            **self.arguments(),
        }
        latents: Tensor = pipe(**{**settings, **changes}).frames
        return latents


def _first_frame_given() -> dict[str, Any]:
    latents = noise(1, FRAMES * ROWS * COLUMNS, 4)
    return {**_prompts(), **_masks(), "guidance_scale": 3.0, "image": picture(), "latents": latents}


CASES = {
    "wan": Case(wan, _prompts),
    "wan-2.2": Case(wan_of_two, lambda: {**_prompts(), "guidance_scale_2": 3.0}),
    "wan-2.2-5b": Case(lambda: wan(expand_timesteps=True), _prompts),
    "wan-image": Case(wan_image, _wan_image),
    "wan-vace": Case(
        lambda: wan("wan-vace", diffusers.WanVACEPipeline, vae=vae("wan")),
        lambda: {**_prompts(), "reference_images": [picture()], "conditioning_scale": [1.0, 0.7]},
    ),
    "ltx": Case(
        lambda: _without_encoders(diffusers.LTXPipeline, "ltx", _flow(use_dynamic_shifting=True)),
        lambda: {**_prompts(), **_masks(), "guidance_scale": 3.0},
        scale=32,
        scale_t=8,
    ),
    "ltx-image": Case(
        lambda: _without_encoders(diffusers.LTXImageToVideoPipeline, "ltx", _flow(use_dynamic_shifting=True)),
        _first_frame_given,
        scale=32,
        scale_t=8,
    ),
    "cogvideox-2b": Case(
        lambda: _without_encoders(diffusers.CogVideoXPipeline, "cogvideox-2b", diffusers.CogVideoXDDIMScheduler()),
        _prompts,
    ),
    "cogvideox-5b": Case(
        lambda: _without_encoders(diffusers.CogVideoXPipeline, "cogvideox-5b", diffusers.CogVideoXDPMScheduler()),
        _prompts,
    ),
    "cogvideox-5b-image": Case(
        lambda: _without_encoders(
            diffusers.CogVideoXImageToVideoPipeline,
            "cogvideox-5b-image",
            diffusers.CogVideoXDDIMScheduler(),
            vae=vae("CogVideoX"),
        ),
        lambda: {**_prompts(), "image": picture(), "height": 112, "width": 80},  # what its positions are learned for
    ),
    "hunyuan-video": Case(
        _hunyuan,
        _hunyuan_prompts,
    ),
    "hunyuan-video-image": Case(
        lambda: _hunyuan(
            diffusers.HunyuanVideoImageToVideoPipeline,
            "hunyuan-video-image",
            vae=vae("HunyuanVideo"),
            image_processor=None,
        ),
        lambda: {**_hunyuan_prompts(), "image": picture()},
    ),
}
ONE_CALL = ("ltx", "cogvideox")  # per step, with both branches of guidance in a batch; the others make two


FRAMES_APART = df.ParallelConfig(strategy="sync", split="frames")


@pytest.mark.parametrize("config", [SYNC, ALWAYS_WARM, COLS, FRAMES_APART], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_latents_equal_those_of_one_device(name: str, config: df.ParallelConfig) -> None:
    check(CASES[name].make, CASES[name], config=config)


@pytest.mark.parametrize("name", CASES)
def test_guidance_on_separate_ranks_is_exact(name: str) -> None:
    check(CASES[name].make, CASES[name], worlds=(2, 4), config=CFG)


@pytest.mark.parametrize("name", [name for name in CASES if name != "wan-2.2"])
def test_displaced_steps_run_in_every_branch(name: str) -> None:
    case, calls = CASES[name], 1 if name.startswith(ONE_CALL) else 2

    def rank(comm: Any) -> tuple[Tensor, Any]:
        pipe = df.parallelize(case.make(), DISPLACED, comm)
        return case(pipe), df.report(pipe)

    truth = case(case.make())
    for latents, report in df.run_ranks(2, rank):
        assert report.kinds == ["sync"] * calls + ["displaced"] * calls * (STEPS - 1)
        assert max(report.messages[calls:]) <= 8
        assert EXACT < distance(latents, truth) < 1


def test_the_second_transformer_warms_up_by_itself() -> None:
    def rank(comm: Any) -> list[df.Report]:
        pipe = df.parallelize(wan_of_two(), DISPLACED, comm)
        CASES["wan-2.2"](pipe)
        both = df.report(pipe)
        pipe.register_to_config(boundary_ratio=0.0)  # the second has no step to make
        CASES["wan-2.2"](pipe)
        return [df.report(pipe.transformer), df.report(pipe.transformer_2), both, df.report(pipe)]

    reports = df.run_ranks(2, rank)[0]
    alone, second, both, last = (report.kinds for report in reports)
    first = both[: -len(second)]
    assert (alone, both[-len(second) :], last) == (["sync"] * 2 + ["displaced"] * 2 * (STEPS - 1), second, alone)
    assert len(reports[2].seconds) == len(both)
    for kinds in (first, second):
        assert kinds == ["sync"] * 2 + ["displaced"] * (len(kinds) - 2)
        assert len(kinds) > 2
    assert len(first) + len(second) == 2 * STEPS


@pytest.mark.parametrize("name", ["wan", "wan-2.2-5b", "hunyuan-video"])
def test_branches_do_not_read_each_others_past(name: str) -> None:
    """With the same prompt in both branches guidance changes nothing, even where it is one step late.

    A branch that read what the other has just sent would be on time instead, and the two would differ.
    """
    case = CASES[name]
    guided = {key: value.clone() for key, value in case.arguments().items() if isinstance(value, Tensor)}
    for key in list(guided):
        if key.startswith("negative_"):
            guided[key] = guided[key.removeprefix("negative_")].clone()
    alone = {"true_cfg_scale": 1.0} if name == "hunyuan-video" else {"guidance_scale": 1.0}

    def rank(comm: Any) -> tuple[Tensor, Tensor, list[str]]:
        pipe = df.parallelize(case.make(), DISPLACED, comm)
        both = case(pipe, **guided)
        kinds = df.report(pipe).kinds
        return both, case(pipe, **alone), kinds

    for both, one, kinds in df.run_ranks(2, rank):
        assert kinds.count("displaced") == 2 * (STEPS - 1)
        assert distance(both, one) <= EXACT


@pytest.mark.parametrize("name", ["wan", "wan-2.2-5b", "hunyuan-video"])
def test_with_two_halves_each_computes_one_of_the_two_calls(name: str) -> None:
    """After the first step, in which nobody knows yet that there are two."""

    def rank(comm: Any) -> int:
        pipe, runs = df.parallelize(CASES[name].make(), CFG, comm), list[int]()
        pipe.transformer.proj_out.register_forward_hook(lambda *_: runs.append(1))
        CASES[name](pipe)
        return len(runs)

    assert df.run_ranks(2, rank) == [STEPS + 1, STEPS + 1]
