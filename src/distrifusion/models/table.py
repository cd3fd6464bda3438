"""What the rest of the package asks of a model: its levels, its layers, and how to cut the arguments of one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..geometry import Levels, Span
from ..layers import Frame, FrameHolder, Layer


@dataclass
class Call:
    """One call of a denoiser, its arguments by name. ``sample`` is the whole latent ``[B, C, H, W]``.

    ``lists`` names arguments that are lists with an item for each picture of the batch, ``several`` tensors that hold
    as many rows for each, one picture's after the other's, and ``shared`` what is not of single pictures at all.
    ``time_name`` is what the model calls the time of the step.
    """

    arguments: dict[str, Any]
    sample_name: str = "sample"
    lists: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    shared: tuple[str, ...] = ("cross_attention_kwargs",)  # masks by IP-Adapter, of which there may be as many
    time_name: str = "timestep"

    @property
    def sample(self) -> Tensor:
        """The latents."""
        sample: Tensor = self.arguments[self.sample_name]
        return sample

    @property
    def time(self) -> Any:
        """The time of the step, in the scheduler's numbers or scaled: a tensor, a number, or None."""
        return self.arguments.get(self.time_name)

    def having(self, **changes: Any) -> Call:
        """The same call with some arguments changed."""
        return replace(self, arguments={**self.arguments, **changes})

    def at(self, time: Any) -> Call:
        """The same call at another time."""
        return self.having(**{self.time_name: time})

    def for_batch(self, span: Span) -> Call:
        """The same call for some of the batch: every tensor whose first dim is the batch is cut."""
        batch = self.sample.shape[0]
        taken = _take(self.arguments, batch, span)
        for name in self.lists:
            items = self.arguments.get(name)
            if isinstance(items, list) and len(items) == batch:
                taken[name] = items[span.start : span.stop]
        for name in self.several:
            rows = self.arguments.get(name)
            if isinstance(rows, Tensor):
                count = rows.shape[0] // batch
                taken[name] = rows[count * span.start : count * span.stop]
        taken.update({name: self.arguments[name] for name in self.shared if name in self.arguments})
        return replace(self, arguments=taken)


class Table(Protocol):
    """What one family of models is made of."""

    model: nn.Module
    gathers: bool
    """Whether the output is gathered: a prediction is, what only another parallel model reads stays in patches."""

    has_window: bool
    """Whether its attentions can be kept to a part of the neighbours (``context_window``)."""

    has_positions: bool
    """Whether it knows where in the picture it is, so that the picture's ends cannot meet."""

    has_frames: bool
    """Whether it makes videos, which may be split along their frames."""

    def size(self, call: Call) -> tuple[int, int]:
        """Height and width of the call's picture, in latent rows."""
        ...

    def third(self, call: Call, dim: int) -> int:
        """The side of the call's tokens that is neither split along ``dim`` nor across, see Frame. 1 for a picture."""
        ...

    def num_guests(self, call: Call) -> int:
        """Tokens of further pictures to look at, which stand right after those of the call's picture."""
        ...

    def num_words(self, call: Call) -> int:
        """Tokens of the call's text that the ranks may share out; 0 where all of them have to compute all."""
        ...

    def levels(self, height: int, width: int, weights: tuple[float, ...], dim: int, frames: int = 1) -> Levels:
        """The splits of a latent of ``height`` x ``width`` along ``dim`` (1 frames, 2 rows, 3 cols) at every level.

        ``weights`` has one number for each patch, to which its rows are in proportion; ``frames`` are those of tokens.

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
        """What stays the same in one picture and guidance branch: the text, the class. A tensor or a tuple of them."""
        ...

    def localise(self, call: Call, frame: Frame, *, fed: bool) -> Call:
        """The same call for the patch of ``frame``: what is spatial and not read whole is cut.

        ``fed``: a model that leaves its output in patches has run just before, so that some of it may be cut already.
        """
        ...

    def fold(self, output: Any, call: Call, frame: Frame) -> Tensor:
        """Own rows ``[B, C, rows, W]`` of the prediction, from what the model returned first; the split dim is

        ``frame.dim``, so that own frames are ``[B, frames, C, H, W]``.
        """
        ...

    def unfold(self, whole: Tensor, like: Any) -> Any:
        """The whole prediction, of what `fold` gave, in the form of what the model returns, ``like`` one of these."""
        ...

    def finish(self, result: Any, frame: Frame) -> Any:
        """What the model returned, where something of it is about the whole picture and known of the patch only."""
        ...

    def unit(self, call: Call, *, fed: bool) -> int:
        """Rows of latent by whose multiples a patch that stands alone may move. ``fed``: see `localise`."""
        ...

    def needs_whole_batch(self, call: Call) -> bool:
        """Whether the ranks of both guidance branches run the whole batch of this call."""
        ...

    def splits_guidance(self) -> bool:
        """Whether the branches of guidance may run on separate ranks."""
        ...


def bind(
    forward: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by name, as ``forward(model, *args, **kwargs)`` would take them; TypeError as Python's own."""
    bound = inspect.signature(forward).bind(model, *args, **kwargs).arguments
    extra = bound.pop("kwargs", {})
    names = list(bound)[1:]  # without self
    return {**{name: bound[name] for name in names}, **extra}


def residual_part(residual: Tensor, frame: Frame, level: int, fed: bool) -> Tensor:
    """Own rows of a feature map ``[B, C, H, W]`` for ``level``: of a whole one, or as it is where it is cut already.

    One of ``[B, C, 1, 1]`` is added everywhere. Patch and whole cannot be mistaken: where they have the same size they
    are the same.

    Raises:
        UnsupportedModel: it has neither size.
    """
    split, across = frame.split(level), frame.levels.across[level]
    span = split.span(frame.patch)
    size = (residual.shape[frame.dim], residual.shape[5 - frame.dim])
    if size == (1, 1) or (fed and size == (len(span), across)):
        return residual
    if size == (split.size, across):
        return frame.own(level, residual)
    height, width = frame.sides(level, split.size)
    raise UnsupportedModel(
        f"a residual of size {tuple(residual.shape)} does not fit level {level}, which is {height} x {width}"
    )


def own_part(residual: Tensor, frame: Frame) -> Tensor:
    """Own rows of a feature map ``[B, C, H, W]`` that has the whole size of one of the levels.

    Raises:
        UnsupportedModel: it has the size of no level.
    """
    for level, (split, across) in enumerate(zip(frame.levels.splits, frame.levels.across, strict=True)):
        if (residual.shape[frame.dim], residual.shape[5 - frame.dim]) == (split.size, across):
            return frame.own(level, residual)
    sizes = ", ".join(f"{s.size}x{a}" for s, a in zip(frame.levels.splits, frame.levels.across, strict=True))
    raise UnsupportedModel(f"a residual of size {tuple(residual.shape)} fits no level of the model ({sizes})")


def _take(value: Any, batch: int, span: Span) -> Any:
    if isinstance(value, Tensor):
        return value[span.start : span.stop] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _take(item, batch, span) for key, item in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_take(item, batch, span) for item in value)
    return value
