"""Fixtures of the suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from process_pool import Processes, ProcessPool, Threads


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPool]:
    """Gloo processes: ``pool.run(fn, world, *args) -> [fn(comm, *args) of each rank]``. They start at the first run."""
    processes = ProcessPool()
    yield processes
    processes.stop()


@pytest.fixture(params=["threads", "gloo"])
def ranks(request: pytest.FixtureRequest) -> Threads | Processes:
    """Both kinds of ranks: ``ranks.run(world, fn, *args) -> [fn(comm, *args) of each rank]``."""
    return Threads() if request.param == "threads" else Processes(request.getfixturevalue("pool"))
