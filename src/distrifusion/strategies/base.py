"""What a strategy is: which layers, which split, which policy. It passes its state in and out and keeps none itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from ..boundary import Stages
from ..comm.residual import Wire
from ..comm.slots import Slots
from ..exchange import Exchange
from ..geometry import Levels, Moved
from ..recall import Seen
from ..stream import Course
from .graphs import Graphs


@dataclass
class State:
    """One picture's progress in one guidance branch."""

    step: int = 0  # calls of the denoiser so far
    num_calls: int = 0  # the same, with those that the other half of the ranks makes, and never back at 0
    levels: Levels | None = None  # the rows that slots and wire are about
    moved: Moved | None = None  # where the patches of this step lie, if each stands alone
    slots: Slots | None = None  # of strategies with late values
    seen: Seen | None = None  # of patches that remember where they were
    wire: Wire | None = None  # of values that travel as residuals and are waited for
    stages: Stages | None = None  # of a model that is cut over its depth
    course: Course | None = None  # of patches that stream through the stages
    graphs: Graphs | None = None  # of steps that are recorded
    time: Any = None  # that the last call was given, under ``time_shift``
    ahead: Any = None  # what a call has given for the next one too
    is_checked: bool = False  # whether the ranks have compared what they were given
    is_halved: bool = False  # whether only one half of the ranks makes its steps
    last: Any = None  # what a call gave, for shapes and class
    memory: dict[str, Any] = field(default_factory=dict)  # what layers keep from step to step, by name

    def restart(self, fresh: State) -> None:
        """Begin anew, as ``fresh``, in the same picture."""
        self.forget(fresh)
        self.step, self.is_halved = 0, False

    def forget(self, fresh: State) -> None:
        """Go on without the words of the step before, as ``fresh`` has none."""
        self.drain()
        self.ahead = self.graphs = None
        self.slots, self.wire, self.stages, self.course = fresh.slots, fresh.wire, fresh.stages, fresh.course

    def depart(self) -> None:
        """Let leave what has waited for the prediction to go first."""
        if self.slots is not None:
            self.slots.depart()

    def drain(self) -> None:
        """Wait for what is still under way."""
        if self.slots is not None:
            self.slots.drain()
        if self.course is not None:
            self.course.drain()


class Strategy(Protocol):
    """How the ranks of one patch group share a picture."""

    name: str

    def start(self) -> State:
        """The state before a picture's first step."""
        ...

    def policy(self, state: State) -> Exchange:
        """How fresh the peers' values are in this step."""
        ...

    def moved(self, state: State, picture: Levels, unit: int) -> Moved | None:
        """Where the patches of this step lie, if each is a picture of its own; None: they are parts of ``picture``.

        They move by multiples of ``unit`` rows.
        """
        ...


class Joined:
    """What strategies have in common whose patches are parts of one picture."""

    def moved(self, state: State, picture: Levels, unit: int) -> Moved | None:
        """See Strategy."""
        return None
