"""Whether a picture fits into the memory that is given, in how many pieces, and what to say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import ConfigError
from ..metrics import human_bytes

LIBRARIES = 480 << 20
"""Bytes of a process on the CPU with torch, diffusers and transformers, and nothing else."""

SLACK = 0.1
"""Of what is predicted of tensors, once more: for what allocators and kernels keep."""


@dataclass(frozen=True)
class Fit:
    """How a part of the work will run.

    Args:
        part: its name.
        how: what a person reads: whole, or in which pieces.
        peak: bytes of the tensors that it has at a time, at most.
    """

    part: str
    how: str
    peak: int


@dataclass
class Budget:
    """The memory of one rank.

    Args:
        limit: bytes that it may hold.
        weights: bytes of the weights.
        libraries: bytes that the process holds at rest, where the limit is about these too.
        rings: bytes of the shared memory through which the rank talks with the others, where it does.
        kept: bytes that stay from step to step: late messages.
        fits: by part, what was found to fit.
        share: where ranks have different weights, whose they are.
    """

    limit: int
    weights: int
    libraries: int = 0
    rings: int = 0
    kept: int = 0
    fits: dict[str, Fit] = field(default_factory=dict)
    share: str = ""

    @property
    def room(self) -> int:
        """Bytes for tensors that come and go."""
        return self.room_beside(self.kept)

    def room_beside(self, kept: int) -> int:
        """The same, where ``kept`` bytes stay from step to step."""
        return int((self.limit - self.held + self.kept - kept) / (1 + SLACK))

    @property
    def held(self) -> int:
        """Bytes that are always there."""
        return self.libraries + self.weights + self.rings + self.kept

    def total(self, peak: int) -> int:
        """Bytes of the rank while a part of the work with this ``peak`` runs."""
        return self.held + int((1 + SLACK) * peak)

    def accept(self, fit: Fit) -> None:
        """Note how a part of the work will run.

        Raises:
            ConfigError: it needs more than there is.
        """
        if fit.peak > self.room:
            raise self._refusal(fit)
        self.fits[fit.part] = fit

    @property
    def lines(self) -> list[str]:
        """The plan, for a person."""
        parts = [f"{fit.part} {fit.how}: {human_bytes(self.total(fit.peak))}" for fit in self.fits.values()]
        return [f"memory per rank: {human_bytes(self.limit)} given, {self._held()}", *parts]

    def check_weights(self) -> None:
        """Whether there is room for anything at all.

        Raises:
            ConfigError: there is not.
        """
        if self.room <= 0:
            raise ConfigError(
                f"max_memory={human_bytes(self.limit)} does not even hold what a rank always has: {self._held()}, "
                f"{human_bytes(self.held)} in all"
            )

    def _refusal(self, fit: Fit) -> ConfigError:
        """What is raised where ``fit`` is the least that is possible, and too much."""
        return ConfigError(
            f"max_memory={human_bytes(self.limit)} is too little for the {fit.part}, which needs at least "
            f"{human_bytes(self.total(fit.peak))} per rank ({fit.how}): {self._held()}, "
            f"{human_bytes((1 + SLACK) * fit.peak)} of tensors at work; give more, take more ranks or a smaller picture"
        )

    def _held(self) -> str:
        parts = {
            "libraries": self.libraries,
            "weights": self.weights,
            "shared memory": self.rings,
            "late messages": self.kept,
        }
        shares = {"weights": self.share}
        return " + ".join(f"{name} {human_bytes(size)}{shares.get(name, '')}" for name, size in parts.items() if size)


def fewest(peak: Callable[[int], int], room: int, most: int, least: int = 2) -> tuple[int, int]:
    """The fewest pieces, of ``least``, twice and four times as many and so on up to ``most``, that fit into ``room``.

    ``peak`` tells the bytes of a number of pieces; more pieces take no more. Returns the number and its bytes, which
    are those of ``most`` where nothing fits.
    """
    counts = [least]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    if most > counts[-1]:
        counts.append(most)
    known = {counts[-1]: peak(counts[-1])}
    low, high = 0, len(counts) - 1
    while known[counts[high]] <= room and low < high:
        middle = (low + high) // 2
        count = counts[middle]
        known[count] = peak(count)
        if known[count] <= room:
            high = middle
        else:
            low = middle + 1
    return counts[high], known[counts[high]]
