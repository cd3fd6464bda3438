"""What a tensor is made of, and how much arithmetic made it: seen from outside, while a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

ELEMENT = 8
"""An element that is written takes as long as so many multiplications: of arithmetic that only passes over memory."""

Sources = frozenset[str]


class Dataflow(TorchFunctionMode):
    """While it is entered, follows marked tensors through every operation of torch.

    A tensor's sources are those of all tensors it was computed from, in place too, but for what is written into it
    through a view. ``work`` counts multiplications.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = 0
        self._sources: Any = WeakTensorKeyDictionary()  # tensor -> Sources

    def mark(self, tensor: Tensor, source: str) -> None:
        """From now on ``tensor`` stands for ``source``."""
        self._sources[tensor] = frozenset({source})

    def sources(self, *values: Any) -> Sources:
        """Of all tensors in ``values``, which may be nested."""
        return frozenset[str]().union(*(self._sources.get(each, ()) for each in _tensors(values)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's hook above every operation."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        made = [args[0]] if name == "__setitem__" else _tensors(result)
        if made:
            given = _tensors((args, kwargs))
            sources = self.sources(given)
            for tensor in made if sources else ():
                self._sources[tensor] = sources
            self.work += _work(name, given, made[0]) + ELEMENT * sum(tensor.numel() for tensor in made)
        return result


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if not isinstance(values, tuple | list | dict) or isinstance(values, torch.Size):
        return []  # most questions to a tensor are about its shape, dtype and device
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def _work(name: str, given: Sequence[Tensor], made: Tensor) -> int:
    """Multiplications of an operation by its name; what is not here passes over memory only."""
    if name == "linear":
        return given[0].numel() * given[1].shape[0]
    if name in ("conv1d", "conv2d", "conv3d"):
        return made.numel() * (given[1].numel() // given[1].shape[0])
    if name == "scaled_dot_product_attention":
        return (given[0].numel() + made.numel()) * given[1].shape[-2]
    if name in ("bmm", "matmul", "__matmul__"):
        return made.numel() * given[0].shape[-1]
    return made.numel() * given[1].shape[-1] if name == "baddbmm" else 0
