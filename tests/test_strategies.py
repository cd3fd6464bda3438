"""The strategies on whole models: what each gives, how old its values are, and what it sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import distrifusion as df
from distrifusion.comm import Comm, Meter, Tracer
from distrifusion.config import BUILT
from distrifusion.metrics import Report
from losses import check_a_lost_rank_is_lost_to_all
from models import SHAPES, build, conditioning, distance, latents
from pipelines import drawing
from reference import DisplacedReference, owners

EXACT = 1e-5  # another order of float32 sums; see test_layers.py
OTHER = 1e-3  # staleness, a missing halo: what two strategies differ by at least

STRATEGIES = list(BUILT)


def displaced(**settings: Any) -> df.ParallelConfig:
    return df.ParallelConfig(**{"strategy": "displaced", "warmup_steps": 0, **settings})


def steps(name: str, config: df.ParallelConfig, comm: Comm, samples: list[Tensor], **arguments: Any) -> list[Tensor]:
    """Predictions of one rank for one picture: a call per sample, later ones at lower timesteps."""
    model = df.parallelize(build(name), config, comm)
    return [model(sample, 900 - 50 * i, **arguments).sample for i, sample in enumerate(samples)]


def one_device(name: str, samples: list[Tensor], **arguments: Any) -> list[Tensor]:
    model = build(name)
    return [model(sample, 900 - 50 * i, **arguments).sample for i, sample in enumerate(samples)]


def walk(name: str, num: int, *size: int) -> list[Tensor]:
    """Latents that change from step to step, as in a sampling."""
    return [latents(name, *size, seed=5) + 0.5 * i * latents(name, *size, seed=6) for i in range(num)]


# --- what each gives ---


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_world_of_one_is_the_untouched_model(strategy: Any) -> None:
    samples, arguments = walk("sd15", 3, 1, 16, 16), conditioning("sd15")
    truth = one_device("sd15", samples, **arguments)
    (result,) = df.run_ranks(1, lambda comm: steps("sd15", displaced(strategy=strategy), comm, samples, **arguments))
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(result, truth, strict=True))


@pytest.mark.parametrize(
    ("world", "split", "warmup_steps", "group_norm"),
    [
        (2, "rows", 0, "corrected"),
        (2, "cols", 0, "stale"),
        (3, "cols", 2, "corrected"),
        (3, "rows", 0, "sync"),
        (5, "rows", 0, "stale"),
    ],
)
def test_held_input_makes_displaced_exact(world: int, split: Any, warmup_steps: int, group_norm: Any) -> None:
    """The picture does not change, so old values are today's. The timestep is held too: features depend on it."""
    name = "sdxl"
    sample, arguments = latents(name, 2, 17, 13), conditioning(name, 2)
    truth = build(name)(sample, 500, **arguments).sample
    config = displaced(split=split, warmup_steps=warmup_steps, group_norm=group_norm)

    def rank(comm: Comm) -> tuple[list[Tensor], Report]:
        model = df.parallelize(build(name), config, comm)
        return [model(sample, 500, **arguments).sample for _ in range(warmup_steps + 4)], df.report(model)

    for results, report in df.run_ranks(world, rank):
        assert all(distance(result, truth) <= EXACT for result in results)
        assert report.kinds == ["sync"] * (1 + warmup_steps) + ["displaced"] * 3
        assert report.patches == tuple(report.patches)
        assert sum(report.patches) == (17 if split == "rows" else 13)


def test_a_warm_up_as_long_as_the_run_is_exact() -> None:
    samples, arguments = walk("sd15", 4, 1, 16, 16), conditioning("sd15")
    truth = one_device("sd15", samples, **arguments)
    for results in df.run_ranks(3, lambda comm: steps("sd15", displaced(warmup_steps=3), comm, samples, **arguments)):
        assert all(distance(mine, wanted) <= EXACT for mine, wanted in zip(results, truth, strict=True))


