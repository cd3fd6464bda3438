"""Patches that stand alone and move: what they give, what travels, and latents that stay in rows between the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.comm import Comm, alone
from distrifusion.geometry import Levels, Moved, Split, moves
from distrifusion.metrics import Report
from distrifusion.strategies.base import State
from distrifusion.strategies.independent import Shifted
from distrifusion.strategies.rows import Rows, Sharing
from models import build, conditioning, distance, latents
from pipelines import NUMPY_WARNINGS, controlnet, drawing, picture, sample, sd, sdxl

EXACT = 1e-5  # see test_unet_exact.py
OTHER = 1e-3


def shifted(**settings: Any) -> df.ParallelConfig:
    """Patches that know nothing of the rest; those that remember it are in test_recall.py."""
    return df.ParallelConfig(**{"strategy": "shifted", "warmup_steps": 0, "remember": False, **settings})


def paint(
    config: df.ParallelConfig,
    world: int,
    make: Callable[[], Any] = sd,
    call: Callable[..., Any] = sample,
    **arguments: Any,
) -> list[tuple[Any, Report]]:
    def rank(comm: Comm) -> tuple[Any, Report]:
        pipe = df.parallelize(make(), config, comm)
        return call(pipe, **arguments), df.report(pipe)

    return df.run_ranks(world, rank)


# --- what they give ---


@pytest.mark.parametrize("remember", [True, False])
@pytest.mark.parametrize(("world", "split", "height"), [(2, "rows", 64), (3, "cols", 64), (5, "rows", 72)])
def test_a_shift_of_nothing_is_naive_bit_for_bit(world: int, split: Any, height: int, remember: bool) -> None:
    """With a memory, too: a patch that rests never sees another place."""
    naive = paint(df.ParallelConfig(strategy="naive", split=split), world, height=height)
    for (result, report), (wanted, _) in zip(
        paint(shifted(shift=0, split=split, remember=remember), world, height=height), naive, strict=True
    ):
        assert type(result) is Tensor
        assert torch.equal(result, wanted)
        assert report.kinds == ["shifted"] * 3


def crops(model: Any, whole: Tensor, moved: Moved, dim: int, arguments: dict[str, Any]) -> Tensor:
    """Each window's strips as pictures of their own, by the plain model; needs windows that no edge divides."""
    result = torch.zeros_like(whole)
    for patch in range(moved.split.num_patches):
        window = moved.window(patch)
        rows = torch.arange(window.start, window.stop) % moved.split.size
        part = model(whole.index_select(dim, rows).contiguous(), 900, **arguments).sample
        result.index_copy_(dim, rows, part)
    return result


@pytest.mark.parametrize(("split", "dim"), [("rows", 2), ("cols", 3)])
@pytest.mark.parametrize("topology", ["plane", "torus"])
@pytest.mark.parametrize("name", ["sdxl", "ddim"])
def test_a_moved_patch_is_a_picture_of_its_own(name: str, split: Any, dim: int, topology: Any) -> None:
    """On a torus a patch lies across the seam; on a plane its two parts share norms and attention, and no border."""
    sample, arguments = latents(name, 2, 24, 24), conditioning(name, 2)
    config = shifted(shift=5, split=split, topology=topology)

    def rank(comm: Comm) -> Tensor:
        model = df.parallelize(build(name), config, comm)
        model(sample, 900, **arguments)
        return model(sample, 900, **arguments).sample

    moved = Moved(Split((0, 8, 16, 24), is_ring=topology == "torus", origin=5))
    alone = build(name)
    if topology == "torus":
        for module in alone.modules():
            if isinstance(module, torch.nn.Conv2d) and any(module.padding):
                _wrap_across(module, dim)
    wanted = crops(alone, sample, moved, dim, arguments)
    inner = slice(5, 21) if topology == "plane" else slice(None)
    for result in df.run_ranks(3, rank):
        results, truths = (x.transpose(2, dim)[:, :, inner] for x in (result, wanted))
        assert distance(results, truths) <= EXACT
        if topology == "plane":  # the last patch is rows 21-24 and 0-5, and the crop has let them touch
            assert distance(result.transpose(2, dim)[:, :, 21:], wanted.transpose(2, dim)[:, :, 21:]) > OTHER


def _wrap_across(module: Any, dim: int) -> None:
    """Circular padding in the dim that is not split, in front of the plain convolution."""
    pads = [module.padding[1]] * 2 + [0, 0] if dim == 2 else [0, 0] + [module.padding[0]] * 2
    module.padding = (module.padding[0], 0) if dim == 2 else (0, module.padding[1])
    module.register_forward_pre_hook(lambda _, args: (torch.nn.functional.pad(args[0], pads, mode="circular"),))


