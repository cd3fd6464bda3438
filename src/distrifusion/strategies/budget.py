"""In how many pieces a decode and a step fit into the memory that is given, told by rehearsals of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..comm import Pending
from ..comm.base import Done
from ..comm.shared import ring_bytes
from ..exchange import Exchange, Recall, packed
from ..footprint import rehearsal
from ..geometry import Halo, Levels, Split
from ..layers import Frame, FrameHolder, Layer
from ..mesh import Mesh
from ..metrics import human_bytes
from ..models import Call, Table, feed_forwards
from ..planner.memory import Budget, Fit, fewest
from .bands import BandedTail, Bands, banded_tail, run_half, whole

if TYPE_CHECKING:
    from ..models.vae import Half
    from ..models.vaes.plan import Tail

CHUNKS = (64 << 20, 16 << 20, 4 << 20)  # bytes that a layer of a denoiser works on at a time, for the least work first


def shared_bytes(mesh: Mesh, *, streams: bool = False) -> int:
    """Of the shared memory through which a rank of ``mesh`` talks with the others of its machine, both ways.

    With a split of guidance there are rings within the groups too; where patches stream, between neighbours and on the
    way back.
    """
    num_branches = mesh.size("cfg")
    worlds = [mesh.world, *([num_branches, mesh.world // num_branches] if num_branches > 1 else [])]
    worlds += [*[2] * min(mesh.size("pipe") - 1, 2), mesh.world] if streams else []
    return sum(2 * (world - 1) * ring_bytes(world) for world in worlds if world > 1)


def half_fit(
    half: Half,
    holder: FrameHolder,
    levels: Levels,
    dim: int,
    arguments: Mapping[str, Any],
    budget: Budget,
    patch: int = 0,
) -> tuple[Bands | None, Fit]:
    """The least work with which an encode or decode fits into the budget: whole, or its tail in bands.

    Where nothing fits, or the half is not known in bands, what comes nearest: `Budget.accept` refuses that. Of the
    patches the largest counts, so that all ranks come to the same.

    Args:
        half: what makes it.
        holder: of its layers, which are attached.
        levels: the split over all ranks.
        dim: the split dim.
        arguments: of its forward, the sample first.
        budget: of each rank.
    """
    trial = _Trial(half, holder, levels, dim, arguments)
    part = f"VAE's {half.kind}"
    plain = Fit(part, "whole", trial.peak(None))
    tail = half.tail()
    if plain.peak <= budget.room or tail is None or arguments.get("feat_cache") is not None:  # a video's frames
        return None, plain
    fits = [plain]
    for most_twice in MOST_TWICE:
        for first in _cuts(tail):
            most = trial.most_bands(first, most_twice)
            if most < 2:
                continue
            num, peak = fewest(lambda num, first=first: trial.peak(Bands(first, num)), budget.room, most)  # type: ignore[misc]
            fit = Fit(part, trial.describe(first, num), peak)
            if peak <= budget.room:
                return Bands(first, num), fit
            fits.append(fit)
    return None, min(fits, key=lambda fit: fit.peak)


MOST_TWICE = (1, 4)
"""Rows around a band to those of it: with as few as possible if that will do, and no plan computes more."""

PICTURES = 4
"""Pictures of floats that a pipeline holds while it makes an image file's bytes of what was decoded."""


def _cuts(tail: Tail) -> list[int]:
    """Where bands may begin, last first: where the pictures are still small, before they are doubled."""
    names = [type(module).__name__ for module in tail.modules]
    doubling = [i for i, name in enumerate(names) if "Upsample" in name or "Resample" in name]
    return sorted({0, *doubling}, reverse=True)


