"""Stages of U-Nets on different ranks, one time step apart: what each step gives, and what it sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distrifusion as df
from async_reference import AsyncReference
from distrifusion.comm import Comm, Meter
from distrifusion.metrics import Report
from losses import check_a_lost_rank_is_lost_to_all
from models import SHAPES, build, conditioning, distance, latents

pytestmark = pytest.mark.usefixtures("unread_memory_is_nan")

EXACT = 1e-5  # another order of float32 sums; the arithmetic of a unit is that of one device
OTHER = 1e-3  # what values of the step before change at least


def pipelined(**settings: Any) -> df.ParallelConfig:
    return df.ParallelConfig(**{"strategy": "pipelined", "warmup_steps": 0, **settings})


def walk(name: str, num: int, *size: int) -> list[Tensor]:
    """Latents that change from step to step, as in a sampling."""
    return [latents(name, *size, seed=5) + 0.5 * i * latents(name, *size, seed=6) for i in range(num)]


def on_ranks(
    name: str, world: int, config: df.ParallelConfig, samples: list[Tensor], times: list[int], **arguments: Any
) -> list[tuple[list[Tensor], Report]]:
    """Every rank's predictions of a call per sample."""

    def rank(comm: Comm) -> tuple[list[Tensor], Report]:
        model = df.parallelize(build(name), config, comm)
        results = [model(sample, time, **arguments).sample for sample, time in zip(samples, times, strict=True)]
        return results, df.report(model)

    return df.run_ranks(world, rank)


# --- what each step gives ---


@pytest.mark.parametrize("name", SHAPES)
def test_a_held_input_is_exact_after_as_many_steps_as_stages(name: str) -> None:
    world, size = 3, (2, 16, 12)
    first, then, arguments = latents(name, *size, seed=1), latents(name, *size, seed=2), conditioning(name, 2)
    samples = [first, first, *[then] * (world + 2)]
    before, after = (build(name)(sample, 500, **arguments).sample for sample in (first, then))
    for results, report in on_ranks(name, world, pipelined(), samples, [500] * len(samples), **arguments):
        assert report.kinds == ["sync"] + ["pipelined"] * (world + 3)
        assert all(distance(result, before) <= EXACT for result in results[:2])
        assert distance(results[2], after) > OTHER
        assert all(distance(result, after) <= EXACT for result in results[2 + world :])


@pytest.mark.parametrize(("name", "world"), [("sdxl", 2), ("sd15", 5), ("ddpm", 4), ("time-cond", 7)])
def test_every_world_is_exact_in_the_end(name: str, world: int) -> None:
    then, arguments = latents(name, 1, 14, 10, seed=2), conditioning(name)
    samples = [latents(name, 1, 14, 10, seed=1), *[then] * (world + 1)]
    truth = build(name)(then, 500, **arguments).sample
    for results, report in on_ranks(name, world, pipelined(), samples, [500] * len(samples), **arguments):
        assert distance(results[-1], truth) <= EXACT
        assert len(report.stages) == world
        assert all(report.stages)


@pytest.mark.parametrize(
    ("name", "world", "warmup_steps"), [("sdxl", 2, 0), ("sd21", 3, 1), ("deepfloyd", 2, 2), ("ddim", 5, 0)]
)
def test_other_stages_are_one_step_late_exactly(name: str, world: int, warmup_steps: int) -> None:
    samples, arguments = walk(name, 5 + warmup_steps, 2, 16, 12), conditioning(name, 2)
    times = [900 - 50 * i for i in range(len(samples))]
    ran = on_ranks(name, world, pipelined(warmup_steps=warmup_steps), samples, times, **arguments)
    reference = AsyncReference(build(name), ran[0][1].stages, 1 + warmup_steps)
    wanted = [reference.step(sample, time, **arguments) for sample, time in zip(samples, times, strict=True)]
    model = build(name)
    fresh = [model(sample, time, **arguments).sample for sample, time in zip(samples, times, strict=True)]
    for results, report in ran:
        assert report.stages == ran[0][1].stages
        for i in range(len(samples)):
            assert distance(results[i], wanted[i]) <= EXACT, i
            assert (distance(results[i], fresh[i]) > OTHER) == (i > warmup_steps), i
        assert all(torch.equal(mine, first) for mine, first in zip(results, ran[0][0], strict=True))  # to the last bit


