"""A call of the model on this rank's patch of the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...exchange import Exchange
from ...geometry import Split
from ...layers import Frame, Layer
from ...metrics import Report
from ...models import Call
from ...planner.memory import Budget
from ..base import State, Strategy
from ..budget import Pretended, StepTrial, largest_patch, patch_layers
from ..cutting import Cutting
from ..graphs import Graphs
from ..pairs import Ran
from .base import Setting


class InPatches:
    """Each rank computes its patch, and layers ask the strategy's policy for what they need of the others.

    Args:
        setting: the model on this rank.
        strategy: says how fresh that is.
        budget: the memory of a rank; None: no matter how much.
    """

    kind = "sync"

    def __init__(self, setting: Setting, strategy: Strategy, budget: Budget | None = None) -> None:
        self.setting, self._strategy, self._budget = setting, strategy, budget
        self._is_cut = setting.mesh.size("patch") > 1

    def layers(self) -> Iterable[Layer]:
        """See Way."""
        setting, has_budget = self.setting, self._budget is not None
        if not self._is_cut and not has_budget and not any(setting.config.rings):
            return []
        return patch_layers(setting.table, setting.holder, is_cut=self._is_cut, has_budget=has_budget)

    def attached(self) -> None:
        """See Way."""

    def start(self) -> None:
        """See Way."""

    def prepare(self, call: Call, state: State, *, num_branches: int, is_fed: bool) -> None:
        """See Way. Finds out how much a layer may work on at a time."""
        setting, cutting, budget = self.setting, self.setting.cutting, self._budget
        if budget is None or not setting.table.gathers:
            return
        picture = cutting.levels(call)
        cutting.moved = None
        frame = cutting.frame(call, picture, Pretended(), {})
        # What feeders have left is this rank's.
        frame.patch = cutting.place if is_fed else largest_patch(picture.splits[0])
        trial = StepTrial(setting.table, setting.holder, setting.own_batch(call), frame, fed=is_fed)
        cutting.chunk, fit, words = trial.fit(budget, keeps=setting.config.keeps_words)
        peaks = setting.comm.all_gather_object((fit.peak, words))
        budget.kept = max(words for _, words in peaks) * num_branches
        budget.accept(replace(fit, peak=max(peak for peak, _ in peaks)))

    def run(self, call: Call, state: State, feeders: Sequence[Cutting], report: Report) -> Ran:
        """See Way."""
        setting, cutting, table = self.setting, self.setting.cutting, self.setting.table
        picture = cutting.levels(call)
        if state.levels is not None and state.levels != picture:
            state.forget(self._strategy.start())
        state.levels = picture
        state.moved = cutting.moved = cutting.moves(call, state, picture, feeders)
        exchange = self._strategy.policy(state)
        own_call = setting.own_batch(cutting.with_plain_latents(call))
        frame = cutting.frame(call, picture, exchange, state.memory)
        if self._is_cut:
            own_call = table.localise(own_call, frame, fed=bool(feeders))
        setting.holder.frame = frame
        with setting.balance.measuring():
            exchange.begin()
            result = self._result(exchange, own_call, frame, state)
            if self._is_cut:
                result = table.finish(result, frame)
            own = table.fold(result[0], own_call, frame) if table.gathers else call.sample
        is_complete = exchange.finish()
        self.kind = exchange.kind if setting.is_spread else "sync"
        report.patches, report.balance = picture.splits[0].sizes, setting.balance.origin(table.size(call))
        split, own = self._part(exchange, picture.splits[0], own, report)
        wire = state.wire if self._is_cut else None
        return Ran(result, own, split, cutting.moved, wire=wire, is_complete=is_complete)

    def _result(self, exchange: Exchange, call: Call, frame: Frame, state: State) -> Any:
        """What the model gives for this rank's part of a call."""
        forward, cut = self._forward(exchange), self.setting.cut
        if cut is None:
            return forward(**call.arguments)
        if state.graphs is None:
            state.graphs = Graphs(cut, type(self.setting.table.model).__name__)
        return state.graphs.run(exchange.kind, forward, call, frame, state.slots)

    def _forward(self, exchange: Exchange) -> Callable[..., Any]:
        """What computes the step."""
        return self.setting.compiling.forward()

    def _part(self, exchange: Exchange, split: Split, own: Tensor, report: Report) -> tuple[Split, Tensor]:
        """Who says what of the prediction, and what this rank says; ``own`` is what it has made for its patch."""
        return split, own

    def skip(self, before: Ran, call: Call, state: State) -> Ran:
        """See Way."""
        cutting = self.setting.cutting
        picture = cutting.levels(call)
        moved = cutting.moves(call, state, picture, [])
        return replace(before, own=cutting.nothing(before.own, moved), split=picture.splits[0], moved=moved)

    def notes(self) -> list[str]:
        """See Way."""
        return []

    def check(self) -> None:
        """See Way."""

    def give_back(self) -> None:
        """See Way."""
