"""Patches that do not talk: each is a picture of its own, at one place for good or at another in every step."""

from __future__ import annotations

from functools import lru_cache
from random import Random

import torch
from torch import Tensor

from ..comm import Comm
from ..config import ParallelConfig
from ..errors import ConfigError
from ..exchange import Absent, Exchange, Fresh
from ..forms import MEASURED
from ..geometry import Levels, Moved, Split, blend
from ..recall import Noting, Recalled, Seen, indices, sizes_of
from .base import State
from .cutting import DIMS

GOLDEN = (5**0.5 - 1) / 2


class Naive:
    """Each patch is denoised as a picture of its own; only the output is gathered. Fast, with seams."""

    name = "naive"

    def __init__(self, config: ParallelConfig, comm: Comm) -> None:
        self._absent = Absent(0)

    def start(self) -> State:
        """See Strategy."""
        return State()

    def policy(self, state: State) -> Exchange:
        """See Strategy."""
        return self._absent

    def moved(self, state: State, picture: Levels, unit: int) -> Moved | None:
        """See Strategy."""
        return Moved(picture.splits[0])


class Shifted:
    """Patches that do not talk and move at every step, on a torus (SpotDiffusion, arXiv 2407.15507).

    What one step has torn, another one has in the middle of a patch. And a patch that comes by all of the picture may
    remember it (`recall`, not of that paper): then it knows the rest as it was some steps ago, and nothing travels for
    it. The first ``warmup_steps`` are synchronous, since early steps decide what the picture is of. Offsets follow from
    the configuration and the number of the step, so all ranks know them.
    """

    name = "shifted"

    def __init__(self, config: ParallelConfig, comm: Comm) -> None:
        self._config = config
        self._comm = comm
        self._absent = Absent(0, self.name)

    def start(self) -> State:
        """See Strategy."""
        return State()

    def policy(self, state: State) -> Exchange:
        """See Strategy."""
        step, picture = self._step(state), state.levels
        assert picture is not None, "set before every step"
        if not self._config.remember or picture.splits[0].num_patches == 1:
            return Fresh(self._comm) if step < 0 else self._absent
        if step < -1:
            return Fresh(self._comm)
        if state.seen is None or state.seen.sizes != sizes_of(picture):
            # Measured rows are known after the synchronous steps: then borders may lie anywhere.
            config = self._config
            by_patch = config.moving == "patch"
            grain = picture.grain(by_patch=by_patch, overlap=config.overlap) if config.balance != MEASURED else 1
            state.seen = Seen(picture, DIMS[self._config.split], grain)
        if step < 0:
            return Noting(self._comm, state.seen, picture)
        assert state.moved is not None, "patches stand alone after the synchronous steps"
        return Recalled(state.seen, picture.alone(state.moved.window(self._comm.rank)))

    def moved(self, state: State, picture: Levels, unit: int) -> Moved | None:
        """See Strategy.

        Raises:
            ConfigError: an overlap that is not a multiple of ``unit``.
        """
        step, overlap, split = self._step(state), self._config.overlap, picture.splits[0]
        if overlap % unit:
            raise ConfigError(f"overlap={overlap} must be a multiple of {unit} rows here")
        if step < 0:
            return None
        if self._config.remember:  # rows of every level, so that what is remembered of them stays at its place
            unit = max(unit, picture.whole_rows)
        return Moved(Split(split.bounds, split.is_ring, self._offset(step, picture, unit)), overlap)

    def _step(self, state: State) -> int:
        """The number of the step after the synchronous ones; negative in these."""
        # By calls, which both halves of the ranks of cfg=2 count alike, whoever makes them.
        return state.num_calls - 1 - self._config.warmup_steps

    def _offset(self, step: int, picture: Levels, unit: int) -> int:
        """Where the first patch begins, in rows."""
        split = picture.splits[0]
        # A patch that remembers comes everywhere; else borders are where they were after its own length.
        num_rows = split.size if self._config.remember else split.size // split.num_patches
        num_places = max(num_rows // unit, 1)
        moving = self._config.moving
        if moving == "patch":
            return step * picture.rows_of_a_patch(unit) % split.size
        if moving == "golden":
            return int(step * GOLDEN % 1 * num_places) * unit
        if moving == "random":
            return Random(f"{self._config.shift_seed}/{step}").randrange(num_places) * unit
        return step * int(moving) // unit * unit % split.size


def blended(window: Tensor, moved: Moved, comm: Comm, dim: int) -> Tensor:
    """Own rows ``[B, C, rows, W]`` of a prediction from the windows of all ranks that cover them. See `blend`."""
    if not moved.overlap:
        return window
    plan, device = blend(moved, comm.rank), window.device
    sends = {peer: window.index_select(dim, indices(rows, device)) for peer, rows in plan.sends}
    recvs = {peer: _with_rows(window, dim, len(places)) for peer, places in plan.recvs if peer != comm.rank}
    if sends or recvs:
        comm.swap(sends, recvs, kind="output").wait()
    own = window.narrow(dim, moved.margins(comm.rank)[0], len(moved.split.span(comm.rank)))
    result = torch.zeros_like(own, dtype=torch.float32)
    for (peer, places), weights in zip(plan.recvs, plan.weights, strict=True):
        part = own if peer == comm.rank else recvs[peer]
        shape = [len(weights) if i == dim else 1 for i in range(window.ndim)]
        result.index_add_(dim, indices(places, device), part * _shares(weights, device).view(shape))
    return result.to(window.dtype)


@lru_cache(maxsize=1024)
def _shares(weights: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(weights, device=device)


def _with_rows(like: Tensor, dim: int, rows: int) -> Tensor:
    return like.new_empty([*like.shape[:dim], rows, *like.shape[dim + 1 :]])
