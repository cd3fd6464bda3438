"""Pipelines of transformers with cross-attention, as they are. Texts come as embeddings: their encoders run whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import distrifusion as df
from models import distance
from mould import Mould
from pipelines import (
    ALWAYS_WARM,
    CFG,
    COLS,
    DISPLACED,
    EXACT,
    NUMPY_WARNINGS,
    SYNC,
    check,
    ddim,
    drawing,
    picture,
    quiet,
    randomised,
    sample,
    sd,
)
from transformers_cross import CROSS, TEXT, TEXT_DIM
from transformers_tiny import Tiny, build, noise

pytestmark = NUMPY_WARNINGS


def _sana(**changes: Any) -> Any:
    return diffusers.SanaTransformer2DModel(  # as the real one: a token for each latent, no positions
        sample_size=16,
        num_layers=3,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT_DIM,
        **changes,
    )


def _sana_guided() -> Any:
    return _sana(guidance_embeds=True, qk_norm="rms_norm_across_heads")


def _dit() -> Any:
    config = {**build(CROSS["dit"]).config, "num_embeds_ada_norm": 1000}
    return diffusers.DiTTransformer2DModel.from_config(config)


def _pixart() -> Any:
    config = {**build(CROSS["pixart"]).config, "use_additional_conditions": False}
    return diffusers.PixArtTransformer2DModel.from_config(config)


# Made before there are ranks, whose threads would draw weights at once.
TRANSFORMERS = {
    "pixart": Mould(build(Tiny(_pixart, dict))),
    "dit": Mould(build(Tiny(_dit, dict))),
    "hunyuan": Mould(build(CROSS["hunyuan"])),
    "sana": Mould(build(Tiny(_sana, dict))),
    "sana-guided": Mould(build(Tiny(_sana_guided, dict))),
}


def without_encoders(family: Any, name: str, scheduler: Any, **more: Any) -> Any:
    """A pipeline of ``family`` with a transformer of its own."""
    settings = {"vae": None, "text_encoder": None, "tokenizer": None, **more}
    return quiet(family(transformer=TRANSFORMERS[name].cast(), scheduler=scheduler, **settings))


def pixart(family: Any, **more: Any) -> Any:
    return without_encoders(family, "pixart", diffusers.DPMSolverMultistepScheduler(), **more)


def hunyuan(family: Any, **more: Any) -> Any:
    settings = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return without_encoders(family, "hunyuan", diffusers.DDPMScheduler(clip_sample=False), **settings, **more)


def sana(family: Any, **more: Any) -> Any:
    return without_encoders(family, "sana", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **more)


def sprint() -> Any:
    return without_encoders(diffusers.SanaSprintPipeline, "sana-guided", diffusers.SCMScheduler())


def dit() -> Any:
    vae = sd().vae  # four latents
    return quiet(diffusers.DiTPipeline(TRANSFORMERS["dit"].cast(), vae, ddim()))


def texts(width: int, suffix: str = "", batch: int = 1) -> dict[str, Tensor]:
    """Embeddings and masks of a prompt and a negative one, as the pipelines call them."""
    mask = torch.ones(batch, TEXT, dtype=torch.int64)
    mask[0, 3:] = 0
    return {
        f"prompt_embeds{suffix}": noise(batch, TEXT, width, seed=1),
        f"negative_prompt_embeds{suffix}": noise(batch, TEXT, width, seed=2),
        f"prompt_attention_mask{suffix}": mask,
        f"negative_prompt_attention_mask{suffix}": mask.flip(0),
    }


def of_text(height: int, width: int, **more: Any) -> Callable[[Any], Tensor]:
    def call(pipe: Any) -> Tensor:
        settings = {"height": height, "width": width, "use_resolution_binning": False, **more}
        has_negative = not isinstance(pipe, diffusers.SanaSprintPipeline)
        embeds = {name: each for name, each in texts(TEXT_DIM).items() if has_negative or "negative" not in name}
        return sample(pipe, None, **embeds, negative_prompt=None if has_negative else ..., **settings)

    return call


def of_two_texts(batch: int = 1, **more: Any) -> Callable[[Any], Tensor]:
    def call(pipe: Any) -> Tensor:
        settings = {"height": 112, "width": 80, "use_resolution_binning": False, **more}  # 7 x 5 tokens
        return sample(pipe, None, **texts(10, batch=batch), **texts(8, "_2", batch=batch), **settings)

    return call


def of_classes(pipe: Any) -> Tensor:
    labels, generator = [3, 500], torch.Generator().manual_seed(0)
    return pipe(labels, num_inference_steps=3, generator=generator, output_type="pt").images


PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "PixArtAlpha": (lambda: pixart(diffusers.PixArtAlphaPipeline), of_text(112, 80)),
    "PixArtSigma": (lambda: pixart(diffusers.PixArtSigmaPipeline), of_text(112, 80)),
    "PixArtSigmaPAG": (
        lambda: pixart(diffusers.PixArtSigmaPAGPipeline, pag_applied_layers=["transformer_blocks.1"]),
        of_text(112, 80),
    ),
    "DiT": (dit, of_classes),
    "HunyuanDiT": (lambda: hunyuan(diffusers.HunyuanDiTPipeline), of_two_texts()),
    "HunyuanDiTPAG": (
        lambda: hunyuan(diffusers.HunyuanDiTPAGPipeline, pag_applied_layers=["blocks.1"]),
        of_two_texts(),
    ),
    "Sana": (lambda: sana(diffusers.SanaPipeline), of_text(224, 160)),
    "SanaPAG": (
        lambda: sana(diffusers.SanaPAGPipeline, pag_applied_layers=["transformer_blocks.1"]),
        # Its latents are 8 pixels wide without a VAE. Quotients of small sums, made larger by two guidances: at the
        # default scales, one device is 1e-5 from itself with these products in float64.
        of_text(96, 64, guidance_scale=2.0, pag_scale=1.0),
    ),
    "SanaSprint": (sprint, of_text(224, 160, intermediate_timesteps=None)),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_sync_equals_one_device(name: str) -> None:
    check(*PIPELINES[name])


@pytest.mark.parametrize("name", PIPELINES)
def test_displaced_in_warm_up_equals_one_device(name: str) -> None:
    check(*PIPELINES[name], config=ALWAYS_WARM)


@pytest.mark.parametrize("name", PIPELINES)
def test_displaced_steps_run_and_are_near_one_device(name: str) -> None:
    make, call = PIPELINES[name]
    truth = call(make())

    def rank(comm: Any, config: df.ParallelConfig) -> tuple[Tensor, list[str]]:
        pipe = df.parallelize(make(), config, comm)
        return call(pipe), df.report(pipe).kinds

    naive = df.run_ranks(2, lambda comm: rank(comm, df.ParallelConfig(strategy="naive")))[0][0]
    for result, kinds in df.run_ranks(2, lambda comm: rank(comm, DISPLACED)):
        assert kinds == ["sync", "displaced", "displaced"]
        assert EXACT < distance(result, truth) < distance(naive, truth)


def test_text_that_is_cast_anew_at_every_step_is_one_text() -> None:
    """Sana's pipeline casts what its encoder gives to the transformer's dtype in each step."""
    embeds = {name: each.bfloat16() if "embeds" in name else each for name, each in texts(TEXT_DIM).items()}
    size = {"height": 224, "width": 160, "use_resolution_binning": False, "negative_prompt": None}

    def rank(comm: Any) -> list[str]:
        pipe = df.parallelize(sana(diffusers.SanaPipeline), DISPLACED, comm)
        sample(pipe, None, **embeds, **size)
        return df.report(pipe).kinds

    assert df.run_ranks(2, rank) == [["sync", "displaced", "displaced"]] * 2


@pytest.mark.parametrize("name", ["PixArtSigma", "DiT", "HunyuanDiT", "Sana"])
def test_the_branches_of_guidance_on_ranks_of_their_own(name: str) -> None:
    check(*PIPELINES[name], worlds=(2, 4), config=CFG)
    check(*PIPELINES[name], worlds=(4,), config=replace(CFG, split="cols"))


@pytest.mark.parametrize("name", [name for name in PIPELINES if name.endswith("PAG")])
def test_pag_keeps_its_branches_together(name: str) -> None:
    make, call = PIPELINES[name]
    with pytest.raises(df.ConfigError, match="cfg=2 does not work with PAG"):
        df.run_ranks(2, lambda comm: call(df.parallelize(make(), CFG, comm)))


@pytest.mark.parametrize("name", ["HunyuanDiT", "Sana"])
def test_one_pipeline_takes_other_sizes_and_batches(name: str) -> None:
    make, call = PIPELINES[name]
    larger = {"HunyuanDiT": of_two_texts(batch=2, height=80), "Sana": of_text(160, 224)}[name]
    check(make, lambda pipe: (call(pipe), larger(pipe), call(pipe)), worlds=(3,), config=COLS)


@cache
def _vae() -> Any:
    with drawing(4):
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            norm_num_groups=2,
        ).eval()
    # The pipeline draws the latents of the control image with torch's global generator, which ranks here share.
    vae.quant_conv.weight.data[4:] = 0
    vae.quant_conv.bias.data[4:] = -30
    return vae.requires_grad_(False)


@cache
def _deep_compression_vae() -> Any:
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_block_types"] = "ResBlock"
        sides[f"{side}_block_out_channels"] = (4, 4, 4, 4)
        sides[f"{side}_layers_per_block"] = (1, 1, 1, 1)
        sides[f"{side}_qkv_multiscales"] = ((), (), (), ())
    with drawing(4):
        vae = diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=2, **sides)
    return vae.eval().requires_grad_(False)


@cache
def _controlnet(family: Any, name: str, **changes: Any) -> Any:
    with drawing(3):
        net = family.from_config(TRANSFORMERS[name].cast().config, **changes)
    return randomised(net, seed=3)


def hunyuan_controlled() -> Any:
    net = _controlnet(diffusers.HunyuanDiT2DControlNetModel, "hunyuan", transformer_num_layers=6)
    return hunyuan(diffusers.HunyuanDiTControlNetPipeline, controlnet=copy.deepcopy(net), vae=copy.deepcopy(_vae()))


def sana_controlled() -> Any:
    net = _controlnet(diffusers.SanaControlNetModel, "sana", num_layers=2)
    vae = _deep_compression_vae()
    return sana(diffusers.SanaControlNetPipeline, controlnet=copy.deepcopy(net), vae=vae)


CONTROLLED: dict[str, tuple[Callable[[], Any], Callable[..., Callable[[Any], Tensor]]]] = {
    "HunyuanDiT2DControlNetModel": (
        hunyuan_controlled,
        lambda **more: of_two_texts(control_image=picture(height=112, width=80), **more),
    ),
    "SanaControlNetModel": (
        sana_controlled,
        lambda **more: of_text(96, 64, control_image=picture(height=96, width=64), **more),
    ),
}


@pytest.mark.parametrize("config", [SYNC, ALWAYS_WARM, COLS])
@pytest.mark.parametrize("name", CONTROLLED)
def test_controlnets_run_whole_and_their_residuals_are_cut(name: str, config: df.ParallelConfig) -> None:
    make, calls = CONTROLLED[name]
    without, controlled = calls(controlnet_conditioning_scale=0.0), calls()
    assert distance(without(make()), controlled(make())) > 1000 * EXACT  # or a residual lost would not show
    check(make, controlled, config=config)
    notes = df.run_ranks(2, lambda comm: df.report(df.parallelize(make(), config, comm)).notes)
    assert [[note for note in each if "Autoencoder" not in note] for each in notes] == [
        [f"{name} runs whole on every rank"]
    ] * 2


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_lora_of_sana_counts_in_sums_and_convolutions() -> None:
    """Loaded after it is parallel, in the linear attention and in all convolutions of the feed-forward."""
    make, call = PIPELINES["Sana"]
    # conv_depth is of 80 groups, each of which takes an equal part of the rank
    targets = LoraConfig(
        r=80,
        lora_alpha=20,
        target_modules=["attn1.to_q", "attn1.to_k", "attn1.to_v", "conv_inverted", "conv_depth", "conv_point"],
        init_lora_weights=False,
    )

    def adapted(pipe: Any) -> tuple[Tensor, Tensor]:
        plain = call(pipe)
        with drawing(5):
            pipe.transformer.add_adapter(targets)
        return plain, call(pipe)

    plain, changed = adapted(make())
    assert distance(changed, plain) > 1000 * EXACT
    check(make, adapted, config=SYNC)
    check(make, adapted, config=ALWAYS_WARM)
