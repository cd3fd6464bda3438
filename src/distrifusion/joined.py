"""Ranks that torchrun started: they join each other, agree on what to paint, and paint it. No worker processes here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ConfigError, DistrifusionError, PeerLost, RanksDisagree
from .painter import OnStep, Painted, Painter, Request, Setup
from .worker import Failure

if TYPE_CHECKING:
    from .comm import Comm

T = TypeVar("T")

POLL = 0.5  # seconds between two looks at who has loaded
SPEAK = 3.0  # seconds that rank 0 has to say what is wrong: torchrun ends all ranks when the first one is gone


def connect(device: str, timeout: float | None = None) -> Comm:
    """The ranks that torchrun started.

    Raises:
        ConfigError: variables or devices that do not fit.
        PeerLost: the ranks did not come together.
    """
    from .comm.torch_dist import TorchComm

    comm = TorchComm.from_environment(device, timeout)
    if comm is None:
        raise ConfigError("this process was not started by torchrun: RANK and WORLD_SIZE are not set")
    return comm


@contextmanager
def one_voice(comm: Comm) -> Iterator[None]:
    """Work of all ranks, of whose errors rank 0 alone speaks; ``comm`` is closed after it.

    Raises:
        DistrifusionError: on rank 0, and on a rank that failed alone. On the others it is SystemExit, in silence, since
            torchrun looks at them too.
    """
    try:
        yield
    except (DistrifusionError, KeyboardInterrupt) as error:
        if comm.rank == 0 or os.environ.get("DISTRIFUSION_TRACEBACK") == "1":
            raise
        if isinstance(error, DistrifusionError):
            time.sleep(SPEAK)
        raise SystemExit(1) from error
    except Exception as error:
        raise DistrifusionError(f"rank {comm.rank}: {type(error).__name__}: {error}") from error
    finally:
        comm.close()


def agree(comm: Comm, said: Mapping[str, Any], check: Callable[[], T]) -> T:
    """What ``check`` gives here, once it has given something on every rank and all ranks have ``said`` the same.

    Raises:
        RanksDisagree: names the first thing that differs, with both values and ranks.
        DistrifusionError: what ``check`` raised on the lowest rank on which it did, on every rank.
    """
    failure = None
    try:
        checked = check()
    except DistrifusionError as error:
        failure = Failure.of(error)
    everyone: list[tuple[dict[str, Any], Failure | None]] = comm.all_gather_object((dict(said), failure))
    for rank, (theirs, _) in enumerate(everyone):
        for name, value in everyone[0][0].items():
            if theirs[name] != value:
                raise RanksDisagree(f"{name} differs: rank 0 has {value!r}, rank {rank} has {theirs[name]!r}")
    _raise_first([failure for _, failure in everyone])
    return checked


def load(comm: Comm, setup: Setup) -> Painter:
    """The pipeline, loaded on every rank and spread over them.

    Ranks load at different speeds, by minutes where disks differ, so none may wait in silence for another: each loads
    on a thread and says meanwhile that it is there.

    Raises:
        DistrifusionError: it does not load on some rank, or cannot be spread; the same on every rank.
        PeerLost: a rank died.
    """
    loading: Future[Painter] = Future()
    Thread(target=_load, args=(setup, comm.rank, comm.world, loading), daemon=True).start()
    while True:
        state: Failure | bool = loading.done()
        if state and (error := loading.exception()) is not None:
            state = Failure.of(error)
        everyone = comm.all_gather_object(state)
        _raise_first([state if isinstance(state, Failure) else None for state in everyone])
        if all(everyone):
            break
        time.sleep(POLL)
    painter = loading.result()
    painter.join(comm)
    return painter


def paint(comm: Comm, painter: Painter, request: Request, on_step: OnStep | None = None) -> Painted:
    """Paint ``request`` of rank 0 on all ranks; ``on_step`` is called there alone.

    Raises:
        PeerLost: a rank died or fell silent; the others then hear of it at once.
    """
    try:
        return painter.paint(request if comm.rank == 0 else None, on_step if comm.rank == 0 else None)
    except BaseException:
        comm.abort()
        raise


def leave(comm: Comm) -> None:
    """Close ``comm`` once all ranks are done with it: who leaves early is lost to one still at its last step."""
    with suppress(PeerLost):
        comm.barrier()
    comm.close()


def _load(setup: Setup, rank: int, world: int, loading: Future[Painter]) -> None:
    try:
        loading.set_result(Painter(setup, rank, world))
    except BaseException as error:
        loading.set_exception(error)


def _raise_first(failures: list[Failure | None]) -> None:
    failed = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
    if not failed:
        return
    rank, failure = next(iter(failed.items()))
    if len(failed) < len(failures):
        failure.text = f"on rank {rank}: {failure.text}"
    raise failure.exception()
