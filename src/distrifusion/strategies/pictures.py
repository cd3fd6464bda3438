"""Which picture, and which guidance branch of it, a call belongs to: the states of the strategies, by branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..models import Call
from .base import State, Strategy

MAX_BRANCHES = 4


@dataclass
class _Branch:
    """What marks the calls of one branch, and its state."""

    conditioning: Any  # the same in all of them
    shape: torch.Size
    dtype: torch.dtype
    timestep: Any  # of the last call, as it was given
    time: float | None  # the same as a number, where it is asked for
    state: State


class Pictures:
    """States by branch. In doubt a call starts anew, since a synchronous step is always right.

    A picture starts when the scheduler has new timesteps (``set_timesteps`` makes a new tensor) or when the model
    changes. Within a picture, calls with the same conditioning, size, batch and dtype are one branch, but two calls
    with one and the same timestep of the scheduler are two: views of a panorama, say. The same conditioning is the same
    tensor or, at another timestep, an equal one. A bare denoiser has no scheduler: there a new conditioning or size
    starts a picture, without conditioning a timestep that rises; else its user calls ``reset``.
    """

    def __init__(self, strategy: Strategy, timesteps: Callable[[], Any]) -> None:
        self._strategy = strategy
        self._timesteps = timesteps
        self.mark: Any = None  # the timesteps of the last call's picture
        self._fingerprint: Any = None
        self._branches: list[_Branch] = []
        self._is_running = False

    def state(self, call: Call, conditioning: Any, fingerprint: Any) -> tuple[State, bool]:
        """The state of the call's branch, and whether the call starts a picture."""
        mark = self._timesteps()
        if mark is not self.mark or fingerprint != self._fingerprint:
            self.reset()
        self.mark, self._fingerprint = mark, fingerprint
        shape, dtype, timestep = call.sample.shape, call.sample.dtype, call.time
        time = _on_host(timestep) if _is_none(conditioning) else None
        alike = [branch for branch in self._branches if (branch.shape, branch.dtype) == (shape, dtype)]
        for branch in alike:
            rises = time is not None and branch.time is not None and time > branch.time
            is_used = mark is not None and isinstance(timestep, torch.Tensor) and branch.timestep is timestep
            if _is_same(branch.conditioning, conditioning) and not rises and not is_used:
                branch.timestep, branch.time = timestep, time
                return branch.state, False
        for branch in alike if mark is not None else ():
            if _is_recast(branch, conditioning, timestep):
                branch.conditioning, branch.timestep = conditioning, timestep
                return branch.state, False
        # Without a scheduler, a branch that appears after the others have made more than a step is another picture's.
        if mark is None and all(branch.state.step != 1 for branch in self._branches):
            self.reset()
        if len(self._branches) == MAX_BRANCHES:
            self.forget()
        is_new_picture, self._is_running = not self._is_running, True
        state = self._strategy.start()
        self._branches.append(_Branch(conditioning, shape, dtype, timestep, time, state))
        return state, is_new_picture

    def place(self, state: State) -> tuple[int, int]:
        """Which branch of the picture ``state`` is, in order of their first calls, and how many there are so far."""
        states = [branch.state for branch in self._branches]
        return next(i for i, other in enumerate(states) if other is state), len(states)

    @property
    def slot_bytes(self) -> int:
        """Memory for late messages, and for what patches remember, of all branches."""
        kept = [each for branch in self._branches for each in (branch.state.slots, branch.state.seen)]
        return sum(each.memory for each in kept if each is not None)

    def reset(self) -> None:
        """End the picture."""
        self.forget()
        self._is_running = False

    def forget(self) -> None:
        """End all branches; what is under way arrives first."""
        branches, self._branches = self._branches, []
        for branch in branches:
            branch.state.drain()

    def abandon(self) -> None:
        """End all branches after an error, without waiting for peers that may be gone."""
        self._branches = []


def _is_same(one: Any, other: Any) -> bool:
    """Whether two calls have one conditioning: the same object, or another view of the same memory."""
    if one is other:
        return True
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_is_same(a, b) for a, b in zip(one, other, strict=True))
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    # The branch holds its tensor, so that no other can have come to lie in its place.
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


def _is_recast(branch: _Branch, conditioning: Any, timestep: Any) -> bool:
    """Whether a call of another timestep has equal conditioning in other memory.

    So it is with pipelines that cast the text at every step, as Sana's where its encoder has another dtype. On an
    accelerator the host waits for it, as it would for the synchronous step that it is spared.
    """
    return not _is_equal(branch.timestep, timestep) and _is_equal(branch.conditioning, conditioning)


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_is_equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        is_alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return is_alike and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _is_none(conditioning: Any) -> bool:
    return all(_is_none(part) for part in conditioning) if isinstance(conditioning, tuple) else conditioning is None


def _on_host(timestep: Any) -> float | None:
    """The timestep where reading it makes no accelerator wait."""
    if isinstance(timestep, torch.Tensor):
        return float(timestep.reshape(-1)[0]) if timestep.device.type == "cpu" and timestep.numel() else None
    return float(timestep) if timestep is not None else None
