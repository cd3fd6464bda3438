"""Ranks that were given different work are told so, all of them, with both values, before they wait in vain."""

from __future__ import annotations

from time import monotonic
from typing import Any

import pytest
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.comm import Comm
from distrifusion.strategies.agreement import agree, check_latents, probe
from models import build, conditioning, in_dtype, latents

NAME = "class-labels"
PROMPT = 10.0  # seconds; the communicators would give up after 60


def call(comm: Comm, config: df.ParallelConfig, sample: Tensor, num_calls: int = 1) -> str:
    """What a rank is told."""
    arguments = in_dtype(conditioning(NAME, sample.shape[0]), sample.dtype)
    try:
        model = df.parallelize(build(NAME, sample.dtype), config, comm)
        for _ in range(num_calls):
            model(sample, 500, **arguments)
    except df.RanksDisagree as error:
        return str(error)
    return "agreed"


SYNC = df.ParallelConfig(strategy="sync")

DIFFERENT = [
    # what differs, rank 0's and rank 1's configuration, sample, and the words of the message
    ("latent size", (SYNC, latents(NAME, 1, 16, 16)), (SYNC, latents(NAME, 1, 16, 24)), ["16 x 16", "16 x 24"]),
    ("batch", (SYNC, latents(NAME, 2, 16, 16)), (SYNC, latents(NAME, 3, 16, 16)), ["has 2", "has 3"]),
    ("dtype", (SYNC, latents(NAME)), (SYNC, latents(NAME).bfloat16()), ["float32", "bfloat16"]),
    (
        "configuration",
        (SYNC, latents(NAME)),
        (df.ParallelConfig(strategy="displaced"), latents(NAME)),
        ["strategy=sync", "strategy=displaced"],
    ),
    (
        "configuration",
        (SYNC, latents(NAME)),
        (df.ParallelConfig(strategy="sync", split="cols"), latents(NAME)),
        ["split=rows", "split=cols"],
    ),
    (
        "configuration",
        (df.ParallelConfig(warmup_steps=2), latents(NAME)),
        (df.ParallelConfig(warmup_steps=3), latents(NAME)),
        ["warmup_steps=2", "warmup_steps=3"],
    ),
    (
        "configuration",
        (df.ParallelConfig(group_norm="stale"), latents(NAME)),
        (df.ParallelConfig(group_norm="sync"), latents(NAME)),
        ["group_norm=stale", "group_norm=sync"],
    ),
    (
        "configuration",
        (df.ParallelConfig(strategy="sync", cfg=2), latents(NAME, 2)),
        (df.ParallelConfig(strategy="sync"), latents(NAME, 2)),
        ["cfg=2", "cfg=1"],
    ),
    ("latents", (SYNC, latents(NAME, seed=0)), (SYNC, latents(NAME, seed=1)), ["rank 0 starts with", "same seed"]),
]


@pytest.mark.parametrize("odd_rank", [0, 1])
@pytest.mark.parametrize(("what", "one", "other", "words"), DIFFERENT)
def test_what_differs_is_named_with_both_values_on_every_rank(
    what: str, one: Any, other: Any, words: list[str], odd_rank: int
) -> None:
    started = monotonic()
    for message in df.run_ranks(2, lambda comm: call(comm, *(other if comm.rank == odd_rank else one))):
        assert message.startswith(f"{what} differ")
        assert "rank 0" in message
        assert "rank 1" in message
        assert all(word in message for word in words)
        assert "\n" not in message
    assert monotonic() - started < PROMPT


def test_the_odd_one_of_three_is_named() -> None:
    def rank(comm: Comm) -> str:
        return call(comm, SYNC, latents(NAME, 1, 16, 20 if comm.rank == 2 else 16))

    for message in df.run_ranks(3, rank):
        assert message.startswith("latent size differs: rank 0 has 16 x 16, rank 2 has 16 x 20")


def test_the_values_of_both_seeds_are_shown() -> None:
    samples = [latents(NAME, seed=0), latents(NAME, seed=1)]
    shown = [f"[{', '.join(f'{value:.3f}' for value in probe(sample)[:3].tolist())}, ...]" for sample in samples]
    for message in df.run_ranks(2, lambda comm: call(comm, SYNC, samples[comm.rank])):
        assert all(values in message for values in shown)
        assert "manual_seed" in message


def test_seeds_are_compared_in_every_step_of_every_strategy() -> None:
    """A scheduler that draws noise of its own on each rank makes latents differ later than in the first step."""

    def rank(comm: Comm) -> str:
        model, arguments = df.parallelize(build(NAME), df.ParallelConfig(warmup_steps=0), comm), conditioning(NAME)
        for _ in range(3):
            model(latents(NAME), 500, **arguments)
        with pytest.raises(df.RanksDisagree, match="latents differ"):
            model(latents(NAME) + comm.rank * latents(NAME, seed=1), 500, **arguments)
        return "told"

    assert df.run_ranks(2, rank) == ["told", "told"]


@pytest.mark.parametrize("config", [SYNC, df.ParallelConfig(warmup_steps=0)], ids=["sync", "displaced"])
def test_a_rank_that_changes_size_in_mid_picture_ends_it_for_all(config: df.ParallelConfig) -> None:
    """It alone starts a new picture, so that the ranks no longer make the same calls."""

    def rank(comm: Comm) -> str:
        model, arguments = df.parallelize(build(NAME), config, comm), conditioning(NAME)
        for _ in range(2):
            model(latents(NAME), 500, **arguments)
        with pytest.raises((df.RanksDisagree, df.PeerLost)):
            model(latents(NAME, 1, 16, 24 if comm.rank == 1 else 16), 500, **arguments)
        return "told"

    started = monotonic()
    assert df.run_ranks(3, rank) == ["told"] * 3
    assert monotonic() - started < PROMPT


@pytest.mark.parametrize("config", [SYNC, df.ParallelConfig(warmup_steps=0), df.ParallelConfig(strategy="naive")])
def test_ranks_that_agree_go_on(config: df.ParallelConfig) -> None:
    assert df.run_ranks(2, lambda comm: call(comm, config, latents(NAME), 3)) == ["agreed", "agreed"]


def test_devices_that_round_differently_agree() -> None:
    """GPUs of different makes draw the same noise and then differ in the last digits, which add up over the steps."""
    sample = latents(NAME)
    noisy = sample + 0.03 * latents(NAME, seed=2)
    check_latents([probe(sample), probe(noisy)])
    with pytest.raises(df.RanksDisagree, match="rank 2"):
        check_latents([probe(sample), probe(noisy), probe(latents(NAME, seed=1))])


def test_latents_that_overflowed_are_not_called_another_seed() -> None:
    check_latents([torch.full((64,), float("nan"))] * 2)


def test_probes_are_few_and_spread_over_the_whole() -> None:
    sample = torch.arange(4096.0).view(1, 4, 32, 32)
    assert probe(sample).tolist() == [64.0 * i for i in range(64)]
    assert probe(torch.zeros(1, 1, 3, 3)).numel() == 9


def test_agreeing_on_facts() -> None:
    def rank(comm: Comm) -> str:
        agree(comm, {"steps": 30})
        with pytest.raises(df.RanksDisagree, match="steps differs: rank 0 has 20, rank 1 has 21") as caught:
            agree(comm, {"steps": 20 + comm.rank})
        return str(caught.value)

    assert len(set(df.run_ranks(3, rank))) == 1
