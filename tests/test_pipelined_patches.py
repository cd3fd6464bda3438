"""Patches within stages: a stage's ranks share the picture exactly, and other stages are one step late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import distrifusion as df
from async_reference import AsyncReference
from distrifusion.comm import Comm, Meter
from distrifusion.metrics import Report
from losses import check_a_lost_rank_is_lost_to_all
from models import build, conditioning, distance, latents
from test_pipelined import skips
from test_pipelined_transformers import calls, whole
from test_transformers import MODELS, first
from transformers_tiny import build as build_tiny

EXACT = 1e-5  # see test_pipelined.py
OTHER = 1e-3

pytestmark = [
    pytest.mark.usefixtures("unread_memory_is_nan"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]


def hybrid(**settings: Any) -> df.ParallelConfig:
    return df.ParallelConfig(**{"strategy": "pipelined", "warmup_steps": 0, **settings})


def on_ranks(world: int, make: Any, config: df.ParallelConfig, given: list[Any]) -> list[tuple[list[Tensor], Report]]:
    """Every rank's predictions of the calls ``given``."""

    def rank(comm: Comm) -> tuple[list[Tensor], Report]:
        model = df.parallelize(make(), config, comm)
        return [first(model(**each, return_dict=False)) for each in given], df.report(model)

    return df.run_ranks(world, rank)


def unet_calls(name: str, num: int, height: int, width: int) -> list[dict[str, Any]]:
    """Calls for two pictures, whose latents and times change from step to step."""
    start, way = (latents(name, 2, height, width, seed=seed) for seed in (5, 6))
    given = [{"sample": start + 0.5 * i * way, "timestep": 900 - 50 * i} for i in range(num)]
    arguments = conditioning(name, 2)  # of one picture, while these are the same tensors
    return [{**each, **arguments} for each in given]


def check(ran: list[tuple[list[Tensor], Report]], make: Any, given: list[Any], truth: Tensor, num_exact: int) -> None:
    """Against a reference in which each stage is one step late and nothing is cut; the last calls are all the same."""
    stages = ran[0][1].stages
    reference = AsyncReference(make(), stages, num_exact)
    wanted = [reference.step(**each) for each in given]
    assert distance(wanted[num_exact], truth) > OTHER
    for results, report in ran:
        assert report.stages == stages
        assert all(torch.equal(mine, other) for mine, other in zip(results, ran[0][0], strict=True))
    for i, mine in enumerate(ran[0][0]):
        assert distance(mine, wanted[i]) <= EXACT, i
    assert distance(ran[0][0][-1], truth) <= EXACT


# Rows of latent: 18 over 2 and 17 over 3 patches are uneven at some level of the model, 9 leave a patch without rows.
@pytest.mark.parametrize(
    ("name", "pipe", "patch", "size", "settings"),
    [
        ("sdxl", 3, 2, (17, 10), {"split": "cols", "warmup_steps": 1}),
        ("sd15", 2, 3, (9, 8), {}),
        ("sd21", 2, 2, (18, 8), {"balance": (3, 1)}),
    ],
)
def test_a_unet_is_late_between_stages_and_exact_within(
    name: str, pipe: int, patch: int, size: tuple[int, int], settings: dict[str, Any]
) -> None:
    config = hybrid(pipe=pipe, patch=patch, **settings)
    num_exact = 1 + config.warmup_steps
    given = unet_calls(name, num_exact + 2, *size)
    given += [given[-1]] * pipe
    truth = build(name)(**given[-1]).sample
    ran = on_ranks(pipe * patch, lambda: build(name), config, given)
    check(ran, lambda: build(name), given, truth, num_exact)
    report = ran[0][1]
    assert report.mesh == f"cfg 1 x pipe {pipe} x patch {patch}"
    assert report.kinds == ["sync"] * num_exact + ["pipelined"] * (len(given) - num_exact)
    assert len(report.patches) == patch
    assert sum(report.patches) == size[config.split == "cols"]


