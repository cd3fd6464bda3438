"""The seam between stages of a model: what the units of the other stages have made, fresh or of the step before.

A unit is a module whose output may go to another rank. In synchronous steps every rank computes all of them. In the
first one the ranks learn who reads whose output, and cut the units into stages of equal work. In a pipelined step a
rank computes the units of its stage; the others give what they have given one step ago, where this rank reads it, and
anything of the right shape where it does not.
"""

from __future__ import annotations

from .plan import Stages
from .policies import Late, Staged, Whole

__all__ = ["Late", "Staged", "Stages", "Whole"]
