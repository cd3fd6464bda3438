"""The activation before a convolution leaves room for its halo: exact, and without a copy of the patch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distrifusion as df
from distrifusion.exchange import Fresh
from distrifusion.geometry import Levels, Split
from distrifusion.layers import Frame, FrameHolder, Layer, PatchConv, PatchSiLU
from models import distance

EXACT = 1e-6  # one convolution: rounding of sums in another order


class Block(nn.Module):
    def __init__(self, conv: nn.Conv2d, inplace: bool = False) -> None:
        super().__init__()
        self.act, self.conv = nn.SiLU(inplace), conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.dropout(self.act(x), training=False))


def in_patches(block: Block, x: Tensor, split: Split, dim: int) -> tuple[Tensor, list[bool]]:
    """The block's output, and on each rank whether the convolution read what the activation had written, in place."""

    def rank(comm: Any) -> tuple[Tensor, bool]:
        own, holder = copy.deepcopy(block), FrameHolder()
        levels = Levels((split,), (x.shape[5 - dim],))
        layers: list[Layer] = [PatchSiLU(own.act, "act", holder)]
        layers.append(PatchConv(own.conv, "conv", holder, level=0, level_out=0))
        for layer in layers:
            layer.attach()
        holder.frame = Frame(comm.rank, dim, levels, Fresh(comm))
        holder.frame.exchange.begin()
        written: list[Tensor] = []
        own.act.register_forward_hook(lambda module, args, out: written.append(out))
        storages: list[int] = []
        convolve = torch.nn.functional.conv2d

        def spy(rows: Tensor, *args: Any) -> Tensor:
            storages.append(rows.untyped_storage().data_ptr())
            return convolve(rows, *args)

        layers[1]._apply = lambda rows, padding: spy(  # type: ignore[attr-defined]
            rows, own.conv.weight, own.conv.bias, own.conv.stride, padding, own.conv.dilation
        )
        span = split.span(comm.rank)
        result = own(x.narrow(dim, span.start, len(span)).clone())
        return result, bool(storages) and storages[0] == written[0].untyped_storage().data_ptr()

    found = df.run_ranks(split.num_patches, rank)
    return torch.cat([result for result, _ in found], dim), [in_place for _, in_place in found]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
@pytest.mark.parametrize("bounds", [(0, 5, 9), (0, 3, 6, 9), (0, 1, 2, 5, 9), (0, 0, 4, 9)])
def test_a_3x3_convolution_reads_the_activation_in_place(bounds: tuple[int, ...], dim: int) -> None:
    torch.manual_seed(0)
    block, x, split = Block(nn.Conv2d(4, 6, 3, padding=1)), noise(2, 4, 9, 9), Split(bounds)
    with torch.no_grad():
        made, in_place = in_patches(block, x, split, dim)
        assert distance(made, block(x)) <= EXACT
    assert in_place == [len(split.span(rank)) > 0 for rank in range(split.num_patches)]


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 6, 5, padding=2),
        nn.Conv2d(4, 6, 3, padding="same", dilation=2),
        nn.Conv2d(4, 6, (3, 5), padding=(1, 2)),
    ],
    ids=["1", "5", "3-dilation-2", "3x5"],
)
@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
def test_other_convolutions_are_exact_too(conv: nn.Conv2d, dim: int) -> None:
    block, x = Block(conv), noise(1, 4, 9, 11)
    with torch.no_grad():
        assert distance(in_patches(block, x, Split((0, 4, 9 if dim == 2 else 11)), dim)[0], block(x)) <= EXACT


def test_an_activation_in_place_and_one_of_no_picture_stay_what_they_are() -> None:
    with torch.no_grad():
        block, x = Block(nn.Conv2d(4, 6, 3, padding=1), inplace=True), noise(1, 4, 8, 8)
        assert distance(in_patches(block, x, Split((0, 4, 8)), 2)[0], block(x.clone())) <= EXACT
        time = noise(2, 16)
        assert torch.equal(PatchSiLU(nn.SiLU(), "act", FrameHolder()).forward(time), nn.functional.silu(time))


def test_channels_last_and_bfloat16_keep_their_layout_and_dtype() -> None:
    x = noise(2, 4, 8, 8).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    holder = FrameHolder()
    holder.frame = Frame(0, 2, Levels((Split((0, 8)),), (8,)), Fresh(None))  # type: ignore[arg-type]
    out = PatchSiLU(nn.SiLU(), "act", holder).forward(x)
    assert out.dtype == torch.bfloat16
    assert out.stride(1) == 1
    assert torch.equal(out, nn.functional.silu(x))
