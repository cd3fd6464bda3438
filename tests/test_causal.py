"""Layers of video autoencoders against the plain ones: uneven, odd and empty patches, rows and columns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AvgDown3D,
    DupUp3D,
    WanAttentionBlock,
    WanCausalConv3d,
    WanUpsample,
)
from torch import Tensor, nn

import distrifusion as df
from distrifusion.comm import Comm
from distrifusion.exchange import Fresh
from distrifusion.geometry import Levels, Split
from distrifusion.layers import (
    Frame,
    FrameHolder,
    Layer,
    PatchCausalConv,
    PatchFrameAttention,
    PatchInterpolate,
    PatchRegroup,
)
from models import distance

EXACT = 1e-5  # see test_layers.py

FINE = [Split((0, 4, 8)), Split((0, 3, 7, 8)), Split((0, 0, 5, 6, 6, 8))]  # odd bounds cut pairs; some own nothing
ACROSS = 6


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prepared(module: Any) -> Any:
    for i, parameter in enumerate(module.parameters()):
        parameter.data = 0.3 * noise(*parameter.shape, seed=i)
    return module.eval().requires_grad_(False)


def levels_of(fine: Split) -> Levels:
    return Levels((fine, fine.strided(2, fine.size // 2)), (ACROSS, ACROSS // 2))


def sized(x_level: int, dim: int, *front: int) -> Tensor:
    sides = (8 >> x_level, ACROSS >> x_level)
    return noise(*front, *(sides if dim == 2 else sides[::-1]))


def in_patches(
    module: Any, layer: Callable[[Any, FrameHolder], Layer], x: Tensor, fine: Split, dim: int, level: int, call: Any
) -> Tensor:
    """What ``call(module, own part of x)`` gives on every rank, put together."""
    levels = levels_of(fine)
    along = x.ndim - 4 + dim

    def rank(comm: Comm) -> Tensor:
        own, holder = copy.deepcopy(module), FrameHolder()
        layer(own, holder).attach()
        exchange = Fresh(comm)
        holder.frame = Frame(comm.rank, dim, levels, exchange)
        span = levels.splits[level].span(comm.rank)
        exchange.begin()
        result: Tensor = call(own, x.narrow(along, span.start, len(span)).clone())
        exchange.finish()
        return result

    return torch.cat(df.run_ranks(fine.num_patches, rank), along)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("fine", FINE, ids=str)
@pytest.mark.parametrize(
    "conv",
    [
        WanCausalConv3d(3, 5, 3, padding=1),
        WanCausalConv3d(3, 5, (3, 1, 1), padding=(1, 0, 0)),
        WanCausalConv3d(3, 5, 1),
    ],
    ids=["3", "3x1x1", "1"],
)
def test_a_causal_convolution_with_and_without_a_past(conv: nn.Module, fine: Split, dim: int) -> None:
    conv = prepared(conv)

    def frames(module: Any, x: Tensor) -> Tensor:
        """The first frame, then two more with the one before as their past, then one with two."""
        parts = [module(x[:, :, :1]), module(x[:, :, 1:3], x[:, :, :1]), module(x[:, :, 3:], x[:, :, 1:3])]
        return torch.cat(parts, 2)

    x = sized(0, dim, 2, 3, 4)
    found = in_patches(conv, lambda m, h: PatchCausalConv(m, "conv", h, level=0), x, fine, dim, 0, frames)
    assert distance(found, frames(conv, x)) <= EXACT


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("fine", FINE, ids=str)
@pytest.mark.parametrize("factor_t", [1, 2])
def test_pixels_to_channels_and_back(fine: Split, dim: int, factor_t: int) -> None:
    down, up = AvgDown3D(4, 8, factor_t, 2), DupUp3D(8, 4, factor_t, 2)
    x, coarse = sized(0, dim, 2, 4, 3), sized(1, dim, 2, 8, 2)
    found = in_patches(down, lambda m, h: PatchRegroup(m, "down", h, level=0, level_out=1), x, fine, dim, 0, _call)
    assert torch.equal(found, down(x))
    for first in (False, True):
        found = in_patches(
            up,
            lambda m, h: PatchRegroup(m, "up", h, level=1, level_out=0),
            coarse,
            fine,
            dim,
            1,
            lambda module, own, first=first: module(own, first_chunk=first),
        )
        assert torch.equal(found, up(coarse, first_chunk=first))


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("fine", FINE, ids=str)
def test_attention_within_each_frame(fine: Split, dim: int) -> None:
    block, x = prepared(WanAttentionBlock(4)), sized(1, dim, 2, 4, 3)
    found = in_patches(block, lambda m, h: PatchFrameAttention(m, "attention", h, level=1), x, fine, dim, 1, _call)
    assert distance(found, block(x)) <= EXACT
    assert distance(block(x), block(x.flip(2)).flip(2)) <= EXACT  # no frame sees another


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("fine", FINE, ids=str)
@pytest.mark.parametrize(
    "module",
    [nn.Upsample(scale_factor=2, mode="nearest"), WanUpsample(scale_factor=(2.0, 2.0), mode="nearest-exact")],
    ids=["nearest", "nearest-exact"],
)
def test_nearest_by_two(module: nn.Module, fine: Split, dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = sized(1, dim, 2, 3).to(dtype)
        found = in_patches(
            module, lambda m, h: PatchInterpolate(m, "up", h, level=1, level_out=0), x, fine, dim, 1, _call
        )
        assert found.dtype == dtype
        assert torch.equal(found, module(x))


def _call(module: Any, own: Tensor) -> Tensor:
    result: Tensor = module(own)
    return result
