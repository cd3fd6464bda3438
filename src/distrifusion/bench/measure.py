"""Seconds per step of strategies and worlds, measured side by side in one run.

Each case runs in turn, again and again (``rounds``), so that a noisy machine is noisy for all; what is printed are
medians and ratios. One thread per rank on CPU. The bare model on one rank, and on one process with all threads, are
cases like the others.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time, sleep
from typing import Any

import torch

from ..comm import Comm
from ..config import ParallelConfig, StrategyName
from ..errors import ConfigError, DistrifusionError
from ..pipeline import parallelize, report, restore
from .workload import Workload, check_name, load

WAIT = 1800.0  # seconds that ranks without a part in a case wait for the others
LOOK = 1.0  # seconds between two looks at the ranks: whoever looks takes a core from one of them


@dataclass(frozen=True)
class Case:
    """One thing to measure. ``strategy`` None is the bare model, with ``threads`` threads."""

    strategy: StrategyName | None
    world: int = 1
    cfg: int = 1
    threads: int = 1
    codec: str | None = None
    context_window: float | None = None

    @property
    def name(self) -> str:
        """What the table calls it."""
        if self.strategy is None:
            return "bare model" if self.threads == 1 else f"bare model, {self.threads} threads"
        parts = [self.strategy, "cfg 2" if self.cfg == 2 else "", self.codec or ""]
        parts += [f"window {self.context_window:g}"] if self.context_window is not None else []
        return " ".join(filter(None, parts))

    @property
    def config(self) -> ParallelConfig:
        """How a step is spread."""
        assert self.strategy is not None, "the bare model spreads nothing"
        # One warm-up step suffices to fill the slots; the first displaced step allocates them.
        return ParallelConfig(
            strategy=self.strategy,
            cfg=self.cfg,
            warmup_steps=0,
            codec=self.codec,
            context_window=self.context_window,
        )


@dataclass(frozen=True)
class Plan:
    """One benchmark run. ``model`` is the name of a shape (see workload.py) or the folder of a pipeline."""

    model: str
    height: int  # rows of latent
    width: int
    batch: int
    cases: tuple[Case, ...]
    rounds: int = 5
    steps: int = 3  # timed steps per round and case
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def world(self) -> int:
        """Ranks that the largest case needs."""
        return max(case.world for case in self.cases)


@dataclass
class Timing:
    """What rank 0 measured of one case."""

    case: Case
    seconds: list[float] = field(default_factory=list)  # per timed step
    cpu_seconds: list[float] = field(default_factory=list)  # per step, summed over the case's ranks
    waited: list[float] = field(default_factory=list)  # host seconds per step in waits, rank 0
    messages: int = 0  # per step and rank
    num_bytes: int = 0

    @property
    def pace(self) -> float:
        """Median seconds per step."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, over the median."""
        low, _, high = quantiles(self.seconds, n=4) if len(self.seconds) > 1 else [self.pace] * 3
        return (high - low) / 2 / self.pace


def cases_for(
    strategies: Sequence[StrategyName],
    worlds: Sequence[int],
    threads: int,
    codecs: Sequence[str | None] = (None,),
    context_window: float | None = None,
) -> tuple[Case, ...]:
    """The bare model on one thread and on ``threads``, then every strategy on every world with every codec.

    One rank is one case, and so is ``"naive"``, which sends nothing that a codec could shorten.
    """
    cases = [Case(None)] + ([Case(None, threads=threads)] if threads > 1 else [])
    for world in worlds:
        if world == 1:
            cases.append(Case(strategies[0]))
            continue
        for strategy in strategies:
            if strategy == "naive":
                cases.append(Case(strategy, world))
                continue
            cases += [Case(strategy, world, codec=codec, context_window=context_window) for codec in codecs]
    return tuple(cases)


def measure(plan: Plan, comm: Comm, tell: Callable[[int, int], None] = lambda done, total: None) -> list[Timing]:
    """Run ``plan`` on all ranks of ``comm``; rank 0's timings count. ``tell(done, total)`` after each case."""
    work = load(plan.model, plan.height, plan.width, plan.batch, getattr(torch, plan.dtype), plan.device)
    comms = {world: _first(comm, world) for world in sorted({case.world for case in plan.cases})}
    timings = [Timing(case) for case in plan.cases]
    for turn in range(plan.rounds):
        for index, timing in enumerate(timings):
            comm.barrier()
            if comm.rank < timing.case.world:
                _run_case(plan, work, timing, comms[timing.case.world])
            tell(turn * len(timings) + index + 1, plan.rounds * len(timings))
    return timings


