"""What a model exchanges, as the planner knows it: the seams of one call, in order. `strategies.anatomy` learns it."""

from __future__ import annotations

from dataclasses import dataclass

from ..geometry import Window


@dataclass(frozen=True)
class Conv:
    """A convolution, or a pooling, of ``[B, channels, H, W]`` at ``level``."""

    channels: int
    level: int
    level_out: int
    windows: tuple[Window, Window]  # along rows, along columns


@dataclass(frozen=True)
class Upsampling:
    """Nearest-neighbour interpolation of ``[B, channels, H, W]`` from ``level`` to ``level_out``."""

    channels: int
    level: int
    level_out: int


@dataclass(frozen=True)
class Norm:
    """A group norm."""

    groups: int


@dataclass(frozen=True)
class Context:
    """Keys and values ``[B, *before, tokens, width]`` of the tokens at ``level``, or ``[B, tokens, *after, width]``.

    ``width`` is that of both, side by side.
    """

    level: int
    width: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    frames: int = 1  # of a video
    others: tuple[int, ...] = ()  # tokens of text and of guests, which the ranks share out


@dataclass(frozen=True)
class Sums:
    """Linear attention's sums over tokens ``[B, *shape]``, as large on every rank."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Total:
    """Under ``tensor``: ``numbers`` of each picture, of which every rank has a part of the sum.

    ``item``: bytes of one.
    """

    numbers: int
    item: int = 4


@dataclass(frozen=True)
class Joint:
    """Under ``tensor``: ``channels`` of ``numbers`` of each picture, of which every rank makes some."""

    channels: int
    numbers: int


@dataclass(frozen=True)
class Crossing:
    """Under ``pipelined`` with patches: a tensor that goes from stage ``link`` to the next one in every pass.

    ``patches``: its numbers for each picture, by patch; ``whole``: the same where the picture goes in one.
    """

    link: int
    patches: tuple[int, ...]
    whole: int
    item: int = 4


Seam = Conv | Upsampling | Norm | Context | Sums | Total | Joint | Crossing


@dataclass(frozen=True)
class Anatomy:
    """Where the tokens of one call of a model look beyond their patch: its seams in the order of the call.

    Of one size or of all, whatever is the split: sizes are those of the `Levels`. `strategies.anatomy` learns it from a
    model. For ``tensor``, and ``pipelined`` with patches, there are others, of the size that they were learned with.

    Args:
        seams: as they are passed.
        channels: of the prediction ``[B, channels, H, W]``; of a video, times its frames.
        item: bytes of a number of the latents, keys, values and rows. Moments are float32.
    """

    seams: tuple[Seam, ...]
    channels: int
    item: int = 4
