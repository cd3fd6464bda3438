"""The two calls of a guided step at the same time, on the two halves of the ranks of ``cfg=2``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..comm.residual import Wire
from ..geometry import Moved, Split
from ..models import Call
from .base import State
from .guidance import Halves
from .later import Later


@dataclass(frozen=True)
class Ran:
    """What a call of the model gave on this rank."""

    result: Any  # of the model
    own: Tensor  # own rows [B, C, rows, W] of the prediction (their window, if alone), or frames [B, frames, C, H, W]
    split: Split  # of the picture
    moved: Moved | None = None  # where the patches were, if each stands alone
    coming: Any = None  # the prediction, where its patches are still under way
    wire: Wire | None = None  # of the picture and branch: how the prediction travels
    departs: bool = True  # whether what has waited for the prediction may leave behind it
    is_complete: bool = True  # whether the next step can build on this one: the model left out no seam


@dataclass
class _First:
    """The first call of a step, until the second has come."""

    call: Call
    ran: Ran  # of this call on the half of the ranks that computes it, of an earlier one on the other


class Pairs:
    """Answers the first of two calls with a `Later`, and both when the second has come.

    Each half of the ranks keeps to its call from step to step, since the words of the step before are with it. A
    pipeline that leaves out the second, or looks at the first before, gets the first from the half that computes it.

    Args:
        branch: of guidance, that this half of the ranks computes: 0 the first call, 1 the second; None: there are no
            halves, and every call is answered at once.
        run: computes a call on the ranks of this half.
        skip: (what ran before on this rank, call, its state) -> the same for a call that is left to the other half.
        deliver: (what ran on this rank, call, see `Guidance.gather`) -> predictions as the model returns them.
        start: a new state.
        place: which branch of its picture a state is, and how many there are.
        alone: wraps work that is done outside of the model's call.
    """

    def __init__(
        self,
        branch: int | None,
        run: Callable[[Call, State], Ran],
        skip: Callable[[Ran, Call, State], Ran],
        deliver: Callable[[Ran, Call, Halves], Any],
        start: Callable[[], State],
        place: Callable[[State], tuple[int, int]],
        alone: Callable[[Callable[[], Tensor]], Tensor],
    ) -> None:
        self._branch = branch
        self._run, self._skip, self._deliver = run, skip, deliver
        self._start, self._place, self._alone = start, place, alone
        self._first: tuple[_First, Later] | None = None

    def call(self, call: Call, state: State) -> Any:
        """The result of one call of the model."""
        place, num_branches = self._place(state)
        # A batch is halved instead. Whether there are two calls in a step is known when both were there once.
        is_known = num_branches == 2 and state.last is not None and isinstance(state.last.result[0], Tensor)
        if self._branch is None or call.sample.shape[0] > 1 or not is_known:
            return self._now(call, state)
        state.is_halved = True
        before: Ran = state.last
        ran = self._run(call, state) if place == self._branch else self._skip(before, call, state)
        if place == 0:
            first = _First(call, ran)
            later = Later(before.result[0], lambda: self._alone(lambda: self._settle(first)))
            self._first = first, later
            return _with(before.result, later)
        if self._first is None:
            return _with(before.result, self._deliver(ran, call, (1,)))
        (first, later), self._first = self._first, None
        both = self._deliver(first.ran if self._branch == 0 else ran, call, (0, 1))
        later.fill(both[:1])
        return _with(before.result, both[1:])

    def _now(self, call: Call, state: State) -> Any:
        if state.is_halved:  # the words of the step before are with one half only
            state.restart(self._start())
        ran = self._run(call, state)
        result = _with(ran.result, self._deliver(ran, call, None))
        state.last = replace(ran, result=result)
        return result

    def _settle(self, first: _First) -> Tensor:
        if self._first is not None and self._first[0] is first:
            self._first = None
        prediction: Tensor = self._deliver(first.ran, first.call, (0,))
        return prediction


def _with(result: Any, prediction: Any) -> Any:
    """A model's result with another prediction."""
    return (prediction, *result[1:]) if isinstance(result, tuple) else type(result)(prediction)