def level_owners(split: str, height: int, width: int, patches: tuple[int, ...], num_levels: int) -> list[Tensor]:
    """By hand for convolutions of stride 2 and padding 1: row i of a level lies at row 2 i of the finer one."""
    bounds = [sum(patches[:i]) for i in range(len(patches) + 1)]
    found = []
    for _ in range(num_levels):
        found.append(owners(tuple(bounds), height, width, 2 if split == "rows" else 3))
        height, width, bounds = -(-height // 2), -(-width // 2), [-(-bound // 2) for bound in bounds]
    return found


@pytest.mark.parametrize(
    ("name", "world", "split", "height", "width", "num_levels", "group_norm"),
    [
        ("sd15", 2, "rows", 16, 10, 4, "corrected"),
        ("sd15", 2, "cols", 10, 19, 4, "separate"),
        ("sdxl", 3, "cols", 10, 19, 3, "stale"),
        ("sdxl", 3, "rows", 19, 10, 3, "corrected"),
        ("sdxl", 4, "rows", 22, 9, 3, "corrected"),
    ],
)
def test_displaced_is_one_step_late_exactly(
    name: str, world: int, split: Any, height: int, width: int, num_levels: int, group_norm: Any
) -> None:
    samples, arguments = walk(name, 4, 2, height, width), conditioning(name, 2)

    def rank(comm: Comm) -> tuple[list[Tensor], Report]:
        model = df.parallelize(build(name), displaced(split=split, group_norm=group_norm), comm)
        return [model(sample, 900 - 50 * i, **arguments).sample for i, sample in enumerate(samples)], df.report(model)

    ran = df.run_ranks(world, rank)
    levels = level_owners(split, height, width, ran[0][1].patches, num_levels)
    reference = DisplacedReference(build(name), levels, world, group_norm)
    wanted = [reference.step(sample, 900 - 50 * i, **arguments) for i, sample in enumerate(samples)]
    fresh = one_device(name, samples, **arguments)
    for results, _ in ran:
        assert distance(results[0], fresh[0]) <= EXACT
        for i in (1, 2, 3):
            assert distance(results[i], wanted[i]) <= EXACT, i
            assert distance(results[i], fresh[i]) > OTHER, i


def test_fresh_statistics_are_nearer_to_the_truth_than_the_own() -> None:
    samples, arguments = walk("time-cond", 3, 1, 16, 16), conditioning("time-cond")
    truth = one_device("time-cond", samples, **arguments)
    results = {
        group_norm: df.run_ranks(
            2, lambda comm, g=group_norm: steps("time-cond", displaced(group_norm=g), comm, samples, **arguments)
        )[0]
        for group_norm in ("corrected", "stale", "separate", "sync")
    }
    for a, b in [("corrected", "stale"), ("corrected", "sync"), ("stale", "sync"), ("separate", "sync")]:
        assert distance(results[a][2], results[b][2]) > 1e-4, (a, b)
    assert distance(results["sync"][2], truth[2]) < distance(results["separate"][2], truth[2])


@pytest.mark.parametrize(("split", "dim"), [("rows", 2), ("cols", 3)])
@pytest.mark.parametrize("name", ["sdxl", "ddim"])
def test_naive_patches_are_pictures_of_their_own(name: str, split: Any, dim: int) -> None:
    sample, arguments = latents(name, 2, 24, 24), conditioning(name, 2)
    truth = torch.cat([build(name)(part.contiguous(), 900, **arguments).sample for part in sample.chunk(3, dim)], dim)

    def rank(comm: Comm) -> tuple[Tensor, Meter]:
        (result,) = steps(name, df.ParallelConfig(strategy="naive", split=split), comm, [sample], **arguments)
        return result, comm.meter

    for result, meter in df.run_ranks(3, rank):
        assert distance(result, truth) <= EXACT
        assert {kind for kind, count in meter.messages.items() if count} <= {"output", "control"}
        assert meter.messages["output"] == 1


# --- what each sends: how many bytes is in test_traffic.py ---


def sends(
    name: str, config: df.ParallelConfig, world: int, sample: Tensor, num_calls: int
) -> list[tuple[Report, list[Meter]]]:
    """Per rank the report, and what was counted in each call."""
    arguments = conditioning(name, sample.shape[0])

    def rank(comm: Comm) -> tuple[Report, list[Meter]]:
        model = df.parallelize(build(name), config, comm)
        meters = []
        for _ in range(num_calls):
            comm.meter.clear()
            model(sample, 500, **arguments)
            meters.append(Meter(comm.meter.messages.copy(), comm.meter.bytes.copy(), comm.meter.links.copy()))
        return df.report(model), meters

    return df.run_ranks(world, rank)


@pytest.mark.parametrize(("world", "rows"), [(2, 2), (3, 2), (4, 2), (5, 2), (7, 2), (2, 8), (4, 8)])
def test_a_displaced_step_sends_at_most_8_messages(world: int, rows: int) -> None:
    """Also where patches are so thin that they are empty below, and rows come from far away."""
    for report, meters in sends("sd21", displaced(), world, latents("sd21", 1, rows * world, 8), 2):
        assert report.kinds == ["sync", "displaced"]
        assert report.messages[0] > 50
        assert report.messages[1] <= 8
        assert set(meters[1].messages) <= {"chunk", "output"}  # nothing that waits, and no control within a picture
        assert meters[1].messages["output"] == 1


@pytest.mark.parametrize("settings", [{}, {"codec": "1bit", "context_window": 0.5, "split": "cols"}])
def test_messages_do_not_grow_with_the_number_of_layers(settings: dict[str, Any]) -> None:
    sample, arguments = latents("sd15", 1, 16, 16), conditioning("sd15")
    build("sd15")

    def rank(comm: Comm, num: int) -> tuple[int, int]:
        with drawing(1):
            model = UNet2DConditionModel(**{**SHAPES["sd15"].settings, "layers_per_block": num})
        df.parallelize(model.eval().requires_grad_(False), displaced(**settings), comm)
        for _ in range(2):
            model(sample, 500, **arguments)
        report = df.report(model)
        return report.messages[0], report.messages[1]

    for world in (2, 3):
        counts = [df.run_ranks(world, lambda comm, n=num: rank(comm, n)) for num in (1, 4)]
        for few, many in zip(*counts, strict=True):
            assert many[0] > 1.8 * few[0]
            assert many[1] <= few[1] <= 8


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("cfg", [1, 2])
def test_the_prediction_leaves_before_the_last_chunk(world: int, cfg: int) -> None:
    """Everyone waits for it. Behind that chunk it would stand in line for a quarter of a step's bytes."""
    sample, arguments = latents("sd15", 2, 24, 8), conditioning("sd15", 2)

    def rank(comm: Comm) -> list[str]:
        model = df.parallelize(build("sd15"), displaced(cfg=cfg), comm)
        for _ in range(2):
            comm.meter.tracer = Tracer()
            model(sample, 500, **arguments)
        return [message.kind for message in comm.meter.tracer.messages]

    for kinds in df.run_ranks(world * cfg, rank):
        after = kinds[kinds.index("output") + 1 :]
        assert set(kinds[: kinds.index("output")]) == {"chunk"}
        assert after
        assert set(after) == {"chunk"}


@pytest.mark.parametrize("world", [2, 3, 4, 5, 7])
def test_halos_go_to_direct_neighbours_only(world: int) -> None:
    ran = sends("sdxl", displaced(), world, latents("sdxl", 1, 8 * world, 8), 2)
    for rank, (_, (fresh, stale)) in enumerate(ran):
        assert {peer for kind, peer in fresh.links if kind == "halo"} == {rank - 1, rank + 1} & set(range(world))
        assert {peer for _, peer in stale.links} == {rank - 1, rank + 1} & set(range(world))


# --- pictures, sizes, dtypes ---


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_pictures_in_a_row_are_what_each_is_alone(strategy: Any) -> None:
    name, config = "sd15", displaced(strategy=strategy)
    pictures = [
        (walk(name, 3, 1, 16, 8), conditioning(name, 1, seed=1)),
        (walk(name, 3, 1, 16, 8)[::-1], conditioning(name, 1, seed=2)),
    ]

    def together(comm: Comm) -> list[list[Tensor]]:
        model = df.parallelize(build(name), config, comm)
        return [
            [model(sample, 900 - 50 * i, **arguments).sample for i, sample in enumerate(samples)]
            for samples, arguments in pictures
        ]

    alone = [df.run_ranks(2, lambda comm, s=s, a=a: steps(name, config, comm, s, **a)) for s, a in pictures]
    for rank, results in enumerate(df.run_ranks(2, together)):
        for picture, wanted in zip(results, (alone[0][rank], alone[1][rank]), strict=True):
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(picture, wanted, strict=True))


