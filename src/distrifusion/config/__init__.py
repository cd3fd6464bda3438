"""What the user chooses. The configuration validates itself and does nothing else."""

from .names import BUILT, OF_STAGES, RECORDED, UNCODED, Blocks, GroupNormMode, SplitDim, StrategyName
from .parallel import ParallelConfig

__all__ = [
    "BUILT",
    "OF_STAGES",
    "RECORDED",
    "UNCODED",
    "Blocks",
    "GroupNormMode",
    "ParallelConfig",
    "SplitDim",
    "StrategyName",
]