class _Trial:
    """Rehearsals of one call of a VAE's half, on the rank with the largest patch."""

    def __init__(self, half: Half, holder: FrameHolder, levels: Levels, dim: int, arguments: Mapping[str, Any]) -> None:
        self._half, self._holder, self._levels, self._dim = half, holder, levels, dim
        self._arguments = dict(arguments)
        self._past = self._arguments.pop("feat_cache", None)
        self._patch = largest_patch(levels.splits[0])

    def peak(self, bands: Bands | None) -> int:
        """Bytes of the tensors that the rank has at a time, the result on all ranks included."""
        half, trial, pretended = self._half, rehearsal(self._half.module), Pretended()
        arguments = trial.stand_in(self._arguments)
        frame = self._holder.frame = self._frame(pretended)
        try:
            with trial.running():
                if self._past is not None:  # made in here it counts, until the model lets go of it
                    arguments["feat_cache"] = [self._kept(each, i == 0) for i, each in enumerate(self._past)]
                own = run_half(half, self._holder, frame, arguments, bands, pretended)
                dim = own.ndim - 4 + self._dim
                made = whole(own, self._levels.splits[half.level_out(self._levels)], dim, pretended)
        finally:
            self._holder.frame = None
        if half.kind == "encode":
            return trial.peak
        num_calls = half.num_calls(self._arguments) if self._past is not None else 1
        before = (num_calls - 1) * _bytes(made)  # of the other frames, which the VAE joins
        return max(trial.peak + before, PICTURES * num_calls * _bytes(made))

    def _kept(self, each: Any, is_first: bool) -> Any:
        """What the rank with the largest patch has kept of earlier frames, where this rank has ``each``.

        ``is_first``: of the first convolution, which reads the whole picture.
        """
        if not isinstance(each, Tensor):
            return each
        dim, across = (-2, -1) if self._dim == 2 else (-1, -2)  # of [B, C, frames, rows, W]
        split = self._levels.splits[self._levels.across.index(each.shape[across])]
        return _resized(each, dim, split.size if is_first else split.sizes[self._patch])

    def most_bands(self, first: int, most_twice: int) -> int:
        """The most bands from module ``first`` on with ``most_twice`` as many rows around a band as in it."""
        around = max(self._tail(first).num_around(self._frame(Pretended())), 1)
        return min(most_twice * self._num_rows // around, self._num_rows)

    def describe(self, first: int, num: int) -> str:
        """What a person reads of a plan."""
        name = {2: "rows", 3: "columns"}[self._dim]
        passes = self._tail(first).num_passes
        often = f", {passes} times over for its norms" if passes > 1 else ""
        return f"in {num} bands of {-(-self._num_rows // num)} {name}{often}"

    @property
    def _num_rows(self) -> int:
        return self._levels.splits[0].sizes[self._patch]

    def _frame(self, exchange: Exchange) -> Frame:
        return Frame(self._patch, self._dim, self._levels, exchange)

    def _tail(self, first: int) -> BandedTail:
        return banded_tail(self._half, self._holder, first)


def largest_patch(split: Split) -> int:
    """The patch with most rows, and of these one with neighbours on both sides."""
    last = split.num_patches - 1
    return max(range(split.num_patches), key=lambda patch: (split.sizes[patch], 0 < patch < last, patch))


class StepTrial:
    """Rehearsals of one call of a denoiser, whose layers are attached.

    Args:
        table: of the model.
        holder: of its layers.
        call: with the batch that the rank has.
        frame: of the rank, but for the exchange and the chunk, which are the trial's.
        fed: see `Table.localise`.
    """

    def __init__(self, table: Table, holder: FrameHolder, call: Call, frame: Frame, *, fed: bool = False) -> None:
        self._table, self._holder, self._call, self._frame, self._fed = table, holder, call, frame, fed

    def fit(self, budget: Budget, *, keeps: bool) -> tuple[int | None, Fit, int]:
        """How much its layers may work on at a time, for the least work; and the bytes of all messages.

        ``keeps``: the messages of a step stay until the next one. Where nothing fits, what comes nearest.
        """
        whole_step, words = self.peak(None)
        kept = words if keeps else 0
        room = budget.room_beside(kept)
        if whole_step <= room:
            return None, Fit("denoiser", "whole", whole_step), kept
        num, peak = fewest(lambda num: self.peak(CHUNKS[num - 1])[0], room, len(CHUNKS), least=1)
        chunk = CHUNKS[num - 1]
        return chunk, Fit("denoiser", f"in pieces of {human_bytes(chunk)} within its layers", peak), kept

    def peak(self, chunk: int | None) -> tuple[int, int]:
        """Bytes of the tensors that the rank has at a time, and of the messages that it sends and receives."""
        table, trial, pretended = self._table, rehearsal(self._table.model), Pretended()
        call = self._call.having(**trial.stand_in(dict(self._call.arguments)))
        frame = replace(self._frame, exchange=pretended, chunk=chunk, memory={})
        is_cut = frame.levels.splits[0].num_patches > 1
        self._holder.frame = frame
        try:
            with trial.running():
                own = table.localise(call, frame, fed=self._fed) if is_cut else call
                result = type(table.model).forward(table.model, **own.arguments)
                result = table.finish(result, frame) if is_cut else result
                whole(table.fold(result[0], own, frame), frame.levels.splits[0], frame.dim, pretended)
        finally:
            self._holder.frame = None
        return trial.peak, pretended.words


def patch_layers(table: Table, holder: FrameHolder, *, is_cut: bool, has_budget: bool) -> Iterator[Layer]:
    """The layers of a denoiser for what is asked of it, not attached: of one that is not cut, those that see edges.

    With a budget they can work on pieces.
    """
    if has_budget:
        yield from feed_forwards(table.model, holder)
    yield from (layer for layer in table.layers(holder) if is_cut or layer.sees_edges)


class Pretended:
    """See Exchange, and the all-gather of Comm: as many bytes as `Fresh` has for what the peers would say, with nothing
    in them. ``words`` counts the bytes that are sent and received.
    """

    kind = "sync"
    sees_peers = True
    is_slow = False
    recall: Recall | None = None

    def __init__(self) -> None:
        self.words = 0

    def begin(self) -> None:
        """See Exchange."""

    def neighbours(
        self, key: str, patch: Tensor, plan: Halo, dim: int, kind: str = "halo"
    ) -> Pending[Mapping[int, Tensor]]:
        """See Exchange."""
        rows = {peer: _resized(patch, dim, count) for peer, count in plan.recvs}
        sent = sum(len(span) for _, spans in plan.sends for span in spans)
        self.words += sum(map(_bytes, rows.values())) + _bytes(_resized(patch, dim, sent))
        return Done(rows)

    def gather(
        self,
        key: str,
        own: Sequence[Tensor],
        sizes: Sequence[int],
        dim: int,
        kind: str = "context",
        *,
        level: int | None = None,
    ) -> Pending[list[Sequence[Tensor]]]:
        """See Exchange."""
        widths = [part.shape[-1] for part in own]
        words = packed(own)
        parts = [_resized(words, dim, size) for size in sizes]
        self.words += sum(map(_bytes, parts))
        return Done([torch.split(part, widths, -1) for part in parts])

    def moments(self, key: str, own: Tensor) -> Tensor:
        """See Exchange."""
        return own[1:].view(2, -1)

    def finish(self) -> bool:
        """See Exchange."""
        return True

    def all_gather(self, own: Tensor, sizes: Sequence[int], *, kind: str) -> Pending[list[Tensor]]:
        """See Comm."""
        return Done([own.new_empty(size) for size in sizes])


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
