"""What was measured of one case. Apart from the measuring, so that who only shows results loads no models for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median, quantiles

from .plan import Case


@dataclass
class Timing:
    """What rank 0 measured of one case at one size ``(height, width)`` in pixels."""

    case: Case
    size: tuple[int, int]
    seconds: list[float] = field(default_factory=list)  # per timed step
    cpu_seconds: list[float] = field(default_factory=list)  # per step, summed over the case's ranks
    waited: list[float] = field(default_factory=list)  # host seconds per step in waits, rank 0
    messages: float = 0  # per step and rank
    num_bytes: int = 0
    slot_bytes: int = 0  # memory for late messages, rank 0
    peaks: list[int | None] = field(default_factory=list)  # bytes of memory, by rank; None: not known

    @property
    def pace(self) -> float:
        """Median seconds per step."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, over the median."""
        low, _, high = quantiles(self.seconds, n=4) if len(self.seconds) > 1 else [self.pace] * 3
        return (high - low) / 2 / self.pace