@pytest.mark.parametrize(
    "settings", [{}, {"codec": "int8"}, {"strategy": "shifted", "warmup_steps": 1}, {"strategy": "pipelined"}]
)
def test_each_step_may_run_in_another_mode(settings: dict[str, Any]) -> None:
    """What a step leaves behind in inference mode is read, and written over, by those outside of it."""
    name, config = "ddpm", displaced(**settings)
    samples = walk(name, 6, 1, 12, 12)

    def rank(comm: Comm, modes: tuple[Any, ...]) -> list[Tensor]:
        model = df.parallelize(build(name), config, comm)
        results = []
        for i, sample in enumerate(samples):
            with modes[i % len(modes)]():
                results.append(model(sample, 900 - 50 * i).sample.clone())
        return results

    modes = torch.inference_mode, torch.inference_mode, torch.no_grad
    wanted = df.run_ranks(2, lambda comm: rank(comm, (torch.no_grad,)))
    for found, truth in zip(df.run_ranks(2, lambda comm: rank(comm, modes)), wanted, strict=True):
        assert all(distance(mine, theirs) <= EXACT for mine, theirs in zip(found, truth, strict=True))


def test_reset_starts_a_picture() -> None:
    name = "ddpm"
    samples = walk(name, 4, 1, 12, 12)

    def rank(comm: Comm) -> tuple[Tensor, list[str], list[str]]:
        model = df.parallelize(build(name), displaced(), comm)
        for sample in samples[:3]:
            model(sample, 500)
        before = df.report(model).kinds
        df.reset(model)
        return model(samples[3], 500).sample, before, df.report(model).kinds

    truth = build(name)(samples[3], 500).sample
    for result, before, after in df.run_ranks(2, rank):
        assert distance(result, truth) <= EXACT
        assert (before, after) == (["sync", "displaced", "displaced"], ["sync"])


