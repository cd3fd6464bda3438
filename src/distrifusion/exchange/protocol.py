"""What layers ask of a policy, and of what a patch that stands alone remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..comm import Pending
from ..geometry import Halo


class Exchange(Protocol):
    """One step's policy. All ranks ask under the same keys in the same order."""

    kind: str  # what ran, for the report
    sees_peers: bool  # whether anything of the peers is known, and so their rows of the latents, which every rank has
    recall: Recall | None  # what the patch saw in earlier steps, where it stands alone and moves

    @property
    def is_slow(self) -> bool:
        """Whether answers take so long that a layer should first compute what it can without them."""
        ...

    def begin(self) -> None:
        """Start a step."""
        ...

    def neighbours(
        self, key: str, patch: Tensor, plan: Halo, dim: int, kind: str = "halo"
    ) -> Pending[Mapping[int, Tensor]]:
        """Rows of the peers: peer -> ``[..., rows, ...]`` for each of ``plan.recvs``.

        ``patch`` is the own patch; ``plan.sends`` of its ``dim`` go to the peers. Called on every rank where any rows
        travel. ``kind`` is the seam's, ``"context"`` for keys and values of neighbours alone. The result may be used
        until the next verb.
        """
        ...

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
        """Everyone's parts, in order of rank; the own ones are always fresh.

        ``own`` are tensors that differ in their last dim only, such as K and V; they travel as one message. Rank r's
        have ``sizes[r]`` along ``dim``, where the tokens of its rows at ``level`` stand; None: sums over all of its
        tokens. The result may be used until the next verb.
        """
        ...

    def moments(self, key: str, own: Tensor) -> Tensor:
        """Mean and biased variance ``[2, K]`` of the whole picture; ``own``: moments ``[1 + 2K]``, see moments.py."""
        ...

    def finish(self) -> bool:
        """End the step. False where the model left out seams, so that the next step cannot build on this one."""
        ...


class Recall(Protocol):
    """What a patch that stands alone knows of rows where it was in earlier steps, and what it is told before that."""

    def num_rows(self, level: int) -> int:
        """Rows at ``level`` beside the own ones, of which keys and values are known."""
        ...

    def beside(self, key: str, x: Tensor, level: int, margins: tuple[int, int], dim: int) -> list[Sides]:
        """What a convolution read when the patch was there: rows before and after each strip of ``x``.

        Args:
            key: the layer's.
            x: its input, own rows at ``level`` along ``dim``.
            level: of the model.
            margins: how many rows before, how many after.
            dim: of the rows.

        Returns:
            For each strip of the patch both sides; None where the picture ends, and where the patch has not been.
        """
        ...

    def note(
        self, key: str, x: Tensor, level: int, margins: tuple[int, int], dim: int, *, is_whole: bool = False
    ) -> None:
        """In the synchronous step before patches stand alone, each tells the others what they may come to stand beside.

        All ranks call this under the same keys in the same order. Arguments as of `beside`; ``is_whole``: ``x`` has the
        rows of the whole picture, as on every rank, and nothing travels.
        """
        ...


Sides = tuple[Tensor | None, Tensor | None]
