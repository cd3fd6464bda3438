"""What a way is: how a model's call runs on a rank that has a part of the picture, of the model, or of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...comm import Comm
from ...comm.cut import CutComm
from ...config import ParallelConfig
from ...footprint import weight_bytes
from ...layers import FrameHolder, Layer
from ...mesh import Mesh
from ...metrics import Report, human_bytes
from ...models import Call, Table
from ...weights import whole_bytes
from ..balance import Balance
from ..base import State
from ..compiling import Compiling
from ..cutting import Cutting
from ..guidance import Guidance
from ..pairs import Ran
from ..times import Times


@dataclass(frozen=True)
class Setting:
    """The model on this rank, and what every way works with."""

    table: Table
    config: ParallelConfig
    mesh: Mesh
    comm: Comm
    guidance: Guidance
    balance: Balance
    cutting: Cutting
    holder: FrameHolder
    model: Callable[..., Any]  # its own forward
    compiling: Compiling
    times: Times
    cut: CutComm | None = None  # of the ranks that share a branch, where steps are recorded

    @property
    def is_spread(self) -> bool:
        """Whether ranks share the work of one branch of guidance."""
        return self.mesh.world > self.mesh.size("cfg")

    @property
    def whole_bytes(self) -> int:
        """Bytes of the model's weights, with what is not on this rank as long as it is noted (`weights.Part`)."""
        return whole_bytes([*self.table.model.parameters(), *self.table.model.buffers()])

    def weights_note(self, num_bytes: int) -> str:
        """How much of ``num_bytes`` of weights this rank holds."""
        return f"{human_bytes(weight_bytes(self.table.model))} of {human_bytes(num_bytes)} of weights on this rank"

    def own_batch(self, call: Call) -> Call:
        """The call for the part of the batch that is this rank's."""
        batch = call.sample.shape[0]
        share = self.guidance.share(batch)
        return call if len(share) == batch or self.table.needs_whole_batch(call) else call.for_batch(share)


class Way(Protocol):
    """How the ranks run a call of the model. What changes from call to call is the state's."""

    kind: str
    """How fresh the last call was, for the report."""

    def layers(self) -> Iterable[Layer]:
        """The layers of the model as it is now, not attached.

        Raises:
            ConfigError: fewer parts of the model than ranks.
            UnsupportedModel: a module that is not known.
        """
        ...

    def attached(self) -> None:
        """The layers are attached for the first time."""
        ...

    def start(self) -> None:
        """A picture starts."""
        ...

    def prepare(self, call: Call, state: State, *, num_branches: int, is_fed: bool) -> None:
        """The first call of a picture's branch comes next. Collective.

        Raises:
            ConfigError: the call does not fit into memory; on every rank.
        """
        ...

    def run(self, call: Call, state: State, feeders: Sequence[Cutting], report: Report) -> Ran:
        """Run the model on what is this rank's, and tell the report who has what.

        ``feeders`` are of models that have fed this one in this step.
        """
        ...

    def skip(self, before: Ran, call: Call, state: State) -> Ran:
        """What ran ``before``, for a call that is left to the other half of the ranks. See `Pairs`."""
        ...

    def notes(self) -> list[str]:
        """What a report is to say beside the numbers."""
        ...

    def check(self) -> None:
        """Before everything is taken back.

        Raises:
            ConfigError: the model has changed in a way that cannot be taken back; nothing is undone then.
        """
        ...

    def give_back(self) -> None:
        """Take back what was done to the model, but for its layers."""
        ...
