"""What patches that move remember: keys, values and statistics of the rows where they were before.

A patch that stands alone and moves over the picture comes by all of its rows. What its layers made of them there is
some steps old when it is elsewhere, as the peers' words are one step old under `exchange.Stale`; and nothing travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from .comm import Comm, Pending
from .comm.base import Done
from .exchange import Absent, Fresh, Named, Sides, packed
from .geometry import Levels, Span, Split, Visit, borders, near, newest
from .moments import combine


class Seen:
    """One patch's memory in one picture and guidance branch: what was said in each visit, by name.

    Args:
        levels: of the picture.
        dim: the split dim of ``[B, frames, H, W]``.
        grain: rows of the first level of which the borders of all visits are multiples.
    """

    def __init__(self, levels: Levels, dim: int, grain: int) -> None:
        self.sizes, self._across, self._dim = sizes_of(levels), levels.across, dim
        self._grains = levels.grains(grain)
        self._visits: dict[int, Visit] = {}
        self._left: dict[int, tuple[tuple[Span, ...], ...]] = {}  # rows that were not seen again since, by level
        self._words: dict[tuple[str, int], Tensor] = {}
        self._borders: dict[str, Tensor] = {}  # by convolution, rows that may be next to a border
        self._been: dict[str, set[int]] = {}  # which of these rows were seen
        self._num_visits = 0

    def enter(self, *visits: Visit) -> tuple[int, ...]:
        """Begin a step: the patch is where the visit says, or every patch of the picture is at one of ``visits``.

        What is known of rows that are now seen again is forgotten. Returns the visits' numbers.
        """
        numbers = tuple(range(self._num_visits, self._num_visits + len(visits)))
        self._num_visits += len(visits)
        self._visits.update(zip(numbers, visits, strict=True))
        left = dict(zip(self._visits, newest(list(self._visits.values()), self.sizes), strict=True))
        self._left = {number: spans for number, spans in left.items() if any(spans)}
        self._visits = {number: self._visits[number] for number in self._left}
        self._words = {key: words for key, words in self._words.items() if key[1] in self._left}
        return numbers

    def keep(self, name: str, number: int, words: Tensor) -> None:
        """Remember what was said in a visit; the memory owns ``words``."""
        if number in self._left:
            self._words[name, number] = words

    def num_rows(self, level: int, here: int) -> int:
        """Rows at ``level`` that are known beside those of visit ``here``."""
        return sum(len(span) for number in self._left if number != here for span in self._left[number][level])

    def tokens(self, name: str, here: int, level: int, dim: int) -> list[Tensor]:
        """What is left of other visits' words about their rows at ``level``: ``[..., tokens, ...]`` along ``dim``."""
        return [
            self._cut(words, len(self._visits[number][level]), span, level, dim)
            for number, words in self._others(name, here)
            for span in self._left[number][level]
        ]

    def sums(self, name: str, here: int) -> list[tuple[Tensor, int, int]]:
        """What other visits have said of all of their rows, how many of these are left, and how many there were."""
        found = [
            (words, sum(map(len, self._left[number][0])), len(self._visits[number][0]))
            for number, words in self._others(name, here)
        ]
        return [each for each in found if each[1]]

    def note_borders(self, key: str, x: Tensor, start: int, level: int, margins: tuple[int, int], dim: int) -> None:
        """Of a convolution's input ``x``, rows from ``start`` on at ``level``, keep those near a possible border."""
        size = self.sizes[level]
        mine = near(self._kept(level, margins), start, x.shape[dim], size)
        rows = x.index_select(dim, indices(mine, x.device))
        self.put_borders(key, rows, [(start + row) % size for row in mine], level, margins, dim)

    def put_borders(
        self, key: str, x: Tensor, rows: Sequence[int], level: int, margins: tuple[int, int], dim: int
    ) -> None:
        """Keep ``x``, which is of these ``rows`` near possible borders."""
        kept = self._kept(level, margins)
        if key not in self._borders:
            shape = [*x.shape[:dim], len(kept), *x.shape[dim + 1 :]]
            with torch.inference_mode(False):  # written in whatever mode the caller's next step runs
                self._borders[key] = torch.zeros(shape, dtype=x.dtype, device=x.device)
        self._been.setdefault(key, set()).update(rows)
        places = tuple(map(kept.index, rows))
        self._borders[key].index_copy_(dim, indices(places, x.device), x)

    def border_rows(self, patches: Split, level: int, margins: tuple[int, int]) -> list[tuple[int, ...]]:
        """Of each patch those near a possible border, counted from its first row."""
        kept, size = self._kept(level, margins), self.sizes[level]
        return [near(kept, patches.span(i).start, patches.sizes[i], size) for i in range(patches.num_patches)]

    def near_border(self, key: str, rows: Span, level: int, margins: tuple[int, int], dim: int) -> Tensor | None:
        """``rows`` next to a border as they were last; None where the patch has not been."""
        wanted = tuple(row % self.sizes[level] for row in range(rows.start, rows.stop))
        if not self._been[key].issuperset(wanted):
            return None
        places = tuple(map(self._kept(level, margins).index, wanted))
        return self._borders[key].index_select(dim, indices(places, self._borders[key].device))

    @property
    def memory(self) -> int:
        """Bytes."""
        kept = [*self._words.values(), *self._borders.values()]
        return sum(words.numel() * words.element_size() for words in kept)

    def _kept(self, level: int, margins: tuple[int, int]) -> tuple[int, ...]:
        return borders(self.sizes[level], self._grains[level], margins)

    def _others(self, name: str, here: int) -> list[tuple[int, Tensor]]:
        return [(n, self._words[name, n]) for n in self._left if n != here and (name, n) in self._words]

    def _cut(self, words: Tensor, rows: int, span: Span, level: int, dim: int) -> Tensor:
        """The tokens of rows ``span`` of a patch that has ``rows``."""
        if len(span) == rows:
            return words
        across = self._across[level]
        third = words.shape[dim] // (rows * across)
        shape = {1: (rows, third, across), 2: (third, rows, across), 3: (third, across, rows)}[self._dim]
        grid = torch.unflatten(words, dim, shape)
        return grid.narrow(dim + self._dim - 1, span.start, len(span)).flatten(dim, dim + 2)