@pytest.mark.parametrize("settings", [{"shift": 0}, {"overlap": 1}, {"shift": 3, "remember": True}])
@pytest.mark.parametrize(("name", "world"), [("resnet-resample", 3), ("deepfloyd", 5), ("ddpm", 7)])
def test_patches_of_odd_rows_of_models_that_halve_even_ones(name: str, world: int, settings: dict[str, Any]) -> None:
    """Down to a single row: a picture that all ranks have, and not one of something else, which would be 1.4 away."""
    sample, arguments = latents(name, 1, 16, 8), conditioning(name, 1)

    def rank(comm: Comm) -> list[Tensor]:
        model = df.parallelize(build(name), shifted(**settings), comm)
        return [model(sample, 900, **arguments).sample for _ in range(3)]

    truth = build(name)(sample, 900, **arguments).sample
    first, *others = df.run_ranks(world, rank)
    for result in first:
        assert OTHER < distance(result, truth) < 1.4
    for results in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, first, strict=True))


def test_the_two_parts_of_a_patch_that_the_edge_divides_do_not_touch() -> None:
    """Two strips joined by nothing but attention and norms: those of one strip alone, when the other is the same."""
    name = "ddim"
    sample, arguments = latents(name, 1, 24, 16), conditioning(name)
    sample[:, :, 20:] = sample[:, :, :4]  # the last patch is rows 20-24 and 0-4

    def rank(comm: Comm) -> Tensor:
        model = df.parallelize(build(name), shifted(shift=4), comm)
        model(sample, 900, **arguments)
        return model(sample, 900, **arguments).sample

    # Attention to everything twice, and statistics of everything twice, are those of it once.
    truth = build(name)(sample[:, :, :4].contiguous(), 900, **arguments).sample
    for result in df.run_ranks(3, rank):
        assert distance(result[:, :, :4], truth) <= EXACT
        assert distance(result[:, :, 20:], truth) <= EXACT


@pytest.mark.parametrize(("world", "split"), [(2, "rows"), (3, "cols"), (5, "rows")])
def test_synchronous_steps_come_first_and_are_exact(world: int, split: Any) -> None:
    truth = sample(sd(), num_inference_steps=4)
    for result, report in paint(shifted(warmup_steps=4, split=split), world, num_inference_steps=4):
        assert distance(result, truth) <= EXACT
        assert report.kinds == ["sync"] * 4
    (result, report), *_ = paint(shifted(warmup_steps=3, split=split), world, num_inference_steps=4)
    assert report.kinds == ["sync"] * 3 + ["shifted"]
    assert distance(result, truth) > EXACT


@pytest.mark.parametrize("shift", ["golden", 3])
def test_moving_borders_are_nearer_to_one_device_than_resting_ones(shift: Any) -> None:
    truth = sample(sd(), num_inference_steps=12)
    apart = [
        distance(paint(config, 2, num_inference_steps=12)[0][0], truth)
        for config in (shifted(shift=shift), shifted(shift=0), shifted(shift=shift, overlap=2))
    ]
    assert max(apart[0], apart[2]) < apart[1]


def offsets(config: df.ParallelConfig, split: Split, unit: int, num: int) -> list[int]:
    strategy = Shifted(config, alone(torch.device("cpu")))
    picture = Levels((split,), (16,))
    found = [strategy.moved(State(num_calls=step + 1), picture, unit) for step in range(num)]
    return [moved.split.origin for moved in found if moved is not None]


def test_offsets_are_known_to_all_ranks_and_cover_a_patch() -> None:
    split = Split((0, 8, 16, 24, 32))
    assert offsets(shifted(shift=3), split, 1, 5) == [0, 3, 6, 9, 12]
    assert offsets(shifted(shift=3), split, 2, 5) == [0, 2, 6, 8, 12]
    for shift in ("golden", "random"):
        assert set(offsets(shifted(shift=shift), split, 1, 60)) == set(range(8))
        assert set(offsets(shifted(shift=shift), split, 2, 40)) == {0, 2, 4, 6}
        assert len(offsets(shifted(shift=shift, warmup_steps=2), split, 1, 10)) == 8
    random = [offsets(shifted(shift="random", shift_seed=seed), split, 1, 20) for seed in (0, 0, 1)]
    assert random[0] == random[1] != random[2]
    with pytest.raises(df.ConfigError, match="overlap=3 must be a multiple of 2 rows"):
        offsets(shifted(overlap=3), split, 2, 1)


