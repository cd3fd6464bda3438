"""Patches that stream through the stages of a model: what a stage hands to the next one, and what it keeps of patches.

The blocks of a transformer are cut into stages, one per rank. The patches of a picture go through them one after the
other: while a stage computes one patch, the stage before it computes the next (PipeFusion, arXiv 2405.14430). The
model's own forward runs once per patch on each rank: a block of an earlier stage gives what has come of it, a block of
a later one a tensor of the right shape that nobody reads. A stage keeps the keys and values that its blocks made last
for each patch, of this step for those that went before, of the step before for those to come.
"""

from __future__ import annotations

from .course import Course
from .links import Back, Links
from .passes import Pass

__all__ = ["Back", "Course", "Links", "Pass"]
