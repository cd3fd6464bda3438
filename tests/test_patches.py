"""Tensors whose patches come one after the other: what is done for a patch, and what waits for all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distrifusion.geometry import Split
from distrifusion.strategies.patches import Ending, Once, Patches

SPLIT = Split((0, 3, 5, 7))
VALUES = torch.randn(2, 4, 7, 5, generator=torch.Generator().manual_seed(1))


def coming(values: Tensor = VALUES, dim: int = -2, ending: Ending | None = None) -> tuple[Patches, list[int]]:
    """``values``, and the patches that have been asked for so far."""
    asked: list[int] = []

    def part(patch: int) -> Tensor:
        asked.append(patch)
        span = SPLIT.span(patch)
        return values.narrow(dim, span.start, len(span)).clone()

    parts = [Once(lambda patch=patch: part(patch)) for patch in range(3)]
    return Patches(values, parts, SPLIT, dim, values.device, ending or Ending()), asked


BY_PATCH: dict[str, Callable[[Any], Any]] = {
    "arithmetic": lambda x: 2.0 * x - x.sqrt() / torch.tensor(3.0),
    "another tensor": lambda x: x + torch.arange(280.0).view(2, 4, 7, 5),
    "a column of another": lambda x: x * torch.arange(7.0).view(7, 1),
    "dtype": lambda x: x.to(torch.float64),
    "guidance": lambda x: (lambda a, b: a + 5.0 * (b - a))(*torch.cat([x, x.neg()]).chunk(2)),
    "channels": lambda x: torch.cat(x.split(2, 1)[::-1], 1)[:, 1:],
    "a batch of one": lambda x: x[0].unsqueeze(0).detach(),
    "a list": lambda x: torch.stack([each.float() for each in x.unsqueeze(2).unbind()]).squeeze(2),
    "a batch of two": lambda x: x.repeat(2, 1, 1, 1),
    "all rows": lambda x: x[:, :, :7],
    "norm": lambda x: x / torch.norm(x, dim=1, keepdim=True),
    "where": lambda x: torch.where(x > 0, x, x.exp()).clamp(-1, 2),
}
AS_A_WHOLE: dict[str, Callable[[Any], Any]] = {
    "sum": lambda x: x.sum(),
    "some rows": lambda x: x[:, :, 1:],
    "quantile": lambda x: torch.quantile(x.flatten(1), 0.9, dim=1),
    "convolution": lambda x: torch.nn.functional.conv2d(x, torch.ones(1, 4, 3, 3)),
    "norm over rows": lambda x: torch.norm(x, dim=2, keepdim=True),
    "repeated rows": lambda x: x.repeat(1, 1, 2, 1),
    "stacked behind": lambda x: torch.stack([x, x], -1),
    "view": lambda x: x.reshape(2, -1),
    "in place": lambda x: (x * 1).mul_(3).add_(1),
    "equality": lambda x: torch.tensor(torch.equal(x, x)),
    "numpy": lambda x: torch.from_numpy(x.numpy() + 0),
    "a deep copy": copy.deepcopy,
}


@pytest.mark.parametrize("name", BY_PATCH)
def test_operations_on_each_value_wait_for_one_patch(name: str) -> None:
    x, asked = coming()
    result, wanted = BY_PATCH[name](x), BY_PATCH[name](VALUES)
    assert asked == []
    assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(result.part(1).nan_to_num(), wanted[..., 3:5, :].nan_to_num())
    assert asked == [1]
    assert torch.equal(result.whole().nan_to_num(), wanted.nan_to_num())
    assert asked == [1, 0, 2]


@pytest.mark.parametrize("name", AS_A_WHOLE)
def test_all_others_wait_for_all(name: str) -> None:
    x, asked = coming()
    result = AS_A_WHOLE[name](x)
    assert sorted(asked) == [0, 1, 2]
    wanted = AS_A_WHOLE[name](VALUES)
    assert torch.equal(result.whole() if isinstance(result, Patches) else result, wanted)


def test_noise_is_drawn_for_the_whole() -> None:
    x, asked = coming()
    torch.manual_seed(3)
    noise = torch.randn_like(x)
    torch.manual_seed(3)
    assert torch.equal(noise, torch.randn_like(VALUES))
    assert asked == []


def test_operands_are_those_of_the_moment() -> None:
    (x, _), factor = coming(), torch.tensor(2.0)
    y = x * factor
    factor.fill_(7.0)
    x.mul_(0.0)
    assert torch.equal(y.whole(), 2 * VALUES)
    assert torch.equal(x.whole(), 0 * VALUES)


def test_views_see_what_is_written() -> None:
    (x, _), values = coming(), VALUES.clone()
    one, two = x.chunk(2)
    one.mul_(0.0)
    values.chunk(2)[0].mul_(0.0)
    assert torch.equal(x.whole(), values)
    two.add_(1.0)
    values.chunk(2)[1].add_(1.0)
    assert torch.equal(x + 0, values)
    assert torch.equal(two.part(2), values[1:, :, 5:])


def test_after_the_last_step_everything_is_whole() -> None:
    ending = Ending()
    x, asked = coming(ending=ending)
    ending.is_over = True
    assert type(2 * x) is Tensor
    assert sorted(asked) == [0, 1, 2]


def test_rows_of_tokens() -> None:
    tokens = VALUES.flatten(0, 1)  # [8, 7, 5]
    x, asked = coming(tokens)
    assert torch.equal(
        (x[:, :7] / x.norm(dim=-1, keepdim=True)).part(0), (tokens / tokens.norm(dim=-1, keepdim=True))[:, :3]
    )
    assert asked == [0]