# --- what travels ---


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize(("world", "split"), [(2, "rows"), (4, "cols")])
def test_only_rows_that_enter_a_patch_travel(world: int, split: Any, guidance_scale: float) -> None:
    """Once, though guidance doubles the batch and the scheduler has the latents too."""
    config = shifted(split=split, warmup_steps=1)
    ran = paint(config, world, num_inference_steps=6, guidance_scale=guidance_scale)
    places = offsets(config, Split.even(16, world, 2), 1, 6)
    row = 4 * 16 * 4  # channels, columns, bytes
    splits = [Split(Split.even(16, world, 2).bounds, False, place) for place in places]
    for rank, (_, report) in enumerate(ran):
        assert report.kinds == ["sync"] + ["shifted"] * 5
        # The first one moves nothing, since every rank has the latents whole; the last one ends with the whole.
        assert (report.messages[1], report.bytes[1]) == (0, 0)
        for i in range(1, 4):
            plan = moves(splits[i - 1], Moved(splits[i]).windows, rank)
            assert report.messages[1 + i] == len(plan.sends)
            assert report.bytes[1 + i] == row * sum(len(span) for _, spans in plan.sends for span in spans)
    assert all(sum(report.bytes[2:5]) > 0 for _, report in ran)


@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize(("world", "cfg"), [(3, 1), (4, 2)])
def test_latents_in_rows_and_whole_ones_give_the_same_picture(world: int, cfg: int, overlap: int) -> None:
    whole = paint(shifted(latents="whole", overlap=overlap, cfg=cfg), world, num_inference_steps=5)
    rows = paint(shifted(overlap=overlap, cfg=cfg), world, num_inference_steps=5)
    assert all(torch.equal(mine[0], theirs[0]) for mine, theirs in zip(rows, whole, strict=True))
    assert all(type(mine[0]) is Tensor for mine in rows)
    assert sum(rows[0][1].bytes) < sum(whole[0][1].bytes)


SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]


def scheduler(name: str, **more: Any) -> Any:
    return getattr(diffusers, name).from_config(sd().scheduler.config, **more)


