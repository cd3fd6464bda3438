"""Rows that come before they are made: the same numbers as when they come after, with one wait less."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import distrifusion as df
from distrifusion.comm.codec import codecs_for
from distrifusion.comm.residual import Wire
from distrifusion.comm.slots import Slots
from distrifusion.exchange import Fresh
from distrifusion.geometry import Levels, Split
from distrifusion.layers import Frame, FrameHolder, Layer, PatchConv, PatchGroupNorm, PatchSiLU
from distrifusion.models import table_for
from models import build, distance

EXACT = 1e-6  # a norm and one convolution: rounding of sums in another order; a row that was not normed shows at 1e-1
EARLY, LATE = ["rows", "moments"], ["moments", "rows"]

SPLITS = [(0, 9), (0, 4, 9), (0, 1, 3, 9), (0, 2, 4, 6, 8, 9), (0, 0, 5, 5, 9)]


class Block(nn.Module):
    """As in a ResnetBlock2D."""

    def __init__(self, kernel: int = 3, *, inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.norm, self.act = nn.GroupNorm(2, 4), nn.SiLU(inplace)
        self.conv = nn.Conv2d(4, 6, kernel, padding=kernel // 2)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.between: Callable[[Tensor], Tensor] = lambda x: x
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.between(self.norm(x)))
        return self.conv(nn.functional.dropout(x, training=False))


class Recorded(Fresh):
    """Writes down what it is asked, in order."""

    def __init__(self, comm: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(comm, *args, **kwargs)
        self.asked: list[str] = []

    def neighbours(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append("rows")
        return super().neighbours(*args, **kwargs)

    def moments(self, key: str, own: Tensor) -> Tensor:
        self.asked.append("moments")
        return super().moments(key, own)


class Late(Recorded):
    asks_early = False  # type: ignore[assignment]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)  # far from normed


def in_patches(
    block: Block,
    x: Tensor,
    split: Split,
    dim: int = 2,
    exchange: Callable[[Any], Recorded] = Recorded,
    prepare: Callable[[FrameHolder], Any] = lambda holder: None,
    is_inference: bool = False,
) -> tuple[Tensor, list[str]]:
    """The block's output, and what each rank asked: the same on all."""

    def rank(comm: Any) -> tuple[Tensor, list[str]]:
        own, holder, policy = copy.deepcopy(block), FrameHolder(), exchange(comm)
        norm = PatchGroupNorm(own.norm, "norm", holder)
        norm.reader = PatchConv(own.conv, "conv", holder, level=0, level_out=0)
        layers: list[Layer] = [norm, PatchSiLU(own.act, "act", holder), norm.reader]
        for layer in layers:
            layer.attach()
        levels = Levels((split,), (x.shape[5 - dim],), is_ring_across=split.is_ring)
        holder.frame = Frame(comm.rank, dim, levels, policy)
        prepare(holder)
        policy.begin()
        span = split.span(comm.rank)
        with torch.inference_mode(is_inference), torch.no_grad():
            result = own(x.narrow(dim, span.start, len(span)).clone())
        return result, policy.asked

    found = df.run_ranks(split.num_patches, rank)
    assert all(asked == found[0][1] for _, asked in found)
    return torch.cat([result for result, _ in found], dim), found[0][1]


@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
@pytest.mark.parametrize("bounds", SPLITS)
def test_patches_are_those_of_one_device(bounds: tuple[int, ...], dim: int) -> None:
    for block in (Block(), Block(5), Block(inplace=True)):
        x = noise(3, 4, 9, 9)
        result, asked = in_patches(block, x, Split(bounds), dim)
        assert distance(result, block(x)) <= EXACT
        assert asked == (EARLY if len(bounds) > 2 else ["moments"])


