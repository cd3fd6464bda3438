"""Interpolation and convolution as one: the same as one after the other, and only where that is known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

import distrifusion as df
from distrifusion.exchange import Fresh
from distrifusion.geometry import Levels, Split
from distrifusion.layers import Frame, FrameHolder, PatchConv, PatchUpsample
from distrifusion.layers.doubled import mark_doubled, source_of, summed
from models import distance

KEY = "up.conv"
# Sums of two and four weights are rounded once more than the products with each: some 1e-7 in float32. A row from the
# wrong place shows at 1e-2.
EXACT = 1e-5


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def upsample(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> Any:
    torch.manual_seed(3)
    module = Upsample2D(4, use_conv=True, out_channels=6, bias=bias)
    return module.eval().requires_grad_(False).to(dtype)


def in_patches(module: Any, x: Tensor, coarse: Split, dim: int, change: Callable[[Any], None] | None = None) -> Tensor:
    """What ``module`` makes of ``x``, twice, with ``change`` to each rank's own before the second time.

    On a ring the picture goes around across the split, too.
    """
    fine = Split(tuple(2 * bound for bound in coarse.bounds), is_ring=coarse.is_ring)
    levels = Levels((coarse, fine), (x.shape[5 - dim], 2 * x.shape[5 - dim]), is_ring_across=coarse.is_ring)

    @torch.no_grad()
    def rank(comm: Any) -> Tensor:
        own, holder = copy.deepcopy(module), FrameHolder()
        PatchUpsample(own, "up", holder, level=0, level_out=1).attach()
        PatchConv(own.conv, KEY, holder, level=1, level_out=1).attach()
        span, memory = coarse.span(comm.rank), dict[str, Any]()
        for turn in (0, 1):
            exchange = Fresh(comm)
            holder.frame = Frame(comm.rank, dim, levels, exchange, memory=memory)
            if turn and change is not None:
                change(own)
            result: Tensor = own(x.narrow(dim, span.start, len(span)).clone())
        assert (KEY in memory) == (len(span) > 0 and x.dtype in (torch.float32, torch.float64))  # whether it was one
        return result

    return torch.cat(df.run_ranks(coarse.num_patches, rank), dim)


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (2, 8, 1, 1), (3, 5, 7, 2)])
def test_summed_weights_make_all_kinds_of_pixels(shape: tuple[int, ...]) -> None:
    conv, x = nn.Conv2d(shape[1], 6, 3, padding=1, dtype=torch.float64), noise(*shape, dtype=torch.float64)
    assert conv.bias is not None
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    phases = F.conv2d(x, summed(conv.weight), conv.bias.repeat(4), padding=1).unflatten(1, (2, 2, 6))
    height, width = shape[2:]
    for row in (0, 1):
        for col in (0, 1):
            part = phases[:, row, col, :, row : row + height, col : col + width]
            torch.testing.assert_close(part, expected[:, :, row::2, col::2])


@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
@pytest.mark.parametrize("bounds", [(0, 9), (0, 4, 9), (0, 1, 3, 9), (0, 2, 4, 6, 8, 9), (0, 0, 5, 5, 9)])
def test_patches_are_those_of_one_device(bounds: tuple[int, ...], dim: int) -> None:
    for module in (upsample(), upsample(bias=False)):
        x = noise(3, 4, 9, 9)
        assert distance(in_patches(module, x, Split(bounds), dim), module(x)) <= EXACT


@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
@pytest.mark.parametrize("bounds", [(0, 9), (0, 4, 9), (0, 1, 3, 9)])
def test_where_the_ends_of_a_picture_meet(bounds: tuple[int, ...], dim: int) -> None:
    module, x = upsample(), noise(2, 4, 9, 9)
    around = F.pad(F.interpolate(x, scale_factor=2.0, mode="nearest"), (1, 1, 1, 1), mode="circular")
    truth = F.conv2d(around, module.conv.weight, module.conv.bias)
    assert distance(in_patches(module, x, Split(bounds, is_ring=True), dim), truth) <= EXACT


def test_double_precision_is_kept() -> None:
    module, x = upsample(torch.float64), noise(2, 4, 8, 6, dtype=torch.float64)
    assert distance(in_patches(module, x, Split((0, 3, 8)), 2), module(x)) <= 1e-13


def test_half_precision_is_left_to_the_module() -> None:
    module, x = upsample(torch.bfloat16), noise(1, 4, 8, 6, dtype=torch.bfloat16)
    assert torch.equal(in_patches(module, x, Split((0, 4, 8)), 2), module(x))


def test_written_weights_count() -> None:
    def change(own: Any) -> None:
        own.conv.weight.mul_(2)
        own.conv.bias.add_(1)

    module, changed, x = upsample(), upsample(), noise(1, 4, 8, 6)
    change(changed)
    assert distance(in_patches(module, x, Split((0, 4, 8)), 2, change), changed(x)) <= EXACT


def marked() -> tuple[Tensor, Tensor]:
    source = noise(1, 4, 3, 3)
    return mark_doubled(F.interpolate(source, scale_factor=2.0, mode="nearest"), source), source


@torch.no_grad()
def test_what_was_written_to_since_is_no_longer_taken_for_doubled() -> None:
    frame, conv = Frame(0, 2, Levels((Split((0, 6)),), (6,)), Fresh(None)), nn.Conv2d(4, 4, 3, padding=1)  # type: ignore[arg-type]
    x, source = marked()
    assert source_of(x, conv, frame) is source
    x[0, 0, 0, 0] += 1
    assert source_of(x, conv, frame) is None


@torch.no_grad()
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 5, padding=2),
        nn.Conv2d(4, 4, 3, padding=0),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.AvgPool2d(3, 1, 1),
    ],
    ids=str,
)
def test_other_convolutions_run_as_they_are(conv: nn.Module) -> None:
    frame = Frame(0, 2, Levels((Split((0, 6)),), (6,)), Fresh(None))  # type: ignore[arg-type]
    assert source_of(marked()[0], conv, frame) is None
