"""Stages that are told the time of the step before (time_shift=True): which time, in which step, on which rank."""

from __future__ import annotations

from functools import partial
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
from models import build, conditioning, distance, latents
from pipelines import sample, sd
from test_pipelined import walk
from test_pipelined_transformers import calls
from test_transformers import MODELS, first
from transformers_tiny import build as build_tiny

pytestmark = pytest.mark.usefixtures("unread_memory_is_nan")

EXACT = 1e-5  # see test_pipelined.py
OTHER = 1e-3


def shifted(**settings: Any) -> df.ParallelConfig:
    return df.ParallelConfig(**{"strategy": "pipelined", "time_shift": True, "warmup_steps": 0, **settings})


def run(
    name: str, world: int, config: df.ParallelConfig, samples: list[Tensor], times: Tensor, **arguments: Any
) -> list[tuple[list[Tensor], Report]]:
    """Every rank's predictions of a step per sample, with a scheduler's ``times``."""

    def rank(comm: Comm) -> tuple[list[Tensor], Report]:
        model = build(name)
        parallel = ParallelDenoiser(table_for(model), config, comm, lambda: times)
        results = [model(each, time, **arguments).sample for each, time in zip(samples, times, strict=True)]
        return results, parallel.report

    return df.run_ranks(world, rank)


@pytest.mark.parametrize(("name", "settings"), [("sd15", {}), ("sdxl", {"warmup_steps": 1}), ("sd15", {"patch": 2})])
def test_late_steps_of_a_unet_are_told_the_time_before(name: str, settings: dict[str, Any]) -> None:
    """As one process does it step by step, with patches within the stages too."""
    config, arguments = shifted(pipe=2, **settings), conditioning(name, 2)
    samples, num_exact = walk(name, 6, 2, 16, 8), 1 + config.warmup_steps
    times = torch.arange(900, 900 - 100 * len(samples), -100)
    ran = run(name, 2 * (config.patch or 1), config, samples, times, **arguments)
    stages = ran[0][1].stages
    told = [*times[:num_exact], *times[num_exact - 1 : -1]]
    reference = AsyncReference(build(name), stages, num_exact)
    wanted = [reference.step(each, time, **arguments) for each, time in zip(samples, told, strict=True)]
    plain = AsyncReference(build(name), stages, num_exact)
    unshifted = [plain.step(each, time, **arguments) for each, time in zip(samples, times, strict=True)]
    for results, report in ran:
        assert all(distance(mine, theirs) <= EXACT for mine, theirs in zip(results, wanted, strict=True))
        assert report.notes == ["time_shift=True"]
    assert distance(wanted[-1], unshifted[-1]) > OTHER


@pytest.mark.parametrize("name", ["pixart", "z-image"])
def test_late_steps_of_a_transformer_are_told_the_time_before(name: str) -> None:
    """One of them calls its time by another name."""
    key = "t" if name == "z-image" else "timestep"
    given = calls(name, 4)
    times = [given[0][key] * (1 - 0.2 * i) for i in range(len(given))]
    given = [{**each, key: time} for each, time in zip(given, times, strict=True)]

    def rank(comm: Comm) -> tuple[list[Tensor], Report]:
        model = df.parallelize(build_tiny(MODELS[name]), shifted(), comm)
        return [first(model(**each)) for each in given], df.report(model)

    ran = df.run_ranks(2, rank)
    reference, plain = (AsyncReference(build_tiny(MODELS[name]), ran[0][1].stages) for _ in range(2))
    told = [times[0], *times[:-1]]
    wanted = [first((reference.step(**{**each, key: time}),)) for each, time in zip(given, told, strict=True)]
    unshifted = [first((plain.step(**each),)) for each in given]
    for results, _ in ran:
        assert all(distance(mine, theirs) <= EXACT for mine, theirs in zip(results, wanted, strict=True))
    assert distance(wanted[-1], unshifted[-1]) > 10 * EXACT  # random weights look little at the time


