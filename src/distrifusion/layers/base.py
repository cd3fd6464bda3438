"""What every patch layer has: its module, its name, and the frame that says where the present step stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..exchange import Exchange, Recall
from ..geometry import Levels, Reader, Span, Split, halo
from ..products import without_products
from .compiled import ask, new_number, place_of
from .rows import attach, own_rows


@dataclass
class Ragged:
    """Sequences of text and picture whose text has another length in each sample: known only inside the model."""

    starts: list[int]  # of the picture, by sample
    lengths: list[int]  # the model's own list of text and picture; it reads it again after its last projection


@dataclass
class Band:
    """Rows with a margin on each side that is computed again with the next band, and belongs to no norm of this one."""

    cores: dict[int, Span]  # by the number of rows at a level: those without the margins
    moments: dict[str, Tensor]  # of the whole picture, by the norm's name, as far as they are known


@dataclass
class Frame:
    """One denoiser's present call on one rank: set before the model runs, read by its layers.

    They do not write to it, but for what is known only inside the model (``ragged``), and what they keep.
    """

    patch: int  # this rank's patch
    dim: int  # the split dim of [B, frames, H, W]: 1 frames, 2 rows, 3 cols
    levels: Levels
    exchange: Exchange
    third: int = 1  # the side beside the split one and across: frames of tokens, or rows where the frames are split
    num_guests: int = 0  # tokens of further pictures, which stand right after the picture's own
    ragged: Ragged | None = None  # set by the entry of a model whose samples have texts of several lengths
    context_window: float | None = None  # see ParallelConfig: which keys a patch's queries see
    sees_peers: bool = field(init=False)  # of the exchange: whether anything of the peers is known
    recall: Recall | None = field(init=False)  # of the exchange: what the patch saw where it was before
    rows_known: tuple[int, ...] = ()  # beside the own ones, by level, of what was seen there
    memory: dict[str, Any] = field(default_factory=dict)  # what layers keep, by name, in this picture and branch
    asks_always: bool = False  # for rows of the neighbours also where there are none, so that the own ones can be kept
    chunk: int | None = None  # bytes that a layer works on at a time where it can; None: on all of its patch
    band: Band | None = None  # where the patch is one of several that a rank computes one after the other
    words: Split | None = None  # which tokens of the text each rank computes; None: every rank all of them
    guests: Split | None = None  # the same of the guests

    def __post_init__(self) -> None:
        # Here, so that a compiled graph, which depends on this, does not depend on the kind of the exchange too.
        self.sees_peers, self.recall = self.exchange.sees_peers, self.exchange.recall
        if self.recall is not None:
            self.rows_known = tuple(map(self.recall.num_rows, range(len(self.levels.splits))))

    def split(self, level: int) -> Split:
        """Who owns which rows at ``level`` of the model."""
        return self.levels.splits[level]

    def strips(self, level: int, x: Tensor) -> list[Tensor]:
        """A patch that stands alone, in the parts that the picture's end divides."""
        rows = self.levels.strips[level]
        return [x] if len(rows) == 1 else list(torch.split(x, list(rows), self.dim))

    def core(self, x: Tensor) -> Tensor:
        """Rows of a patch ``[B, C, rows, W]`` that no other patch has."""
        if self.band is None:
            return x
        core = self.band.cores[x.shape[self.dim]]
        return x.narrow(self.dim, core.start, len(core))

    def own(self, level: int, whole: Tensor, dim: int | None = None) -> Tensor:
        """Own rows at ``level`` of a tensor that has those of the whole picture."""
        return own_rows(whole, self.split(level), self.patch, self.dim if dim is None else dim)

    def num_tokens(self, level: int) -> list[int]:
        """Tokens of each patch at ``level``."""
        return [self.third * rows * self.levels.across[level] for rows in self.levels.splits[level].sizes]

    def num_remembered(self, level: int) -> int:
        """Tokens at ``level`` whose keys and values are known from earlier steps."""
        rows = self.rows_known[level] if self.rows_known else 0
        return self.third * rows * self.levels.across[level]

    @property
    def num_own_guests(self) -> int:
        """Guests that this rank computes."""
        return self.num_guests if self.guests is None else self.guests.sizes[self.patch]

    @property
    def num_common_guests(self) -> int:
        """Guests that every rank computes."""
        return self.num_guests if self.guests is None else 0

    def num_keys(self, level: int, *, has_words: bool) -> list[int]:
        """Tokens at ``level`` that each rank has for the others: its patch, and its shares of the guests and words."""
        shares = [self.guests, self.words if has_words else None]
        sizes = [self.num_tokens(level), *(share.sizes for share in shares if share is not None)]
        return [sum(each) for each in zip(*sizes, strict=True)]

    def shape(self, level: int, owned: int) -> tuple[int, int, int]:
        """Frames, rows and columns at ``level`` where there are ``owned`` of what is split."""
        if self.dim == 1:
            return owned, self.third, self.levels.across[level]
        return self.third, *self.sides(level, owned)

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

    sees_edges = False
    """Whether a model that is not cut needs the layer too, where the ends of its picture meet."""

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

    level: int  # of the rows it has

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


@without_products
def with_halo(frame: Frame, key: str, patch: Tensor, inputs: Split, outputs: Split, reader: Reader) -> Tensor:
    """The rows a layer reads to make the output rows it owns: ``patch`` ``[B, C, rows, W]`` with its halo attached.

    Zeros stand where the layer reads beyond the picture. The result has no rows where the rank owns no output.
    """
    dim, plan = frame.dim, halo(inputs, outputs, reader, frame.patch)
    pending = frame.exchange.neighbours(key, patch, plan, dim) if plan.links or frame.asks_always else None
    own = plan.own_alone(frame.patch)
    if own is not None:
        if pending is not None:
            pending.wait()
        return patch.narrow(dim, own.start, len(own))
    return attach(patch, plan, frame.patch, dim, lambda: pending.wait() if pending is not None else {})
