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

    conditioning: Any  # the same object in all of them
    shape: torch.Size
    dtype: torch.dtype
    timestep: float | None
    state: State


class Pictures:
    """States by branch. In doubt a call starts a picture anew, since a synchronous step is always right.

    A picture starts when the scheduler has new timesteps (``set_timesteps`` makes a new tensor), when the latents change size,
    batch or dtype, or when the model changes. Within a picture, calls with the same conditioning object are one branch. A bare
    denoiser without conditioning starts a picture where the timestep rises; else its user calls ``reset``.
    """

    def __init__(self, strategy: Strategy, timesteps: Callable[[], Any]) -> None:
        self._strategy = strategy
        self._timesteps = timesteps
        self._mark: Any = None
        self._fingerprint: Any = None
        self._branches: list[_Branch] = []

    def state(self, call: Call, conditioning: Any, fingerprint: Any) -> tuple[State, bool]:
        """The state of the call's branch, and whether the call starts a picture."""
        mark = self._timesteps()
        if mark is not self._mark or fingerprint != self._fingerprint:
            self.forget()
        self._mark, self._fingerprint = mark, fingerprint
        shape, dtype = call.sample.shape, call.sample.dtype
        timestep = _on_host(call.arguments.get("timestep")) if conditioning is None else None
        for branch in self._branches:
            rises = timestep is not None and branch.timestep is not None and timestep > branch.timestep
            if branch.conditioning is conditioning and (branch.shape, branch.dtype) == (shape, dtype) and not rises:
                branch.timestep = timestep
                return branch.state, False
        # A branch that appears after the others have made more than a step belongs to another picture.
        is_new_picture = all(branch.state.step != 1 for branch in self._branches)
        if is_new_picture or len(self._branches) == MAX_BRANCHES:
            self.forget()
        state = self._strategy.start()
        self._branches.append(_Branch(conditioning, shape, dtype, timestep, state))
        return state, is_new_picture

    def forget(self) -> None:
        """End all branches; what is under way arrives first."""
        branches, self._branches = self._branches, []
        for branch in branches:
            branch.state.drain()

    def abandon(self) -> None:
        """End all branches after an error, without waiting for peers that may be gone."""
        self._branches = []


def _on_host(timestep: Any) -> float | None:
    """The timestep where reading it makes no accelerator wait."""
    if isinstance(timestep, torch.Tensor):
        return float(timestep.reshape(-1)[0]) if timestep.device.type == "cpu" and timestep.numel() else None
    return float(timestep) if timestep is not None else None