def _run_case(plan: Plan, work: Workload, timing: Timing, comm: Comm) -> None:
    case = timing.case
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        if case.strategy is not None:
            parallelize(work.model, case.config, comm)
        with torch.no_grad():
            for step in range(2 + plan.steps):
                sample = work.sample(step)
                waited = comm.meter.waited
                comm.barrier()
                started, busy = perf_counter(), _cpu_seconds()
                work.model(sample, torch.tensor(500), **work.arguments)
                _synchronise(work.device)
                seconds, busy = perf_counter() - started, _cpu_seconds() - busy
                total = sum(comm.all_gather_object(busy))
                if step >= 2:
                    timing.seconds.append(seconds)
                    timing.cpu_seconds.append(total)
                    timing.waited.append(comm.meter.waited - waited)
        ran = report(work.model)
        if ran.messages:
            timing.messages, timing.num_bytes = ran.messages[-1], ran.bytes[-1]
    finally:
        restore(work.model)
        torch.set_num_threads(before)


def _cpu_seconds() -> float:
    """CPU time of this process, all threads."""
    return process_time()


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _first(comm: Comm, world: int) -> Comm:
    """The communicator of the first ``world`` ranks (of the others, on the others)."""
    if world == comm.world:
        return comm
    return comm.split([list(range(world)), list(range(world, comm.world))])


def summary(plan: Plan, timings: Sequence[Timing]) -> dict[str, Any]:
    """The one JSON object: medians, and ratios to the bare model of the same run."""
    bare = next(timing for timing in timings if timing.case.strategy is None and timing.case.threads == 1)
    threaded = next((timing for timing in timings if timing.case.threads > 1), None)
    rows = []
    for timing in timings:
        rows.append(
            {
                "case": timing.case.name,
                "world": timing.case.world,
                "seconds_per_step": round(timing.pace, 5),
                "spread": round(timing.spread, 4),
                "speedup": round(bare.pace / timing.pace, 3),
                "speedup_over_threads": round(threaded.pace / timing.pace, 3) if threaded else None,
                "share_of_linear": round(bare.pace / timing.pace / max(timing.case.world, timing.case.threads), 3),
                "cpu_seconds_per_step": round(median(timing.cpu_seconds), 5),
                "waited_per_step": round(median(timing.waited), 5),
                "messages_per_step": timing.messages,
                "bytes_per_step": timing.num_bytes,
            }
        )
    settings = asdict(plan)
    settings.pop("cases")
    return {"bench": settings, "torch": torch.__version__, "cpus": os.cpu_count(), "cases": rows}


def run(plan: Plan, on_progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Start the ranks, measure, and return the summary.

    Raises:
        ConfigError: a value that cannot be measured.
        DistrifusionError: a rank failed; the end of its log is in the text.
    """
    from ..launch import Group

    check_name(plan.model)
    if plan.device == "cpu" and plan.world > (os.cpu_count() or 1) * 8:
        raise ConfigError(f"{plan.world} ranks are too many for {os.cpu_count()} CPUs; at most 8 per CPU")
    with tempfile.TemporaryDirectory(prefix="distrifusion-bench-") as folder:
        settings, result = Path(folder) / "plan.json", Path(folder) / "result.json"
        settings.write_text(json.dumps(asdict(plan)))
        environment = {
            "DISTRIFUSION_BENCH": folder,
            "DISTRIFUSION_TIMEOUT": str(WAIT),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        group = Group(plan.world, "distrifusion.bench.measure", "worker", environment, monitor_interval=LOOK)
        try:
            while not group.wait(LOOK):
                for done, total in _progress(Path(folder)):
                    on_progress(done, total)
            if not result.exists():
                lost = group.first_exit()
                log = group.log_tail(lost.rank if lost else 0)
                raise DistrifusionError(f"rank {lost.rank if lost else '?'} {lost or 'ended'}:\n{log}")
            found: dict[str, Any] = json.loads(result.read_text())
            return found
        finally:
            group.release()


def worker() -> None:
    """One rank of `run`: reads the plan, measures, and rank 0 writes the result."""
    from ..comm.torch_dist import TorchComm
    from ..launch import follow_parent

    follow_parent()
    folder = Path(os.environ["DISTRIFUSION_BENCH"])
    raw = json.loads((folder / "plan.json").read_text())
    plan = Plan(**{**raw, "cases": tuple(Case(**case) for case in raw["cases"])})
    torch.set_num_threads(1)
    comm = TorchComm.from_environment(plan.device)
    assert comm is not None, "the launcher sets torchrun's variables"

    def tell(done: int, total: int) -> None:
        if comm.rank == 0:
            (folder / "progress.json").write_text(json.dumps([done, total]))

    timings = measure(plan, comm, tell)
    if comm.rank == 0:
        part = folder / "result.part"
        part.write_text(json.dumps(summary(plan, timings)))
        part.rename(folder / "result.json")
    comm.barrier()
    comm.close()


def _progress(folder: Path) -> Iterator[tuple[int, int]]:
    try:
        done, total = json.loads((folder / "progress.json").read_text())
        yield done, total
    except (OSError, ValueError):  # not written yet, or just being written
        sleep(0.1)
