"""Who gets how many rows: equal patches, weights that the user gives, or the speed that was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

from ..comm import Comm
from ..comm.stopwatch import Stopwatch, stopwatch_for
from ..config import ParallelConfig
from ..forms import MEASURED
from ..geometry import Levels
from ..mesh import Mesh

Size = tuple[int, int]  # height and width in rows of latent

LEAST_GAIN = 0.05
"""Of the slowest rank's time. Less is not worth a change: on equal devices, measurements differ by a few per cent."""


class Balance:
    """The weights of the patches of one model and its feeders. A patch has rows in proportion to its weight.

    ``balance="measured"`` follows STADI (arXiv 2509.04719): while a picture's first ``warmup_steps`` steps run, each
    rank measures how long it computes, waits for peers left out, the first step left out too where there are others.
    Then all ranks tell each other their median in one message, and compute the same weights from the same numbers:

        weight = rows / seconds

    The next step, which is synchronous under every strategy, is the first with other rows. The weights are kept for
    later pictures of the same size, which measure again, so that rows settle where a fixed cost per step makes time
    not quite proportional to rows. Of the ranks with the same patch under ``cfg=2``, the slower one counts.

    Args:
        config: says what the weights are.
        mesh: of ``comm``'s ranks.
        comm: all ranks.

    ``watch`` tells the time; another may be put in its place.
    """

    def __init__(self, config: ParallelConfig, mesh: Mesh, comm: Comm) -> None:
        self._config, self._mesh, self._comm = config, mesh, comm
        self._given = config.weights or (1.0,) * mesh.size("patch")
        self._measures = config.balance == MEASURED and mesh.size("patch") > 1
        self.watch: Stopwatch = stopwatch_for(comm.device)
        self._measured: dict[Size, tuple[float, ...]] = {}
        self._is_open = self._measures  # whether this picture's rows may still change

    def weights(self, size: Size) -> tuple[float, ...]:
        """The weight of each patch of a picture of this size."""
        return self._measured.get(size, self._given)

    def origin(self, size: Size) -> str:
        """What the rows of a picture of this size follow, for reports."""
        if size in self._measured:
            return MEASURED
        return str(self._config.balance) if self._config.weights else "even"

    def start(self) -> None:
        """A picture starts."""
        self._is_open = self._measures
        self.watch.clear()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The model runs in here; its time counts while it is asked for."""
        if not self._is_open:
            yield
            return
        meter = self._comm.meter
        meter.watch = self.watch
        self.watch.start()
        try:
            yield
        finally:
            self.watch.stop()
            meter.watch = None

    def end_call(self, num_calls: int, is_last: bool, size: Size, levels: Callable[[tuple[float, ...]], Levels]) -> str:
        """A call of the model has ended, which may be the moment to change the rows. All ranks come here alike.

        Args:
            num_calls: of its guidance branch in this picture, so far.
            is_last: whether it was the step's last.
            size: of the picture.
            levels: of the picture, for some weights.

        Returns:
            What the report is to say about it; mostly nothing.

        Raises:
            PeerLost: a peer is gone.
        """
        last = self._config.warmup_steps
        if num_calls > last:
            self._is_open = False  # too late: this branch may have words that are one step old
        if not self._is_open or not is_last:
            return ""
        if num_calls == 1 < last:  # its one-off costs say nothing about the others
            self.watch.clear()
            return ""
        self.watch.lap()
        if num_calls < last:
            return ""
        self._is_open = False
        return self._decide(size, levels)

    def _decide(self, size: Size, levels: Callable[[tuple[float, ...]], Levels]) -> str:
        now, seconds = levels(self.weights(size)).splits[0], self._seconds()
        if min(seconds) <= 0:
            return "rows kept: a rank had nothing to compute that a clock would show"
        speeds = [rows / each for rows, each in zip(now.sizes, seconds, strict=True)]
        weights = tuple(speed / sum(speeds) for speed in speeds)
        then = levels(weights).splits[0]
        pace = max(rows / speed for rows, speed in zip(then.sizes, speeds, strict=True))
        gain = 1 - pace / max(seconds)
        if gain < LEAST_GAIN:
            return f"rows kept: others would gain {max(gain, 0):.0%}"
        self._measured[size] = weights
        return f"{self._config.split} per rank {'+'.join(map(str, now.sizes))} before they were measured"

    def _seconds(self) -> list[float]:
        """How long a step takes to compute on each rank along the picture, the same numbers on all ranks."""
        own = torch.tensor([median(self.watch.laps())], dtype=torch.float64)
        # On the host, whatever the device: the next step's rows depend on it.
        everyone = self._comm.all_gather(own, [1] * self._comm.world, kind="control").wait()
        return [max(float(everyone[rank]) for rank in group) for group in self._mesh.groups("cfg")]
