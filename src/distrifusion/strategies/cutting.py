"""Where the patches of one call lie: rows at every level, what a layer is told of them, and patches that move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..config import ParallelConfig
from ..errors import UnsupportedModel
from ..exchange import Exchange
from ..geometry import Levels, Moved, Split
from ..layers import Frame
from ..layers.rows import put_rows
from ..mesh import Mesh
from ..models import Call, Table
from .balance import Balance
from .base import State, Strategy
from .rows import Rows

DIMS = {"frames": 1, "rows": 2, "cols": 3}  # of what tables fold a prediction to


def check_model(table: Table, config: ParallelConfig) -> None:
    """Whether the model can be cut in this way.

    Raises:
        UnsupportedModel: it cannot, by name.
    """
    name = type(table.model).__name__
    if config.context_window is not None and not table.has_window:
        raise UnsupportedModel(f"context_window={config.context_window} is known for U-Nets only, not for {name}")
    if any(config.rings) and table.has_positions:
        raise UnsupportedModel(
            f"topology={config.topology!r}: {name} knows the position of each part of a picture, so that its ends do "
            "not meet; known for U-Nets only"
        )
    if config.split == "frames" and not table.has_frames:
        raise UnsupportedModel(f"split='frames' is for models of videos, not for {name}: use 'rows' or 'cols'")


def share_out(frame: Frame, num_words: int) -> None:
    """Let the ranks share out the text and the guests like the rows of the picture, where each gets some of them.

    A token fewer than ranks is no work to speak of, and modules that get none may not know what to do.
    """
    rows = frame.split(-1)
    if rows.num_patches > 1:
        frame.words, frame.guests = rows.shares(num_words), rows.shares(frame.num_guests)


class Cutting:
    """How one rank's patch of a model's call is found. ``table``, ``config``, ``mesh`` and ``rank`` are the model's."""

    def __init__(
        self, table: Table, config: ParallelConfig, mesh: Mesh, rank: int, balance: Balance, strategy: Strategy
    ) -> None:
        self._table, self._config, self._mesh, self._rank = table, config, mesh, rank
        self._balance, self._strategy = balance, strategy
        self.place = mesh.coordinate(rank, "patch")
        self.dim = DIMS[config.split]
        self.chunk: int | None = None
        """See `Frame`."""
        self.moved: Moved | None = None
        """Where the patches of the last call were, if each stood alone."""

    def levels(self, call: Call, weights: tuple[float, ...] | None = None) -> Levels:
        """The rows of all ranks at every level, by ``weights``; None: by the present ones."""
        size, frames = self._table.size(call), self._table.third(call, 2)
        levels = self._table.levels(*size, weights or self._balance.weights(size), self.dim, frames)
        return levels.with_rings(*self._config.rings, self.dim)

    def frame(self, call: Call, picture: Levels, exchange: Exchange, memory: dict[str, Any]) -> Frame:
        """What this rank's layers are told of the call."""
        window = self._config.context_window
        third, num_guests = self._table.third(call, self.dim), self._table.num_guests(call)
        patch, levels = self.place, picture
        if self.moved is not None:
            patch, levels = 0, picture.alone(self.moved.window(self.place))
        frame = Frame(
            patch, self.dim, levels, exchange, third, num_guests, None, window, memory=memory, chunk=self.chunk
        )
        if frame.sees_peers and self.moved is None and frame.recall is None:
            share_out(frame, self._table.num_words(call))  # who is alone has to compute all, and to remember none
        return frame

    def moves(self, call: Call, state: State, picture: Levels, feeders: Sequence[Cutting]) -> Moved | None:
        """Where the patches of this step lie, if each stands alone; ``feeders`` are of models that have fed this one.

        Raises:
            UnsupportedModel: a feeder that has not run at every step, and so was elsewhere.
        """
        if picture.splits[0].num_patches == 1:
            return None
        moved = self._strategy.moved(state, picture, self._table.unit(call, fed=bool(feeders)))
        for feeder in feeders:
            if feeder.moved != moved:
                raise UnsupportedModel(
                    f"{type(feeder._table.model).__name__} has not run once in each step, so that its patches are not "
                    f"those of {type(self._table.model).__name__}: strategy={self._strategy.name!r} cannot have that"
                )
        return moved

    def with_plain_latents(self, call: Call) -> Call:
        """The call with latents that a model can read; of those in `Rows`, the rows that this step needs."""
        sample = call.sample
        if not isinstance(sample, Rows):
            return call
        if self.moved is None:
            return call.having(**{call.sample_name: sample.whole()})
        plain = torch.zeros(sample.shape, dtype=sample.dtype, device=sample.device)
        put_rows(plain, sample.over(self.moved), self.moved.window(self.place), self.dim - 4)
        return call.having(**{call.sample_name: plain})

    def nothing(self, like: torch.Tensor, moved: Moved | None) -> torch.Tensor:
        """What this rank would have predicted, in zeros; ``like`` its prediction in another call."""
        if moved is None:
            return like.new_zeros(like.shape)
        shape = list(like.shape)
        shape[self.dim] = len(moved.window(self.place))
        return like.new_zeros(shape)

    def own_share(self, whole: torch.Tensor) -> tuple[Split, torch.Tensor]:
        """What this rank says of a prediction that all ranks have: some of its rows, so that all say equally much."""
        num_ranks, rows = self._mesh.size("tensor"), whole.shape[self.dim]
        split = Split(tuple(rows * place // num_ranks for place in range(num_ranks + 1)))
        span = split.span(self._mesh.coordinate(self._rank, "tensor"))
        return split, whole.narrow(self.dim, span.start, len(span))
