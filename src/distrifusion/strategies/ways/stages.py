"""A call of the model of which this rank computes one stage, beside the other stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ...boundary import Staged
from ...exchange import Exchange
from ...geometry import Split
from ...layers import Layer
from ...metrics import Report
from ...models import Call, stage_layers
from ..base import State
from ..cutting import Cutting
from ..pairs import Ran
from ..pipelined import Pipelined
from .base import Setting
from .patches import InPatches

_UNKNOWN = "stride=2: the time of the next step is not known here, so that all stages are told that of the present one"


class InStages(InPatches):
    """The model's own forward runs on every rank, and units of other stages give what has come of them.

    On a patch of the picture, where a stage has several ranks.
    """

    def __init__(self, setting: Setting, strategy: Pipelined) -> None:
        super().__init__(setting, strategy)
        self._pipelined = strategy

    def layers(self) -> Iterable[Layer]:
        """See Way."""
        setting = self.setting
        return stage_layers(setting.table.model, self._pipelined.num_stages, setting.holder, super().layers())

    def run(self, call: Call, state: State, feeders: Sequence[Cutting], report: Report) -> Ran:
        """See Way."""
        before = state.time
        if self.setting.config.time_shift:
            # A copy: callers may write the next time into the same tensor.
            state.time = call.time.clone() if isinstance(call.time, Tensor) else call.time
        if state.ahead is not None:
            ran: Ran = state.ahead
            state.ahead = None
            return ran
        looks_ahead = self._pipelined.looks_ahead(state)
        ran = super().run(self._told(call, state, before, report), state, feeders, report)
        if not looks_ahead:
            return ran
        assert state.stages is not None
        picture, rank = Split((0, ran.split.size)), state.stages.output_rank(is_ahead=True)
        state.ahead = replace(ran, split=_of_stage(picture, rank, self.setting.mesh.size("pipe")))
        return replace(ran, departs=False)  # the next step's prediction, which comes at once, goes first

    def _told(self, call: Call, state: State, before: Any, report: Report) -> Call:
        """The call at the time that this rank's stage is told; ``before`` is that of the last step. See `Pipelined`."""
        setting, strategy = self.setting, self._pipelined
        looks_ahead = strategy.looks_ahead(state)
        is_ahead = looks_ahead and strategy.is_ahead(setting.guidance.patches.rank)
        if setting.config.time_shift:
            return call.at(before) if strategy.is_late(state) and not is_ahead else call
        if looks_ahead and setting.times.place(call) is None and _UNKNOWN not in report.notes:
            report.notes.append(_UNKNOWN)
        following = setting.times.following(call) if is_ahead else None
        return call if following is None else call.at(following)

    def _forward(self, exchange: Exchange) -> Callable[..., Any]:
        assert isinstance(exchange, Staged)
        return partial(exchange.run, self.setting.model)

    def _part(self, exchange: Exchange, split: Split, own: Tensor, report: Report) -> tuple[Split, Tensor]:
        assert isinstance(exchange, Staged)
        report.patches = split.sizes if self._is_cut else ()
        report.stages, report.balance = exchange.names, str(self.setting.config.balance or "even")
        return _of_stage(split, exchange.output_rank, self.setting.mesh.size("pipe")), own

    def skip(self, before: Ran, call: Call, state: State) -> Ran:
        """See Way."""
        return before

    def notes(self) -> list[str]:
        """See Way."""
        return uncompiled(self.setting.table.model)


def _of_stage(split: Split, stage: int, num_stages: int) -> Split:
    """Who has which rows of the prediction: the ranks of one stage have their patches, those of others none."""
    num_patches = split.num_patches
    ends = [split.bounds[0]] * stage * num_patches
    return Split((*ends, *split.bounds, *[split.size] * (num_stages - stage - 1) * num_patches))


def uncompiled(model: Any) -> list[str]:
    """What a report is to say of a model that its user has compiled, or blocks of it, where that does nothing."""
    is_compiled = any(each._compiled_call_impl is not None for each in model.modules())
    return ["torch.compile does nothing while pipelined"] if is_compiled else []
