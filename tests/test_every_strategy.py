"""What every strategy must do, on whole pipelines. `test_strategies.py` asks the same of bare denoisers, where it can.

A strategy that is added to `BUILT` is asked all of it without a word here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.comm import Comm
from distrifusion.config import BUILT
from models import distance
from pipelines import picture, sample, sd

EXACT = 1e-5  # see test_unet_exact.py
AS_ONE_DEVICE = ("sync", "tensor")

CASES = [
    pytest.param(
        df.ParallelConfig(strategy=name, cfg=cfg, split=split, warmup_steps=warm), world, id=f"{name}-cfg{cfg}"
    )
    for name in BUILT
    for cfg, split, world, warm in ((1, "rows", 3, 0), (2, "cols", 4, 1))
]
# Two axes at once, beside those that each strategy has.
CASES.append(pytest.param(df.ParallelConfig(strategy="pipelined", patch=2, warmup_steps=0), 4, id="pipelined-patch2"))
every = pytest.mark.parametrize(("config", "world"), CASES)
# The third without a warm-up is made of what was late itself; with one, of what was synchronous.
STEPS = 3

Call = Callable[[Any], Any]


def on_ranks(config: df.ParallelConfig, world: int, *calls: Call, make: Callable[[], Any] = sd) -> list[list[Any]]:
    """What ``calls`` give, one after the other, on each rank of one pipeline."""

    def rank(comm: Comm) -> list[Any]:
        pipe = df.parallelize(make(), config, comm)
        return [call(pipe) for call in calls]

    return df.run_ranks(world, rank)


def first(pipe: Any) -> Tensor:
    return sample(pipe, num_inference_steps=STEPS)


def other(pipe: Any) -> Tensor:
    return sample(pipe, "a lake", seed=1, num_inference_steps=STEPS, height=72, width=48, guidance_scale=2.0)


def unguided(pipe: Any) -> Tensor:
    return sample(pipe, "a lake", seed=2, num_inference_steps=STEPS, guidance_scale=1.0)


def restored(pipe: Any) -> Tensor:
    return first(df.restore(pipe))


@cache
def one_device() -> Tensor:
    return first(sd())


@cache
def in_turn(config: df.ParallelConfig, world: int) -> list[list[Tensor]]:
    """On each rank of one pipeline: a picture, the same again, two others, and the first without any ranks."""
    return on_ranks(config, world, first, first, other, unguided, restored)


@pytest.mark.parametrize("name", BUILT)
def test_a_world_of_one_changes_nothing(name: Any) -> None:
    assert torch.equal(on_ranks(df.ParallelConfig(strategy=name), 1, first)[0][0], one_device())


@every
def test_all_ranks_end_with_the_same_whole_picture(config: df.ParallelConfig, world: int) -> None:
    ran = in_turn(config, world)
    for result, *_ in ran:
        assert type(result) is Tensor
        assert torch.equal(result, ran[0][0])
        # Seams, staleness: a picture of something else would be 1.4 away.
        assert distance(result, one_device()) <= (EXACT if config.strategy in AS_ONE_DEVICE else 0.5)


@every
def test_calls_one_after_the_other_give_what_each_gives_alone(config: df.ParallelConfig, world: int) -> None:
    """Other sizes, prompts, guidance; the second of two like calls starts anew."""
    ran = in_turn(config, world)
    alone = [ran[0][0], ran[0][0], *(on_ranks(config, world, call)[0][0] for call in (other, unguided))]
    for *results, _ in ran:
        for result, truth in zip(results, alone, strict=True):
            assert distance(result, truth) <= EXACT


@every
def test_restore_gives_back_the_pipeline(config: df.ParallelConfig, world: int) -> None:
    for *_, after in in_turn(config, world):
        assert torch.equal(after, one_device())


@every
def test_pictures_of_a_batch_do_not_see_each_other(config: df.ParallelConfig, world: int) -> None:
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    prompts = ["a hill", "a lake"]

    def both(pipe: Any) -> Tensor:
        return sample(pipe, prompts, latents=noise.clone(), num_inference_steps=STEPS)

    def single(i: int) -> Call:
        return lambda pipe: sample(pipe, prompts[i], latents=noise[i : i + 1].clone(), num_inference_steps=STEPS)

    for together, *apart in on_ranks(config, world, both, single(0), single(1)):
        assert distance(together, torch.cat(apart)) <= EXACT


@every
def test_a_callback_sees_the_latents_and_may_change_them(config: df.ParallelConfig, world: int) -> None:
    def painted(factor: float) -> Call:
        def call(pipe: Any) -> tuple[Tensor, np.ndarray]:
            seen: list[np.ndarray] = []

            def look(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                seen.append(tensors["latents"].cpu().numpy().copy())
                return {"latents": tensors["latents"] * factor}

            return sample(pipe, callback_on_step_end=look, num_inference_steps=STEPS), np.stack(seen)

        return call

    ran = on_ranks(config, world, painted(1.0), painted(0.5))
    for (same, seen), (changed, _) in ran:
        assert torch.equal(same, in_turn(config, world)[0][0])
        assert np.array_equal(seen, ran[0][0][1])
        assert np.array_equal(seen[-1], same.numpy())
        assert distance(changed, same) > 0.1


@every
def test_image_to_image(config: df.ParallelConfig, world: int) -> None:
    """Fewer steps than the scheduler has, which begin in the middle."""

    def make() -> Any:
        return sd(diffusers.StableDiffusionImg2ImgPipeline)

    def call(pipe: Any) -> Tensor:
        size = {"height": ..., "width": ..., "num_inference_steps": 2 * STEPS}
        return sample(pipe, image=picture(), strength=0.5, **size)

    truth = call(make())
    ran = on_ranks(config, world, call, make=make)
    for (result,) in ran:
        assert type(result) is Tensor
        assert torch.equal(result, ran[0][0])
        assert distance(result, truth) <= (EXACT if config.strategy in AS_ONE_DEVICE else 0.5)


@every
@pytest.mark.parametrize("step", [0, STEPS - 2])
def test_a_lost_peer_ends_the_picture_for_all(config: df.ParallelConfig, world: int, step: int) -> None:
    lost: list[int] = []

    def rank(comm: Comm) -> None:
        pipe = df.parallelize(sd(), config, comm)

        def leave(_: Any, at: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if comm.rank == 1 and at == step:
                raise RuntimeError("out of memory")
            return {}

        try:
            sample(pipe, callback_on_step_end=leave, num_inference_steps=STEPS)
        except df.PeerLost:
            lost.append(comm.rank)
            raise

    with pytest.raises(RuntimeError, match="out of memory"):
        df.run_ranks(world, rank)
    assert sorted(lost) == [each for each in range(world) if each != 1]
