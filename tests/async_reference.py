"""Asynchronous denoising on one device, written without the package: what `pipelined` must give, step by step.

The whole model runs once for each stage. In the run of a stage, every unit of the other stages is given the output that
it had one step before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class AsyncReference:
    """One step after the other: the first ``num_exact`` calls are exact, each later one uses the outputs of the call
    before. ``stages`` has the names of the modules of each; the last one gives the prediction.
    """

    def __init__(self, model: Any, stages: Sequence[Sequence[str]], num_exact: int = 1) -> None:
        self._model = model
        self._stages = stages
        self._num_exact = num_exact
        self._before: dict[str, Any] = {}
        self._now: dict[str, Any] = {}
        self._stage: int | None = None
        for stage, names in enumerate(stages):
            for name in names:
                model.get_submodule(name).register_forward_hook(self._hook(name, stage))

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The prediction of the next step."""
        self._now = {}
        if self._num_exact > 0:
            self._num_exact -= 1
            result = self._run(*args, **kwargs)
        else:
            for stage in range(len(self._stages)):
                self._stage = stage
                result = self._run(*args, **kwargs)
            self._stage = None
        self._before = self._now
        return result

    def stride(self, now: dict[str, Any], ahead: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The predictions of the next two steps, which run each stage once for both, the last one twice.

        ``now`` are the arguments of the first step, ``ahead`` the same with the time of the second.
        """
        self._now = {}
        self._stage = len(self._stages) - 1
        first = self._run(**now)
        self._now = {}
        for stage in range(len(self._stages)):
            self._stage = stage
            second = self._run(**ahead)
        self._stage, self._before = None, self._now
        return first, second

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = type(self._model).forward(self._model, *args, **kwargs)[0]
        return result

    def _hook(self, name: str, stage: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._stage in (None, stage):
                self._now[name] = copy.deepcopy(output)
                return output
            return copy.deepcopy(self._before[name])

        return hook
