"""Rows for unequal devices: given ones are as exact as equal ones, measured ones move to where the time is."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import distrifusion as df
from distrifusion.comm import Comm, Meter
from distrifusion.comm.stopwatch import HostStopwatch
from distrifusion.metrics import Report
from distrifusion.strategies.balance import LEAST_GAIN
from models import build, conditioning, distance, latents
from pipelines import NUMPY_WARNINGS, controlnet, picture, sample, sd
from transformers_cross import CROSS
from transformers_joint import JOINT
from transformers_tiny import build as build_tiny
from transformers_tiny import build_double, doubled, noise

EXACT = 1e-5  # another order of float32 sums; see test_layers.py

TINY = {**CROSS, **JOINT}


def walk(name: str, num: int, *size: int) -> list[Tensor]:
    """Latents that change from step to step, as in a sampling."""
    return [latents(name, *size, seed=5) + 0.5 * i * latents(name, *size, seed=6) for i in range(num)]


def sync(**settings: Any) -> df.ParallelConfig:
    return df.ParallelConfig(**{"strategy": "sync", **settings})


# --- given weights ---


GIVEN = [
    # name, balance, split, batch, height, width, rows
    ("sd15", (2, 1, 1), "rows", 1, 16, 12, (8, 4, 4)),
    ("sd15", (2, 1, 1), "cols", 2, 11, 19, (10, 5, 4)),
    ("sd15", (1, 3), "rows", 2, 21, 10, (4, 17)),
    ("sdxl", (1, 3), "cols", 1, 10, 16, (4, 12)),
    ("sdxl", (5, 1, 1, 1, 2), "rows", 2, 20, 9, (10, 2, 2, 2, 4)),
    ("sd15", (5, 1, 1, 1, 2), "cols", 1, 8, 13, (7, 1, 1, 1, 3)),
    ("ddpm", (1, 100, 1), "rows", 2, 12, 10, (1, 10, 1)),
]


@pytest.mark.parametrize(("name", "balance", "split", "batch", "height", "width", "rows"), GIVEN)
def test_rows_in_proportion_equal_one_device(
    name: str, balance: Any, split: Any, batch: int, height: int, width: int, rows: tuple[int, ...]
) -> None:
    given, arguments = latents(name, batch, height, width), conditioning(name, batch)
    truth = build(name)(given, 321, **arguments).sample

    def rank(comm: Comm) -> tuple[Tensor, Report]:
        model = df.parallelize(build(name), sync(balance=balance, split=split), comm)
        return model(given, 321, **arguments).sample, df.report(model)

    for result, report in df.run_ranks(len(balance), rank):
        assert distance(result, truth) <= EXACT
        assert report.patches == rows
        assert report.balance == ",".join(map(str, balance))


@pytest.mark.parametrize("name", ["sd3", "pixart"])
@pytest.mark.parametrize(
    ("balance", "split", "tokens"),
    [((2, 1, 1), "rows", (4, 2, 1)), ((1, 3), "cols", (1, 4)), ((5, 1, 1, 1, 2), "rows", (3, 1, 1, 1, 1))],
)
def test_rows_of_tokens_in_proportion_equal_one_device(
    name: str, balance: Any, split: Any, tokens: tuple[int, ...]
) -> None:
    arguments = TINY[name].arguments(2, 7, 5)
    truth = build_tiny(TINY[name])(**arguments)[0]

    def rank(comm: Comm) -> Any:
        held = df.ParallelConfig(balance=balance, split=split, warmup_steps=0)
        model = df.parallelize(build_tiny(TINY[name]), held, comm)
        return [model(**arguments)[0] for _ in range(3)], df.report(model)

    for results, report in df.run_ranks(len(balance), rank):
        assert report.kinds == ["sync", "displaced", "displaced"]
        assert all(distance(result, truth) <= EXACT for result in results)
        assert [rows // (report.patches[-1] // tokens[-1]) for rows in report.patches] == list(tokens)


@pytest.mark.parametrize(
    ("balance", "cfg", "split", "group_norm"),
    [((2, 1, 1), 1, "rows", "corrected"), ((1, 3), 2, "cols", "stale"), ((5, 1, 1, 1, 2), 1, "cols", "carried")],
)
def test_held_input_makes_displaced_exact(balance: Any, cfg: int, split: Any, group_norm: Any) -> None:
    given, arguments = latents("sdxl", 2, 17, 13), conditioning("sdxl", 2)
    truth = build("sdxl")(given, 500, **arguments).sample
    config = df.ParallelConfig(balance=balance, cfg=cfg, split=split, group_norm=group_norm, warmup_steps=0)

    def rank(comm: Comm) -> tuple[list[Tensor], Report]:
        model = df.parallelize(build("sdxl"), config, comm)
        return [model(given, 500, **arguments).sample for _ in range(4)], df.report(model)

    for results, report in df.run_ranks(cfg * len(balance), rank):
        assert report.kinds == ["sync"] + ["displaced"] * 3
        assert all(distance(result, truth) <= EXACT for result in results)
        assert max(report.messages[1:]) <= 8
        assert report.patches[balance.index(max(balance))] == max(report.patches)


def test_ranks_with_other_weights_are_told() -> None:
    def rank(comm: Comm) -> None:
        df.parallelize(build("sd15"), sync(balance=(2, 1) if comm.rank else (1, 2)), comm)

    with pytest.raises(df.RanksDisagree, match=r"rank 0 has .* balance=1,2, rank 1 has .* balance=2,1;"):
        df.run_ranks(2, rank)


def test_weights_for_another_world_are_refused_at_once() -> None:
    message = "balance=2,1,1 has 3 weights for 1 ranks along the picture"
    with pytest.raises(df.ConfigError, match=message):
        df.run_ranks(2, lambda comm: df.parallelize(build("sd15"), sync(cfg=2, balance=(2, 1, 1)), comm))
    with pytest.raises(df.ConfigError, match=message):
        df.parallelize(build("sd15"), sync(balance=(2, 1, 1)))


# --- measured speed ---


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def on_its_own_time(
    model: Any,
    seconds: float,
    fixed: float = 0.0,
    *,
    first: float = 0.0,
    probe: str = "conv_in",
    dim: int = 2,
    balance: Any = None,
) -> None:
    """By the watch of its balance, this rank takes ``seconds`` for each row of ``probe``'s output, and ``fixed``.

    And ``first`` in the first call.
    """
    clock, more = Clock(), [first]

    def passes(_: nn.Module, __: Any, output: Tensor) -> None:
        clock.now += fixed + seconds * output.shape[dim] + (more.pop() if more else 0.0)

    model.get_submodule(probe).register_forward_hook(passes)
    (balance or model._distrifusion._balance).watch = HostStopwatch(clock)


def measured(**settings: Any) -> df.ParallelConfig:
    return df.ParallelConfig(**{"strategy": "sync", "balance": "measured", "warmup_steps": 3, **settings})


def rows_by_step(model: Any, calls: Any) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Predictions of the calls, and the rows of all ranks in each."""
    results, rows = [], []
    for call in calls:
        results.append(call())
        rows.append(df.report(model).patches)
    return results, rows


