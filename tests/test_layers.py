"""Every layer against the plain one, on thread ranks with fresh values: uneven and empty patches, rows and columns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor, AttnProcessor, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

import distrifusion as df
from distrifusion.exchange import Absent, Fresh
from distrifusion.geometry import Levels, Span, Split
from distrifusion.layers import (
    Frame,
    FrameHolder,
    Layer,
    PatchAttention,
    PatchConv,
    PatchDownsample,
    PatchGroupNorm,
    PatchUpsample,
)
from distrifusion.layers.conv import windows
from models import distance

# The kernels sum in another order over a patch than over the whole: some 1e-7 in float32. A row read from the wrong
# place, or a key forgotten, shows at 1e-2.
EXACT = 1e-5

Attach = Callable[[Any, FrameHolder], list[Layer]]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prepared(module: nn.Module) -> Any:
    torch.manual_seed(3)
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return module.eval().requires_grad_(False)


def splits_of(size: int) -> Iterator[Split]:
    """Worlds 1, 2, 3, 5, the last ones uneven; then patches without rows, in the middle and at both ends."""
    for world in (1, 2, 3, 5):
        yield Split.even(size, world)
    yield Split((0, 1, size - 2, size))
    yield Split((0, 0, size // 2, size // 2, size, size))


def in_patches(
    module: Any, attach: Attach, x: Tensor, levels: Levels, dim: int, *, whole: bool = False, **kwargs: Any
) -> Tensor:
    """What the module makes of ``x`` in patches, put together again. Tokens ``[B, tokens, C]`` are cut like rows."""
    inputs = levels.splits[0]

    def rank(comm: Any) -> Tensor:
        own, holder = copy.deepcopy(module), FrameHolder()
        for layer in attach(own, holder):
            layer.attach()
        exchange = Fresh(comm)
        holder.frame = Frame(comm.rank, dim, levels, exchange)
        span = inputs.span(comm.rank)
        exchange.begin()
        # A copy, as a patch is a tensor of its own in a model; its strides keep the order of those of `x`.
        result = own(x if whole else x.narrow(dim, span.start, len(span)).clone(), **kwargs)
        exchange.finish()
        return result

    return torch.cat(df.run_ranks(inputs.num_patches, rank), dim)


def one_level(split: Split, across: int) -> Levels:
    return Levels((split,), (across,))


def shapes(module: Any, name: str, **kwargs: Any) -> pytest.ParameterSet:
    return pytest.param(module, kwargs, id=name)


CONVOLUTIONS = [
    shapes(nn.Conv2d(4, 6, 1), "1"),
    shapes(nn.Conv2d(4, 6, 3, padding=1), "3-padding-1"),
    shapes(nn.Conv2d(4, 6, 3), "3-padding-0"),
    shapes(nn.Conv2d(4, 6, 5, padding=2), "5-padding-2"),
    shapes(nn.Conv2d(4, 6, 5, padding=1), "5-padding-1"),
    shapes(nn.Conv2d(4, 6, 7, padding="same"), "7-same"),
    shapes(nn.Conv2d(4, 6, (1, 3), padding="same"), "1x3-same"),
    shapes(nn.Conv2d(4, 6, (3, 1), padding=(1, 0)), "3x1-padding-1x0"),
    shapes(nn.Conv2d(4, 6, 3, padding="valid"), "3-valid"),
    shapes(nn.Conv2d(4, 6, 4, padding="same"), "4-same-is-uneven"),
    shapes(nn.Conv2d(4, 6, 3, stride=2, padding=1), "3-stride-2"),
    shapes(nn.Conv2d(4, 6, 3, stride=2, padding=2), "3-stride-2-padding-2"),
    shapes(nn.Conv2d(4, 6, 5, stride=2, padding=2), "5-stride-2"),
    shapes(nn.Conv2d(4, 6, 2, stride=2), "2-stride-2"),
    shapes(nn.Conv2d(4, 6, 1, stride=2), "1-stride-2"),
    shapes(nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1), "3-stride-2x1"),
    shapes(nn.Conv2d(4, 6, 3, padding=2, dilation=2), "3-dilation-2"),
    shapes(nn.Conv2d(4, 6, 3, padding="same", dilation=2), "3-dilation-2-same"),
    shapes(nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), "3-groups-2-no-bias"),
    shapes(nn.Conv2d(4, 6, 1, padding_mode="reflect"), "1-reflect-without-padding"),
    shapes(nn.Conv2d(4, 6, 3, stride=2), "3-stride-2-zeros-after", extra=(0, 1)),
    shapes(nn.AvgPool2d(2), "pool-2"),
    shapes(nn.AvgPool2d(3, stride=2), "pool-3-stride-2"),
    shapes(nn.AvgPool2d((1, 2), stride=(1, 2), divisor_override=3), "pool-1x2-divisor-3"),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own: it pads such by a copy
@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
@pytest.mark.parametrize(("module", "kwargs"), CONVOLUTIONS)
def test_convolution_and_pooling(module: nn.Module, kwargs: dict[str, Any], dim: int) -> None:
    module, extra = prepared(module), kwargs.get("extra", (0, 0))
    for batch, height, width in ((1, 11, 8), (3, 8, 13)):
        x = noise(batch, 4, height, width)
        truth = module(nn.functional.pad(x, (*extra, *extra)))
        along, size, across = x.shape[dim], truth.shape[dim], (x.shape[5 - dim], truth.shape[5 - dim])
        window = windows(module, extra)[dim - 2]
        for inputs in splits_of(along):
            levels = Levels((inputs, inputs.strided(window.stride, size)), across)

            def attach(own: Any, holder: FrameHolder) -> list[Layer]:
                return [PatchConv(own, "conv", holder, level=0, level_out=1, **kwargs)]

            assert distance(in_patches(module, attach, x, levels, dim), truth) <= EXACT, inputs


@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
@pytest.mark.parametrize("bounds", [(0, 3, 9), (0, 0, 4, 9), (0, 7, 8, 9)])
def test_a_convolution_that_has_the_whole_picture_reads_it_without_a_message(bounds: tuple[int, ...], dim: int) -> None:
    module, x = prepared(nn.Conv2d(4, 6, 5, padding=2)), noise(2, 4, 9, 9)

    def attach(own: Any, holder: FrameHolder) -> list[Layer]:
        return [PatchConv(own, "conv_in", holder, level=0, level_out=0, reads_whole=True)]

    levels = one_level(Split(bounds), 9)
    assert distance(in_patches(module, attach, x, levels, dim, whole=True), module(x)) <= EXACT

    def silent(comm: Any) -> int:
        holder = FrameHolder()
        holder.frame = Frame(comm.rank, dim, levels, Fresh(comm))
        PatchConv(module, "conv_in", holder, level=0, level_out=0, reads_whole=True).forward(x)
        return sum(comm.meter.messages.values())

    assert df.run_ranks(len(bounds) - 1, silent) == [0] * (len(bounds) - 1)


def test_channels_last_stays_channels_last() -> None:
    module, x = prepared(nn.Conv2d(4, 6, 3, padding=1)), noise(2, 4, 9, 7).contiguous(memory_format=torch.channels_last)

    def rank(comm: Any) -> Tensor:
        holder = FrameHolder()
        split = Split((0, 4, 9))
        holder.frame = Frame(comm.rank, 2, one_level(split, 7), Fresh(comm))
        own = x[:, :, split.bounds[comm.rank] : split.bounds[comm.rank + 1]].contiguous(
            memory_format=torch.channels_last
        )
        return PatchConv(module, "conv", holder, level=0, level_out=0).forward(own)

    parts = df.run_ranks(2, rank)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)
    assert distance(torch.cat(parts, 2), module(x)) <= EXACT


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "down.conv.*circular"),
        (nn.AvgPool2d(2, ceil_mode=True), "down.conv.*ceil_mode=True"),
        (nn.AvgPool2d(3, padding=1), "down.conv.*padding=1"),
    ],
)
def test_what_would_be_wrong_in_patches_is_refused_by_name(module: nn.Module, message: str) -> None:
    with pytest.raises(df.UnsupportedModel, match=message):
        PatchConv(module, "down.conv", FrameHolder(), level=0, level_out=0)


def norm(own: Any, holder: FrameHolder) -> list[Layer]:
    return [PatchGroupNorm(own, "norm", holder)]


@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_groups", [1, 2, 8])
def test_group_norm(num_groups: int, batch: int, dim: int) -> None:
    module, x = prepared(nn.GroupNorm(num_groups, 8, eps=1e-3)), 2 * noise(batch, 8, 9, 11) + 1
    for split in splits_of(x.shape[dim]):
        assert distance(in_patches(module, norm, x, one_level(split, 0), dim), module(x)) <= EXACT, split


def test_group_norm_of_tokens_and_of_views() -> None:
    module = prepared(nn.GroupNorm(2, 8))
    tokens = noise(2, 8, 12)  # [B, C, tokens], as attention makes it
    assert distance(in_patches(module, norm, tokens, one_level(Split((0, 5, 12)), 1), 2), module(tokens)) <= EXACT
    transposed = noise(2, 12, 8).transpose(1, 2)
    last = noise(2, 8, 9, 11).contiguous(memory_format=torch.channels_last)
    for view in (transposed, last):
        assert not view.is_contiguous()
        assert (
            distance(in_patches(module, norm, view, one_level(Split((0, 4, view.shape[2])), 1), 2), module(view))
            <= EXACT
        )


def test_group_norm_without_affine_part() -> None:
    module, x = nn.GroupNorm(4, 8, affine=False), noise(2, 8, 6, 5)
    assert distance(in_patches(module, norm, x, one_level(Split((0, 1, 6)), 5), 2), module(x)) <= EXACT


def test_group_norm_does_not_cancel() -> None:
    """Mean 1e3, deviation 1: E[x^2] - E[x]^2 in float32 would be off by 6e-2 of the variance."""
    module = prepared(nn.GroupNorm(2, 8))
    x = noise(2, 8, 12, 9) + 1000
    truth = copy.deepcopy(module).double()(x.double())
    for split in splits_of(12):
        # What float32 inputs of 1e3 leave: their own rounding, 6e-5 absolute, over a deviation of 1.
        assert distance(in_patches(module, norm, x, one_level(split, 9), 2), truth) <= 1e-4
    assert distance(in_patches(module, norm, x, one_level(Split((0, 5, 12)), 9), 2), module(x)) <= 1e-4


@pytest.mark.parametrize("shift", [0.0, 30.0, 300.0])
def test_group_norm_in_bfloat16_is_as_good_as_torch(shift: float) -> None:
    module = prepared(nn.GroupNorm(2, 8)).bfloat16()
    x = (noise(2, 8, 12, 9) * 3 + shift).bfloat16()
    truth = copy.deepcopy(module).float()(x.float())
    for split in splits_of(12):
        ours = in_patches(module, norm, x, one_level(split, 9), 2)
        assert ours.dtype == torch.bfloat16
        assert distance(ours, truth) <= 1.5 * distance(module(x), truth)


def test_group_norm_in_float64_runs_with_float32_moments() -> None:
    module = prepared(nn.GroupNorm(2, 8)).double()
    x = noise(2, 8, 10, 6).double()
    result = in_patches(module, norm, x, one_level(Split((0, 4, 10)), 6), 2)
    assert result.dtype == torch.float64
    assert distance(result, module(x)) <= EXACT


def test_group_norm_in_half_precision_does_not_overflow() -> None:
    """Squares of 300 are beyond float16."""
    module = prepared(nn.GroupNorm(2, 8)).half()
    x = (noise(1, 8, 10, 6) * 300).half()
    truth = copy.deepcopy(module).float()(x.float())
    assert distance(in_patches(module, norm, x, one_level(Split((0, 4, 10)), 6), 2), truth) <= 2e-3  # of a float16


def attention(own: Any, holder: FrameHolder) -> list[Layer]:
    layers: list[Layer] = [PatchAttention(own, "attn", holder, level=0)]
    if own.group_norm is not None:
        layers.append(PatchGroupNorm(own.group_norm, "attn.group_norm", holder))
    return layers


PROCESSORS = [AttnProcessor2_0, AttnProcessor]


def token_levels(split: Split, across: int) -> tuple[Levels, Levels]:
    """Levels of the picture, and the cut of its row-major tokens ``[B, tokens, C]`` in rows."""
    return one_level(split, across), one_level(Split(tuple(bound * across for bound in split.bounds)), 1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_self_attention(processor: type, batch: int) -> None:
    module = prepared(Attention(8, heads=2, dim_head=4, bias=True, processor=processor()))
    x = noise(batch, 7 * 3, 8)
    for split in splits_of(7):
        # Own tokens of a patch of rows are consecutive; of columns they are not, but attention does not ask.
        tokens = token_levels(split, 3)[1]
        assert distance(in_patches(module, attention, x, tokens, 1), module(x)) <= EXACT, split


def test_cross_attention_sends_nothing() -> None:
    module = prepared(Attention(8, cross_attention_dim=6, heads=2, dim_head=4))
    x, text = noise(3, 21, 8), noise(3, 5, 6, seed=1)
    mask = torch.zeros(3, 1, 5).masked_fill(torch.arange(5) > 2, -1e4)
    for split in splits_of(7):
        tokens = token_levels(split, 3)[1]
        result = in_patches(module, attention, x, tokens, 1, encoder_hidden_states=text, attention_mask=mask)
        assert distance(result, module(x, text, mask)) <= EXACT, split

    def rank(comm: Any) -> int:
        holder = FrameHolder()
        holder.frame = Frame(comm.rank, 1, one_level(Split((0, 9, 21)), 1), Fresh(comm))
        PatchAttention(module, "attn2", holder, level=0).forward(x[:, :9] if comm.rank == 0 else x[:, 9:], text)
        return sum(comm.meter.messages.values())

    assert df.run_ranks(2, rank) == [0, 0]


@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_attention_with_group_norm_inside(processor: type, dim: int) -> None:
    module = prepared(
        Attention(
            8,
            heads=2,
            dim_head=4,
            norm_num_groups=2,
            bias=True,
            residual_connection=True,
            rescale_output_factor=1.4,
            processor=processor(),
        )
    )
    x = noise(2, 8, 6, 7)
    for split in splits_of(x.shape[dim]):
        levels = one_level(split, x.shape[5 - dim])
        assert distance(in_patches(module, attention, x, levels, dim), module(x)) <= EXACT, split


@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
@pytest.mark.parametrize("only_cross", [False, True])
def test_attention_with_added_keys(only_cross: bool, dim: int) -> None:
    module = prepared(
        Attention(
            8,
            heads=2,
            dim_head=4,
            added_kv_proj_dim=6,
            norm_num_groups=2,
            bias=True,
            only_cross_attention=only_cross,
            processor=AttnAddedKVProcessor(),
        )
    )
    x, text = noise(2, 8, 6, 7), noise(2, 5, 6, seed=1)
    truth = module(x, text)
    for split in splits_of(x.shape[dim]):
        result = in_patches(module, attention, x, one_level(split, x.shape[5 - dim]), dim, encoder_hidden_states=text)
        assert distance(result, truth) <= EXACT, split


def test_a_mask_over_image_tokens_is_refused_by_name() -> None:
    holder = FrameHolder()
    layer = PatchAttention(prepared(Attention(8, heads=2, dim_head=4)), "mid.attn1", holder, level=0)

    def rank(comm: Any) -> None:
        holder.frame = Frame(0, 1, one_level(Split((0, 21)), 1), Fresh(comm))
        layer.forward(noise(1, 21, 8), None, torch.zeros(1, 1, 21))

    with pytest.raises(df.UnsupportedModel, match=r"mid\.attn1: attention_mask"):
        df.run_ranks(1, rank)


@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
@pytest.mark.parametrize("use_conv", [True, False])
@pytest.mark.parametrize("finer", [(12, 14), (11, 13), (13, 15)], ids=["doubled", "one-less", "one-more"])
def test_upsample(finer: tuple[int, int], use_conv: bool, dim: int) -> None:
    module, x = prepared(Upsample2D(4, use_conv=use_conv, out_channels=6 if use_conv else 4)), noise(3, 4, 6, 7)
    truth = module(x, output_size=finer)

    def attach(own: Any, holder: FrameHolder) -> list[Layer]:
        layers: list[Layer] = [PatchUpsample(own, "up", holder, level=0, level_out=1)]
        return layers + ([PatchConv(own.conv, "up.conv", holder, level=1, level_out=1)] if use_conv else [])

    size, across = finer if dim == 2 else finer[::-1]
    for fine in splits_of(size):
        # As in a U-Net: the coarse split follows from the fine one, so its patches may be empty or unaligned.
        coarse = fine.strided(2, x.shape[dim])
        levels = Levels((coarse, fine), (x.shape[5 - dim], across))
        assert distance(in_patches(module, attach, x, levels, dim), truth) <= EXACT, fine


@pytest.mark.parametrize("rows", [1, 3, 5, 6])
@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
@pytest.mark.parametrize(
    ("module", "extra", "truth"),
    [
        (nn.AvgPool2d(2), (0, 0), lambda x: nn.functional.avg_pool2d(x, 2, ceil_mode=True)),
        # A row and a column of zeros after the picture, as the module around it pads, and one more where rows are odd.
        (
            nn.Conv2d(3, 2, 3, stride=2),
            (0, 1),
            lambda x: nn.functional.pad(x, [n for i in (3, 2) for n in (0, 1 + x.shape[i] % 2)]),
        ),
    ],
    ids=["pooling", "convolution"],
)
def test_half_of_the_rows_of_a_patch_that_stands_alone_is_rounded_up(
    module: Any, extra: tuple[int, int], truth: Any, dim: int, rows: int
) -> None:
    x = noise(2, 3, *((rows, 4) if dim == 2 else (4, rows)))
    wanted = truth(x) if isinstance(module, nn.AvgPool2d) else prepared(module)(truth(x))
    window, picture = windows(module, extra)[0], Split((0, rows, 12))
    holder = FrameHolder()
    levels = Levels((picture, picture.strided(2, window.out_size(12))), (4, 2), (2,)).alone(Span(0, rows))
    holder.frame = Frame(0, dim, levels, Absent(0, "naive"))
    with torch.no_grad():
        found = PatchConv(module, "", holder, level=0, level_out=1, extra=extra).forward(x)
    assert found.shape[dim] == -(-rows // 2)
    assert distance(found, wanted) <= EXACT


@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "cols"])
@pytest.mark.parametrize(("use_conv", "padding"), [(True, 1), (True, 0), (False, 1)], ids=["conv-1", "conv-0", "pool"])
def test_downsample(use_conv: bool, padding: int, dim: int) -> None:
    module = prepared(Downsample2D(4, use_conv=use_conv, out_channels=6 if use_conv else 4, padding=padding))
    extra = (0, 1) if use_conv and padding == 0 else (0, 0)

    def attach(own: Any, holder: FrameHolder) -> list[Layer]:
        conv: list[Layer] = [PatchConv(own.conv, "down.conv", holder, level=0, level_out=1, extra=extra)]
        return conv + ([PatchDownsample(own, "down", holder)] if extra != (0, 0) else [])

    for batch, height, width in ((1, 11, 8), (3, 8, 13)):
        x = noise(batch, 4, height, width)
        truth = module(x)
        for inputs in splits_of(x.shape[dim]):
            levels = Levels((inputs, inputs.strided(2, truth.shape[dim])), (x.shape[5 - dim], truth.shape[5 - dim]))
            assert distance(in_patches(module, attach, x, levels, dim), truth) <= EXACT, inputs


def test_a_forward_that_another_library_replaced_is_not_undone() -> None:
    module = nn.Conv2d(2, 2, 3, padding=1)
    module.forward = module.forward  # an attribute of the instance, as offloading hooks leave it
    layer = PatchConv(module, "conv_out", FrameHolder(), level=0, level_out=0)
    with pytest.raises(df.UnsupportedModel, match=r"conv_out \(Conv2d\): another library has replaced its forward"):
        layer.attach()


def test_detach_leaves_no_trace() -> None:
    module = nn.Conv2d(2, 2, 3, padding=1)
    before = dict(module.__dict__)
    layer = PatchConv(module, "conv", FrameHolder(), level=0, level_out=0)
    layer.attach()
    assert module.forward == layer.forward
    layer.detach()
    assert module.__dict__ == before
