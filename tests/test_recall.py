"""Patches that move and remember: with a held input they come to know the whole picture, and nothing travels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.comm import Comm
from distrifusion.comm import alone as alone_comm
from distrifusion.geometry import Levels, Moved, Split
from distrifusion.metrics import Report
from distrifusion.recall import Noting, Recalled, Seen, visit_of
from models import build, conditioning, distance, latents
from pipelines import NUMPY_WARNINGS, sample, sd, sdxl

EXACT = 1e-5  # see test_unet_exact.py


def paint(config: df.ParallelConfig, world: int, make: Any = sd, **arguments: Any) -> list[tuple[Any, Report]]:
    def rank(comm: Comm) -> tuple[Any, Report]:
        pipe = df.parallelize(make(), config, comm)
        return sample(pipe, **arguments), df.report(pipe)

    return df.run_ranks(world, rank)


def held(name: str, world: int, steps: int, batch: int = 1, size: tuple[int, int] = (32, 32), **more: Any) -> Any:
    """Distance of each step's prediction from one device's, with an input that does not change."""
    given, arguments = latents(name, batch, *size), conditioning(name, batch)
    config = df.ParallelConfig(strategy="shifted", **more)
    one = df.parallelize(build(name), df.ParallelConfig(topology=config.topology), alone_comm(torch.device("cpu")))
    truth = one(given, 900, **arguments).sample

    def rank(comm: Comm) -> tuple[list[float], int]:
        model = df.parallelize(build(name), config, comm)
        apart = [distance(model(given, 900, **arguments).sample, truth) for _ in range(steps)]
        return apart, comm.meter.messages["halo"] + comm.meter.messages["context"] + comm.meter.messages["moments"]

    return df.run_ranks(world, rank)


@pytest.mark.parametrize(
    ("name", "world", "split", "topology", "steps"),
    [
        ("sd15", 2, "rows", "plane", 30),
        ("sd15", 2, "rows", "torus", 30),
        ("sdxl", 2, "cols", "ring-x", 30),
    ],
)
def test_a_held_input_is_known_exactly_in_the_end(name: str, world: int, split: Any, topology: Any, steps: int) -> None:
    """Each round over the picture makes what is known of the rest one layer of borders better, until all is exact."""
    for apart, messages in held(
        name, world, steps, 2, (16 * world // 2, 16), warmup_steps=0, split=split, topology=topology
    ):
        assert apart[0] > 1e-3  # nothing is known yet
        assert min(apart[-world:]) <= EXACT
        assert messages == 0


@pytest.mark.parametrize(("name", "world", "split"), [("sd15", 2, "rows"), ("sdxl", 4, "cols")])
def test_after_synchronous_steps_a_held_input_stays_exact(name: str, world: int, split: Any) -> None:
    """As under `displaced`: all that a patch may come to stand beside was told."""
    for apart, _ in held(name, world, 8, size=(16, 16), warmup_steps=2, split=split):
        assert max(apart) <= EXACT


@pytest.mark.parametrize(("shift", "world"), [("patch", 3), ("random", 3)])
def test_uneven_patches_come_near(shift: Any, world: int) -> None:
    """Where borders lie between rows of a deep level, what is remembered there is half a row off: near, not exact."""
    remembering = held("sd15", world, 12, size=(36, 8), warmup_steps=0, shift=shift)
    forgetful = held("sd15", world, 12, size=(36, 8), warmup_steps=0, shift=shift, remember=False)
    for (apart, messages), (without, _) in zip(remembering, forgetful, strict=True):
        assert sum(apart[-6:]) < 0.7 * sum(without[-6:])
        assert messages == 0


@pytest.mark.parametrize(("make", "world"), [(sd, 2), (sd, 3), pytest.param(sdxl, 2, marks=NUMPY_WARNINGS)])
def test_a_memory_takes_no_message_more(make: Any, world: int) -> None:
    arguments = {"num_inference_steps": 8, "height": 128, "width": 64}
    truth = sample(make(), **arguments)
    with_memory = paint(df.ParallelConfig(strategy="shifted"), world, make, **arguments)
    without = paint(df.ParallelConfig(strategy="shifted", shift="patch", remember=False), world, make, **arguments)
    for (result, report), (other, plain) in zip(with_memory, without, strict=True):
        assert torch.equal(result, with_memory[0][0])
        if world == 2:  # on three ranks, of random weights and in so few steps, neither is near
            assert distance(result, truth) < 0.8 * distance(other, truth)
        # But for the last synchronous step, in which ranks tell each other what they may come to stand beside.
        assert (report.messages[4:], report.bytes[4:]) == (plain.messages[4:], plain.bytes[4:])
        assert report.slot_bytes > 0 == plain.slot_bytes


def test_warm_up_as_long_as_the_picture_is_exact() -> None:
    truth = sample(sd(), num_inference_steps=4)
    for result, _ in paint(df.ParallelConfig(strategy="shifted", warmup_steps=4), 3, num_inference_steps=4):
        assert distance(result, truth) <= EXACT


def test_two_pictures_in_a_row_give_what_each_gives_alone() -> None:
    config = df.ParallelConfig(strategy="shifted", warmup_steps=1)

    def rank(comm: Comm) -> list[Tensor]:
        pipe = df.parallelize(sd(), config, comm)
        return [sample(pipe, num_inference_steps=5, height=height) for height in (64, 128, 64)]

    first, other, again = df.run_ranks(2, rank)[0]
    assert torch.equal(first, again)
    assert torch.equal(other, paint(config, 2, num_inference_steps=5, height=128)[0][0])


# --- the memory ---

PICTURE = Levels((Split((0, 4, 8)), Split((0, 2, 4))), (3, 3), (2,))


def alone(start: int) -> Levels:
    return PICTURE.alone(Moved(Split((0, 4, 8), origin=start)).window(0))


def words(start: int, rows: int, step: int) -> Tensor:
    """``[1, tokens, 2]``: which row of the first level each token is of, and when that was."""
    row = (torch.arange(rows) + start) % 8
    return torch.stack([row.repeat_interleave(3), torch.full((rows * 3,), step)], -1)[None].float()


def test_tokens_are_those_of_the_last_visit_of_each_row() -> None:
    seen = Seen(PICTURE, 2, 2)
    known = []
    for step, start in enumerate((0, 4, 2)):
        policy = Recalled(seen, alone(start))
        policy.begin()
        own = words(start, 4, step)
        mine, rest = policy.gather("attn", (own, 2 * own), [12, 12], 1, level=0).wait()
        assert mine[0] is own
        assert torch.equal(rest[1], 2 * rest[0])
        assert policy.num_rows(0) * 3 == rest[0].shape[1]
        known.append(rest[0][0].tolist())
    assert known[0] == []
    assert known[1] == words(0, 4, 0)[0].tolist()
    assert sorted(known[2]) == sorted([*words(0, 2, 0)[0].tolist(), *words(6, 2, 1)[0].tolist()])


def test_sums_are_of_as_many_rows_as_the_rest_has() -> None:
    seen = Seen(PICTURE, 2, 2)
    for start in (0, 2):
        policy = Recalled(seen, alone(start))
        policy.begin()
        own = torch.full((1, 2, 5, 4), 4.0)  # one a row
        _, (rest,) = policy.gather("linear", (own,), [5, 5], 2).wait()
    # Two rows of the first visit are left, and stand for the four of the rest.
    assert torch.equal(rest, own)


def test_moments_are_of_the_patch_that_a_row_was_last_seen_in() -> None:
    seen = Seen(PICTURE, 2, 2)
    values = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    for start in (0, 4):
        policy = Recalled(seen, alone(start))
        policy.begin()
        part = values[start : start + 4]
        own = torch.tensor([part.numel(), part.mean(), part.var(correction=0)])
        found = policy.moments("norm", own)
    assert torch.allclose(found.flatten(), torch.tensor([values.mean(), values.var(correction=0)]))


def test_rows_beside_a_patch_are_those_that_it_saw() -> None:
    seen, dim = Seen(PICTURE, 2, 2), 2
    picture = torch.arange(8.0).view(1, 1, 8, 1)
    sides = []
    for start in (0, 4, 2, 6):
        policy = Recalled(seen, alone(start))
        policy.begin()
        x = picture.roll(-start, dim)[:, :, :4]
        sides.append(
            [[None if row is None else row.item() for row in both] for both in policy.beside("conv", x, 0, (1, 1), dim)]
        )
    assert sides == [[[None, None]], [[3, None]], [[1, 6]], [[5, None], [None, 2]]]


def test_notes_are_of_all_patches() -> None:
    def rank(comm: Comm) -> list[float]:
        seen = Seen(PICTURE, 2, 2)
        fresh = Noting(comm, seen, PICTURE)
        fresh.begin()
        fresh.gather("attn", (words(4 * comm.rank, 4, 0),), [12, 12], 1, level=0).wait()
        fresh.moments("norm", torch.tensor([4.0, comm.rank, 1.0]))
        policy = Recalled(seen, alone(2))
        policy.begin()
        _, (rest,) = policy.gather("attn", (words(2, 4, 1),), [12, 12], 1, level=0).wait()
        rows = sorted({int(row) for row in rest[0, :, 0]})
        return [*rows, float(policy.moments("norm", torch.tensor([4.0, 5.0, 1.0]))[0])]

    # Of the mean: own 5 of four rows, and two rows of each patch, whose means are 0 and 1.
    assert df.run_ranks(2, rank) == [[0, 1, 6, 7, (4 * 5 + 2 * 0 + 2 * 1) / 8]] * 2


def test_rows_beside_a_patch_are_those_that_others_told_of() -> None:
    def rank(comm: Comm) -> list[float | None]:
        seen, dim = Seen(PICTURE, 2, 2), 2
        own = torch.arange(8.0).view(1, 1, 8, 1)[:, :, 4 * comm.rank : 4 * comm.rank + 4]
        Noting(comm, seen, PICTURE).note("conv", own, 0, (1, 1), dim)
        ((before, after),) = Recalled(seen, alone(2)).beside("conv", torch.zeros(1, 1, 4, 1), 0, (1, 1), dim)
        return [row.item() if row is not None else None for row in (before, after)]

    assert df.run_ranks(2, rank) == [[1, 6]] * 2


def test_a_memory_forgets_what_is_seen_again() -> None:
    seen = Seen(PICTURE, 2, 2)
    sizes = []
    for step in range(8):
        (number,) = seen.enter(visit_of(alone(4 * (step % 2)), 0))
        seen.keep("attn", number, torch.zeros(1, 12, 2))
        sizes.append(seen.memory)
    assert sizes[2:] == [sizes[1]] * 6
