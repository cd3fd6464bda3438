"""What a stage keeps of the patches: keys and values, or their sums, and rows at borders, as they were last."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..errors import UnsupportedModel
from ..geometry import Split

MARGIN = 2
"""Rows that are kept at each border of a patch, of the last step that was computed whole."""

SAME_BLOCKS = ": while patches stream, the same blocks run for each of them and in every step of a picture"


class Context:
    """Of one stage, in one picture and guidance branch. See the module."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int, int], Tensor] = {}  # (name, maker, reader)
        self._whole: dict[str, Sequence[Tensor]] = {}
        self._parts: dict[str, list[Sequence[Tensor] | None]] = {}
        self._edges: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # (name, patch) -> first and last rows

    def keep(self, name: str, own: Sequence[Tensor], dim: int) -> None:
        """Of the whole picture."""
        self._whole[name] = tuple(own)
        self._parts.pop(name, None)

    def gather(
        self,
        name: str,
        own: Sequence[Tensor],
        sizes: Sequence[int],
        dim: int,
        patch: int,
        cut: Callable[[Tensor, int], list[Tensor]],
    ) -> list[Sequence[Tensor]]:
        """Of all patches, of which ``own`` is the newest."""
        if len(sizes) == 1:
            return [own]
        if name not in self._parts:
            whole = self._whole.get(name)
            if whole is None:
                raise UnsupportedModel(f"{name} runs in this step and did not in the step before{SAME_BLOCKS}")
            if whole[0].shape[dim] == sum(sizes):
                by_tensor = [cut(each, dim) for each in whole]
                self._parts[name] = list(zip(*by_tensor, strict=True))
                del self._whole[name]
            else:  # a sum over tokens, which cannot be taken apart
                self._parts[name] = [None] * len(sizes)
        parts = self._parts[name]
        parts[patch] = own
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            self._whole.pop(name, None)
            return known
        nothing = [part.narrow(dim, 0, 0) for part in own]
        return [self._whole[name], *[nothing] * (len(parts) - 1)]

    def keep_borders(self, name: str, whole: Tensor, split: Split, dim: int) -> None:
        """The first and the last rows of each patch, of a map of the whole picture."""
        for patch in range(split.num_patches):
            span = split.span(patch)
            count = min(MARGIN, len(span))
            first, last = (whole.narrow(dim, start, count).clone() for start in (span.start, span.stop - count))
            self._edges[name, patch] = first, last

    def borders(self, name: str, maker: int, reader: int, count: int, dim: int) -> Tensor:
        """The ``count`` rows of ``maker`` that lie next to ``reader``."""
        if (name, maker, reader) in self.rows:
            return self.rows[name, maker, reader]
        if (name, maker) not in self._edges:
            raise UnsupportedModel(f"{name} runs in this step and did not in the step before{SAME_BLOCKS}")
        first, last = self._edges[name, maker]
        rows = last if maker < reader else first
        if rows.shape[dim] < count:
            raise UnsupportedModel(f"{name} reads {count} rows of a neighbour; while patches stream, {MARGIN} are kept")
        return rows.narrow(dim, rows.shape[dim] - count if maker < reader else 0, count)