@pytest.mark.parametrize(
    ("name", "split", "size", "paces", "before", "after"),
    [
        ("sd15", "rows", (2, 24, 10), (1.0, 3.0, 1.0), (8, 8, 8), (11, 3, 10)),
        ("sdxl", "cols", (1, 9, 17), (1.0, 1.0, 2.5), (6, 6, 5), (7, 7, 3)),
        ("sd15", "rows", (1, 23, 8), (1.0, 1.0, 4.0, 1.0, 1.0), (5, 5, 5, 4, 4), (6, 6, 1, 5, 5)),
    ],
)
def test_rows_move_away_from_a_slow_rank_and_sync_stays_exact(
    name: str, split: Any, size: Any, paces: tuple[float, ...], before: Any, after: Any
) -> None:
    samples, arguments = walk(name, 6, *size), conditioning(name, size[0])
    plain = build(name)
    truth = [plain(given, 900 - 50 * i, **arguments).sample for i, given in enumerate(samples)]

    def rank(comm: Comm) -> Any:
        model = df.parallelize(build(name), measured(split=split), comm)
        on_its_own_time(model, paces[comm.rank], dim=2 if split == "rows" else 3)
        calls = [lambda i=i: model(samples[i], 900 - 50 * i, **arguments).sample for i in range(len(samples))]
        return *rows_by_step(model, calls), df.report(model)

    for results, rows, report in df.run_ranks(len(paces), rank):
        assert rows == [before] * 3 + [after] * 3
        assert all(distance(mine, wanted) <= EXACT for mine, wanted in zip(results, truth, strict=True))
        assert (report.patches, report.balance) == (after, "measured")
        was = "+".join(map(str, before))
        assert report.notes == ["balance=measured", f"{split} per rank {was} before they were measured"]