def test_a_time_that_is_written_over_is_remembered() -> None:
    """A caller may have one tensor for all steps."""
    name, arguments = "sd15", conditioning("sd15")
    samples = walk(name, 4)

    def rank(comm: Comm, is_one: bool) -> list[Tensor]:
        model, time = df.parallelize(build(name), shifted(), comm), torch.tensor(900)
        results = []
        for each in samples:
            results.append(model(each, time, **arguments).sample)
            time = time.sub_(100) if is_one else time - 100
        return results

    one, several = (df.run_ranks(2, partial(rank, is_one=is_one))[0] for is_one in (True, False))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, several, strict=True))


def test_with_a_stride_of_two_steps_each_rank_is_told_the_time_one_step_before() -> None:
    """The rank for the step at hand that of the last step, all others, which compute for the next, that at hand."""
    name, world, arguments = "sd15", 3, conditioning("sd15")
    samples = walk(name, 7)
    times = torch.arange(900, 900 - 100 * len(samples), -100)
    ran = run(name, world, shifted(stride=2), samples, times, **arguments)
    reference = AsyncReference(build(name), ran[0][1].stages[:-1])
    wanted = [reference.step(samples[0], times[0], **arguments)]
    for i in range(1, len(samples), 2):
        now = {"sample": samples[i], "timestep": times[i - 1], **arguments}
        wanted += reference.stride(now, {**now, "timestep": times[i]})
    for results, report in ran:
        assert all(distance(mine, theirs) <= EXACT for mine, theirs in zip(results, wanted, strict=True))
        assert report.notes == ["stride=2", "time_shift=True"]


@pytest.mark.parametrize("cfg", [1, 2])
def test_a_pipeline_is_exact_while_it_warms_up_and_another_after(cfg: int) -> None:
    def rank(comm: Comm, **settings: Any) -> tuple[Tensor, Report]:
        config = df.ParallelConfig(strategy="pipelined", cfg=cfg, **settings)
        pipe = df.parallelize(sd(), config, comm)
        return sample(pipe, num_inference_steps=5), df.report(pipe)

    def on_ranks(**settings: Any) -> list[tuple[Tensor, Report]]:
        ran = df.run_ranks(2 * cfg, lambda comm: rank(comm, **settings))
        assert all(torch.equal(result, ran[0][0]) for result, _ in ran)
        return ran

    truth = sample(sd(), num_inference_steps=5)
    assert distance(on_ranks(time_shift=True, warmup_steps=4)[0][0], truth) <= EXACT
    (late, report), (plain, _) = (on_ranks(time_shift=on, warmup_steps=1)[0] for on in (True, False))
    assert report.kinds == ["sync"] * 2 + ["pipelined"] * 3
    assert torch.isfinite(late).all()
    assert distance(late, plain) > OTHER


@pytest.mark.parametrize(("world", "settings"), [(1, {}), (2, {"cfg": 2}), (2, {"patch": 2})])
def test_one_stage_has_nothing_to_shift(world: int, settings: dict[str, Any]) -> None:
    def rank(comm: Comm) -> tuple[Tensor, Report]:
        pipe = df.parallelize(sd(), shifted(**settings), comm)
        return sample(pipe, num_inference_steps=3), df.report(pipe)

    truth = sample(sd(), num_inference_steps=3)
    for result, report in df.run_ranks(world, rank):
        assert distance(result, truth) <= EXACT
        assert report.notes == (["time_shift=True does nothing with one stage"] if world > 1 else [])


def test_the_next_picture_begins_with_its_own_time() -> None:
    name, arguments = "sd15", conditioning("sd15")
    given = latents(name)

    def rank(comm: Comm) -> list[list[Tensor]]:
        model = df.parallelize(build(name), shifted(), comm)
        found = []
        for _ in range(2):
            found.append([model(given, time, **arguments).sample for time in (900, 500, 100)])
            df.reset(model)
        return found

    for before, after in df.run_ranks(2, rank):
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
