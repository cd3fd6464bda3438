"""Seams inside of a compiled graph: to torch.compile, each question to the exchange is one operator.

A compiler cannot look into an exchange and need not: it sees tensors that go in, and tensors that come out with another
size along one dim. So a block compiles as one graph, and one graph serves all steps, whatever is fresh or late in them,
and all blocks of one shape, since which layer asks is told by a tensor and not by a constant.

Ranks must ask in the same order, and all of them, also one whose patch is empty and who has no use for the answer. That
is a matter of data here: every operator writes to the same ``turn``, so none can be moved before another, or left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Asker(Protocol):
    """A layer, as an operator sees it."""

    def answer(self, tensors: list[Tensor], dim: int, question: int) -> Sequence[Tensor]:
        """What the layer gets for ``tensors`` along ``dim``, outside of the graph. See `ask`."""
        ...


_ASKERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = count()


def place_of(asker: Asker) -> Tensor:
    """A number by which the operator finds ``asker``, on the CPU."""
    number = next(_NUMBERS)
    _ASKERS[number] = asker
    return new_number(number)


def new_number(value: int) -> Tensor:
    """A number that a graph gets as an input, ``[]`` of int64 on the CPU, whatever the mode of the caller."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.int64, device="cpu")


def ask(
    tensors: list[Tensor], place: Tensor, turn: Tensor, sizes: list[int], dim: int, question: int = 0
) -> list[Tensor]:
    """The layer's `Asker.answer`: tensors like ``tensors``, the i-th with ``sizes[i]`` along ``dim``.

    Args:
        tensors: what the layer says, one or two.
        place: of the layer.
        turn: of its model; written to.
        sizes: along ``dim``.
        dim: of all tensors.
        question: which of the layer's.
    """
    if len(tensors) == 1:
        return [torch.ops.distrifusion.ask(*tensors, place, turn, sizes, dim, question)]
    return list(torch.ops.distrifusion.ask_pair(*tensors, place, turn, sizes, dim, question))


# Two operators: compilers refuse one that writes to an argument and returns a list.
@torch.library.custom_op("distrifusion::ask", mutates_args={"turn"})
def _ask(tensor: Tensor, place: Tensor, turn: Tensor, sizes: list[int], dim: int, question: int) -> Tensor:
    return _answers([tensor], place, turn, sizes, dim, question)[0]


@torch.library.custom_op("distrifusion::ask_pair", mutates_args={"turn"})
def _ask_pair(
    first: Tensor, second: Tensor, place: Tensor, turn: Tensor, sizes: list[int], dim: int, question: int
) -> tuple[Tensor, Tensor]:
    one, other = _answers([first, second], place, turn, sizes, dim, question)
    return one, other


@_ask.register_fake
def _(tensor: Tensor, place: Tensor, turn: Tensor, sizes: list[int], dim: int, question: int) -> Tensor:
    return empty_like_but(tensor, dim, sizes[0])


@_ask_pair.register_fake
def _(
    first: Tensor, second: Tensor, place: Tensor, turn: Tensor, sizes: list[int], dim: int, question: int
) -> tuple[Tensor, Tensor]:
    return empty_like_but(first, dim, sizes[0]), empty_like_but(second, dim, sizes[1])


def _answers(
    tensors: list[Tensor], place: Tensor, turn: Tensor, sizes: list[int], dim: int, question: int
) -> list[Tensor]:
    turn.add_(1)
    asker: Asker = _ASKERS[int(place)]
    results = []
    for tensor, found, size in zip(tensors, asker.answer(tensors, dim, question), sizes, strict=True):
        assert found.shape[dim] == size, f"an answer of {tuple(found.shape)} has not {size} along {dim}"
        # An operator's result lies as the compiler was told, in memory of its own.
        shares = any(found.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in tensors)
        layout = layout_of(tensor)
        results.append(found.clone(memory_format=layout) if shares else found.contiguous(memory_format=layout))
    return results


def empty_like_but(like: Tensor, dim: int, size: int) -> Tensor:
    """An uninitialised tensor like ``like``, contiguous or channels last as that is, with ``size`` along ``dim``."""
    shape = list(like.shape)
    shape[dim] = size
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout_of(like))


def layout_of(x: Tensor) -> torch.memory_format:
    """Channels last where ``x`` is that and nothing simpler."""
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format