def test_size_batch_and_dtype_may_change_from_call_to_call() -> None:
    name = "sd15"
    calls = [
        (1, 16, 16, torch.float32),
        (1, 19, 9, torch.float32),
        (3, 19, 9, torch.float32),
        (3, 19, 9, torch.float64),
        (1, 16, 16, torch.float32),
    ]

    def run(model: Any, report: list[str] | None = None) -> list[Tensor]:
        results = []
        for batch, height, width, dtype in calls:
            nn.Module.to(model, dtype)
            arguments = {key: value.to(dtype) for key, value in conditioning(name, batch).items()}
            for _ in range(2):
                results.append(model(latents(name, batch, height, width).to(dtype), 500, **arguments).sample)
            if report is not None:
                report += df.report(model).kinds
        return results

    def rank(comm: Comm) -> tuple[list[Tensor], list[str]]:
        kinds: list[str] = []
        return run(df.parallelize(build(name), displaced(), comm), kinds), kinds

    truth = run(build(name))
    for results, kinds in df.run_ranks(3, rank):
        assert kinds == ["sync", "displaced"] * len(calls)
        for result, wanted in zip(results, truth, strict=True):
            assert result.dtype == wanted.dtype
            assert distance(result, wanted) <= EXACT


# --- guidance ---


@pytest.mark.parametrize(
    ("name", "world", "strategy"),
    [
        ("sdxl", 2, "sync"),
        ("sdxl", 4, "displaced"),
        ("sd15", 2, "displaced"),
        ("time-cond", 4, "sync"),
        ("time-cond", 6, "sync"),
        ("time-cond", 6, "displaced"),
    ],
)
def test_the_cfg_split_equals_the_joint_batch(name: str, world: int, strategy: Any) -> None:
    """Batch 2 is guidance on, 1 is off; 3 does not halve evenly. Each in turn, on the same model."""

    def run(model: Any) -> list[Tensor]:
        results = []
        for batch in (2, 1, 3, 2):
            arguments = conditioning(name, batch, seed=batch)
            results += [model(latents(name, batch, 14, 10), 500, **arguments).sample for _ in range(3)]
        return results

    def rank(comm: Comm) -> tuple[list[Tensor], Report]:
        model = df.parallelize(build(name), displaced(strategy=strategy, cfg=2), comm)
        return run(model), df.report(model)

    truth = run(build(name))
    for results, report in df.run_ranks(world, rank):
        assert all(distance(result, wanted) <= EXACT for result, wanted in zip(results, truth, strict=True))
        assert report.mesh == f"cfg 2 x patch {world // 2}"
        wanted_kind = "displaced" if strategy == "displaced" and world > 2 else "sync"
        assert report.kinds[1:] == [wanted_kind] * 2


def test_the_cfg_split_of_changing_latents_is_late_in_patches_only() -> None:
    """With displaced patches each branch is what the same two patches give without the split."""
    name = "sd15"
    samples, arguments = walk(name, 3, 2, 16, 12), conditioning(name, 2)
    without = df.run_ranks(2, lambda comm: steps(name, displaced(), comm, samples, **arguments))[0]
    for results in df.run_ranks(4, lambda comm: steps(name, displaced(cfg=2), comm, samples, **arguments)):
        assert all(distance(mine, wanted) <= EXACT for mine, wanted in zip(results, without, strict=True))
    # On two ranks there are no patches, so nothing is late.
    truth = one_device(name, samples, **arguments)
    for results in df.run_ranks(2, lambda comm: steps(name, displaced(cfg=2), comm, samples, **arguments)):
        assert all(distance(mine, wanted) <= EXACT for mine, wanted in zip(results, truth, strict=True))