def test_a_warm_up_as_long_as_the_run_is_exact() -> None:
    name, times = "sdxl", [900, 700, 500]
    samples, arguments = walk(name, 3, 1, 16, 16), conditioning(name)
    model = build(name)
    truth = [model(sample, time, **arguments).sample for sample, time in zip(samples, times, strict=True)]
    for results, _ in on_ranks(name, 3, pipelined(warmup_steps=2), samples, times, **arguments):
        assert all(distance(mine, wanted) <= EXACT for mine, wanted in zip(results, truth, strict=True))


# --- stages ---


def test_the_ends_of_a_unet_are_one_stage() -> None:
    """Their skip connections carry the detail, which is then never old."""
    sample, arguments = latents("sd15"), conditioning("sd15")
    for world in (2, 3):
        (_, report), *_ = on_ranks("sd15", world, pipelined(), [sample], [500], **arguments)
        *others, ends = report.stages
        assert {"conv_in", "conv_norm_out", "conv_act", "conv_out"} <= set(ends)
        assert any("mid_block" in name for names in others for name in names)


def test_measured_stages_are_the_same_on_all_ranks() -> None:
    samples, arguments = walk("sdxl", 3, 1, 16, 16), conditioning("sdxl")
    config = pipelined(balance="measured", warmup_steps=1)
    ran = on_ranks("sdxl", 3, config, samples, [900, 800, 700], **arguments)
    reference = AsyncReference(build("sdxl"), ran[0][1].stages, 2)
    wanted = [reference.step(sample, 900 - 100 * i, **arguments) for i, sample in enumerate(samples)]
    for results, report in ran:
        assert report.stages == ran[0][1].stages
        assert report.balance == "measured"
        assert all(distance(mine, theirs) <= EXACT for mine, theirs in zip(results, wanted, strict=True))


def test_more_stages_than_blocks_are_refused_with_both_numbers() -> None:
    # Down: conv_in, 2 resnets, 1 attention, 1 sampler. Middle: 3. Up: 4, 2 and 1, and what comes after.
    message = "UNet2DConditionModel of 16 blocks cannot be cut into 17 stages: pipe=16 is the most"
    with pytest.raises(df.ConfigError, match=message):
        on_ranks("time-cond", 17, pipelined(), [latents("time-cond")], [500], **conditioning("time-cond"))


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_other_modules_than_in_the_first_step_are_refused(warmup_steps: int) -> None:
    name = "sd15"
    sample, arguments = latents(name), conditioning(name)

    def again(model: Any) -> Any:
        return model.mid_block.register_forward_pre_hook(lambda *_: (model.conv_in(sample), None)[1])

    def rank(comm: Comm) -> None:
        model = df.parallelize(build(name), pipelined(warmup_steps=warmup_steps), comm)
        model(sample, 500, **arguments)
        handle = again(model)
        with pytest.raises(df.UnsupportedModel, match="conv_in#2 runs in this step and did not in the first one"):
            model(sample, 500, **arguments)
        model(sample, 500, **arguments)  # after an error, a picture starts
        handle.remove()
        if warmup_steps:
            with pytest.raises(df.UnsupportedModel, match="conv_in#2 ran in the first step and does not in this one"):
                model(sample, 500, **arguments)

    df.run_ranks(2, rank)


# --- what each step sends ---


def skips(name: str, sample: Tensor) -> tuple[dict[str, set[str]], dict[str, int]]:
    """Unit -> the units that read it, by hand for U-Nets of resnets, attentions and samplers; and its bytes."""
    model, order, sizes = build(name), [], {}
    for key, module in model.named_modules():
        if key.split(".")[-2:][0] in ("resnets", "attentions", "downsamplers", "upsamplers") or key in (
            "conv_in",
            "conv_norm_out",
            "conv_act",
            "conv_out",
        ):

            def hook(_: nn.Module, args: Any, output: Any, key: str = key) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                order.append(key)
                sizes[key] = tensor.numel() * tensor.element_size()

            module.register_forward_hook(hook)
    model(sample, 500, **conditioning(name, sample.shape[0]))
    readers: dict[str, set[str]] = {key: set() for key in order}
    stack: list[str] = []
    for before, key, after in zip([None, *order], order, [*order[1:], None], strict=False):
        if before is not None:
            readers[before].add(key)
        if key.startswith("up_blocks") and ".resnets." in key:
            readers[stack.pop()].add(key)
        is_down = key.startswith("down_blocks")
        is_last_of_layer = is_down and (".downsamplers." in key or ".attentions." in key or ".attentions." not in after)
        if key == "conv_in" or is_last_of_layer:
            stack.append(key)
    assert not stack
    return readers, sizes