CASES = [
    *[pytest.param(name, {}, marks=NUMPY_WARNINGS, id=name) for name in SCHEDULERS],
    pytest.param("DDIMScheduler", {"thresholding": True}, id="thresholds"),  # a quantile of the whole picture
    pytest.param("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, marks=NUMPY_WARNINGS, id="sde"),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_every_scheduler_steps_on_rows_as_on_the_whole(name: str, settings: dict[str, Any]) -> None:
    """History of moved rows, noise drawn at each step, values that depend on all others: all the same."""

    def make() -> Any:
        return sd(scheduler=scheduler(name, **settings))

    arguments = {"num_inference_steps": 5, "guidance_scale": 3.0}
    whole = paint(shifted(latents="whole"), 2, make, **arguments)
    for (result, _), (wanted, _) in zip(paint(shifted(), 2, make, **arguments), whole, strict=True):
        assert type(result) is Tensor
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("looks", ["reads", "writes"])
def test_a_callback_sees_whole_latents_and_may_write_to_them(looks: str) -> None:
    def call(pipe: Any, **arguments: Any) -> Any:
        seen: list[Any] = []

        def look(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            found = tensors["latents"]
            if step == 2 and looks == "writes":
                found[:, :, 3:9] *= 0.5
                found += 0.25
            seen.append(np.array(found.float().cpu().numpy()))
            return {"latents": found} if looks == "writes" else {}

        result = sample(pipe, callback_on_step_end=look, num_inference_steps=5, **arguments)
        return result, np.stack(seen)

    whole = paint(shifted(latents="whole"), 3, sd, call)
    for ((result, seen), _), ((wanted, wanted_seen), _) in zip(paint(shifted(), 3, sd, call), whole, strict=True):
        assert torch.equal(result, wanted)
        assert np.array_equal(seen, wanted_seen)


def test_after_a_look_at_the_latents_only_rows_travel_again() -> None:
    def call(pipe: Any, **arguments: Any) -> Tensor:
        def look(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                tensors["latents"].sum().item()
            return {}

        return sample(pipe, callback_on_step_end=look, num_inference_steps=6, **arguments)

    looked, plain = paint(shifted(), 3, sd, call), paint(shifted(), 3, num_inference_steps=6)
    for (result, report), (wanted, other) in zip(looked, plain, strict=True):
        assert torch.equal(result, wanted)
        assert report.bytes[1] > 2 * other.bytes[1]  # the latents, once
        assert report.bytes[2] == 0  # which everyone has now
        assert report.bytes[3:] == other.bytes[3:]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler under numpy 2.4
def test_guidance_that_looks_at_the_whole_prediction_is_exact() -> None:
    whole = paint(shifted(latents="whole"), 2, sdxl, guidance_rescale=0.7)
    for (result, _), (wanted, _) in zip(paint(shifted(), 2, sdxl, guidance_rescale=0.7), whole, strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("world", [2, 3])
def test_a_controlnet_moves_with_its_unet(world: int) -> None:
    def make() -> Any:
        return sd(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet())

    truth = sample(make(), image=picture(), num_inference_steps=4)
    naive, _ = paint(df.ParallelConfig(strategy="naive"), world, make, image=picture(), num_inference_steps=4)[0]
    ran = paint(shifted(), world, make, image=picture(), num_inference_steps=4)
    assert all(torch.equal(result, ran[0][0]) for result, _ in ran)
    assert OTHER < distance(ran[0][0], truth) < 2 * distance(naive, truth)


def test_a_picture_that_is_not_told_how_long_it_is_keeps_whole_latents() -> None:
    """A bare denoiser has no scheduler, so nobody could say which prediction is the last."""
    name = "sd15"
    given, arguments = latents(name), conditioning(name)

    def rank(comm: Comm) -> Any:
        model = df.parallelize(build(name), shifted(), comm)
        return [type(model(given, 900 - i, **arguments).sample) for i in range(3)]

    assert df.run_ranks(2, rank) == [[Tensor] * 3] * 2


# --- rows ---


def in_rows(work: Callable[[Rows, Tensor], Any], *, origin: int = 3) -> list[tuple[Any, Any, int]]:
    """What ``work`` gives of a tensor in rows, and of the same whole; and the messages that it took."""
    whole = torch.randn(2, 4, 12, 6, generator=torch.Generator().manual_seed(0))
    split = Split((0, 5, 8, 12), origin=origin)

    def rank(comm: Comm) -> tuple[Any, Any, int]:
        index = torch.tensor([row for run in split.runs(comm.rank) for row in range(run.start, run.stop)])
        rows = Rows(whole.index_select(2, index), split, -2, Sharing(comm, lambda send: send()), 1)
        result = work(rows, torch.ones(12, 6))
        messages = sum(comm.meter.messages.values())
        if isinstance(result, Rows):
            assert "rows=" in repr(result)
            result = result.whole()
        return result, work(whole.clone(), torch.ones(12, 6)), messages  # type: ignore[arg-type]

    return df.run_ranks(3, rank)


BY_VALUE: list[Callable[[Any, Tensor], Any]] = [
    lambda x, y: 2 * x + y,
    lambda x, y: (x.double() - 1).clamp(-0.5, 0.5).to(torch.bfloat16).float(),
    lambda x, y: torch.where(x > 0, x, -x),
    lambda x, y: torch.cat([x] * 2).chunk(2)[1] * x.sqrt().nan_to_num(),
    lambda x, y: torch.cat([x, y.expand(2, 1, 12, 6)], dim=1)[:, 2:],
    lambda x, y: x.mul_(3).add_(y),
    lambda x, y: x[1].unsqueeze(0).clone(),
    lambda x, y: torch.zeros_like(x) + y,
]
OF_ALL: list[Callable[[Any, Tensor], Any]] = [
    lambda x, y: x - x.mean(),
    lambda x, y: x[:, :, 2:7] * 2,
    lambda x, y: x.flatten(1).abs().quantile(0.9, dim=1),
    lambda x, y: torch.stack([x, x], dim=-1).sum(-1),
    lambda x, y: torch.tensor(x.tolist()),
    lambda x, y: x.norm().item() * y,
    lambda x, y: torch.from_numpy(np.array(x)),
]


@pytest.mark.parametrize("work", BY_VALUE)
def test_what_treats_each_value_alone_sends_nothing(work: Callable[[Any, Tensor], Any]) -> None:
    for result, wanted, messages in in_rows(work):
        assert torch.equal(result, wanted)
        assert messages == 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # torch's own under numpy 2.4
@pytest.mark.parametrize("work", OF_ALL)
def test_whatever_else_sees_the_whole(work: Callable[[Any, Tensor], Any]) -> None:
    for result, wanted, messages in in_rows(work):
        assert torch.equal(result, wanted)
        assert messages == 1


def test_writing_through_a_view_is_not_lost() -> None:
    def work(x: Any, y: Tensor) -> Any:
        before = 2 * x
        x[:, :, 4:9] = 7.0
        x += 1
        return x * before

    for result, wanted, _ in in_rows(work):
        assert torch.equal(result, wanted)


def test_noise_is_drawn_for_the_whole() -> None:
    def work(x: Any, y: Tensor) -> Any:
        with drawing(4):
            return x + torch.randn_like(x)

    for result, wanted, messages in in_rows(work):
        assert torch.equal(result, wanted)
        assert messages == 0
