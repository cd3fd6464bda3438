"""What the rest of the package asks of a model: its levels, its layers, and how to cut the arguments of one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..geometry import Levels, Span
from ..layers import Frame, FrameHolder, Layer


@dataclass
class Call:
    """One call of a denoiser, its arguments by name. ``sample`` is the whole latent ``[B, C, H, W]``."""

    arguments: dict[str, Any]
    sample_name: str = "sample"

    @property
    def sample(self) -> Tensor:
        """The latents."""
        sample: Tensor = self.arguments[self.sample_name]
        return sample

    def having(self, **changes: Any) -> Call:
        """The same call with some arguments changed."""
        return Call({**self.arguments, **changes}, self.sample_name)

    def for_batch(self, span: Span) -> Call:
        """The same call for some of the batch: every tensor whose first dim is the batch is cut."""
        return Call(_take(self.arguments, self.sample.shape[0], span), self.sample_name)


class Table(Protocol):
    """What one family of models is made of."""

    model: nn.Module

    def levels(self, height: int, width: int, num_patches: int, dim: int) -> Levels:
        """The splits of a latent of ``height`` x ``width`` along ``dim`` (2 rows, 3 cols) at every level.

        Raises:
            ConfigError: a size that the model cannot take, or fewer rows than patches.
        """
        ...

    def layers(self, holder: FrameHolder) -> Iterator[Layer]:
        """The patch layers of the model as it is now, in order, not attached.

        Raises:
            UnsupportedModel: a module that may read beyond its rows and is not known.
        """
        ...

    def fingerprint(self) -> tuple[Any, ...]:
        """Changes when the model was changed in a way that asks for new layers. Cheap: asked at every call."""
        ...

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call's arguments by name."""
        ...

    def conditioning(self, call: Call) -> Any:
        """What stays the same object through one picture of one guidance branch: the text, or the class."""
        ...

    def localise(self, call: Call, frame: Frame) -> Call:
        """The same call for the patch of ``frame``: what is spatial and not read whole is cut."""
        ...

    def splits_guidance(self) -> bool:
        """Whether the branches of guidance may run on separate ranks."""
        ...


def bind(forward: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, as ``forward(model, *args, **kwargs)`` would take them; TypeError as Python's own."""
    bound = inspect.signature(forward).bind(model, *args, **kwargs).arguments
    extra = bound.pop("kwargs", {})
    names = list(bound)[1:]  # without self
    return {**{name: bound[name] for name in names}, **extra}


def own_part(residual: Tensor, frame: Frame) -> Tensor:
    """Own rows of a feature map ``[B, C, H, W]`` that has the whole size of one of the levels.

    Raises:
        UnsupportedModel: it has the size of no level.
    """
    for split, across in zip(frame.levels.splits, frame.levels.across, strict=True):
        if (residual.shape[frame.dim], residual.shape[5 - frame.dim]) == (split.size, across):
            span = split.span(frame.patch)
            return residual.narrow(frame.dim, span.start, len(span))
    sizes = ", ".join(f"{s.size}x{a}" for s, a in zip(frame.levels.splits, frame.levels.across, strict=True))
    raise UnsupportedModel(f"a residual of size {tuple(residual.shape)} fits no level of the model ({sizes})")


@dataclass(frozen=True)
class Place:
    """Where the walk through a model stands: what the modules below inherit."""

    level: int
    level_out: int
    extra: tuple[int, int] = (0, 0)  # zeros that the module around pads before and after
    reads_whole: bool = False

    def then(self, level: int) -> Place:
        """A place wholly on ``level``."""
        return Place(level, level)


@dataclass
class Walk:
    """Goes through a module tree and turns what it knows into layers. Everything must be known by class."""

    holder: FrameHolder
    known_seams: dict[type, Callable[[Walk, nn.Module, str, Place], Iterator[Layer]]]
    containers: tuple[type, ...]
    local: tuple[type, ...]
    seen: set[int] = field(default_factory=set)  # a module may be registered under two names

    def __call__(self, module: nn.Module, name: str, place: Place) -> Iterator[Layer]:
        """Layers of ``module`` and everything below it.

        Raises:
            UnsupportedModel: names the module and its class.
        """
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        rule = self.known_seams.get(type(module))
        if rule is not None:
            yield from rule(self, module, name, place)
        elif isinstance(module, nn.Linear) or type(module) in self.local:
            if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
                raise UnsupportedModel(f"{name} drops at random, differently on each rank: call .eval() on the model")
        elif type(module) in self.containers or type(module).__module__.startswith("peft."):
            if type(module).__name__.startswith("Dora"):
                raise unsupported(module, name)
            yield from self.children(module, name, place)
        else:
            raise unsupported(module, name)

    def children(self, module: nn.Module, name: str, place: Place, skip: Sequence[str] = ()) -> Iterator[Layer]:
        """Layers of all children but those named in ``skip``."""
        for child_name, child in module.named_children():
            if child_name not in skip:
                yield from self(child, f"{name}.{child_name}", place)


def unsupported(module: nn.Module, name: str, why: str = "is not known, and may read beyond its rows") -> UnsupportedModel:
    """The error that names a module."""
    return UnsupportedModel(f"{name} ({type(module).__name__}) {why}")


def _take(value: Any, batch: int, span: Span) -> Any:
    if isinstance(value, Tensor):
        return value[span.start : span.stop] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _take(item, batch, span) for key, item in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_take(item, batch, span) for item in value)
    return value
