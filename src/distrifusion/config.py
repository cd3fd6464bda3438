"""What the user chooses. The configuration validates itself and does nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import ConfigError

StrategyName = Literal["sync", "displaced", "naive", "shifted", "pipelined", "tensor"]
SplitDim = Literal["rows", "cols"]
GroupNormMode = Literal["corrected", "carried", "stale", "separate", "sync"]

BUILT: tuple[StrategyName, ...] = ("sync", "displaced", "naive")
"""Strategies that this release runs; the other names are reserved and refused with a line that says so."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one denoising step is spread over the ranks. All arguments are keywords.

    Args:
        strategy: ``"sync"`` is exact, ``"displaced"`` reuses the previous step's features of the peers
            (DistriFusion, arXiv 2402.19481), ``"naive"`` exchanges nothing inside the denoiser (the baseline).
        cfg: 2 runs the conditional and the unconditional branch of classifier-free guidance on separate ranks.
        patch: ranks along the picture; None takes all that ``cfg`` leaves.
        split: ``"rows"`` or ``"cols"`` of the latent.
        warmup_steps: synchronous steps after the first one; ``displaced`` only (0: only the first is synchronous).
        group_norm: statistics under ``displaced``: ``"corrected"`` (the paper's: all old, moved by the own change),
            ``"carried"`` (the peers' patches taken to have changed much as the own one; nearer to one device),
            ``"stale"`` (peers' old, own fresh), ``"separate"`` (own only) or ``"sync"`` (exact, waits).

    Raises:
        ConfigError: a value that is not one of these, printed with what would be right.
    """

    strategy: StrategyName = "displaced"
    cfg: int = 1
    patch: int | None = None
    split: SplitDim = "rows"
    warmup_steps: int = 4
    group_norm: GroupNormMode = "corrected"

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, get_args(StrategyName))
        if self.strategy not in BUILT:
            raise ConfigError(
                f"strategy={self.strategy!r} is not built yet; choose one of {', '.join(map(repr, BUILT))}"
            )
        _one_of("split", self.split, get_args(SplitDim))
        _one_of("group_norm", self.group_norm, get_args(GroupNormMode))
        _whole("cfg", self.cfg, 1)
        if self.cfg > 2:
            raise ConfigError(f"cfg={self.cfg} must be 1 or 2: guidance has two branches")
        if self.patch is not None:
            _whole("patch", self.patch, 1)
        _whole("warmup_steps", self.warmup_steps, 0)

    def __str__(self) -> str:
        return (
            f"strategy={self.strategy} cfg={self.cfg} patch={self.patch or 'all'} split={self.split} "
            f"warmup_steps={self.warmup_steps} group_norm={self.group_norm}"
        )


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