class Noting(Fresh):
    """A synchronous step of all patches, to which a memory listens: what those that stand alone then start from."""

    def __init__(self, comm: Comm, seen: Seen, levels: Levels) -> None:
        super().__init__(comm)
        self._seen, self._levels = seen, levels
        self._noted = Named()  # a convolution's halo has a name of its own
        self._numbers = seen.enter(*(visit_of(levels, patch) for patch in range(levels.splits[0].num_patches)))
        self.recall = self

    def _keep_shared(self, name: str, own: Tensor, parts: list[Tensor], kind: str) -> None:
        for number, part in zip(self._numbers, parts, strict=True):
            self._seen.keep(name, number, part.clone())

    def note(
        self, key: str, x: Tensor, level: int, margins: tuple[int, int], dim: int, *, is_whole: bool = False
    ) -> None:
        """See Recall."""
        name, patches = self._noted._name(key), self._levels.splits[level]
        if is_whole:
            self._seen.note_borders(name, x, 0, level, margins, dim)
            return
        rows = self._seen.border_rows(patches, level, margins)
        own = x.index_select(dim, indices(rows[self._comm.rank], x.device))
        shapes = [(*x.shape[:dim], len(each), *x.shape[dim + 1 :]) for each in rows]
        parts = self._comm.all_gather(own.reshape(-1), [prod(shape) for shape in shapes], kind="halo").wait()
        for patch, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
            start = patches.span(patch).start
            self._seen.put_borders(name, part.view(shape), [start + row for row in rows[patch]], level, margins, dim)

    def num_rows(self, level: int) -> int:
        """See Recall."""
        return 0

    def beside(self, key: str, x: Tensor, level: int, margins: tuple[int, int], dim: int) -> list[Sides]:
        """See Recall."""
        raise AssertionError(f"{key}: patches of a synchronous step do not stand alone")


