"""The ways to run a model on several ranks: in patches of the picture, stages of the model, both at once (patches that
stream through stages), or slices of the weights."""

from __future__ import annotations

from ...planner.memory import Budget
from ..base import Strategy
from ..streamed import Streamed
from .base import Setting, Way
from .patches import InPatches
from .slices import InSlices
from .stages import InStages
from .streams import InStreams

__all__ = ["Setting", "Way", "way_for"]


def way_for(setting: Setting, strategy: Strategy, budget: Budget | None = None) -> Way:
    """The way of a mesh; the ``budget`` is for patches, and for one device."""
    if isinstance(strategy, Streamed):
        return InStreams(setting, strategy)
    if setting.mesh.size("pipe") > 1:
        return InStages(setting, strategy)
    if setting.mesh.size("tensor") > 1:
        return InSlices(setting, strategy)
    return InPatches(setting, strategy, budget)
