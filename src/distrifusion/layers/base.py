"""What every patch layer has: its module, its name, and the frame that says where the present step stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..exchange import Exchange
from ..geometry import Levels, Reader, Split, halo
from .compiled import ask, empty_like_but, layout_of, new_number, place_of


@dataclass
class Ragged:
    """Sequences of text and picture whose text has another length in each sample: known only inside the model."""

    starts: list[int]  # of the picture, by sample
    lengths: list[int]  # the model's own list of text and picture; it reads it again after its last projection


@dataclass
class Frame:
    """One denoiser's present call on one rank: set before the model runs, read by its layers.

    They do not write to it, but for what is known only inside the model (``ragged``), and what they keep.
    """

    patch: int  # this rank's patch
    dim: int  # the split dim of [B, C, H, W]: 2 rows, 3 cols
    levels: Levels
    exchange: Exchange
    num_frames: int = 1  # of a video; they share the split
    num_guests: int = 0  # tokens of further pictures, which stand right after the picture's own and are never cut
    ragged: Ragged | None = None  # set by the entry of a model whose samples have texts of several lengths
    context_window: float | None = None  # see ParallelConfig: which keys a patch's queries see
    sees_peers: bool = field(init=False)  # of the exchange: whether anything of the peers is known
    memory: dict[str, Any] = field(default_factory=dict)  # what layers keep, by name, in this picture and branch

    def __post_init__(self) -> None:
        # Here, so that a compiled graph, which depends on this, does not depend on the kind of the exchange too.
        self.sees_peers = self.exchange.sees_peers

    def split(self, level: int) -> Split:
        """Who owns which rows at ``level`` of the model."""
        return self.levels.splits[level]

    def num_tokens(self, level: int) -> list[int]:
        """Tokens of each patch at ``level``."""
        return [self.num_frames * rows * self.levels.across[level] for rows in self.levels.splits[level].sizes]

    def sides(self, level: int, rows: int) -> tuple[int, int]:
        """Height and width of ``rows`` rows (or columns) at ``level``."""
        across = self.levels.across[level]
        return (rows, across) if self.dim == 2 else (across, rows)


class FrameHolder:
    """Where the layers of one denoiser find the frame of the present call."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.turn = new_number(0)  # counts questions from compiled graphs

    def now(self) -> Frame:
        """The present frame."""
        assert self.frame is not None, "a patch layer ran outside of the denoiser's forward"
        return self.frame


class Layer:
    """A module of the model whose ``forward`` is this object's while the model is parallel.

    The module itself stays where it is, with its weights, hooks and class, so that state dicts, LoRA and everything
    else that reaches into the model goes on working; ``detach`` leaves no trace.
    """

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder) -> None:
        self.module: Any = module
        self.key = key
        self._holder = holder
        self.plain: Callable[..., Any] = getattr(type(module), self.method)  # the class's own, with the module first
        self._place = place_of(self)

    @property
    def frame(self) -> Frame:
        """The present frame."""
        return self._holder.now()

    def ask(self, tensors: list[Tensor], sizes: list[int], dim: int, question: int = 0) -> list[Tensor]:
        """In a graph that is being compiled: what `answer` will give when it runs. See `compiled.ask`."""
        return ask(tensors, self._place, self._holder.turn, sizes, dim, question)

    def answer(self, tensors: list[Tensor], dim: int, question: int) -> Sequence[Tensor]:
        """See `compiled.Asker`."""
        raise NotImplementedError

    method = "forward"
    """The method of the module that is taken over."""

    is_optional = False
    """Whether the result is the same without it, so that it gives way to another library's method."""

    @property
    def forward(self) -> Callable[..., Any]:
        """What the module does instead of its own forward, or ``method``."""
        raise NotImplementedError

    @property
    def place(self) -> tuple[int, str]:
        """What is taken over; the same for two layers that would be in each other's way."""
        return id(self.module), self.method

    @property
    def is_attached(self) -> bool:
        """Whether the method is still ours."""
        return bool(self.module.__dict__.get(self.method) == self.forward)

    @property
    def gives_way(self) -> bool:
        """Whether another library was here first, and the layer is not needed."""
        return self.is_optional and self.method in self.module.__dict__

    def attach(self) -> None:
        """Take over the module's forward.

        Raises:
            UnsupportedModel: another library has replaced it already, so that ours would silently undo theirs.
        """
        if self.method in self.module.__dict__:
            raise UnsupportedModel(
                f"{self.key} ({type(self.module).__name__}): another library has replaced its {self.method} "
                "(sequential offload, layerwise casting ...); take that off, or switch it on after df.parallelize"
            )
        setattr(self.module, self.method, self.forward)

    def detach(self) -> None:
        """Give the module its own method back."""
        self.module.__dict__.pop(self.method, None)