def test_what_moving_patches_remember_outlives_a_change_of_rows() -> None:
    """Near, since the moments of a patch stand for those of each of its rows, which several visits share here."""
    name = "sd15"
    given, arguments = walk(name, 1, 1, 24, 8)[0], conditioning(name, 1)
    truth = build(name)(given, 900, **arguments).sample

    def rank(comm: Comm) -> Any:
        model = df.parallelize(build(name), measured(strategy="shifted", warmup_steps=2), comm)
        on_its_own_time(model, 3.0 if comm.rank else 1.0, dim=2)
        return rows_by_step(model, [lambda: model(given, 900, **arguments).sample] * 16)

    ran = df.run_ranks(2, rank)
    for results, rows in ran:
        assert rows == [(12, 12)] * 2 + [(20, 4)] * 14
        apart = [distance(result, truth) for result in results]
        assert max(apart[:2]) <= EXACT
        assert min(apart[-6:]) < 0.9 * apart[2]
        assert all(map(torch.equal, results, ran[0][0]))


def test_a_transformer_is_measured_too() -> None:
    arguments = TINY["pixart"].arguments(2, 12, 5)
    truth = build_tiny(TINY["pixart"])(**arguments)[0]

    def rank(comm: Comm) -> Any:
        model = df.parallelize(build_tiny(TINY["pixart"]), measured(strategy="displaced"), comm)
        on_its_own_time(model, 3.0 if comm.rank == 2 else 1.0, probe="pos_embed", dim=1)
        return *rows_by_step(model, [lambda: model(**arguments)[0]] * 6), df.report(model)

    for results, rows, report in df.run_ranks(3, rank):
        assert rows[2] == (8, 8, 8)
        assert rows[3:] == [(12, 10, 2)] * 3
        assert report.kinds == ["sync"] * 4 + ["displaced"] * 2
        assert all(distance(result, truth) <= EXACT for result in results)


