"""Fixtures of the suite."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from distrifusion.comm.hub import Hub
from process_pool import Processes, ProcessPool, Threads


def pytest_collection_finish() -> None:
    """Leave what was imported, a million objects that stay to the end, out of every later round of garbage."""
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    """Ranks that are threads take turns: a third less work for the processor. Tests of the communicator do without."""
    Hub.takes_turns = True


@pytest.fixture
def all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are threads work at the same time, as they do outside of tests."""
    monkeypatch.setattr(Hub, "takes_turns", False)


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


@pytest.fixture
def unread_memory_is_nan() -> Iterator[None]:
    """Units of other stages give tensors with anything inside where nobody reads them: here, with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
