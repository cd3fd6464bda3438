"""Guidance in two calls per step: with cfg=2 each half of the ranks computes one, and the picture is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.strategies.later import Later
from models import distance
from transformers_joint import JOINT
from transformers_tiny import build_double, doubled, noise

EXACT = 1e-12  # in float64: guidance and steps multiply float32's rounding, which would reach 1e-5 by itself
STEPS = 5
TEXTS = noise(1, 5, 6).double(), noise(1, 5, 6, seed=78).double()
Read = Callable[[Tensor], Tensor]


def guided(model: Any, *, read: Read = lambda first: first, until: int = STEPS) -> Tensor:
    """A loop as in the pipelines.

    ``read`` is what they do with the first prediction before the second call, ``until`` the step from which on there is
    no second.
    """
    arguments = doubled(JOINT["sd3"].arguments(1, 7, 5))
    latents = arguments.pop("hidden_states")
    for step in range(STEPS):
        time = torch.full((1,), 900.0 - 100 * step)
        calls = [{**arguments, "timestep": time, "encoder_hidden_states": text} for text in TEXTS]
        prediction = read(model(hidden_states=latents, **calls[0])[0])
        if step < until:
            other = model(hidden_states=latents, **calls[1], return_dict=False)[0]
            prediction = other + 3.0 * (prediction - other)
        latents = latents - 0.1 * prediction
    return latents


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a part": {"read": lambda first: first[:, :, : first.shape[2]]},
    "looked at early": {"read": lambda first: first * 1.0},
    "the first alone from step 3 on": {"until": 3},
    "never two": {"until": 0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", [2, 4, 6])
def test_two_calls_on_two_halves_equal_one_device(way: str, world: int) -> None:
    truth = guided(build_double(JOINT["sd3"]), **WAYS[way])

    def rank(comm: Any) -> Tensor:
        return guided(
            df.parallelize(build_double(JOINT["sd3"]), df.ParallelConfig(strategy="sync", cfg=2), comm), **WAYS[way]
        )

    for result in df.run_ranks(world, rank):
        assert type(result) is Tensor
        assert distance(result, truth) <= EXACT


@pytest.mark.parametrize(
    ("way", "first_half", "second_half"),
    [("plain", 6, 6), ("a part", 6, 6), ("never two", 5, 5), ("the first alone from step 3 on", 6, 4)],
)
def test_each_half_computes_its_own_call(way: str, first_half: int, second_half: int) -> None:
    """After the first step, in which nobody knows yet how many calls there are, a half computes one call of two."""

    def rank(comm: Any) -> tuple[int, int]:
        model = df.parallelize(build_double(JOINT["sd3"]), df.ParallelConfig(strategy="sync", cfg=2), comm)
        runs: list[int] = []
        model.transformer_blocks[0].register_forward_hook(lambda *_: runs.append(1))
        guided(model, **WAYS[way])
        return len(runs), len(df.report(model).kinds)

    assert df.run_ranks(2, rank) == [(first_half,) * 2, (second_half,) * 2]


def test_displaced_keeps_a_state_per_call() -> None:
    """With a held input, and with warm-up as long as the run, displaced halves equal one device."""
    truth = guided(build_double(JOINT["sd3"]), **WAYS["plain"])
    config = df.ParallelConfig(strategy="displaced", cfg=2, warmup_steps=STEPS)
    for result in df.run_ranks(4, lambda comm: guided(df.parallelize(build_double(JOINT["sd3"]), config, comm))):
        assert distance(result, truth) <= EXACT

    arguments = doubled(JOINT["sd3"].arguments(1, 7, 5))
    wanted = [build_double(JOINT["sd3"])(**{**arguments, "encoder_hidden_states": text})[0] for text in TEXTS]
    late = df.ParallelConfig(strategy="displaced", cfg=2, warmup_steps=0)

    def rank(comm: Any) -> Any:
        model = df.parallelize(build_double(JOINT["sd3"]), late, comm)
        for _ in range(4):
            made = [model(**{**arguments, "encoder_hidden_states": text})[0] for text in TEXTS]
        return [each + 0 for each in made], df.report(model).kinds

    for made, kinds in df.run_ranks(4, rank):
        assert all(distance(each, want) <= EXACT for each, want in zip(made, wanted, strict=True))
        assert kinds == ["sync", "sync", "displaced", "displaced", "displaced"]


def test_all_ranks_have_one_picture_however_the_calls_come() -> None:
    """Displaced halves are late by different steps; what one half computes is what all ranks get."""
    config = df.ParallelConfig(strategy="displaced", cfg=2, warmup_steps=0)
    for way in WAYS:

        def rank(comm: Any, way: str = way) -> Tensor:
            return guided(df.parallelize(build_double(JOINT["sd3"]), config, comm), **WAYS[way])

        first, *others = df.run_ranks(4, rank)
        assert first.isfinite().all()
        assert all(torch.equal(first, other) for other in others)


def test_a_later_asks_once_and_only_when_it_must() -> None:
    asked: list[int] = []
    value = noise(2, 3)

    def ask() -> Tensor:
        asked.append(1)
        return value

    later = Later(torch.empty(2, 3), ask)
    part = later[:, 1:][0]
    assert (later.shape, later.dtype, part.shape) == ((2, 3), torch.float32, (2,))
    assert "Later" in repr(later)
    assert not asked
    assert torch.equal(part + 0, value[0, 1:])
    assert torch.equal(2 * later, 2 * value)
    assert asked == [1]
    filled = Later(torch.empty(2, 3), ask)
    filled.fill(value + 1)
    assert torch.equal(torch.cat([filled, value]), torch.cat([value + 1, value]))
    assert asked == [1]
