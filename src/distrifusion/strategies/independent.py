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
from ..geometry import Moved, Split, blend
from .base import State

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

    def moved(self, state: State, split: Split, unit: int) -> Moved | None:
        """See Strategy."""
        return Moved(split)


class Shifted:
    """Patches that do not talk and whose borders move at every step, on a torus (SpotDiffusion, arXiv 2407.15507).

    What one step has torn, another one has in the middle of a patch. The first ``warmup_steps`` are synchronous, since
    early steps decide what the picture is of. Offsets follow from the configuration and the number of the step, so all
    ranks know them.
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
        return Fresh(self._comm) if self._step(state) < 0 else self._absent

    def moved(self, state: State, split: Split, unit: int) -> Moved | None:
        """See Strategy.

        Raises:
            ConfigError: an overlap that is not a multiple of ``unit``.
        """
        step, overlap = self._step(state), self._config.overlap
        if overlap % unit:
            raise ConfigError(f"overlap={overlap} must be a multiple of {unit} rows here")
        if step < 0:
            return None
        return Moved(Split(split.bounds, split.is_ring, self._offset(step, split, unit)), overlap)

    def _step(self, state: State) -> int:
        """The number of the step after the synchronous ones; negative in these."""
        # By calls, which both halves of the ranks of cfg=2 count alike, whoever makes them.
        return state.num_calls - 1 - self._config.warmup_steps

    def _offset(self, step: int, split: Split, unit: int) -> int:
        """Where the first patch begins, in rows: within its own length, after which all borders are where they were."""
        num_places = max(split.size // split.num_patches // unit, 1)
        if self._config.shift == "golden":
            return int(step * GOLDEN % 1 * num_places) * unit
        if self._config.shift == "random":
            return Random(f"{self._config.shift_seed}/{step}").randrange(num_places) * unit
        return step * int(self._config.shift) // unit * unit % split.size


def blended(window: Tensor, moved: Moved, comm: Comm, dim: int) -> Tensor:
    """Own rows ``[B, C, rows, W]`` of a prediction from the windows of all ranks that cover them. See `blend`."""
    if not moved.overlap:
        return window
    plan, device = blend(moved, comm.rank), window.device
    sends = {peer: window.index_select(dim, _index(rows, device)) for peer, rows in plan.sends}
    recvs = {peer: _with_rows(window, dim, len(places)) for peer, places in plan.recvs if peer != comm.rank}
    if sends or recvs:
        comm.swap(sends, recvs, kind="output").wait()
    own = window.narrow(dim, moved.margins(comm.rank)[0], len(moved.split.span(comm.rank)))
    result = torch.zeros_like(own, dtype=torch.float32)
    for (peer, places), weights in zip(plan.recvs, plan.weights, strict=True):
        part = own if peer == comm.rank else recvs[peer]
        shape = [len(weights) if i == dim else 1 for i in range(window.ndim)]
        result.index_add_(dim, _index(places, device), part * _shares(weights, device).view(shape))
    return result.to(window.dtype)


@lru_cache(maxsize=1024)
def _index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, since a host that copies to an accelerator waits for it; patches come to the same places again."""
    return torch.tensor(rows, device=device)


@lru_cache(maxsize=1024)
def _shares(weights: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(weights, device=device)


def _with_rows(like: Tensor, dim: int, rows: int) -> Tensor:
    return like.new_empty([*like.shape[:dim], rows, *like.shape[dim + 1 :]])