# --- in place, and back ---


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        (name, strategy)
        for name in ("sdxl", "deepfloyd", "ddpm")
        for strategy in STRATEGIES
        if (name, strategy) != ("deepfloyd", "tensor")  # asks for another processor: see test_tensor.py
    ],
)
def test_restore_gives_back_the_model_as_it_was(name: str, strategy: Any) -> None:
    sample, arguments = latents(name, 1, 16, 16), conditioning(name)
    truth = build(name)(sample, 500, **arguments).sample

    def rank(comm: Comm) -> None:
        model = build(name)
        before = {key: dict(module.__dict__) for key, module in model.named_modules()}
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        assert df.parallelize(model, displaced(strategy=strategy), comm) is model
        for _ in range(2):
            model(sample, 500, **arguments)
        assert list(model.state_dict()) == list(weights)
        assert df.restore(model) is model
        assert {key: list(module.__dict__) for key, module in model.named_modules()} == {
            key: list(items) for key, items in before.items()
        }
        for key, module in model.named_modules():
            assert all(module.__dict__[item] is value for item, value in before[key].items() if item != "training"), key
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        assert torch.equal(model(sample, 500, **arguments).sample, truth)
        df.parallelize(model, displaced(strategy="sync"), comm)  # and again
        assert distance(model(sample, 500, **arguments).sample, truth) <= EXACT

    df.run_ranks(2, rank)


def test_parallel_twice_is_refused_by_name() -> None:
    def rank(comm: Comm) -> None:
        model = df.parallelize(build("sd15"), displaced(), comm)
        with pytest.raises(df.ConfigError, match="this UNet2DConditionModel is parallel already"):
            df.parallelize(model, displaced(), comm)

    df.run_ranks(2, rank)


@pytest.mark.parametrize(("split", "size"), [("rows", (4, 16)), ("cols", (16, 4))])
def test_fewer_rows_than_ranks_says_the_largest_world(split: Any, size: tuple[int, int]) -> None:
    message = r"cannot be split over 5 ranks: the largest world for this picture is 4"
    with pytest.raises(df.ConfigError, match=message):
        df.run_ranks(
            5,
            lambda comm: steps(
                "sd15", displaced(split=split), comm, [latents("sd15", 1, *size)], **conditioning("sd15")
            ),
        )


@pytest.mark.parametrize("failing_call", [0, 1, 2])
def test_an_error_inside_a_step_leaves_the_model_usable(failing_call: int) -> None:
    name = "sd15"
    sample, arguments = latents(name, 1, 16, 16), conditioning(name)
    truth = build(name)(sample, 500, **arguments).sample

    def rank(comm: Comm) -> list[Tensor]:
        model = df.parallelize(build(name), displaced(), comm)
        for _ in range(failing_call):
            model(sample, 500, **arguments)

        def fail(*_: Any) -> None:
            raise ArithmeticError("in the middle of a step")

        handle = model.mid_block.resnets[0].register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError, match="in the middle of a step"):
            model(sample, 500, **arguments)
        handle.remove()
        results = [model(sample, 500, **arguments).sample for _ in range(3)]
        assert df.report(model).kinds[-3:] == ["sync", "displaced", "displaced"]
        return results

    for results in df.run_ranks(2, rank):
        assert all(distance(result, truth) <= EXACT for result in results)


def test_a_rank_that_fails_alone_frees_the_others() -> None:
    sample, arguments = latents("sd15", 1, 16, 16), conditioning("sd15")
    check_a_lost_rank_is_lost_to_all(
        lambda: build("sd15"), displaced(), 3, lambda model: model(sample, 500, **arguments), num_calls=1
    )


def test_two_models_with_two_configurations_live_side_by_side() -> None:
    first, second = "sd15", "ddpm"
    samples, arguments = walk(first, 3, 1, 16, 16), conditioning(first)
    pictures = walk(second, 3, 1, 12, 12)
    wanted = df.run_ranks(2, lambda comm: steps(first, displaced(), comm, samples, **arguments))[0]
    truth = one_device(second, pictures)

    def rank(comm: Comm) -> tuple[list[Tensor], list[Tensor]]:
        one = df.parallelize(build(first), displaced(), comm)
        two = df.parallelize(build(second), df.ParallelConfig(strategy="sync", split="cols"), comm)
        results: tuple[list[Tensor], list[Tensor]] = ([], [])
        for i, (sample, picture) in enumerate(zip(samples, pictures, strict=True)):
            results[0].append(one(sample, 900 - 50 * i, **arguments).sample)
            results[1].append(two(picture, 900 - 50 * i).sample)
        return results

    for mine, exact in df.run_ranks(2, rank):
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))
        assert all(distance(a, b) <= EXACT for a, b in zip(exact, truth, strict=True))
