"""A model that its user has compiled as a whole: what runs inside of our forward is compiled in the same way.

Our forward itself is not for a compiler: it agrees with peers, keeps time, gathers. So the model's own forward is
handed to the user's compiler again, and what ``torch.compile(model)`` has put around the model lets calls through. The
graph of ``model.compile`` breaks where our forward begins.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class Compiling:
    """The forward of ``model``, compiled as the model is at the moment: by ``model.compile``, or within ``wrapper``.

    Args:
        model: a denoiser.
        forward: what it does by itself.
        wrapper: what ``torch.compile(model)`` made, where that was before the model became parallel.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any], wrapper: Any = None) -> None:
        self._model, self._forward, self._wrapper = model, forward, wrapper
        self._known: tuple[Any, Callable[..., Any]] = (None, forward)
        self._around: Callable[..., Any] | None = None  # the wrapper's own forward, while it lets calls through

    def open(self) -> None:
        """From now on the wrapper lets calls through."""
        if self._wrapper is not None:
            self._around, self._wrapper.forward = self._wrapper.forward, self._model.__call__

    def close(self) -> None:
        """The wrapper compiles again."""
        if self._around is not None:
            self._wrapper.forward, self._around = self._around, None

    def forward(self) -> Callable[..., Any]:
        """The forward to call in this step."""
        compiled = self._model._compiled_call_impl or self._wrapper
        if compiled is not self._known[0]:
            compiler = _compiler_of(compiled) if compiled is not None else None
            self._known = compiled, self._forward if compiler is None else compiler(self._forward)
        return self._known[1]

    @property
    def is_whole(self) -> bool:
        """Whether the model runs as a graph."""
        return self.forward() is not self._forward

    @property
    def note(self) -> str | None:
        """What a report should say."""
        compiled = self._model._compiled_call_impl or self._wrapper
        if compiled is None or _compiler_of(compiled) is not None:
            return None
        return "torch.compile of the whole model does nothing while parallel with this torch: compile its blocks"


def _compiler_of(compiled: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """What compiles another function with the options of ``compiled``: torch keeps it there, and names no way to it."""
    found = getattr(compiled, "dynamo_ctx", None)
    if found is None and inspect.isfunction(compiled):
        found = inspect.getclosurevars(compiled).nonlocals.get("self")
    return found if callable(found) else None