@pytest.mark.parametrize(("name", "world"), [("sdxl", 2), ("sd15", 3), ("sd21", 5)])
def test_messages_and_bytes_are_those_that_skips_predict(name: str, world: int) -> None:
    sample = latents(name, 2, 16, 16)
    arguments = conditioning(name, 2)

    def rank(comm: Comm) -> tuple[Report, list[Meter]]:
        model, meters = df.parallelize(build(name), pipelined(), comm), []
        for _ in range(4):
            comm.meter.clear()
            model(sample, 500, **arguments)
            meters.append(Meter(comm.meter.messages.copy(), comm.meter.bytes.copy(), comm.meter.links.copy()))
        return df.report(model), meters

    readers, sizes = skips(name, sample)
    ran = df.run_ranks(world, rank)
    owner = {key: rank for rank, names in enumerate(ran[0][0].stages) for key in names}
    assert owner.keys() == readers.keys()
    for rank_, (report, meters) in enumerate(ran):
        chunks, peers = 0, set()
        for key, units in readers.items():
            others = {owner[unit] for unit in units} - {rank_}
            if owner[key] == rank_:
                chunks += -(-sizes[key] // 16) * 16 * len(others)  # words lie on multiples of 16 bytes
                peers |= others
        output = (sample.numel() + 64) * 4 * (world - 1)  # with 64 latents to compare; all padded to the largest
        for i in (1, 2, 3):
            assert dict(meters[i].bytes) == {"chunk": chunks, "output": output}
            assert {peer for _, peer in meters[i].links} == peers
            assert meters[i].messages["output"] == 1
            assert report.bytes[i] == chunks + output
            assert report.messages[i] <= 8
        assert {kind for kind, count in meters[0].messages.items() if count} <= {"output", "control"}


# --- pictures, sizes, guidance ---


def test_size_batch_and_dtype_may_change_from_call_to_call() -> None:
    name = "sd15"
    calls = [
        (1, 16, 16, torch.float32),
        (3, 19, 9, torch.float32),
        (3, 19, 9, torch.float64),
        (1, 16, 16, torch.float32),
    ]

    def run(model: Any, kinds: list[str]) -> list[Tensor]:
        results = []
        for batch, height, width, dtype in calls:
            nn.Module.to(model, dtype)
            arguments = {key: value.to(dtype) for key, value in conditioning(name, batch).items()}
            results += [model(latents(name, batch, height, width).to(dtype), 500, **arguments).sample for _ in range(2)]
            kinds += df.report(model).kinds
        return results

    def rank(comm: Comm) -> tuple[list[Tensor], list[str]]:
        kinds: list[str] = []
        return run(df.parallelize(build(name), pipelined(), comm), kinds), kinds

    truth = run(build(name), [])
    for results, kinds in df.run_ranks(3, rank):
        assert kinds == ["sync", "pipelined"] * len(calls)
        assert all(distance(mine, wanted) <= EXACT for mine, wanted in zip(results, truth, strict=True))


def test_the_cfg_split_pipelines_each_branch() -> None:
    name, times = "sdxl", [900, 850, 800, 750]
    samples, arguments = walk(name, 4, 2, 16, 12), conditioning(name, 2)
    without = on_ranks(name, 2, pipelined(), samples, times, **arguments)
    # The half of a batch costs half in every unit, so that the stages are the same.
    for results, report in on_ranks(name, 4, pipelined(cfg=2), samples, times, **arguments):
        assert report.mesh == "cfg 2 x pipe 2 x patch 1"
        assert report.stages == without[0][1].stages
        assert all(distance(mine, wanted) <= EXACT for mine, wanted in zip(results, without[0][0], strict=True))
    model = build(name)
    truth = [model(sample, time, **arguments).sample for sample, time in zip(samples, times, strict=True)]
    for results, report in on_ranks(name, 2, pipelined(cfg=2), samples, times, **arguments):  # one stage each
        assert report.kinds == ["sync"] * 4
        assert all(distance(mine, wanted) <= EXACT for mine, wanted in zip(results, truth, strict=True))


def test_channels_last_stays_as_it_is() -> None:
    name, layouts = "sd15", {}
    sample, arguments = latents(name, 2), conditioning(name, 2)
    truth = build(name)(sample, 500, **arguments).sample

    def rank(comm: Comm) -> list[Tensor]:
        model = df.parallelize(build(name).to(memory_format=torch.channels_last), pipelined(), comm)
        seen: list[bool] = []
        model.conv_out.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
        results = [model(sample.to(memory_format=torch.channels_last), 500, **arguments).sample for _ in range(3)]
        layouts[comm.rank] = seen
        return results

    for results in df.run_ranks(2, rank):
        assert all(distance(result, truth) <= EXACT for result in results)
    assert layouts == {0: [True] * 3, 1: [True] * 3}


# --- in place, and errors ---


def test_an_error_inside_a_step_leaves_the_model_usable() -> None:
    name = "sd15"
    sample, arguments = latents(name), conditioning(name)
    truth = build(name)(sample, 500, **arguments).sample

    def rank(comm: Comm) -> list[Tensor]:
        model = df.parallelize(build(name), pipelined(), comm)
        for num_calls in (0, 1, 2):
            for _ in range(num_calls):
                model(sample, 500, **arguments)

            def fail(*_: Any) -> None:
                raise ArithmeticError("in the middle of a step")

            handle = model.mid_block.resnets[0].register_forward_pre_hook(fail)
            with pytest.raises(ArithmeticError, match="in the middle of a step"):
                model(sample, 500, **arguments)
            handle.remove()
        results = [model(sample, 500, **arguments).sample for _ in range(3)]
        assert df.report(model).kinds[-3:] == ["sync", "pipelined", "pipelined"]
        return results

    for results in df.run_ranks(2, rank):
        assert all(distance(result, truth) <= EXACT for result in results)


def test_a_lost_stage_is_lost_to_all() -> None:
    sample, arguments = latents("sd15"), conditioning("sd15")
    check_a_lost_rank_is_lost_to_all(
        lambda: build("sd15"), pipelined(), 4, lambda model: model(sample, 500, **arguments), num_calls=2
    )


def runs_on_processes(comm: Comm, name: str, num: int) -> tuple[list[Tensor], Report]:
    arguments = conditioning(name)
    with torch.no_grad():
        model = df.parallelize(build(name), pipelined(), comm)
        results = [
            model(sample, 900 - 50 * i, **arguments).sample for i, sample in enumerate(walk(name, num, 1, 16, 12))
        ]
        return results, df.report(model)


def test_processes_give_what_threads_give(pool: Any) -> None:
    name, num = "sdxl", 4
    wanted, report = df.run_ranks(3, lambda comm: runs_on_processes(comm, name, num))[0]
    for results, theirs in pool.run(runs_on_processes, 3, name, num):
        assert theirs.stages == report.stages
        assert max(theirs.messages) <= 8
        assert all(torch.equal(mine, their) for mine, their in zip(results, wanted, strict=True))


@pytest.mark.parametrize("part", ["model", "block"])
def test_compiled_models_run_as_they_are_and_say_so(part: str) -> None:
    name = "time-cond"
    sample, arguments = latents(name), conditioning(name)
    truth = build(name)(sample, 500, **arguments).sample

    def rank(comm: Comm) -> tuple[list[Tensor], Report]:
        model = build(name)
        (model if part == "model" else model.mid_block.resnets[0]).compile(backend="eager")
        df.parallelize(model, pipelined(), comm)
        return [model(sample, 500, **arguments).sample for _ in range(3)], df.report(model)

    for results, report in df.run_ranks(2, rank):
        assert all(distance(result, truth) <= EXACT for result in results)
        assert report.kinds == ["sync", "pipelined", "pipelined"]
        assert report.notes == ["torch.compile does nothing while pipelined"]
