"""Pipelines of the joint-attention transformers: final latents of ranks against one device, and what a step was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import distrifusion as df
from distrifusion.strategies.condition import SharedCondition
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
    randomised,
    sd,
)
from transformers_joint import JOINT, POOLED, TEXT, TEXT_DIM
from transformers_tiny import build, noise

pytestmark = [*NUMPY_WARNINGS, pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")]

SIZE = {"height": 112, "width": 80}  # 7 x 5 tokens
STEPS = 3
NO_ENCODERS = {"vae": None, "text_encoder": None, "tokenizer": None}
TWO_ENCODERS = {**NO_ENCODERS, "text_encoder_2": None, "tokenizer_2": None}
THREE_ENCODERS = {**TWO_ENCODERS, "text_encoder_3": None, "tokenizer_3": None}

PROMPT = {"prompt_embeds": noise(1, TEXT, TEXT_DIM, seed=1)}
NEGATIVE = {"negative_prompt_embeds": noise(1, TEXT, TEXT_DIM, seed=2)}
POOLS = {"pooled_prompt_embeds": noise(1, POOLED, seed=3)}
NEGATIVE_POOLS = {"negative_pooled_prompt_embeds": noise(1, POOLED, seed=4)}
LONG, SHORT = torch.ones(1, TEXT, dtype=torch.int64), torch.tensor([[1] * 3 + [0] * (TEXT - 3)])


@dataclass(frozen=True)
class Case:
    """A pipeline, its transformer by its name in ``JOINT``, the arguments of a call, and denoiser calls per step."""

    family: Any
    transformer: str
    arguments: dict[str, Any]
    parts: dict[str, Any]
    calls: int = 1
    is_shifted: bool = True
    scheduler: Any = None

    def make(self) -> Any:
        flow = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=self.is_shifted)
        scheduler = flow if self.scheduler is None else self.scheduler()
        return quiet(self.family(transformer=build(JOINT[self.transformer]), scheduler=scheduler, **self.parts))

    def call(self, pipe: Any, **changes: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        common = {**SIZE, "num_inference_steps": STEPS, "generator": generator, "output_type": "latent"}
        images = pipe(**{**common, **self.arguments, **changes}).images
        return torch.stack(images) if isinstance(images, list) else images


class _LongCat(diffusers.LongCatImagePipeline):  # which takes no embeddings without a prompt
    def _encode_prompt(self, prompt: list[str]) -> Tensor:
        return {**PROMPT, **NEGATIVE}[prompt[0]]


CASES = {
    "SD3": Case(
        diffusers.StableDiffusion3Pipeline,
        "sd35",
        {**PROMPT, **NEGATIVE, **POOLS, **NEGATIVE_POOLS},
        THREE_ENCODERS,
        is_shifted=False,
    ),
    "FLUX": Case(diffusers.FluxPipeline, "flux", {**PROMPT, **POOLS}, TWO_ENCODERS),
    "FLUX with two branches": Case(
        diffusers.FluxPipeline,
        "flux",
        {**PROMPT, **NEGATIVE, **POOLS, **NEGATIVE_POOLS, "true_cfg_scale": 3.0},
        TWO_ENCODERS,
        calls=2,
    ),
    "Chroma": Case(
        diffusers.ChromaPipeline,
        "chroma",
        {**PROMPT, **NEGATIVE, "prompt_attention_mask": LONG.bool(), "negative_prompt_attention_mask": SHORT.bool()},
        NO_ENCODERS,
        calls=2,
    ),
    # At its own scale of guidance, which is 5, one device is 2e-5 from itself in float64.
    "Ovis-Image": Case(
        diffusers.OvisImagePipeline,
        "ovis",
        {**PROMPT, **NEGATIVE, "negative_prompt": None, "guidance_scale": 3.0},
        NO_ENCODERS,
        calls=2,
    ),
    "LongCat-Image": Case(
        _LongCat,
        "longcat",
        {"prompt": "prompt_embeds", "negative_prompt": "negative_prompt_embeds", "enable_prompt_rewrite": False},
        {**NO_ENCODERS, "text_processor": None},
        calls=2,
    ),
    "FLUX.2": Case(diffusers.Flux2Pipeline, "flux2", PROMPT, NO_ENCODERS),
    "Qwen-Image": Case(
        diffusers.QwenImagePipeline,
        "qwen",
        {
            **PROMPT,
            **NEGATIVE,
            "prompt_embeds_mask": LONG,
            "negative_prompt_embeds_mask": SHORT,
            "true_cfg_scale": 3.0,
        },
        NO_ENCODERS,
        calls=2,
    ),
    "AuraFlow": Case(
        diffusers.AuraFlowPipeline,
        "auraflow",
        {**PROMPT, **NEGATIVE, "prompt_attention_mask": LONG, "negative_prompt_attention_mask": SHORT},
        NO_ENCODERS,
        is_shifted=False,
    ),
    "CogView3-Plus": Case(
        diffusers.CogView3PlusPipeline,
        "cogview3",
        {**PROMPT, **NEGATIVE},
        NO_ENCODERS,
        scheduler=diffusers.CogVideoXDDIMScheduler,
    ),
    "CogView4": Case(diffusers.CogView4Pipeline, "cogview4", {**PROMPT, **NEGATIVE}, NO_ENCODERS, calls=2),
    "Lumina 2": Case(
        diffusers.Lumina2Pipeline,
        "lumina2",
        {**PROMPT, **NEGATIVE, "prompt_attention_mask": LONG, "negative_prompt_attention_mask": SHORT},
        NO_ENCODERS,
        calls=2,
    ),
    "Z-Image": Case(
        diffusers.ZImagePipeline,
        "z-image",
        {"prompt_embeds": [noise(34, TEXT_DIM, seed=1)], "negative_prompt_embeds": [noise(TEXT, TEXT_DIM, seed=2)]},
        NO_ENCODERS,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("config", [df.ParallelConfig(strategy="sync"), ALWAYS_WARM], ids=["sync", "warm-up"])
def test_a_pipeline_gives_the_latents_of_one_device(name: str, config: df.ParallelConfig) -> None:
    check(CASES[name].make, CASES[name].call, config=config)


@pytest.mark.parametrize("name", CASES)
def test_displaced_steps_run_in_every_branch(name: str) -> None:
    case = CASES[name]
    truth = case.call(case.make())

    def rank(comm: Any) -> tuple[Tensor, df.Report]:
        pipe = df.parallelize(case.make(), DISPLACED, comm)
        return case.call(pipe), df.report(pipe)

    for result, report in df.run_ranks(2, rank):
        assert report.kinds == ["sync"] * case.calls + ["displaced"] * (STEPS - 1) * case.calls
        assert result.isfinite().all()
        assert distance(result, truth) > EXACT


@pytest.mark.parametrize("name", CASES)
def test_branches_on_ranks_of_their_own(name: str) -> None:
    check(CASES[name].make, CASES[name].call, worlds=(2, 4), config=CFG)


def test_columns_and_a_size_that_changes_from_call_to_call() -> None:
    case = CASES["FLUX with two branches"]
    check(case.make, lambda pipe: [case.call(pipe), case.call(pipe, height=80, width=144)], config=COLS)


def test_skipped_layers_of_sd3() -> None:
    """A third call per step, which leaves out a block: it is a branch of its own."""
    case = CASES["SD3"]
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    for config in (df.ParallelConfig(strategy="sync"), ALWAYS_WARM):
        check(case.make, lambda pipe: case.call(pipe, **skipping), config=config)


def wide_flux() -> Any:
    """A FLUX for latents of four channels, which the pipelines' own autoencoder makes."""
    with drawing(1):
        model = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=POOLED,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )
    return randomised(model, 1)


