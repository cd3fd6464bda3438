"""A tensor of which each rank has its own rows: what the latents of a picture are between steps of `Shifted`.

A scheduler, and most of what a pipeline does to latents, treats every value alone. Of `Rows` such operations run on the
rows that a rank has, and give `Rows`. Whatever else is asked of them, by a scheduler with thresholds or by a decoder,
runs on the whole tensor, for which the ranks then send each other their rows: exact, and all ranks do it at the same
place, since they run the same program. Where the patches have moved, rows that entered one are fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..comm import Comm
from ..geometry import Moved, Split, moves
from ..layers.rows import attach, own_rows, rows_of
from .values import OF_SHAPE, InParts, is_along_another, is_by_value


class Sharing:
    """One picture's rows on the ranks of ``comm``, which hold patches of it.

    Args:
        comm: the ranks, in order of their patches.
        aside: wraps what is sent, so that it is reported where it is outside of the denoiser's calls.
    """

    def __init__(self, comm: Comm, aside: Callable[[Callable[[], Tensor]], Tensor]) -> None:
        self.comm = comm
        self.aside = aside
        self.is_over = False
        """Whether every tensor is to be whole from now on, since the last prediction has been given."""


@dataclass
class _Held:
    """What a rank has of a tensor.

    ``is_whole``: ``words`` are all of it, and not only own rows of ``split``: once asked for, the whole stays.
    """

    words: Tensor
    split: Split
    dim: int  # of the rows, counted from the end
    sharing: Sharing
    step: int  # of the prediction that it goes back to: the younger of two is where the patches are now
    is_whole: bool = False
    window: tuple[Moved, Tensor, int] | None = None  # its rows elsewhere, and the version of words that they are of
    source: tuple[Any, list[Any], Any, Rows, int] | None = None  # the operation on one other `Rows` that it comes of

    @property
    def version(self) -> int | None:
        """Changes when the words are written to; None: nobody counts."""
        return None if self.words.is_inference() else self.words._version


class Rows(InParts):
    """The rows of one rank, as a tensor of the whole shape.

    Args:
        own: the rows of ``split`` that are this rank's.
        split: who has which.
        dim: of the rows, counted from the end.
        sharing: the ranks.
        step: see `_Held`.
    """

    _held: _Held

    @staticmethod
    def __new__(cls, own: Tensor, split: Split, dim: int, sharing: Sharing, step: int) -> Rows:
        """See the class."""
        shape = list(own.shape)
        shape[dim] = split.size
        made: Rows = Tensor._make_wrapper_subclass(cls, shape, dtype=own.dtype, device=own.device)
        made._held = _Held(own, split, dim, sharing, step)
        return made

    def __init__(self, own: Tensor, split: Split, dim: int, sharing: Sharing, step: int) -> None: ...

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        rows = [str(run) for run in self._held.split.runs(self._held.sharing.comm.rank)]
        return f"Rows(shape={tuple(self.shape)}, of the whole={self._held.is_whole}, rows={rows})"

    def whole(self) -> Tensor:
        """All rows, plain. All ranks call this; one message each, the first time."""
        held = self._held
        if not held.is_whole:
            held.words, held.is_whole = held.sharing.aside(self._gather), True
            held.window = held.source = None
        return held.words

    def over(self, moved: Moved) -> Tensor:
        """The rows of this rank's window in ``moved``, plain. All ranks call this; only rows it has not travel."""
        held = self._held
        rank, version = held.sharing.comm.rank, held.version
        if held.is_whole:
            return rows_of(held.words, moved.window(rank), held.dim)
        if held.split == moved.split and not moved.overlap:
            return held.words
        if held.window is not None and held.window[2] == version and held.window[0].split == moved.split:
            known, words, _ = held.window
            if known == moved:
                return words
            if not moved.overlap:
                return words.narrow(held.dim, known.margins(rank)[0], len(moved.split.span(rank)))
        again = self._again(moved)
        words = again if again is not None else held.sharing.aside(lambda: self._fetch(moved))
        if version is not None:
            held.window = moved, words, version
        return words

    def _again(self, moved: Moved) -> Tensor | None:
        """The operation that this comes of, on its argument's rows there: what was made of rows need not travel."""
        if self._held.source is None:
            return None
        func, leaves, spec, parent, version = self._held.source
        if parent._held.version != version:
            return None
        there = parent.over(moved)
        args, kwargs = tree_unflatten([there if leaf is parent else leaf for leaf in leaves], spec)
        result = func(*args, **kwargs)
        return result if isinstance(result, Tensor) else None

    def _fetch(self, moved: Moved) -> Tensor:
        held = self._held
        comm, dim, words = held.sharing.comm, held.dim, held.words
        plan = moves(held.split, moved.windows, comm.rank)
        sends = {
            peer: torch.cat([words.narrow(dim, span.start, len(span)) for span in spans], dim).contiguous()
            for peer, spans in plan.sends
        }
        recvs = {peer: _with_rows(words, dim, count) for peer, count in plan.recvs}
        pending = comm.swap(sends, recvs, kind="latents") if sends or recvs else None

        def arrived() -> dict[int, Tensor]:
            if pending is not None:
                pending.wait()
            return recvs

        return attach(words, plan, comm.rank, dim, arrived)

    def _gather(self) -> Tensor:
        held = self._held
        split, comm, dim, words = held.split, held.sharing.comm, held.dim, held.words
        shapes = [_resized(words, dim, rows) for rows in split.sizes]
        sizes = [prod(shape) for shape in shapes]
        parts = comm.all_gather(words.contiguous().reshape(-1), sizes, kind="output").wait()
        joined = torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim)
        return joined.roll(split.origin, dim) if split.origin else joined

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Torch's hook below every operation."""
        leaves, spec = tree_flatten((args, kwargs or {}))
        rows = [leaf for leaf in leaves if isinstance(leaf, Rows) and not leaf._held.is_whole]
        if func in OF_SHAPE:
            leaves[0] = torch.empty(leaves[0].shape, dtype=leaves[0].dtype, device=leaves[0].device)
            rows = []
        target = _target(func, args, kwargs or {}, rows)
        if target is None:
            args, kwargs = tree_unflatten([leaf.whole() if isinstance(leaf, Rows) else leaf for leaf in leaves], spec)
            result = func(*args, **kwargs)
            return leaves[0] if func._schema.is_mutable and isinstance(leaves[0], Rows) else result
        return _on_rows(func, leaves, spec, rows, target)