@pytest.mark.parametrize("group_norm", ["corrected", "stale"])
def test_displaced_steps_start_from_a_synchronous_one_with_the_new_rows(group_norm: Any) -> None:
    """The input changes, and still all is as if the picture had had the new rows from its first step on."""
    samples, arguments = walk("sdxl", 7, 1, 20, 9), conditioning("sdxl", 1)

    def rank(comm: Comm, config: df.ParallelConfig) -> Any:
        model = df.parallelize(build("sdxl"), config, comm)
        if config.balance == "measured":
            on_its_own_time(model, 4.0 if comm.rank == 0 else 1.0)
        calls = [lambda i=i: model(samples[i], 900 - 50 * i, **arguments).sample for i in range(len(samples))]
        return *rows_by_step(model, calls), df.report(model)

    config = measured(strategy="displaced", group_norm=group_norm)
    moved = df.run_ranks(3, lambda comm: rank(comm, config))
    after = moved[0][1][-1]
    assert after[0] < after[1]
    given = df.ParallelConfig(warmup_steps=3, group_norm=group_norm, balance=after)
    for (results, rows, report), (wanted, same_rows, same) in zip(
        moved, df.run_ranks(3, lambda comm: rank(comm, given)), strict=True
    ):
        assert rows[:3] == [(7, 7, 6)] * 3
        assert rows[3:] == same_rows[3:]
        assert report.kinds == same.kinds == ["sync"] * 4 + ["displaced"] * 3
        assert all(distance(mine, other) <= EXACT for mine, other in zip(results, wanted, strict=True))
        assert report.messages[3:] == same.messages[3:]
        assert report.bytes[3:] == same.bytes[3:]


@pytest.mark.parametrize(("until", "after"), [(5, (12, 2, 10)), (4, (12, 2, 10)), (2, (8, 8, 8))])
def test_two_calls_per_step_on_two_halves_change_rows_together(until: int, after: tuple[int, ...]) -> None:
    """Each half of the ranks of cfg=2 computes one of the calls; the slow rank is in the second half.

    From step ``until`` on there is one call only: without a last call of a step before that, the rows stay.
    """
    texts = noise(1, 5, 6).double(), noise(1, 5, 6, seed=78).double()  # guidance multiplies float32's rounding

    def guided(model: Any) -> tuple[Tensor, list[Any]]:
        arguments = doubled(JOINT["sd3"].arguments(1, 12, 5))
        now, rows = arguments.pop("hidden_states"), []
        for step in range(5):
            time = torch.full((1,), 900.0 - 100 * step)
            calls = [{**arguments, "timestep": time, "encoder_hidden_states": text} for text in texts]
            prediction = model(hidden_states=now, **calls[0])[0]
            if step < until:
                other = model(hidden_states=now, **calls[1])[0]
                prediction = other + 3.0 * (prediction - other)
            now = now - 0.05 * prediction
            rows.append(df.report(model).patches)
        return now, rows

    truth, _ = guided(build_double(JOINT["sd3"]))

    def rank(comm: Comm) -> Any:
        model = df.parallelize(build_double(JOINT["sd3"]), measured(cfg=2), comm)
        on_its_own_time(model, 3.0 if comm.rank == 4 else 1.0, probe="pos_embed", dim=1)
        return guided(model)

    for result, rows in df.run_ranks(6, rank):
        assert distance(result, truth) <= EXACT
        assert rows == [(8, 8, 8)] * 3 + [after] * 2


class TestPipelines:
    pytestmark = NUMPY_WARNINGS

    @pytest.mark.parametrize("strategy", ["sync", "displaced"])
    def test_a_controlnet_and_its_unet_change_rows_together(self, strategy: Any) -> None:
        def make() -> Any:
            return sd(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet())

        def call(pipe: Any) -> Tensor:
            return sample(pipe, image=picture(), num_inference_steps=6, height=..., width=...)

        truth = call(make())

        def rank(comm: Comm) -> Any:
            # Warm to the end, where displaced: with other rows the last steps would be near, not equal.
            pipe = df.parallelize(make(), measured(strategy=strategy, warmup_steps=5), comm)
            on_its_own_time(pipe.controlnet, 2.0 if comm.rank else 1.0, balance=pipe.unet._distrifusion._balance)
            pictures = [call(pipe), call(pipe)]
            return pictures, df.report(pipe), pipe.controlnet._distrifusion.report.patches

        for pictures, report, fed in df.run_ranks(3, rank):
            assert all(distance(result, truth) <= EXACT for result in pictures)
            assert report.patches == fed == (8, 4, 4)
            assert report.notes == ["balance=measured", "rows kept: others would gain 0%"]

    def test_given_weights_hold_for_controlnet_and_guidance(self) -> None:
        def make() -> Any:
            return sd(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet())

        def call(pipe: Any) -> Tensor:
            return sample(pipe, image=picture(), height=..., width=...)

        truth = call(make())

        def rank(comm: Comm) -> Any:
            pipe = df.parallelize(make(), sync(balance=(2, 1, 1), cfg=2), comm)
            return call(pipe), df.report(pipe).patches, pipe.controlnet._distrifusion.report.patches

        for result, rows, fed in df.run_ranks(6, rank):
            assert distance(result, truth) <= EXACT
            assert rows == fed == (8, 4, 4)


