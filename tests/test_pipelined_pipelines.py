"""Whole pipelines whose U-Net is cut into stages: every scheduler steps on whole predictions, once per step."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import distrifusion as df
from async_reference import AsyncReference
from distrifusion.comm import Comm
from distrifusion.metrics import Report
from models import distance
from pipelines import EXACT, NUMPY_WARNINGS, check, controlnet, picture, sample, sd, sdxl
from test_schedulers import swapped

pytestmark = NUMPY_WARNINGS

PIPELINED = df.ParallelConfig(strategy="pipelined", warmup_steps=1)
WARM = df.ParallelConfig(strategy="pipelined", warmup_steps=1000)


def on_ranks(world: int, config: df.ParallelConfig, call: Any, make: Any = sd) -> list[tuple[Any, Report]]:
    def rank(comm: Comm) -> tuple[Any, Report]:
        pipe = df.parallelize(make(), config, comm)
        return call(pipe), df.report(pipe)

    return df.run_ranks(world, rank)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_schedulers_keep_their_history_over_stale_stages(scheduler: str) -> None:
    def call(pipe: Any) -> Tensor:
        return sample(swapped(pipe, scheduler, {}), num_inference_steps=5)

    ran = on_ranks(3, PIPELINED, call)
    pipe = sd()
    reference = AsyncReference(pipe.unet, ran[0][1].stages, 2)
    pipe.unet.forward = lambda *args, **kwargs: (reference.step(*args, **kwargs),)
    wanted = call(pipe)
    assert distance(wanted, call(sd())) > 100 * EXACT
    for result, report in ran:
        assert distance(result, wanted) <= EXACT
        assert report.kinds == ["sync"] * 2 + ["pipelined"] * (len(report.kinds) - 2)
        assert len(report.kinds) == (9 if scheduler.startswith("Heun") else 5)


def test_two_pictures_in_a_row_are_each_that_of_a_fresh_start() -> None:
    def calls(pipe: Any) -> list[Tensor]:
        return [sample(pipe, "a hill"), sample(pipe, "a lake", seed=2, height=48), sample(pipe, "a hill")]

    (results, _), *_ = on_ranks(2, PIPELINED, calls)
    alone, _ = on_ranks(2, PIPELINED, lambda pipe: sample(pipe, "a hill"))[0]
    assert torch.equal(results[0], alone)
    assert torch.equal(results[2], alone)


def test_callbacks_see_every_step_once() -> None:
    seen: dict[int, list[int]] = {}

    def rank(comm: Comm) -> None:
        steps = seen.setdefault(comm.rank, [])

        def note(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            steps.append(step)
            return values

        sample(df.parallelize(sd(), PIPELINED, comm), num_inference_steps=4, callback_on_step_end=note)

    df.run_ranks(3, rank)
    assert seen == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3], 2: [0, 1, 2, 3]}


@pytest.mark.parametrize("make", [sd, sdxl])
def test_a_pipeline_is_exact_while_it_warms_up(make: Any) -> None:
    check(make, sample, config=WARM)
    config = df.ParallelConfig(strategy="pipelined", cfg=2, warmup_steps=1000)
    check(make, lambda pipe: sample(pipe, output_type="pt"), worlds=(4,), config=config)  # decoded, by all ranks


def test_image_to_image() -> None:
    def make() -> Any:
        return sd(diffusers.StableDiffusionImg2ImgPipeline)

    def call(pipe: Any) -> Tensor:
        return sample(pipe, image=picture(), strength=0.8, num_inference_steps=6, height=..., width=...)

    check(make, call, config=WARM)
    for result, report in on_ranks(2, PIPELINED, call, make):
        assert result.isfinite().all()
        assert report.kinds == ["sync"] * 2 + ["pipelined"] * 2


def test_a_controlnet_runs_whole_on_every_rank() -> None:
    def make() -> Any:
        return sd(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet())

    def call(pipe: Any) -> Tensor:
        return sample(pipe, image=picture(), num_inference_steps=4, height=..., width=...)

    check(make, call, config=WARM)
    ran = on_ranks(3, PIPELINED, call, make)
    pipe = make()
    reference = AsyncReference(pipe.unet, ran[0][1].stages, 2)
    pipe.unet.forward = lambda *args, **kwargs: (reference.step(*args, **kwargs),)
    wanted = call(pipe)
    for result, report in ran:
        assert distance(result, wanted) <= EXACT
        assert report.notes == ["ControlNetModel runs whole on every rank"]
