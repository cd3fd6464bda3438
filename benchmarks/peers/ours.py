"""distrifusion, as `rank.py` asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from rank import Cases, Settings

import distrifusion as df
from distrifusion.bench.plan import Case, cases_for
from distrifusion.bench.workload import Workload
from distrifusion.comm.torch_dist import TorchComm


def cases(settings: Settings) -> Cases:
    """Displaced and sync, with each codec."""
    comm = TorchComm.from_environment("cpu")
    assert comm is not None, "started with torchrun's variables"
    work = settings.work()

    @contextmanager
    def spread(case: Case) -> Iterator[Workload]:
        df.parallelize(work.model, case.config, comm)
        try:
            yield work
        finally:
            df.restore(work.model)

    return {case.name: partial(spread, case) for case in own_cases(comm.world, settings.codecs)}


def own_cases(world: int, codecs: list[str | None]) -> list[Case]:
    """Those of this library among a benchmark's."""
    return [case for case in cases_for(["displaced", "sync"], [world], 1, codecs) if case.strategy is not None]
