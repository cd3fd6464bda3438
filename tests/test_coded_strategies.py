"""Codecs and context windows on whole models: what they send, how near they stay, and where they are exact."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import distrifusion as df
from distrifusion.bench.shapes import SHAPES as BENCH_SHAPES
from distrifusion.comm import Comm, Meter
from distrifusion.forms import CODECS
from distrifusion.metrics import Report
from models import build, conditioning, distance, latents

EXACT = 1e-5  # another order of float32 sums; see test_layers.py
STRATEGIES = ["sync", "displaced"]


def config(**settings: Any) -> df.ParallelConfig:
    return df.ParallelConfig(**{"warmup_steps": 0, **settings})


def run(
    name: str, settings: df.ParallelConfig, world: int, samples: list[Tensor], timesteps: list[int]
) -> list[tuple[list[Tensor], Report, list[Meter]]]:
    """Per rank the predictions of one picture, the report, and what was counted in each call."""
    arguments = conditioning(name, samples[0].shape[0])
    build(name)  # the first one alone: ranks that draw weights at the same time get each other's

    def rank(comm: Comm) -> tuple[list[Tensor], Report, list[Meter]]:
        model = df.parallelize(build(name), settings, comm)
        results, meters = [], []
        for sample, timestep in zip(samples, timesteps, strict=True):
            comm.meter.clear()
            results.append(model(sample, timestep, **arguments).sample)
            meters.append(Meter(comm.meter.messages.copy(), comm.meter.bytes.copy(), comm.meter.links.copy()))
        return results, df.report(model), meters

    return df.run_ranks(world, rank, timeout=60)


def held(name: str, settings: df.ParallelConfig, world: int, sample: Tensor, num: int) -> Any:
    return run(name, settings, world, [sample] * num, [500] * num)


def walk(name: str, num: int, *size: int) -> list[Tensor]:
    """Latents that change from step to step by little, as late in a sampling."""
    return [latents(name, *size, seed=5) + 0.05 * i * latents(name, *size, seed=6) for i in range(num)]


# --- how near ---


@pytest.mark.parametrize(
    ("codec", "world", "split", "strategy"),
    [
        ("fp16", 2, "rows", "displaced"),
        ("int8", 3, "cols", "displaced"),
        ("int8", 5, "rows", "sync"),
        ("int4", 2, "cols", "sync"),
        ("int2", 3, "rows", "displaced"),
        ("1bit", 2, "rows", "displaced"),
        ("1bit", 3, "rows", "sync"),
        ({"context": "1bit", "halo": "bf16"}, 5, "rows", "displaced"),
    ],
)
def test_held_input_stays_exact(codec: Any, world: int, split: Any, strategy: Any) -> None:
    """Residuals of what does not change are rounding: the first, whole values are the base. Uneven patches, batch 2."""
    name = "sdxl"
    sample, arguments = latents(name, 2, 17, 13), conditioning(name, 2)
    truth = build(name)(sample, 500, **arguments).sample
    for results, report, _ in held(name, config(strategy=strategy, split=split, codec=codec), world, sample, 4):
        assert all(distance(result, truth) <= EXACT for result in results)
        assert report.kinds == ["sync"] + [strategy] * 3


@pytest.mark.parametrize(("codec", "strategy"), list(zip(CODECS, cycle(STRATEGIES), strict=False)))
def test_after_a_jump_held_input_converges_to_sync(codec: str, strategy: Any) -> None:
    """What changes at once is far from the bases; error feedback brings them there.

    Displaced, the change also passes one seam per step, with any codec and with none.
    """
    name = "ddpm"
    num = 24 if strategy == "displaced" else {"int2": 14}.get(codec, 5)
    num, world = 30 if codec == "1bit" else num, 3 if codec == "int8" else 2
    samples = [latents(name, 2, 12, 6, seed=1)] + [latents(name, 2, 12, 6, seed=2)] * num
    truth = build(name)(samples[1], 500).sample
    ran = run(name, config(strategy=strategy, codec=codec, group_norm="sync"), world, samples, [500] * (1 + num))
    for results, _, _ in ran:
        errors = [distance(result, truth) for result in results[1:]]
        assert errors[0] > 10 * errors[-1] or errors[0] < EXACT
        assert errors[-1] <= {"1bit": 1e-3, "int2": 1e-4}.get(codec, EXACT)


@pytest.mark.parametrize(("world", "strategy"), [(2, "displaced"), (3, "sync")])
def test_fewer_bits_cost_more_and_int8_next_to_nothing(world: int, strategy: Any) -> None:
    name, num = "time-cond", 5
    samples, times = walk(name, num, 2, 20, 11), [900 - 20 * i for i in range(num)]
    plain = run(name, config(strategy=strategy), world, samples, times)[0][0]
    off = {}
    for codec in CODECS:
        results, report, _ = run(name, config(strategy=strategy, codec=codec), world, samples, times)[0]
        assert torch.equal(results[0], plain[0])  # whole values travel in the first step
        # Sync: from the second step on; displaced: what that step sends is used in the third.
        off[codec] = max(distance(mine, theirs) for mine, theirs in zip(results, plain, strict=True))
        assert report.notes == [f"codec={codec}"]
        assert f"codec={codec}" in report.line()
    assert 0 < off["fp16"] < off["int8"] < off["int4"] < off["int2"] < off["1bit"]
    assert off["int8"] < 2e-3
    assert off["1bit"] < 0.3


def test_a_seam_without_a_codec_is_left_alone() -> None:
    """The halo's bytes are those of no codec, the context's are not, and the other way round."""
    name, sample = "sdxl", latents("sdxl", 1, 16, 16)
    plain = held(name, config(strategy="sync"), 2, sample, 2)[0][2][1].bytes
    for seam, other in (("halo", "context"), ("context", "halo")):
        coded = held(name, config(strategy="sync", codec={seam: "int8"}), 2, sample, 2)[0][2][1].bytes
        assert coded[seam] < plain[seam]
        assert coded[other] == plain[other]
        assert coded["moments"] == plain["moments"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_pictures_in_a_row_are_what_each_is_alone(strategy: Any) -> None:
    name, settings = "sd15", config(strategy=strategy, codec="int4")
    first, second = walk(name, 3, 1, 16, 8), walk(name, 3, 1, 16, 8)[::-1]
    alone = [run(name, settings, 2, samples, [900, 800, 700])[0][0] for samples in (first, second)]
    arguments = conditioning(name)

    def rank(comm: Comm) -> list[list[Tensor]]:
        model = df.parallelize(build(name), settings, comm)
        found = []
        for samples in (first, second):
            df.reset(model)
            steps = zip(samples, (900, 800, 700), strict=True)
            found.append([model(sample, timestep, **arguments).sample for sample, timestep in steps])
        return found

    for found in df.run_ranks(2, rank):
        for results, wanted in zip(found, alone, strict=True):
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, wanted, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_guidance_branches_have_bases_of_their_own(strategy: Any) -> None:
    """Two branches in turn give what each gives alone."""
    name, settings = "sd15", config(strategy=strategy, codec="int4")
    build(name)
    samples, texts = walk(name, 3, 1, 16, 8), [conditioning(name, 1, seed=seed) for seed in (1, 2)]

    def rank(comm: Comm, texts: list[dict[str, Any]]) -> list[list[Tensor]]:
        model = df.parallelize(build(name), settings, comm)
        return [[model(sample, 900 - 50 * i, **text).sample for text in texts] for i, sample in enumerate(samples)]

    together = df.run_ranks(2, lambda comm: rank(comm, texts))[0]
    for branch, text in enumerate(texts):
        alone = df.run_ranks(2, lambda comm, text=text: rank(comm, [text]))[0]
        assert all(torch.equal(both[branch], one[0]) for both, one in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_dtypes(dtype: torch.dtype, strategy: Any) -> None:
    name = "sd15"
    sample, text = latents(name, 1, 16, 16).to(dtype), conditioning(name)["encoder_hidden_states"].to(dtype)

    build(name)

    def rank(comm: Comm, settings: df.ParallelConfig) -> list[Tensor]:
        model = df.parallelize(build(name, dtype), settings, comm)
        return [model(sample, 500, text).sample for _ in range(4)]

    plain = df.run_ranks(2, lambda comm: rank(comm, config(strategy=strategy)))[0]
    coded = df.run_ranks(2, lambda comm: rank(comm, config(strategy=strategy, codec="int4")))[0]
    for mine, theirs in zip(coded, plain, strict=True):
        assert mine.dtype == dtype
        assert distance(mine, theirs) <= max(EXACT, 8 * torch.finfo(dtype).eps)


def test_the_cfg_split_says_that_it_has_nothing_to_code() -> None:
    results, report, _ = held("sd15", config(codec="1bit", cfg=2), 2, latents("sd15", 2, 16, 16), 2)[0]
    truth = build("sd15")(latents("sd15", 2, 16, 16), 500, **conditioning("sd15", 2)).sample
    assert all(distance(result, truth) <= EXACT for result in results)
    assert report.notes == ["codec=1bit does nothing without patches"]


def test_ranks_with_different_codecs_are_told_so() -> None:
    def rank(comm: Comm) -> None:
        df.parallelize(build("sd15"), config(codec="int8" if comm.rank else "int4"), comm)

    with pytest.raises(df.RanksDisagree, match=r"codec=int4, rank 1 has .* codec=int8"):
        df.run_ranks(2, rank)


# --- what is sent: how many bytes is in test_traffic.py ---


@pytest.mark.parametrize(("world", "codec"), [(2, "fp16"), (3, "int4"), (5, "1bit"), (7, "int8")])
def test_a_displaced_step_sends_at_most_8_messages(world: int, codec: str) -> None:
    """Also with a window, on patches so thin that they are empty below."""
    for window in (None, 0.5):
        settings = config(codec=codec, context_window=window)
        for _, report, meters in held("sd15", settings, world, latents("sd15", 1, 2 * world, 8), 2):
            assert report.kinds == ["sync", "displaced"]
            assert report.messages[1] <= 8
            assert set(meters[1].messages) <= {"chunk", "output"}


@pytest.mark.parametrize(("world", "strategy"), [(2, "displaced"), (3, "sync")])
def test_one_bit_sends_at_most_a_24th_of_all_bytes(world: int, strategy: Any) -> None:
    """SDXL at a fifth of its width, more tokens than channels as in real pictures. All of a step, output included."""
    settings = {
        **BENCH_SHAPES["sdxl-mini"],
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2, 3),
        "block_out_channels": (64, 128, 256),
    }
    torch.manual_seed(0)
    model = UNet2DConditionModel(**settings).eval().requires_grad_(False)
    sample = torch.randn(1, 4, 48 * world, 64)
    arguments: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(1, 7, 256),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 256), "time_ids": torch.ones(1, 6)},
    }

    def rank(comm: Comm, codec: str | None) -> int:
        import copy

        mine = df.parallelize(copy.deepcopy(model), config(strategy=strategy, codec=codec), comm)
        for _ in range(2):
            mine(sample, 500, **arguments)
        return df.report(mine).bytes[-1]

    whole = df.run_ranks(world, lambda comm: rank(comm, None), timeout=60)
    bits = df.run_ranks(world, lambda comm: rank(comm, "1bit"), timeout=60)
    for mine, plain in zip(bits, whole, strict=True):
        assert mine <= plain / 24


# --- the prediction ---


@pytest.mark.parametrize("codec", ["1bit", {"output": "int8"}, {"output": "1bit"}])
@pytest.mark.parametrize(
    ("world", "split", "cfg", "strategy"),
    [(2, "rows", 1, "displaced"), (3, "cols", 1, "sync"), (5, "rows", 1, "displaced"), (6, "rows", 2, "displaced")],
)
def test_all_ranks_have_the_same_prediction(world: int, split: Any, cfg: int, strategy: Any, codec: Any) -> None:
    """To the bit: whoever said a part has of it what the others have. Uneven patches, two pictures."""
    settings = config(strategy=strategy, split=split, cfg=cfg, codec=codec, warmup_steps=1)
    samples, times = walk("sdxl", 4, 2, 17, 13), [900, 800, 700, 600]
    ran = run("sdxl", settings, world, samples, times)
    for results, _, _ in ran:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, ran[0][0], strict=True))


@pytest.mark.parametrize(("world", "cfg"), [(3, 1), (4, 2)])
def test_a_coded_prediction_is_near_and_warm_up_steps_are_whole(world: int, cfg: int) -> None:
    """int8's is off by half a level of what changes, and by more the fewer the bits; the model's work is as it was."""
    samples, times = walk("sd15", 5, 2, 17, 13), [900, 800, 700, 600, 500]
    settings = {"cfg": cfg, "warmup_steps": 2}
    plain = run("sd15", config(**settings), world, samples, times)[0][0]
    off = {}
    for codec in ("int8", "int4", "1bit"):
        results, report, meters = run("sd15", config(codec={"output": codec}, **settings), world, samples, times)[0]
        assert report.kinds == ["sync"] * 3 + ["displaced"] * 2
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[:3], plain[:3], strict=True))
        off[codec] = max(distance(mine, theirs) for mine, theirs in zip(results[3:], plain[3:], strict=True))
        assert meters[4].bytes["output"] < meters[2].bytes["output"]
    assert 0 < off["int8"] < off["int4"] < off["1bit"]
    assert off["int8"] < 1e-3


@pytest.mark.parametrize("is_looked_at", [False, True])
def test_a_pair_of_calls_on_halves_of_the_ranks_says_whole_predictions(is_looked_at: bool) -> None:
    """Of two calls in a step, each on one half of the ranks: what would be coded is as without a codec, to the bit.

    A pipeline that looks at the first before the second gets both one by one.
    """
    name, settings = "sd15", config(strategy="sync", cfg=2, codec={"output": "int8"})
    build(name)
    samples, texts = walk(name, 4, 1, 16, 8), [conditioning(name, 1, seed=seed) for seed in (1, 2)]

    def rank(comm: Comm, settings: df.ParallelConfig) -> tuple[list[Tensor], int]:
        model = df.parallelize(build(name), settings, comm)
        found = []
        for i, sample in enumerate(samples):
            comm.meter.clear()
            results = [model(sample, 900 - 50 * i, **text).sample for text in texts[:1]]
            results = [result + 0.0 for result in results] if is_looked_at else results
            results += [model(sample, 900 - 50 * i, **text).sample for text in texts[1:]]
            found.append(torch.stack([result + 0.0 for result in results]))
        return found, comm.meter.bytes["output"]  # of the last step

    plain = df.run_ranks(4, lambda comm: rank(comm, config(strategy="sync", cfg=2)))
    for mine, theirs in zip(df.run_ranks(4, lambda comm: rank(comm, settings)), plain, strict=True):
        assert mine[1] == theirs[1] > 0
        assert all(torch.equal(results, wanted) for results, wanted in zip(mine[0], theirs[0], strict=True))


# --- windows ---


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("split", ["rows", "cols"])
def test_a_window_of_all_of_the_only_neighbour_is_exact(split: Any, strategy: Any) -> None:
    name = "sdxl"
    sample = latents(name, 2, 17, 13)
    truth = build(name)(sample, 500, **conditioning(name, 2)).sample
    for results, report, _ in held(name, config(strategy=strategy, split=split, context_window=1.0), 2, sample, 3):
        assert all(distance(result, truth) <= EXACT for result in results)
        assert report.notes == ["context_window=1.0"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_window_of_nothing_sends_no_context_and_is_not_exact(strategy: Any) -> None:
    name = "sdxl"
    sample = latents(name, 2, 16, 16)
    truth = build(name)(sample, 500, **conditioning(name, 2)).sample
    for results, _, meters in held(name, config(strategy=strategy, context_window=0.0), 3, sample, 2):
        assert not any(meter.bytes["context"] for meter in meters)
        assert all(1e-4 < distance(result, truth) < 0.5 for result in results)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world", [3, 5])
def test_keys_and_values_of_a_window_go_to_neighbours_only(world: int, strategy: Any) -> None:
    settings = config(strategy=strategy, context_window=0.3, group_norm="separate")
    for rank, (_, _, meters) in enumerate(held("sdxl", settings, world, latents("sdxl", 1, 8 * world, 8), 2)):
        wanted = {rank - 1, rank + 1} & set(range(world))
        if strategy == "sync":
            assert {peer for kind, peer in meters[1].links if kind == "context"} == wanted
        else:
            assert {peer for _, peer in meters[1].links} == wanted
            assert set(meters[1].messages) == {"chunk", "output"}
            assert meters[1].messages["chunk"] == sum(meters[1].links.values())  # nothing goes to all


def test_wider_windows_are_nearer() -> None:
    name = "sdxl"
    sample = latents(name, 1, 24, 16)
    truth = build(name)(sample, 500, **conditioning(name)).sample
    off = [
        distance(held(name, config(strategy="sync", context_window=window), 3, sample, 1)[0][0][0], truth)
        for window in (0.0, 0.5, 1.0, None)
    ]
    assert off[0] > off[1] > off[2] > off[3]


@pytest.mark.parametrize("codec", ["int8", "1bit"])
def test_a_window_and_a_codec_together(codec: str) -> None:
    name = "sdxl"
    sample = latents(name, 2, 17, 13)
    plain = held(name, config(context_window=0.5), 3, sample, 4)[0][0]
    coded_results = held(name, config(context_window=0.5, codec=codec), 3, sample, 4)[0][0]
    assert all(distance(mine, theirs) <= EXACT for mine, theirs in zip(coded_results, plain, strict=True))