def _target(func: Any, args: Any, kwargs: Any, rows: list[Rows]) -> _Held | None:
    """Whose rows the result of an operation on ``rows``, none of them whole, has; None: it is one of the whole."""
    if not rows:
        return None
    held = max((row._held for row in rows), key=lambda each: each.step)
    if held.sharing.is_over or any((row._held.sharing, row._held.dim) != (held.sharing, held.dim) for row in rows):
        return None
    if func._schema.is_mutable:
        is_into_rows = any(args[0] is row for row in rows) and "out" not in kwargs
        return args[0]._held if is_by_value(func) and is_into_rows else None
    return held if is_by_value(func) or is_along_another(func, args, kwargs, rows[0], held.dim) else None


def _on_rows(func: Any, leaves: list[Any], spec: Any, rows: list[Rows], target: _Held) -> Any:
    """An operation on own rows."""
    here, size = Moved(target.split), target.split.size
    rank, dim = target.sharing.comm.rank, target.dim
    is_of_one = True
    local: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Rows):
            is_of_one = is_of_one and leaf is rows[0]
            leaf = leaf.over(here)
        elif isinstance(leaf, Tensor):
            is_of_one = is_of_one and leaf.numel() == 1
            if leaf.ndim >= -dim and leaf.shape[dim] == size:
                leaf = own_rows(leaf, target.split, rank, dim)
        local.append(leaf)
    args, kwargs = tree_unflatten(local, spec)
    result = func(*args, **kwargs)
    if func._schema.is_mutable:
        target.source = None
        return leaves[0]
    version = rows[0]._held.version
    source = (func, leaves, spec, rows[0], version) if is_of_one and version is not None else None
    return tree_map_only(Tensor, lambda own: _made(own, target, source), result)


def _made(own: Tensor, target: _Held, source: Any) -> Rows:
    made = Rows(own, target.split, target.dim, target.sharing, target.step)
    made._held.source = source
    return made


def _resized(like: Tensor, dim: int, rows: int) -> list[int]:
    shape = list(like.shape)
    shape[dim] = rows
    return shape


def _with_rows(like: Tensor, dim: int, rows: int) -> Tensor:
    return like.new_empty(_resized(like, dim, rows))
