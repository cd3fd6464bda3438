"""The forward of a module, in our hands for a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class TakenForward:
    """The ``forward`` of ``module``: another from `take` to `give_back`. ``own`` is what it does by itself."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.own: Callable[..., Any] = module.forward
        self._previous = module.__dict__.get("forward")
        self._ours: Callable[..., Any] | None = None

    def take(self, forward: Callable[..., Any]) -> None:
        """Put ``forward`` in its place."""

        @functools.wraps(self.own)
        def ours(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        # Collectives and clocks are not for a compiler, which would make crumbs of what is between them. See Compiling.
        self._ours = torch.compiler.disable(ours)  # type: ignore[no-untyped-call]
        self._module.forward = self._ours

    @property
    def is_ours(self) -> bool:
        """Whether nobody has replaced it since `take`."""
        return self._module.__dict__.get("forward") == self._ours

    def give_back(self) -> None:
        """Everything as it was."""
        if self._previous is None:
            del self._module.forward
        else:
            self._module.forward = self._previous
