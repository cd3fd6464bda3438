"""Worker processes that take tasks as they get done: one thread each, and an end that is told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from ..errors import DistrifusionError

T = TypeVar("T")
R = TypeVar("R")


def num_cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


class Pool(Generic[T, R]):
    """``jobs`` processes, each of which makes its own ``handle = make()`` and answers tasks with ``handle(task)``.

    One job is this process itself: nothing is started. ``make``, tasks and answers must pickle where there are more.
    """

    def __init__(self, jobs: int, make: Callable[[], Callable[[T], R]]) -> None:
        self._make = make
        self._jobs = jobs
        self._handle: Callable[[T], R] | None = None
        self._workers: dict[Connection, BaseProcess] = {}

    def run(self, tasks: Iterable[T]) -> Iterator[R]:
        """The answers, in the order in which they get done.

        Raises:
            DistrifusionError: what a task raised (its kind stays), or a worker that is gone.
        """
        waiting = list(tasks)
        if self._jobs == 1:
            for task in waiting:
                self._handle = self._handle or self._make()
                yield self._handle(task)
            return
        waiting.reverse()
        if not self._workers:
            self._start(min(self._jobs, len(waiting)))
        idle, num_open = list(self._workers), len(waiting)
        while num_open:
            while idle and waiting:
                idle.pop(0).send(waiting.pop())
            for connection in wait(self._workers):
                assert isinstance(connection, Connection)
                yield self._answer(connection)
                idle.append(connection)
                num_open -= 1

    def _answer(self, connection: Connection) -> R:
        try:
            is_done, answer = connection.recv()
        except (EOFError, ConnectionError):
            worker = self._workers[connection]
            worker.join(5)
            code = worker.exitcode
            how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            raise DistrifusionError(
                f"a worker process {how}; what is done is kept, and the same command goes on (--jobs 1 takes least "
                "memory)"
            ) from None
        if not is_done:
            raise answer
        found: R = answer
        return found

    def _start(self, num: int) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        resource_tracker.ensure_running()  # or it starts with the first worker, and unblocks SIGINT when it does
        for _ in range(num):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(self._make, theirs), daemon=True)
            with _no_interrupts():  # Ctrl-C in the terminal goes to all of its processes, and is this one's to answer
                worker.start()
            theirs.close()
            self._workers[ours] = worker

    def close(self, is_done: bool = False) -> None:
        """End the workers. ``is_done`` says that none has a task; else those at work are stopped."""
        for connection, worker in self._workers.items():
            if is_done:
                connection.close()  # which ends its loop
            else:
                worker.terminate()
        for connection, worker in self._workers.items():
            worker.join(10)
            if worker.is_alive():
                worker.kill()
                worker.join()
            connection.close()
        self._workers.clear()

    def __enter__(self) -> Pool[T, R]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(is_done=kind is None)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C waits until this is over; processes that are started in it never hear it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(make: Callable[[], Callable[[Any], Any]], connection: Connection) -> None:
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system's, left behind by a stopped worker
    handle: Callable[[Any], Any] | None = None
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            handle = handle or make()
            answer = True, handle(task)
        except DistrifusionError as error:
            answer = False, error
        except Exception as error:
            answer = False, DistrifusionError(f"{type(error).__name__}: {error}")
        try:
            connection.send(answer)
        except BrokenPipeError:
            return