# --- what is measured, and when rows stay ---


def pictures_of(
    paces: tuple[float, ...], fixed: float = 0.0, *, num: int = 1, size: Any = (1, 80, 8), **settings: Any
) -> list[tuple[list[Report], Meter]]:
    """The reports of some pictures of four steps each, on ranks of these seconds per row."""
    given, arguments = latents("sdxl", *size), conditioning("sdxl", size[0])

    def rank(comm: Comm) -> tuple[list[Report], Meter]:
        model = df.parallelize(build("sdxl"), measured(**settings), comm)
        if settings.get("balance", "measured") == "measured":
            on_its_own_time(model, paces[comm.rank], fixed)
        reports = []
        for _ in range(num):
            df.reset(model)
            for _ in range(4):
                model(given, 500, **arguments)
            reports.append(df.report(model))
        return reports, comm.meter

    return df.run_ranks(len(paces), rank)


@pytest.mark.parametrize(
    ("paces", "note"),
    [
        ((1.0, 1.0), "rows kept: others would gain 0%"),
        ((1.0, 1.05), "rows kept: others would gain 0%"),
        ((1.0, 1.15), "rows kept: others would gain 4%"),  # (44, 36)
        ((0.0, 1.0), "rows kept: a rank had nothing to compute that a clock would show"),
    ],
)
def test_rows_stay_where_little_would_be_gained(paces: tuple[float, ...], note: str) -> None:
    for (report,), _ in pictures_of(paces):
        assert (report.patches, report.balance) == ((40, 40), "even")
        assert report.notes == ["balance=measured", note]


def test_the_agreement_is_one_message_per_picture() -> None:
    """Of a kind that is not counted as the picture's; what the picture sends is as with equal rows."""
    # Of four steps each; nine warm-up steps are never over, and their configuration weighs as much.
    plain, asked = (pictures_of((1.0, 1.0), num=2, warmup_steps=steps) for steps in (9, 3))
    for (reports, meter), (even_reports, even_meter) in zip(asked, plain, strict=True):
        assert meter.messages["control"] == even_meter.messages["control"] + 2
        assert meter.bytes["control"] == even_meter.bytes["control"] + 2 * 8
        assert [report.messages for report in reports] == [report.messages for report in even_reports]
        assert [report.bytes for report in reports] == [report.bytes for report in even_reports]


def test_rows_settle_where_time_is_not_in_proportion_to_them() -> None:
    """A fixed cost makes the first guess too bold; each picture measures again, and changes rows once at most."""
    ((reports, _), *_) = pictures_of((1.0, 3.0), 10.0, num=4)
    rows = [report.patches for report in reports]
    paces = [max(10 + one, 10 + 3 * other) for one, other in [(40, 40), *rows]]
    assert paces == sorted(paces, reverse=True)
    assert rows[-1] == rows[-2]
    best = min(max(10 + one, 10 + 3 * (80 - one)) for one in range(1, 80))
    assert paces[-1] <= best / (1 - LEAST_GAIN)
    assert all(len(report.notes) == 2 for report in reports)  # what was asked, and what became of it
    assert all(report.balance == "measured" for report in reports)


