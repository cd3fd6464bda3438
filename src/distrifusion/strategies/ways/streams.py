"""A call of the model whose patches stream through the stages, of which this rank has one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...layers import Layer
from ...metrics import Report
from ...models import Call
from ..base import State
from ..cutting import Cutting
from ..pairs import Ran
from ..streamed import Streamed
from ..streaming import Streaming
from .base import Setting
from .stages import uncompiled


class InStreams:
    """The model's own forward runs once for each patch. See `Streaming`."""

    kind = "sync"

    def __init__(self, setting: Setting, streamed: Streamed) -> None:
        num_patches = setting.config.patches
        assert num_patches is not None
        self.setting, self._streamed = setting, streamed
        self._num_bytes = setting.whole_bytes  # before any are given up
        self._streaming = Streaming(
            streamed, setting.table, num_patches, setting.holder, setting.cutting.dim, setting.guidance
        )

    def layers(self) -> Iterable[Layer]:
        """See Way."""
        return self._streamed.layers(self.setting.table.model, self.setting.holder)

    def attached(self) -> None:
        """See Way. Gives up the weights of other stages, where the configuration says so."""
        self._streamed.free()

    def start(self) -> None:
        """See Way."""
        self._streaming.start()

    def prepare(self, call: Call, state: State, *, num_branches: int, is_fed: bool) -> None:
        """See Way."""

    def run(self, call: Call, state: State, feeders: Sequence[Cutting], report: Report) -> Ran:
        """See Way."""
        setting, is_last = self.setting, self.setting.times.is_last(call, state)
        flow = self._streaming.step(call, setting.own_batch(call), state, setting.model, is_last=is_last)
        assert state.course is not None
        self.kind, split = flow.kind, flow.levels.splits[0]
        report.stages, report.patches = state.course.names(), split.sizes
        if flow.note is not None and flow.note not in report.notes:
            report.notes.append(flow.note)
        return Ran(flow.result, flow.own, self._streaming.output_split(split.size), coming=flow.coming)

    def skip(self, before: Ran, call: Call, state: State) -> Ran:
        """See Way."""
        return before

    def notes(self) -> list[str]:
        """See Way."""
        held = [self.setting.weights_note(self._num_bytes)] if self.setting.config.blocks == "freed" else []
        return [*held, *uncompiled(self.setting.table.model)]

    def check(self) -> None:
        """See Way."""

    def give_back(self) -> None:
        """See Way. Collective where weights were given up."""
        self._streamed.give_back()
