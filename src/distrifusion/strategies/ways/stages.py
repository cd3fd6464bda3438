"""A call of the model of which this rank computes one stage, beside the other stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from ..pairs import Ran
from .patches import InPatches


class InStages(InPatches):
    """The model's own forward runs on every rank, and units of other stages give what has come of them."""

    def layers(self) -> Iterable[Layer]:
        """See Way."""
        setting = self.setting
        return stage_layers(setting.table.model, setting.mesh.size("pipe"), setting.holder)

    def _forward(self, exchange: Exchange) -> Callable[..., Any]:
        assert isinstance(exchange, Staged)
        return partial(exchange.run, self.setting.model)

    def _part(self, exchange: Exchange, split: Split, own: Tensor, report: Report) -> tuple[Split, Tensor]:
        assert isinstance(exchange, Staged)
        report.patches = ()
        report.stages, report.balance = exchange.names, str(self.setting.config.balance or "even")
        return exchange.output_split(split.size), own  # one rank has all of it

    def skip(self, before: Ran, call: Call, state: State) -> Ran:
        """See Way."""
        return before

    def notes(self) -> list[str]:
        """See Way."""
        return uncompiled(self.setting.table.model)


def uncompiled(model: Any) -> list[str]:
    """What a report is to say of a model that its user has compiled, or blocks of it, where that does nothing."""
    is_compiled = any(each._compiled_call_impl is not None for each in model.modules())
    return ["torch.compile does nothing while pipelined"] if is_compiled else []