class Recalled(Absent):
    """The own patch of this step, and the rest of the picture as this rank saw it last. Sends nothing.

    Layers see two patches: the own, and the rest, of which nothing is known before the patch has moved or a memory has
    taken notes of a synchronous step. Convolutions ask for what is beside the patch; to layers that ask their
    neighbours for rows the rest is zeros.
    """

    def __init__(self, seen: Seen, levels: Levels) -> None:
        super().__init__(0, "shifted")
        self._seen = seen
        self._levels = levels
        (self._here,) = seen.enter(visit_of(levels, 0))
        self._num_rest = levels.splits[0].sizes[1]
        self.recall = self

    def note(
        self, key: str, x: Tensor, level: int, margins: tuple[int, int], dim: int, *, is_whole: bool = False
    ) -> None:
        """See Recall."""
        raise AssertionError(f"{key}: a patch that stands alone tells nobody")

    def num_rows(self, level: int) -> int:
        """See Recall."""
        return self._seen.num_rows(level, self._here)

    def beside(self, key: str, x: Tensor, level: int, margins: tuple[int, int], dim: int) -> list[Sides]:
        """See Recall."""
        name, split, (before, after) = self._name(key), self._levels.splits[level], margins
        size, start = self._seen.sizes[level], split.origin
        self._seen.note_borders(name, x, start, level, margins, dim)
        sides: list[Sides] = []
        for rows in self._levels.strips[level]:
            reads = Span(start - before, start), Span(start + rows, start + rows + after)
            known = [
                self._seen.near_border(name, span, level, margins, dim)
                if len(span) and (split.is_ring or (span.start >= 0 and span.stop <= size))
                else None
                for span in reads
            ]
            sides.append((known[0], known[1]))
            start = (start + rows) % size
        return sides

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
        name, words = self._name(key), packed(own)
        rest = self._tokens(name, level, dim) if level is not None else self._sums(name)
        self._seen.keep(name, self._here, words.clone() if words is own[0] else words)
        if rest is None:
            rest = words.narrow(dim, 0, 0)
        return Done([own, torch.split(rest, [part.shape[-1] for part in own], -1)])

    def moments(self, key: str, own: Tensor) -> Tensor:
        """See Exchange. A row has the moments of the patch that it was last seen in."""
        name = self._name(key)
        parts = [own]
        for words, left, rows in self._seen.sums(name, self._here):
            part = words.clone()
            part[0] *= left / rows
            parts.append(part)
        self._seen.keep(name, self._here, own)
        return combine(parts)

    def _tokens(self, name: str, level: int, dim: int) -> Tensor | None:
        found = self._seen.tokens(name, self._here, level, dim)
        return torch.cat(found, dim) if found else None

    def _sums(self, name: str) -> Tensor | None:
        """What all of the rest has in sum, if it is as what is known of it."""
        found = self._seen.sums(name, self._here)
        if not found:
            return None
        scale = self._num_rest / sum(left for _, left, _ in found)
        return torch.stack([words * (scale * left / rows) for words, left, rows in found]).sum(0)


@lru_cache(maxsize=4096)
def indices(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, since a host that copies to an accelerator waits for it; patches come to the same places again."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


def sizes_of(levels: Levels) -> tuple[int, ...]:
    """Rows of the whole picture at every level."""
    return tuple(split.size for split in levels.splits)


def visit_of(levels: Levels, patch: int) -> Visit:
    """The rows of a patch at every level."""
    return tuple(split.place(patch) for split in levels.splits)