@pytest.mark.parametrize(("name", "pipe", "patch"), [("flux", 2, 2), ("pixart", 2, 3), ("hunyuan", 2, 2)])
def test_a_transformer_is_late_between_stages_and_exact_within(name: str, pipe: int, patch: int) -> None:
    given = calls(name, 3)
    given += [given[-1]] * pipe
    ran = on_ranks(pipe * patch, lambda: build_tiny(MODELS[name]), hybrid(pipe=pipe, patch=patch), given)
    check(ran, lambda: build_tiny(MODELS[name]), given, whole(name, given[-1]), 1)


def test_branches_of_guidance_on_ranks_of_their_own() -> None:
    given = unet_calls("sdxl", 3, 16, 8)
    given += [given[-1]] * 2
    ran = on_ranks(8, lambda: build("sdxl"), hybrid(cfg=2, patch=2), given)
    check(ran, lambda: build("sdxl"), given, build("sdxl")(**given[-1]).sample, 1)
    assert ran[0][1].mesh == "cfg 2 x pipe 2 x patch 2"


def test_a_warm_up_as_long_as_the_run_is_exact() -> None:
    given = unet_calls("sd15", 3, 14, 8)
    for results, _ in on_ranks(6, lambda: build("sd15"), hybrid(pipe=3, patch=2, warmup_steps=2), given):
        assert all(
            distance(mine, build("sd15")(**each).sample) <= EXACT for mine, each in zip(results, given, strict=True)
        )


def test_patches_talk_within_a_stage_and_stages_within_a_patch() -> None:
    sample, arguments = latents("sd15", 1, 16, 8), conditioning("sd15")

    def rank(comm: Comm) -> tuple[Report, Meter]:
        model = df.parallelize(build("sd15"), hybrid(pipe=2, patch=2), comm)
        for _ in range(3):
            comm.meter.clear()
            model(sample, 500, **arguments)
        return df.report(model), comm.meter

    ran = df.run_ranks(4, rank)
    readers, sizes = skips("sd15", sample)
    owner = {key: stage for stage, names in enumerate(ran[0][0].stages) for key in names}
    for me, (_, meter) in enumerate(ran):
        stage, patch = divmod(me, 2)
        assert {kind for kind, _ in meter.links} >= {"chunk", "halo"}
        for kind, peer in meter.links:  # peers are counted within the group that talks
            assert kind == "output" or peer == 1 - (stage if kind == "chunk" else patch)
        crossing = [key for key, units in readers.items() if {owner[key], *map(owner.get, units)} == {0, 1}]
        whole = sum(sizes[key] for key in crossing if owner[key] == stage)
        assert meter.bytes["chunk"] == whole // 2  # of a picture in two equal patches


def test_a_lost_rank_is_lost_to_all() -> None:
    sample, arguments = latents("sd15"), conditioning("sd15")
    config = hybrid(pipe=2, patch=2)
    check_a_lost_rank_is_lost_to_all(
        lambda: build("sd15"), config, 4, lambda model: model(sample, 500, **arguments), num_calls=2
    )


@pytest.mark.parametrize(
    ("settings", "world", "message"),
    [
        ({"pipe": 2, "patch": 2}, 6, "a world of 6 does not fit cfg=1 x pipe=2 x patch=2: start 4 ranks"),
        (
            {"patch": 3, "cfg": 2},
            8,
            "a world of 8 does not fit cfg=2 x pipe=any x patch=3: start a multiple of 6 ranks",
        ),
        ({"patch": 2, "balance": (2, 1, 1)}, 4, "balance=2,1,1 has 3 weights for 2 ranks along the picture"),
        ({"patch": 2, "patches": 4}, 4, "patch=2 does not go with patches=4"),
        ({"balance": (2, 1)}, 2, "are weights of patches, which strategy='pipelined' has not without patch="),
        ({"patch": 2, "codec": "int8"}, 4, "codec='int8' does nothing under strategy='pipelined'"),
        ({"patch": 5}, 10, "4 rows of latent cannot be split over 5 ranks"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(settings: dict[str, Any], world: int, message: str) -> None:
    def rank(comm: Comm) -> None:
        model = df.parallelize(build("sd15"), hybrid(**settings), comm)
        model(latents("sd15", 1, 4, 8), 500, **conditioning("sd15"))

    with pytest.raises(df.ConfigError, match=message):
        df.run_ranks(world, rank)