class HaloLayer(Layer):
    """A layer that reads rows of its neighbours."""

    def reach(self, frame: Frame) -> tuple[Split, Split, Reader]:
        """The rows it has, the rows it makes, and which of the former it reads for the latter."""
        raise NotImplementedError

    def with_halo(self, frame: Frame, patch: Tensor) -> Tensor:
        """See `with_halo`."""
        inputs, outputs, reader = self.reach(frame)
        if not torch.compiler.is_compiling():
            return with_halo(frame, self.key, patch, inputs, outputs, reader)
        out = outputs.span(frame.patch)
        return self.ask([patch], [len(reader.reads(out)) if len(out) else 0], frame.dim)[0]

    def answer(self, tensors: list[Tensor], dim: int, question: int) -> Sequence[Tensor]:
        """See Layer."""
        return [self.with_halo(self.frame, tensors[0])]


def with_halo(frame: Frame, key: str, patch: Tensor, inputs: Split, outputs: Split, reader: Reader) -> Tensor:
    """The rows a layer reads to make the output rows it owns: ``patch`` ``[B, C, rows, W]`` with its halo attached.

    Zeros stand where the layer reads beyond the picture. The result has no rows where the rank owns no output.
    """
    dim, plan = frame.dim, halo(inputs, outputs, reader, frame.patch)
    pending = frame.exchange.neighbours(key, patch, plan, dim) if plan.links else None
    if plan.is_whole_patch:
        own = patch.narrow(dim, plan.own.start, len(plan.own))
        if pending is not None:
            pending.wait()
        return own
    lengths = [plan.zeros[0], plan.before, len(plan.own), plan.after, plan.zeros[1]]
    room: Tensor | None = getattr(patch, _ROOM, None)
    is_roomy = room is not None and (sum(lengths[:2]), lengths[2], sum(lengths[3:])) == (1, patch.shape[dim], 1)
    rows = room if room is not None and is_roomy else empty_like_but(patch, dim, plan.num_rows)
    zeros_before, before, own, after, zeros_after = torch.split(rows, lengths, dim)
    if not is_roomy:
        own.copy_(patch.narrow(dim, plan.own.start, len(plan.own)))  # while the halo travels
    zeros_before.zero_()
    zeros_after.zero_()
    received = pending.wait() if pending is not None else {}
    for side, peers in ((before, range(frame.patch)), (after, range(frame.patch + 1, inputs.num_patches))):
        arrived = [(peer, count) for peer, count in plan.recvs if peer in peers]
        for (peer, _), part in zip(
            arrived, torch.split(side, [count for _, count in arrived], dim) if arrived else (), strict=True
        ):
            part.copy_(received[peer])
    return rows


_ROOM = "_distrifusion_room"  # on a patch: the tensor with one row more on each side in which it lies


def empty_with_room(like: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """An uninitialised patch of ``shape`` with a row of room on each side in memory.

    A 3 x 3 convolution of this very tensor then needs no copy of the patch: its halo is written into the room.
    """
    roomy = list(shape)
    roomy[dim] += 2
    room = torch.empty(roomy, dtype=like.dtype, device=like.device, memory_format=layout_of(like))
    own = room.narrow(dim, 1, shape[dim])
    setattr(own, _ROOM, room)
    return own
