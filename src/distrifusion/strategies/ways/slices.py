"""A call of the model of whose weights this rank has slices."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ...errors import ConfigError
from ...exchange import Exchange
from ...geometry import Split
from ...layers import Layer
from ...metrics import Report
from ...models import Call, fused, sliced_layers
from ...weights import part_of
from ..base import State, Strategy
from ..pairs import Ran
from .base import Setting
from .patches import InPatches


class InSlices(InPatches):
    """Every rank computes some heads and channels of each layer, of the whole picture."""

    def __init__(self, setting: Setting, strategy: Strategy) -> None:
        super().__init__(setting, strategy)
        # Before there are slices.
        self._fused, self._num_bytes = fused(setting.table.model), setting.whole_bytes

    def layers(self) -> Iterable[Layer]:
        """See Way."""
        setting, mesh = self.setting, self.setting.mesh
        place = mesh.coordinate(setting.comm.rank, "tensor")
        return sliced_layers(setting.table.model, place, mesh.size("tensor"), setting.holder)

    def _part(self, exchange: Exchange, split: Split, own: Tensor, report: Report) -> tuple[Split, Tensor]:
        return self.setting.cutting.own_share(own)

    def skip(self, before: Ran, call: Call, state: State) -> Ran:
        """See Way."""
        return before

    def notes(self) -> list[str]:
        """See Way."""
        return [self.setting.weights_note(self._num_bytes)]

    def check(self) -> None:
        """See Way."""
        model = self.setting.table.model
        if fused(model) != self._fused:
            raise ConfigError(
                f"a LoRA of {type(model).__name__} was fused, or unfused, after df.parallelize, in slices of the "
                "weights only; take that back before df.restore"
            )
        for files in {part.files for part in map(part_of, model.parameters()) if part is not None}:
            files.check()
