"""How long a pipelined run takes, by the formula of AsyncDiff (arXiv 2406.06911): after the warm-up, a step takes what
one of N equal components takes, and with a stride of 2 half of that.
"""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DModel

import distrifusion as df
from distrifusion.comm import Comm
from virtual_time import Clock, TimedComm, Wire

WIDTH, SIDE, NUM_STEPS = 64, 6, 6


def unet() -> UNet2DModel:
    """Of one level, so that its resnets can be dealt into 2 and into 3 stages that differ by at most 2 %."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (WIDTH,)}
    channels = {"in_channels": 1, "out_channels": 1, "norm_num_groups": 4, "add_attention": False}
    return UNet2DModel(sample_size=SIDE, layers_per_block=8, **blocks, **channels).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("world", "stride", "slowness", "is_hidden"),
    [
        (2, 1, 0.25, True),
        (3, 1, 0.01, True),  # two stages follow on each other, and what goes from one to the other is waited for
        (3, 2, 0.25, True),
        (2, 1, 1.5, False),
    ],
)
def test_a_step_takes_as_long_as_a_component(world: int, stride: int, slowness: float, is_hidden: bool) -> None:
    """``slowness``: how long the output of a unit is under way, where a component takes 1."""
    model, sample = unet(), torch.zeros(1, 1, SIDE, SIDE)
    with Clock() as clock:
        model(sample, 500)
    num_components = world - stride + 1
    component = clock.now / num_components
    wire = Wire(rate=4 * WIDTH * SIDE * SIDE / (slowness * component))

    def rank(comm: Comm) -> list[float]:
        config, clock = df.ParallelConfig(strategy="pipelined", warmup_steps=1, stride=stride), Clock()
        own, ends = df.parallelize(copy.deepcopy(model), config, TimedComm(comm, clock, wire)), []
        with clock:
            for _ in range(2 + NUM_STEPS):
                own(sample, 500)
                ends.append(clock.now)
        return ends

    ends = [max(times) for times in zip(*df.run_ranks(world, rank), strict=True)]
    took, published = ends[-1] - ends[1], NUM_STEPS * component / stride
    assert took >= 0.95 * published
    assert (took <= 1.05 * published) == is_hidden