@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
@pytest.mark.parametrize("bounds", SPLITS[:4])
def test_where_the_ends_of_a_picture_meet(bounds: tuple[int, ...], dim: int) -> None:
    block, x = Block(), noise(2, 4, 9, 9)
    around = nn.functional.pad(block.act(block.norm(x)), (1, 1, 1, 1), mode="circular")
    truth = nn.functional.conv2d(around, block.conv.weight, block.conv.bias)
    result, asked = in_patches(block, x, Split(bounds, is_ring=True), dim)
    assert distance(result, truth) <= EXACT
    assert asked == (EARLY if len(bounds) > 2 else ["moments"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_are_those_that_come_after(dtype: torch.dtype) -> None:
    block, x, split = Block().to(dtype), noise(2, 4, 9, 16, dtype=dtype), Split((0, 4, 6, 9))
    late, asked = in_patches(block, x, split, exchange=Late)
    assert asked == LATE
    assert torch.equal(in_patches(block, x, split)[0], late)


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), lambda x: 2 * x], ids=["written to", "a new tensor"])
def test_what_else_is_done_to_the_patch_is_not_missed(change: Callable[[Tensor], Tensor]) -> None:
    block, x = Block(), noise(2, 4, 9, 9)
    block.between = change
    result, asked = in_patches(block, x, Split((0, 4, 9)))
    assert distance(result, block(x)) <= EXACT
    assert asked == [*EARLY, "rows"]


def test_inference_mode_counts_no_writes_and_so_waits_twice() -> None:
    block, x = Block(), noise(2, 4, 9, 9)
    result, asked = in_patches(block, x, Split((0, 4, 9)), is_inference=True)
    assert distance(result, block(x)) <= EXACT
    assert asked == LATE


@pytest.mark.parametrize(
    "exchange",
    [
        lambda comm: Recorded(comm, Slots(comm, {})),
        lambda comm: Recorded(comm, wire=Wire(comm, codecs_for({"halo": "int8"}))),
    ],
    ids=["displaced steps follow", "codec"],
)
def test_rows_that_others_build_on_are_those_that_are_read(exchange: Callable[[Any], Recorded]) -> None:
    block, x = Block(), noise(2, 4, 9, 9)
    result, asked = in_patches(block, x, Split((0, 4, 9)), exchange=exchange)
    assert distance(result, block(x)) <= EXACT
    assert asked == LATE


def test_a_model_that_was_compiled_asks_as_its_graphs_do() -> None:
    block, x = Block(), noise(2, 4, 9, 9)
    result, asked = in_patches(block, x, Split((0, 4, 9)), prepare=lambda holder: holder.turn.add_(1))
    assert distance(result, block(x)) <= EXACT
    assert asked == LATE


def readers(model: Any) -> dict[str, str]:
    layers = [layer for layer in table_for(model).layers(FrameHolder()) if isinstance(layer, PatchGroupNorm)]
    return {layer.key: layer.reader.key for layer in layers if layer.reader is not None}


def norms(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}


def test_norms_know_the_convolution_after_them() -> None:
    model = build("sdxl")
    found = readers(model)
    assert found["conv_norm_out"] == "conv_out"
    assert found["mid_block.resnets.0.norm2"] == "mid_block.resnets.0.conv2"
    assert set(found) == {name for name in norms(model) if ".resnets." in name or name == "conv_norm_out"}


def test_a_norm_after_which_something_else_comes_has_no_reader() -> None:
    assert not readers(build("deepfloyd"))  # GELU
    found = readers(build("resnet-resample"))  # samplers resample there, and norm2 is scaled and shifted
    assert all(".resnets." in name and name.endswith("norm1") for name in found if name != "conv_norm_out")


def test_of_a_convolution_with_an_adapter_its_own_part_reads() -> None:
    model = build("sd15")
    model.add_adapter(LoraConfig(r=2, target_modules=["conv1"]))
    found = readers(model)
    assert found["mid_block.resnets.0.norm1"] == "mid_block.resnets.0.conv1.base_layer"
    assert found["mid_block.resnets.0.norm2"] == "mid_block.resnets.0.conv2"
