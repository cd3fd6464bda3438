"""How a layer, or a convolution, is cut into slices of its weights, and which features a rank has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..geometry import Span, Split
from ..layers import FrameHolder, Layer, Sliced, SummedSlice
from ..layers.slices import Features
from .walk import unsupported

_PLAIN = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Cutter:
    """Makes the layers of one rank."""

    rank: int
    num_ranks: int
    holder: FrameHolder

    def own(self, count: int, what: str, name: str) -> Span:
        """This rank's part of ``count`` things, as even as they go.

        Raises:
            ConfigError: fewer of them than ranks.
        """
        if count < self.num_ranks:
            raise ConfigError(
                f"strategy='tensor': {name} has {count} {what}, which {self.num_ranks} ranks cannot share: "
                f"start at most {count} ranks"
            )
        return Split.even(count, self.num_ranks).span(self.rank)

    def made(self, module: Any, name: str, features: Features, **numbers: int) -> Iterator[Layer]:
        """Own output features of a linear layer or a convolution, if there is one, and of what a LoRA adds to them."""
        for key, part in parts(module, name, "lora_B"):
            slices = {"weight": (features, 0), **({"bias": (features, 0)} if part.bias is not None else {})}
            yield Sliced(part, key, self.holder, slices=slices, numbers=numbers)

    def read(self, module: Any, name: str, features: Features) -> Iterator[Layer]:
        """Own input features of a linear layer or a convolution, if there is one, and of what a LoRA reads of them."""
        for key, part in parts(module, name, "lora_A"):
            yield SummedSlice(part, key, self.holder, slices={"weight": (features, 1)})


def parts(module: Any, name: str, adapter: str | None) -> Iterator[tuple[str, Any]]:
    """A layer, or what is to be cut of one with a LoRA: the layer within, and the ``adapter`` of the LoRA's halves.

    Raises:
        UnsupportedModel: another adapter, which may do anything with whole weights; or a layer that holds its weights
            in a way of its own (quantised).
    """
    if module is None:
        return
    found = {name: module}
    owner = type(module).__module__
    if owner.startswith("peft.tuners."):
        if owner != "peft.tuners.lora.layer" or any(getattr(module, "use_dora", {}).values()):
            raise unsupported(module, name, "is an adapter that is not known in slices of weights; known is LoRA")
        halves = getattr(module, adapter).items() if adapter is not None else ()
        found = {f"{name}.base_layer": module.base_layer, **{f"{name}.{adapter}.{key}": half for key, half in halves}}
    for key, part in found.items():
        if type(part) not in _PLAIN:
            raise unsupported(part, key, "holds its weights in a way of its own, of which no slice is known")
    yield from found.items()


def in_features(layer: Any) -> int:
    """Of a linear layer or a convolution as it is without slices."""
    base = getattr(layer, "base_layer", layer)
    return int(base.in_features if isinstance(base, nn.Linear) else base.in_channels)


def out_features(layer: Any) -> int:
    """See `in_features`."""
    base = getattr(layer, "base_layer", layer)
    return int(base.out_features if isinstance(base, nn.Linear) else base.out_channels)


def wide(span: Span, width: int) -> Span:
    """The features of some heads, or groups, of ``width``."""
    return Span(span.start * width, span.stop * width)


def behind(span: Span, size: int) -> Span:
    """The same features after ``size`` others."""
    return Span(span.start + size, span.stop + size)


def repeated(span: Span, size: int, times: int) -> Features:
    """The same features in each of ``times`` equal parts of ``size``."""
    return tuple(behind(span, size * i) for i in range(times))
