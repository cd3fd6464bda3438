"""Stages that compute once for two steps (stride=2): what each step gives, how often a unit runs, what is sent."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import distrifusion as df
from async_reference import AsyncReference
from distrifusion.comm import Comm
from distrifusion.metrics import Report
from distrifusion.models import table_for
from distrifusion.strategies.denoiser import ParallelDenoiser
from losses import check_a_lost_rank_is_lost_to_all
from models import build, conditioning, distance, latents
from pipelines import sample, sd
from test_pipelined_transformers import calls, whole
from test_transformers import MODELS, first
from transformers_tiny import build as build_tiny

pytestmark = pytest.mark.usefixtures("unread_memory_is_nan")

EXACT = 1e-5  # see test_pipelined.py
OTHER = 1e-3


def strided(**settings: Any) -> df.ParallelConfig:
    return df.ParallelConfig(**{"strategy": "pipelined", "stride": 2, "warmup_steps": 0, **settings})


def run(
    name: str, world: int, config: df.ParallelConfig, samples: list[Tensor], times: Tensor, **arguments: Any
) -> list[tuple[list[Tensor], Report, Counter[str]]]:
    """Every rank's predictions of a step per sample, with a scheduler's ``times``; and how often which unit ran."""

    def rank(comm: Comm) -> tuple[list[Tensor], Report, Counter[str]]:
        model, runs = build(name), Counter[str]()
        units = [key.removesuffix(".conv1") for key, _ in model.named_modules() if key.endswith(".conv1")]
        for unit in units:  # resnets, whose first convolution is not called where they do not run
            model.get_submodule(f"{unit}.conv1").register_forward_pre_hook(lambda *_, unit=unit: runs.update([unit]))
        parallel = ParallelDenoiser(table_for(model), config, comm, lambda: times)
        results = [model(each, time, **arguments).sample for each, time in zip(samples, times, strict=True)]
        return results, parallel.report, runs

    return df.run_ranks(world, rank)


@pytest.mark.parametrize(("name", "world", "warmup_steps"), [("sd15", 3, 0), ("sdxl", 4, 1), ("ddpm", 2, 0)])
def test_each_stage_computes_once_for_two_steps(name: str, world: int, warmup_steps: int) -> None:
    start, way, arguments = latents(name, 2, 16, 8, seed=5), latents(name, 2, 16, 8, seed=6), conditioning(name, 2)
    num_exact, num_stages = 1 + warmup_steps, world - 1
    samples = [start + 0.5 * i * way for i in range(num_exact + 3)]
    samples += [samples[-1]] * (2 * num_stages + 1)  # the fourth late step begins a round
    times = torch.arange(900, 900 - 10 * len(samples), -10)
    times[num_exact + 3 :] = times[num_exact + 2]
    ran = run(name, world, strided(warmup_steps=warmup_steps), samples, times, **arguments)
    stages = ran[0][1].stages
    assert stages[-1] == stages[-2]  # two ranks have the last stage
    reference, wanted = AsyncReference(build(name), stages[:-1], num_exact), []
    for i in range(num_exact):
        wanted.append(reference.step(samples[i], times[i], **arguments))
    for i in range(num_exact, len(samples), 2):
        now = {"sample": samples[i], "timestep": times[i], **arguments}
        wanted += reference.stride(now, {**now, "timestep": times[min(i + 1, len(times) - 1)]})
    truth = build(name)(samples[-1], times[-1], **arguments).sample
    for place, (results, report, runs) in enumerate(ran):
        assert all(distance(mine, theirs) <= EXACT for mine, theirs in zip(results, wanted, strict=False))
        assert all(torch.equal(mine, other) for mine, other in zip(results, ran[0][0], strict=True))
        assert distance(results[-1], truth) <= EXACT  # a held input, after as many rounds as stages
        assert report.kinds == ["sync"] * num_exact + ["pipelined"] * (len(samples) - num_exact)
        assert report.notes == ["stride=2"]
        num_rounds = len(samples) - num_exact - (len(samples) - num_exact) // 2
        for unit, count in runs.items():
            assert count == num_exact + num_rounds * (unit in stages[place]), unit
        outputs = [output_bytes(samples[0], world)] * (len(samples) - num_exact)
        if place == world - 1:  # the stage's other rank tells the stages
            assert report.bytes[num_exact:] == outputs
    late = build(name)(samples[num_exact + 1], times[num_exact + 1], **arguments).sample
    assert distance(wanted[num_exact + 1], late) > OTHER  # it is of the latents of the step before


def output_bytes(sample: Tensor, world: int) -> int:
    """Bytes of a prediction with the 64 latents to compare, all padded to the largest, to all others."""
    return (sample.numel() + 64) * 4 * (world - 1)


def test_the_time_of_the_next_step_is_told_or_its_lack_reported() -> None:
    """A bare denoiser has no scheduler: all stages are told the time of the present step."""
    name, arguments = "sd15", conditioning("sd15")
    samples = [latents(name, seed=seed) for seed in range(4)]

    def rank(comm: Comm) -> tuple[list[Tensor], Report]:
        model = df.parallelize(build(name), strided(), comm)
        return [model(each, 900 - 50 * i, **arguments).sample for i, each in enumerate(samples)], df.report(model)

    ran = df.run_ranks(3, rank)
    reference = AsyncReference(build(name), ran[0][1].stages[:-1])
    wanted = [reference.step(samples[0], 900, **arguments)]
    now = {"sample": samples[1], "timestep": 850, **arguments}
    wanted += reference.stride(now, now)
    for results, report in ran:
        assert all(distance(mine, theirs) <= EXACT for mine, theirs in zip(results, wanted, strict=False))
        assert [note for note in report.notes if "the time of the next step is not known" in note]


def test_a_transformer_with_a_held_input_is_exact_in_the_end() -> None:
    one, other = calls("pixart", 2)

    def rank(comm: Comm) -> list[Tensor]:
        model = df.parallelize(build_tiny(MODELS["pixart"]), strided(), comm)
        return [first(model(**given)) for given in (one, *[other] * 6)]

    for results in df.run_ranks(3, rank):
        assert distance(results[1], whole("pixart", other)) > OTHER
        assert all(distance(result, whole("pixart", other)) <= EXACT for result in results[5:])


def test_a_pipeline_is_exact_while_it_warms_up_and_the_same_on_all_ranks_after() -> None:
    def rank(comm: Comm, **settings: Any) -> tuple[Tensor, Report]:
        pipe = df.parallelize(sd(), strided(**settings), comm)
        return sample(pipe, num_inference_steps=6), df.report(pipe)

    truth = sample(sd(), num_inference_steps=6)
    for result, report in df.run_ranks(3, lambda comm: rank(comm, warmup_steps=5)):
        assert distance(result, truth) <= EXACT
        assert report.notes == ["stride=2"]
    ran = df.run_ranks(6, lambda comm: rank(comm, warmup_steps=1, cfg=2))
    for result, report in ran:
        assert torch.equal(result, ran[0][0])
        assert torch.isfinite(result).all()
        assert report.kinds == ["sync"] * 2 + ["pipelined"] * 4


def test_a_lost_stage_is_lost_to_all() -> None:
    given, arguments = latents("sd15"), conditioning("sd15")
    check_a_lost_rank_is_lost_to_all(
        lambda: build("sd15"), strided(), 3, lambda model: model(given, 500, **arguments), num_calls=3
    )