def with_vae(family: Any, transformer: Any, **parts: Any) -> Any:
    vae = copy.deepcopy(sd().vae)
    vae.register_to_config(shift_factor=0.1)
    # SD3's pipeline draws the latents of its control image from torch's global generator: here with a variance of none.
    vae.quant_conv.weight.data[4:].zero_()
    vae.quant_conv.bias.data[4:] = -60.0
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return quiet(family(**{"transformer": transformer, "scheduler": scheduler, **TWO_ENCODERS, **parts, "vae": vae}))


SMALL = {
    **PROMPT,
    **POOLS,
    "height": 56,
    "width": 40,
    "num_inference_steps": STEPS,
    "output_type": "latent",
}


def edited(pipe: Any) -> Tensor:
    """A picture of 8 x 6 tokens from one of 5 x 7."""
    seen = torch.from_numpy(np.array(picture(height=40, width=56))).permute(2, 0, 1)[None] / 255
    generator = torch.Generator().manual_seed(0)
    own = {"height": 64, "width": 48, "max_area": 64 * 48, "_auto_resize": False}
    images = pipe(**{**SMALL, **own}, image=seen, generator=generator).images
    assert isinstance(images, Tensor)
    return images


def controlled(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    extra = NEGATIVE | NEGATIVE_POOLS if isinstance(pipe, diffusers.StableDiffusion3ControlNetPipeline) else {}
    images = pipe(
        **SMALL,
        **extra,
        control_image=picture(height=56, width=40),
        controlnet_conditioning_scale=1.0,
        generator=generator,
    ).images
    assert isinstance(images, Tensor)
    return images


def flux_controlled() -> Any:
    with drawing(2):
        net = diffusers.FluxControlNetModel.from_transformer(
            wide_flux(), num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
        )
    return with_vae(diffusers.FluxControlNetPipeline, wide_flux(), controlnet=randomised(net, 2))


def sd3_controlled() -> Any:
    transformer = build(JOINT["sd3"])
    with drawing(2):
        net = diffusers.SD3ControlNetModel.from_transformer(
            transformer, num_layers=2, num_extra_conditioning_channels=0
        )
    family = diffusers.StableDiffusion3ControlNetPipeline
    return with_vae(family, transformer, controlnet=randomised(net, 2), **THREE_ENCODERS)


CONDITIONED = {
    "Kontext": (lambda: with_vae(diffusers.FluxKontextPipeline, wide_flux()), edited),
    "ControlNet of FLUX": (flux_controlled, controlled),
    "ControlNet of SD3": (sd3_controlled, controlled),
}


@pytest.mark.parametrize("name", CONDITIONED)
@pytest.mark.parametrize("config", [df.ParallelConfig(strategy="sync"), ALWAYS_WARM], ids=["sync", "warm-up"])
def test_pictures_to_look_at_and_controlnets(name: str, config: df.ParallelConfig) -> None:
    check(*CONDITIONED[name], config=config)


def test_every_rank_is_led_by_the_control_image_of_rank_0() -> None:
    """SD3's pipeline draws its latents from torch's global generator, which is another one on each rank."""

    def make(rank: int) -> Any:
        pipe = sd3_controlled()
        pipe.vae.quant_conv.bias.data[:4] += 0.5 * rank
        return pipe

    truth, other = controlled(make(0)), controlled(make(1))
    assert distance(other, truth) > 1000 * EXACT

    def rank(comm: Any) -> tuple[Tensor, bool]:
        pipe = df.parallelize(make(comm.rank), SYNC, comm)
        latents = controlled(pipe)
        df.restore(pipe)
        return latents, bool(pipe.controlnet._forward_pre_hooks)

    for latents, has_hooks in df.run_ranks(3, rank):
        assert distance(latents, truth) <= EXACT
        assert not has_hooks


def test_control_images_of_several_sizes_are_told() -> None:
    class Net(torch.nn.Module):
        def forward(self, controlnet_cond: Tensor) -> Tensor:
            return controlnet_cond

    def rank(comm: Any) -> None:
        net = Net()
        SharedCondition(net, comm).attach()
        net(controlnet_cond=torch.zeros(1, 3 + comm.rank))

    with pytest.raises(df.RanksDisagree, match=r"control image differs: rank 0 has \(1, 3\), torch.float32, rank 1"):
        df.run_ranks(2, rank)


def test_controlnets_of_transformers_are_reported_to_run_whole() -> None:
    def rank(comm: Any) -> tuple[list[str], list[str]]:
        pipe = df.parallelize(flux_controlled(), DISPLACED, comm)
        controlled(pipe)
        return df.report(pipe).notes, df.report(pipe).kinds

    notes = ["FluxControlNetModel runs whole on every rank"]
    assert df.run_ranks(2, rank) == [(notes, ["sync", "displaced", "displaced"])] * 2


def adapted(pipe: Any) -> Any:
    """With a LoRA that changes what tokens become, where they enter and leave, and in both kinds of blocks."""
    config = LoraConfig(
        r=2,
        target_modules=["to_q", "to_v", "add_k_proj", "x_embedder", "proj_out", "proj_mlp"],
        init_lora_weights=False,
    )
    transformer = pipe.transformer
    transformer.add_adapter(config)
    for i, (name, weight) in enumerate(transformer.named_parameters()):
        if "lora_" in name:
            weight.data = 0.3 * noise(*weight.shape, seed=i)
    return pipe


@pytest.mark.parametrize("config", [df.ParallelConfig(strategy="sync"), ALWAYS_WARM], ids=["sync", "warm-up"])
@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
def test_lora_on_flux(config: df.ParallelConfig, is_before: bool) -> None:
    case = CASES["FLUX"]
    plain = case.call(case.make())
    truth = case.call(adapted(case.make()))
    assert distance(truth, plain) > 1000 * EXACT

    def rank(comm: Any) -> list[Tensor]:
        pipe = case.make()
        if is_before:
            pipe = df.parallelize(adapted(pipe), config, comm)
            return [case.call(pipe)]
        pipe = df.parallelize(pipe, config, comm)
        first = case.call(pipe)
        assert distance(first, plain) <= EXACT
        return [case.call(adapted(pipe))]

    for (result,) in df.run_ranks(3, rank):
        assert distance(result, truth) <= EXACT


def test_the_reader_of_a_flux_step_waits_for_no_positions() -> None:
    """Positions are read off the tensor once per picture, not once per step and branch."""
    case, reads = CASES["FLUX with two branches"], [0]

    def counted(read: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any) -> Any:
            reads[0] += 1
            return read(*args)

        return count

    with pytest.MonkeyPatch.context() as patch:
        from distrifusion.models import grid

        patch.setattr(grid, "_read_positions", counted(grid._read_positions))
        df.run_ranks(2, lambda comm: case.call(df.parallelize(case.make(), DISPLACED, comm)))
    assert reads == [2]  # one for each rank
