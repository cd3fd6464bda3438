"""The ranks of a benchmark: worker processes of our own, or those that torchrun started."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DistrifusionError
from .plan import Plan
from .shapes import check_name

if TYPE_CHECKING:
    from ..comm import Comm

WAIT = 1800.0  # seconds that ranks without a part in a case wait for the others
LOOK = 1.0  # seconds between two looks at the ranks: whoever looks takes a core from one of them

Tell = Callable[[int, int], None]
"""``tell(done, total)`` after each case."""


@dataclass(frozen=True)
class Found:
    """What a run gives: see `summary`, and `trace.merge` where the plan asks for it."""

    summary: dict[str, Any]
    trace: dict[str, Any] | None = None


def run(plan: Plan, on_progress: Tell = lambda done, total: None) -> Found:
    """Start the ranks and measure.

    Raises:
        ConfigError: a value that cannot be measured.
        DistrifusionError: a rank failed; the end of its log is in the text.
    """
    from ..comm.shared import is_allowed
    from ..launch import Group
    from ..products import asked_for

    check_name(plan.model)
    is_allowed()  # bad variables are refused here, not in the log of a rank
    asked_for()
    if plan.device == "cpu" and plan.world > (os.cpu_count() or 1) * 8:
        raise ConfigError(f"{plan.world} ranks are too many for {os.cpu_count()} CPUs; at most 8 per CPU")
    with tempfile.TemporaryDirectory(prefix="distrifusion-bench-") as folder:
        settings, result = Path(folder) / "plan.json", Path(folder) / "result.json"
        settings.write_text(json.dumps(plan.as_dict()))
        environment = {
            "DISTRIFUSION_BENCH": folder,
            "DISTRIFUSION_TIMEOUT": str(WAIT),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        group = Group(plan.world, "distrifusion.bench.start", "worker", environment, monitor_interval=LOOK)
        try:
            while not group.wait(LOOK):
                for done, total in _progress(Path(folder)):
                    on_progress(done, total)
            if not result.exists():
                lost = group.first_exit()
                log = group.log_tail(lost.rank if lost else 0)
                raise DistrifusionError(f"rank {lost.rank if lost else '?'} {lost or 'ended'}:\n{log}")
            return Found(**json.loads(result.read_text()))
        finally:
            group.release()


def worker() -> None:
    """One rank of `run`: reads the plan, measures, and rank 0 writes the result."""
    from ..comm.torch_dist import TorchComm
    from ..launch import follow_parent

    follow_parent()
    folder = Path(os.environ["DISTRIFUSION_BENCH"])
    plan = Plan.from_dict(json.loads((folder / "plan.json").read_text()))
    comm = TorchComm.from_environment(plan.device)
    assert comm is not None, "the launcher sets torchrun's variables"

    def tell(done: int, total: int) -> None:
        if comm.rank == 0:
            (folder / "progress.json").write_text(json.dumps([done, total]))

    found = measure(plan, comm, tell)
    if found is not None:
        part = folder / "result.part"
        part.write_text(json.dumps(vars(found)))
        part.rename(folder / "result.json")
    comm.barrier()
    comm.close()


def measure(plan: Plan, comm: Comm, tell: Tell = lambda done, total: None) -> Found | None:
    """Carry out ``plan`` on all ranks of ``comm``; what was found on rank 0, None on the others."""
    import torch

    from .measure import Bench
    from .summary import summary

    torch.set_num_threads(1)
    bench = Bench(plan, comm, tell)
    timings = bench.measure()
    trace = bench.trace() if plan.traces else None
    return Found(summary(plan, timings, comm.wire, bench.products), trace) if comm.rank == 0 else None


def _progress(folder: Path) -> Iterator[tuple[int, int]]:
    try:
        done, total = json.loads((folder / "progress.json").read_text())
        yield done, total
    except (OSError, ValueError):  # not written yet, or just being written
        sleep(0.1)
