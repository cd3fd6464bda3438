"""Steps that follow each other as in a picture, of the bench."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.bench import workload
from distrifusion.bench.picture import Picture
from distrifusion.bench.workload import Workload, load
from distrifusion.comm import Comm

TINY = {
    "sample_size": 16,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "cross_attention_dim": 16,
    "caption_channels": 8,
    "out_channels": 8,
    "use_additional_conditions": False,
}
NUM_STEPS = 5


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Workload:
    monkeypatch.setitem(workload.TRANSFORMERS, "pixart-mini", ("PixArtTransformer2DModel", TINY))
    return load("pixart-mini", 16, 16)


@torch.no_grad()
def paint(picture: Picture) -> list[Tensor]:
    """The latents after each step."""
    made = []
    for _ in range(NUM_STEPS):
        picture.step()
        made.append(picture._latents)
    return made


def test_steps_of_a_picture_go_down_the_schedule_from_the_time_given(
    work: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    forward = work.model.forward

    def noted(*args: object, timestep: Tensor, **kwargs: object) -> object:
        times.append(timestep.item())
        return forward(*args, timestep=timestep, **kwargs)

    monkeypatch.setattr(work.model, "forward", noted)
    made = paint(Picture.of(work, NUM_STEPS))
    assert times[0] == workload.TIME
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == NUM_STEPS
    assert all(not torch.equal(before, after) for before, after in pairwise(made))


@pytest.mark.parametrize("num_patches", [1, 3])
def test_no_step_waits_for_all_of_the_one_before_but_the_last(work: Workload, num_patches: int) -> None:
    alone = paint(Picture.of(work, NUM_STEPS))
    config = df.ParallelConfig(strategy="pipelined", patches=num_patches, warmup_steps=0)

    def rank(comm: Comm) -> tuple[list[bool], Tensor, list[str]]:
        own = replace(work, model=deepcopy(work.model))
        picture = df.parallelize(Picture.of(own, NUM_STEPS), config, comm)
        made = paint(picture)
        found = df.report(own.model)
        return [getattr(latents, "is_open", False) for latents in made], made[-1], found.notes

    for is_open, latents, notes in df.run_ranks(2, rank):
        assert not any("wait for each other" in note for note in notes)
        assert is_open[-1] is False
        if num_patches == 1:  # one after the other, which is exact
            assert (latents - alone[-1]).norm() <= 1e-5 * alone[-1].norm()
        else:
            assert any(is_open)
            assert 1e-5 < (latents - alone[-1]).norm() / alone[-1].norm() < 0.1  # keys of the step before
