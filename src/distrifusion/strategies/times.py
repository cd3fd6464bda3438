"""Where in its picture a call is, by the timesteps of the scheduler. Asks no accelerator for a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..models import Call
from .base import State


class Times:
    """``timesteps`` gives those of the present picture, or something else where they are not known."""

    def __init__(self, timesteps: Callable[[], Any]) -> None:
        self._timesteps = timesteps

    def is_last(self, call: Call, state: State) -> bool:
        """Whether the scheduler has no timestep after this one."""
        times, time = self._timesteps(), call.time
        if not isinstance(times, Tensor) or state.step + 1 >= len(times):
            return True
        return isinstance(time, Tensor) and time.data_ptr() == times[-1:].data_ptr()

    def place(self, call: Call) -> int | None:
        """Which timestep of the scheduler's the call's is; None where it is no part of their tensor, which tells."""
        times, time = self._timesteps(), call.time
        if not isinstance(times, Tensor) or not isinstance(time, Tensor) or times.dtype != time.dtype:
            return None
        is_one = time.numel() == 1 or (time.numel() > 1 and not any(time.stride()))
        if not is_one or times.untyped_storage().data_ptr() != time.untyped_storage().data_ptr():
            return None
        return (time.storage_offset() - times.storage_offset()) // times.stride(0)

    def following(self, call: Call) -> Tensor | None:
        """The time after the call's, in its shape; None where it is the last one, or its place is not known."""
        times, place = self._timesteps(), self.place(call)
        if place is None or not 0 <= place < len(times) - 1:
            return None
        after: Tensor = times[place + 1]
        return after.expand(call.time.shape)
