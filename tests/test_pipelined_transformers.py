"""Stages of diffusion transformers: every class of the plans, exact in the end where the input is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import distrifusion as df
from async_reference import AsyncReference
from distrifusion.metrics import Report
from models import distance
from test_transformers import COLS, EXACT, MODELS, ROWS, first
from transformers_tiny import build

pytestmark = [
    pytest.mark.usefixtures("unread_memory_is_nan"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]


def calls(name: str, num: int) -> list[dict[str, Any]]:
    """Arguments of calls for two pictures, which differ in their latents."""
    arguments = MODELS[name].arguments(2, ROWS, COLS)

    def moved(latents: Any, seed: int) -> Any:
        if isinstance(latents, list):
            return [moved(each, seed) for each in latents]
        return latents + 0.5 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))

    key = MODELS[name].latents
    return [{**arguments, key: moved(arguments[key], seed)} for seed in range(num)]


def whole(name: str, arguments: dict[str, Any]) -> Tensor:
    """One device's, without what is predicted for further pictures."""
    result = first(build(MODELS[name])(**arguments))
    return result.narrow(1, 0, result.shape[1] - MODELS[name].guests(ROWS, COLS))


@pytest.mark.parametrize("name", MODELS)
def test_a_held_input_is_exact_after_as_many_steps_as_stages(name: str) -> None:
    world, (one, other) = 2, calls(name, 2)
    before, after = whole(name, one), whole(name, other)

    def rank(comm: Any) -> tuple[list[Tensor], Report]:
        model = df.parallelize(build(MODELS[name]), df.ParallelConfig(strategy="pipelined", warmup_steps=0), comm)
        return [first(model(**given)) for given in (one, one, *[other] * (world + 2))], df.report(model)

    for results, report in df.run_ranks(world, rank):
        assert report.kinds == ["sync"] + ["pipelined"] * (world + 3)
        assert all(report.stages)
        assert all(distance(result, before) <= EXACT for result in results[:2])
        assert distance(results[2], after) > 10 * EXACT
        assert all(distance(result, after) <= EXACT for result in results[2 + world :])
        assert max(report.messages) <= 8


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_other_stages_are_one_step_late_exactly(name: str) -> None:
    given = calls(name, 4)

    def rank(comm: Any) -> tuple[list[Tensor], Report]:
        model = df.parallelize(build(MODELS[name]), df.ParallelConfig(strategy="pipelined", warmup_steps=1), comm)
        return [first(model(**each)) for each in given], df.report(model)

    ran = df.run_ranks(2, rank)
    reference = AsyncReference(build(MODELS[name]), ran[0][1].stages, 2)
    wanted = [reference.step(**each) for each in given]
    for results, _ in ran:
        assert all(distance(mine, theirs) <= EXACT for mine, theirs in zip(results, wanted, strict=True))


def test_a_call_that_leaves_out_blocks_is_refused_where_too_few_are_left() -> None:
    given = {**calls("sd3", 1)[0], "skip_layers": [1]}  # of three

    def rank(comm: Any) -> str:
        model = df.parallelize(build(MODELS["sd3"]), df.ParallelConfig(strategy="pipelined"), comm)
        with pytest.raises(df.UnsupportedModel) as caught:
            model(**given)
        return str(caught.value)

    assert set(df.run_ranks(3, rank)) == {"3 stages for the 2 parts of the model that run in this call"}
