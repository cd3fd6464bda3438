"""Modules of which every rank has a slice of the weights (tensor parallelism: Megatron-LM, arXiv 1909.08053).

A layer that makes features makes some of them (`Sliced`), what works on each feature or group of features alone works
on these, and the layer that reads all of them adds up what the ranks have made of theirs (`SummedSlice`): one sum for
two layers. Every rank has the whole picture, the same input, and the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..exchange import Summed
from ..geometry import Span
from ..weights import Part, part_of, set_part
from .base import FrameHolder, Layer

Features = tuple[Span, ...]
"""Own features of a dim, in order: of one part of it, or of several such as the halves of a gate."""


class Sliced(Layer):
    """A module with own features only of some parameters. It does what its class does, on these.

    The parameters stay the objects they are, with other ``data``. What they had is kept, in the host's memory where
    they are on an accelerator, and given back by ``detach``, bit for bit. Not freed altogether: a rank must be able to
    give back the model when its peers are gone. Of parameters that were read in slices, the whole is in the file.

    Args:
        slices: of each parameter that is cut, the features, and the dim that they are of.
        numbers: attributes that say how many features there are, such as ``heads``, and what they are to say.
        arguments: arguments by name that are tuples of tensors with all features in their last dim, and own ones.
    """

    def __init__(
        self,
        module: nn.Module,
        key: str,
        holder: FrameHolder,
        *,
        slices: Mapping[str, tuple[Features, int]] | None = None,
        numbers: Mapping[str, int] | None = None,
        arguments: Mapping[str, Features] | None = None,
    ) -> None:
        super().__init__(module, key, holder)
        self.slices = dict(slices or {})
        self._numbers = dict(numbers or {})
        self._arguments = dict(arguments or {})
        self._whole: dict[str, Tensor | Part] = {}
        self._before: dict[str, Any] = {}  # numbers of the whole

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        for name, features in self._arguments.items():
            if kwargs.get(name) is not None:
                kwargs[name] = tuple(own_features(each, features, -1) for each in kwargs[name])
        return self.plain(self.module, *args, **kwargs)

    def attach(self) -> None:
        """See Layer.

        Raises:
            UnsupportedModel: also weights of a class of their own (quantised), of which no slice is known.
        """
        for name in self.slices:
            data = getattr(self.module, name).data
            if type(data) is not Tensor:
                raise UnsupportedModel(
                    f"{self.key} ({type(self.module).__name__}): its {name} is a {type(data).__name__}, of which no "
                    "slice is known; strategy='tensor' takes plain weights"
                )
        super().attach()
        for name, (features, dim) in self.slices.items():
            parameter = getattr(self.module, name)
            part = part_of(parameter)
            if part is not None:
                assert (part.spans, part.dim) == (features, dim), "the slices that it was read for"
                self._whole[name] = part
                continue
            whole = parameter.data
            parameter.data = own_features(whole, features, dim)
            self._whole[name] = whole if whole.device.type in ("cpu", "meta") else whole.to("cpu")
        for name, number in self._numbers.items():
            self._before[name] = getattr(self.module, name)
            setattr(self.module, name, number)

    def detach(self) -> None:
        """See Layer."""
        for name, whole in self._whole.items():
            parameter = getattr(self.module, name)
            if isinstance(whole, Part):
                whole = whole.whole(parameter.dtype)
                set_part(parameter, None)
            parameter.data = whole.to(parameter.device, parameter.dtype)  # the model may have been moved, or cast
        for name, number in self._before.items():
            setattr(self.module, name, number)
        self._whole.clear()
        self._before.clear()
        super().detach()


class SummedSlice(Sliced):
    """A linear layer, or a convolution, of own input features ``[B, tokens, own]`` or ``[B, own, H, W]``.

    Its output is the sum over the ranks, to which the bias is added once, so that no rank's part is heavier.
    """

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        forward: Callable[..., Any] = self._summed
        return forward

    def _summed(self, x: Tensor) -> Tensor:
        module, is_linear = self.module, isinstance(self.module, nn.Linear)
        part = F.linear(x, module.weight) if is_linear else module._conv_forward(x, module.weight, None)
        whole = total(self, part)
        if module.bias is None:
            return whole
        return whole.add_(module.bias if is_linear else module.bias.view(-1, 1, 1))

    def answer(self, tensors: list[Tensor], dim: int, question: int) -> Sequence[Tensor]:
        """See Layer."""
        return [total(self, tensors[0])]


class JoinedSlice(Sliced):
    """A convolution that makes own channels, which the ranks then send each other: ``[B, C, H, W]``, all of them.

    Half the bytes of a sum, for layers whose output nobody can go on with in parts.

    Args:
        sizes: channels of each rank.
        slices: see Sliced.
    """

    def __init__(
        self,
        module: nn.Module,
        key: str,
        holder: FrameHolder,
        *,
        sizes: tuple[int, ...],
        slices: Mapping[str, tuple[Features, int]],
    ) -> None:
        super().__init__(module, key, holder, slices=slices)
        self.sizes = sizes

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        forward: Callable[..., Any] = self._joined
        return forward

    def _joined(self, x: Tensor) -> Tensor:
        own: Tensor = self.plain(self.module, x)
        if torch.compiler.is_compiling():
            return self.ask([own], [sum(self.sizes)], 1)[0]
        return self._gathered(own)

    def _gathered(self, own: Tensor) -> Tensor:
        parts = _exchange(self).gather(self.key, [own.contiguous()], self.sizes, 1, kind="sum").wait()
        return torch.cat([part for (part,) in parts], 1)

    def answer(self, tensors: list[Tensor], dim: int, question: int) -> Sequence[Tensor]:
        """See Layer."""
        return [self._gathered(tensors[0])]


class SlicedNorm(Sliced):
    """An RMS norm over the features of all heads, of which ``[B, tokens, own]`` are here.

    Args:
        size: features in all.
        slices: see Sliced.
    """

    def __init__(
        self,
        module: nn.Module,
        key: str,
        holder: FrameHolder,
        *,
        size: int,
        slices: Mapping[str, tuple[Features, int]],
    ) -> None:
        super().__init__(module, key, holder, slices=slices)
        self._size = size

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        forward: Callable[..., Any] = self._normed
        return forward

    def _normed(self, x: Tensor) -> Tensor:
        mean = total(self, x.float().square().sum(-1, keepdim=True)) / self._size
        eps = self.module.eps if self.module.eps is not None else torch.finfo(x.dtype).eps
        weight: Tensor = self.module.weight
        return (x.float() * torch.rsqrt(mean + eps)).to(x.dtype) * weight

    def answer(self, tensors: list[Tensor], dim: int, question: int) -> Sequence[Tensor]:
        """See Layer."""
        return [total(self, tensors[0])]


def total(layer: Layer, part: Tensor) -> Tensor:
    """The sum of all ranks' ``part``."""
    if torch.compiler.is_compiling():
        return layer.ask([part], [part.shape[0]], 0)[0]
    return _exchange(layer).total(layer.key, part)


def _exchange(layer: Layer) -> Summed:
    exchange = layer.frame.exchange
    assert isinstance(exchange, Summed)
    return exchange


def own_features(whole: Tensor, features: Features, dim: int) -> Tensor:
    """Those of ``features`` along ``dim``: on the CPU a view of ``whole`` where they are of one piece."""
    parts = [whole.narrow(dim, span.start, len(span)) for span in features]
    if len(parts) > 1:
        return torch.cat(parts, dim)
    # Elsewhere a view would keep the whole where memory is scarce.
    return parts[0] if whole.device.type == "cpu" else parts[0].clone(memory_format=torch.contiguous_format)


def number_of(module: Any, name: str) -> Any:
    """An attribute of a module as it is without slices."""
    layer = getattr(module.__dict__.get("forward"), "__self__", None)
    before = layer._before if isinstance(layer, Sliced) else {}
    return before.get(name, getattr(module, name))