def test_measured_rows_are_kept_for_their_size_alone() -> None:
    arguments = conditioning("sdxl")

    def rank(comm: Comm) -> list[tuple[tuple[int, ...], str]]:
        model = df.parallelize(build("sdxl"), measured(warmup_steps=1), comm)
        on_its_own_time(model, 1.0 + comm.rank)
        found = []
        for height, num in [(24, 2), (16, 1), (24, 1)]:
            df.reset(model)
            for _ in range(num):
                model(latents("sdxl", 1, height, 8), 500, **arguments)
            found.append((df.report(model).patches, df.report(model).balance))
        return found

    assert df.run_ranks(2, rank) == [[((16, 8), "measured"), ((8, 8), "even"), ((16, 8), "measured")]] * 2


def test_the_first_step_is_left_out() -> None:
    """It allocates, loads and tunes, which here takes the second rank very long."""
    given, arguments = latents("sdxl", 1, 24, 8), conditioning("sdxl")

    def rank(comm: Comm) -> list[str]:
        model = df.parallelize(build("sdxl"), measured(warmup_steps=2), comm)
        on_its_own_time(model, 1.0, first=1000.0 if comm.rank else 0.0)
        for _ in range(3):
            model(given, 500, **arguments)
        return df.report(model).notes

    assert df.run_ranks(2, rank) == [["balance=measured", "rows kept: others would gain 0%"]] * 2


@pytest.mark.parametrize("codec", ["fp16", "int8"])
@pytest.mark.parametrize("strategy", ["sync", "displaced"])
def test_codecs_start_anew_with_the_new_rows(codec: str, strategy: Any) -> None:
    """Their bases have the old ones. With a held input, the result is as near as without a change."""
    given, arguments = latents("sdxl", 1, 24, 8), conditioning("sdxl")
    truth = build("sdxl")(given, 500, **arguments).sample

    def rank(comm: Comm) -> Any:
        model = df.parallelize(build("sdxl"), measured(strategy=strategy, codec=codec), comm)
        on_its_own_time(model, 3.0 if comm.rank else 1.0)
        return rows_by_step(model, [lambda: model(given, 500, **arguments).sample] * 7)

    for results, rows in df.run_ranks(2, rank):
        assert rows == [(12, 12)] * 3 + [(20, 4)] * 4
        assert distance(results[3], truth) <= EXACT  # whole values travel after the change
        assert all(distance(result, truth) < 1e-2 for result in results)


def test_one_patch_has_nothing_to_balance() -> None:
    given, arguments = latents("sdxl", 2), conditioning("sdxl", 2)
    truth = build("sdxl")(given, 500, **arguments).sample

    def rank(comm: Comm) -> Any:
        model = df.parallelize(build("sdxl"), measured(cfg=2, warmup_steps=1), comm)
        return [model(given, 500, **arguments).sample for _ in range(3)], df.report(model)

    for results, report in df.run_ranks(2, rank):
        assert all(distance(result, truth) <= EXACT for result in results)
        assert report.notes == ["balance=measured does nothing without patches"]
        assert report.balance == "even"


def test_by_the_real_clock_it_is_exact_whatever_it_measures() -> None:
    samples, arguments = walk("sdxl", 4, 1, 20, 9), conditioning("sdxl", 1)
    plain = build("sdxl")
    truth = [plain(given, 900 - 50 * i, **arguments).sample for i, given in enumerate(samples)]

    def rank(comm: Comm) -> Any:
        model = df.parallelize(build("sdxl"), measured(warmup_steps=2), comm)
        results = [model(given, 900 - 50 * i, **arguments).sample for i, given in enumerate(samples)]
        return results, df.report(model)

    ran = df.run_ranks(3, rank)
    for results, report in ran:
        assert all(distance(mine, wanted) <= EXACT for mine, wanted in zip(results, truth, strict=True))
        assert report.patches == ran[0][1].patches
        assert len(report.notes) == 2
