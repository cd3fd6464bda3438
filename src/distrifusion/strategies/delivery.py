"""The end of a call: everyone's parts of the prediction come together, or stay in rows until somebody asks for more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..comm import Comm
from ..geometry import Split
from ..models import Call, Table
from .agreement import check_latents, probe
from .base import State
from .cutting import Cutting
from .guidance import Guidance, Halves
from .independent import blended
from .pairs import Ran
from .rows import Rows, Sharing


class Delivery:
    """Makes of what the ranks have of a prediction what the model returns.

    Args:
        table: of the model.
        comm: all ranks.
        guidance: who has which part of the batch.
        cutting: the dim of the patches.
        stays_in_rows: whether a prediction stays in the rows of each rank where that is possible, see `Rows`.
        aside: sends something where no call of the model does, see `Sharing`.
    """

    def __init__(
        self,
        table: Table,
        comm: Comm,
        guidance: Guidance,
        cutting: Cutting,
        *,
        stays_in_rows: bool,
        aside: Callable[[Callable[[], torch.Tensor]], torch.Tensor],
    ) -> None:
        self._table, self._comm, self._guidance, self._cutting = table, comm, guidance, cutting
        self._stays_in_rows, self._aside = stays_in_rows, aside
        self._sharing: Sharing | None = None  # of the present picture
        self._num_predictions = 0  # in rows
        self.leaving: State | None = None
        """Of the call whose last words go behind its prediction."""

    def start(self, *, has_end: bool) -> None:
        """A picture starts. ``has_end``: its last step will be known, and nothing stays in rows then."""
        self._sharing = None
        if self._stays_in_rows and has_end:
            self._guidance.open_branches()
            self._sharing = Sharing(self._guidance.patches, self._aside)

    def end(self) -> None:
        """The picture's last step begins: from now on everything is to be whole."""
        if self._sharing is not None:
            self._sharing.is_over = True

    def __call__(self, ran: Ran, call: Call, halves: Halves) -> Any:
        """Everyone's predictions, as the model returns them. See `Pairs`."""
        if ran.coming is not None:
            return ran.coming
        own, split = ran.own, ran.split
        if ran.moved is not None:
            own, split = blended(own, ran.moved, self._guidance.patches, self._cutting.dim), ran.moved.split
            if self._sharing is not None and not self._sharing.is_over and _has_rows(ran.result[0]):
                return self._in_rows(own, split, self._sharing, ran, call, halves)
        known = probe(call.sample) if not isinstance(call.sample, Rows) else own.new_empty(0)
        # Which half of the ranks has which bases would depend on which of two calls was made.
        wire = ran.wire if halves is None else None
        gathering = self._guidance.gather(own, known, call.sample.shape[0], split, self._cutting.dim, halves, wire)
        if self.leaving is not None:  # on a slow link the prediction would wait for what leaves before it
            self.leaving.depart()
            self.leaving = None
        whole, probes = gathering.wait()
        check_latents(probes)
        return self._table.unfold(whole, ran.result[0])

    def _in_rows(self, own: torch.Tensor, split: Split, sharing: Sharing, ran: Ran, call: Call, halves: Halves) -> Rows:
        if not isinstance(call.sample, Rows):  # else no latents are known twice
            known = probe(call.sample)
            sizes = [known.numel()] * self._comm.world
            check_latents(self._comm.all_gather(known.contiguous(), sizes, kind="control").wait())
        joined = self._guidance.join_branches(own, call.sample.shape[0], halves)
        self._num_predictions += 1
        rows = self._table.unfold(joined, ran.result[0])
        return Rows(rows, split, self._cutting.dim - 4, sharing, self._num_predictions)


def _has_rows(result: Any) -> bool:
    """Whether a prediction is a map ``[B, C, H, W]`` or ``[B, C, frames, H, W]``, and not in tokens."""
    return isinstance(result, torch.Tensor) and result.ndim in (4, 5)
