"""Every scheduler that Stable Diffusion's pipeline takes: timesteps are left alone, the calls are one picture."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import is_scipy_available, is_torchsde_available
from torch import Tensor

import distrifusion as df
from models import distance
from pipelines import DISPLACED, EXACT, NUMPY_WARNINGS, SYNC, check, ddim, sample, sd, sdxl

pytestmark = NUMPY_WARNINGS

COMPATIBLE = sorted(family.__name__ for family in ddim().compatibles)
MISSING = {"DPMSolverSDEScheduler": is_torchsde_available(), "LMSDiscreteScheduler": is_scipy_available()}
SECOND_ORDER = {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in COMPATIBLE),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
]


def swapped(pipe: Any, name: str, changes: dict[str, Any]) -> Any:
    family = getattr(diffusers, name)
    settings = {} if name == "EDMEulerScheduler" else dict(pipe.scheduler.config)  # its sigmas are its own
    pipe.scheduler = family.from_config(settings, **changes)
    return pipe


@pytest.mark.parametrize(("name", "changes"), CASES, ids=lambda value: str(value))
def test_a_scheduler_put_in_after_parallelize(name: str, changes: dict[str, Any]) -> None:
    if not MISSING.get(name, True):
        pytest.skip(f"what {name} needs is not installed")
    steps = 10 if name == "PNDMScheduler" and not changes else 4  # its Runge-Kutta start takes more

    def call(pipe: Any) -> tuple[Tensor, list[tuple[torch.dtype, float]]]:
        times: list[tuple[torch.dtype, float]] = []
        hook = pipe.unet.time_proj.register_forward_pre_hook(
            lambda _, args: times.append((args[0].dtype, args[0][0].item()))
        )
        result = sample(swapped(pipe, name, changes), num_inference_steps=steps)
        hook.remove()
        return result, times

    truth, times = call(sd())
    assert truth.isfinite().all()
    if name in SECOND_ORDER:
        assert len(times) > steps

    def rank(comm: Any) -> tuple[Any, list[str]]:
        exact = call(df.parallelize(sd(), SYNC, comm))
        pipe = df.parallelize(sd(), DISPLACED, comm)
        call(pipe)
        return exact, df.report(pipe).kinds

    for (result, seen), kinds in df.run_ranks(2, rank):
        assert distance(result, truth) <= EXACT
        assert seen == times  # dtype and value, to the last digit
        assert kinds == ["sync"] + ["displaced"] * (len(times) - 1)


def test_the_cases_are_what_the_pipeline_takes() -> None:
    assert set(COMPATIBLE) >= SECOND_ORDER | {"EulerDiscreteScheduler", "EDMEulerScheduler", "UniPCMultistepScheduler"}


def test_some_timesteps_are_fractions() -> None:
    pipe = swapped(sd(), "EulerDiscreteScheduler", {"use_karras_sigmas": True})
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.is_floating_point()
    assert (pipe.scheduler.timesteps % 1 != 0).any()


def test_a_swap_starts_a_new_picture_and_leaves_the_old_scheduler_as_it_was() -> None:
    def rank(comm: Any) -> list[list[str]]:
        pipe = df.parallelize(sd(), DISPLACED, comm)
        sample(pipe)
        kinds = [df.report(pipe).kinds]
        old, before = pipe.scheduler, set(vars(pipe.scheduler))
        swapped(pipe, "HeunDiscreteScheduler", {})
        sample(pipe)
        kinds.append(df.report(pipe).kinds)
        assert set(vars(old)) == before
        assert not any(callable(value) for value in vars(old).values())
        return kinds

    one, two = ["sync"] + ["displaced"] * 2, ["sync"] + ["displaced"] * 4
    assert df.run_ranks(2, rank) == [[one, two]] * 2


def test_timesteps_and_sigmas_given_by_the_user() -> None:
    def calls(pipe: Any) -> list[Tensor]:
        swapped(pipe, "DPMSolverMultistepScheduler", {})
        spaced = sample(pipe, timesteps=[900, 500, 301, 20], num_inference_steps=...)
        swapped(pipe, "EulerDiscreteScheduler", {})
        return [spaced, sample(pipe, sigmas=[12.0, 5.0, 1.5, 0.3], num_inference_steps=...)]

    check(sd, calls, worlds=(3,))


def test_a_refiner_takes_over_halfway() -> None:
    def calls(pipe: Any) -> Tensor:
        started = sample(pipe, denoising_end=0.5, num_inference_steps=4)
        img2img = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(pipe, add_watermarker=False)
        img2img.set_progress_bar_config(disable=True)
        return sample(
            img2img, image=started, denoising_start=0.5, num_inference_steps=4, height=..., width=..., strength=...
        )

    check(sdxl, calls, worlds=(2,))
