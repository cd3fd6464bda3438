"""Ranks for tests: threads of this process, or processes that live as long as the session.

Importing torch takes seconds, a task for a process that has it milliseconds. The workers are forked from a server that
has imported it once, join one Gloo group of `MAX_WORLD`, and keep a communicator of each smaller world.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from distrifusion.errors import PeerLost

MAX_WORLD = 6
PATIENCE = 120.0  # seconds for one task of a pool

Task = Callable[..., Any]


class ProcessPool:
    """``pool.run(fn, world, *args)`` calls ``fn(comm, *args)`` on ranks 0 .. world-1 and returns the results in order.

    ``fn`` is a function of a module that the workers can import (any test module). Where ranks raise, the first
    exception that is not a PeerLost is raised here, with the worker's traceback as its note; the pool then starts anew
    when it is used next.
    """

    def __init__(self, max_world: int = MAX_WORLD, timeout: float = 25.0, patience: float = PATIENCE) -> None:
        self.max_world = max_world
        self.timeout = timeout
        self.patience = patience
        self.processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, fn: Task, world: int, *args: Any) -> list[Any]:
        outcomes = self.outcomes(fn, world, *args)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors:
            raise next((error for error in errors if not isinstance(error, PeerLost)), errors[0])
        return outcomes

    def outcomes(self, fn: Task, world: int, *args: Any) -> list[Any]:
        """As `run`, but with what each rank raised in place of its result; None for a worker that died."""
        if not 1 <= world <= self.max_world:
            raise ValueError(f"world={world} must be 1..{self.max_world}")
        self.start()
        for pipe in self._pipes[:world]:
            pipe.send_bytes(pickle.dumps((fn, world, args)))
        outcomes: dict[int, Any] = {}
        pipes = {pipe: rank for rank, pipe in enumerate(self._pipes[:world])}
        while pipes:
            ready = wait(list(pipes), self.patience)
            if not ready:
                self.stop()
                raise TimeoutError(f"ranks {sorted(pipes.values())} did not answer within {self.patience:g} s")
            for pipe in ready:
                rank = pipes.pop(pipe)
                try:
                    outcomes[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    outcomes[rank] = None
        results = [outcomes[rank] for rank in range(world)]
        if any(isinstance(result, BaseException) for result in results) or not all(
            p.is_alive() for p in self.processes
        ):
            self.stop()
        return [result[0] if isinstance(result, tuple) else result for result in results]

    def start(self) -> None:
        """Start the workers, unless they run."""
        if self.processes:
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "pytest", "distrifusion.comm.torch_dist"])
        self._folder = tempfile.TemporaryDirectory(prefix="distrifusion-pool-")
        for rank in range(self.max_world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, rank, self.max_world, self.timeout, os.path.join(self._folder.name, "store")),
                name=f"rank-{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        """End the workers."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self.processes:
            self._folder.cleanup()
        self.processes, self._pipes = [], []


class Threads:
    """Thread ranks behind the interface of the fixture ``ranks``."""

    name = "threads"

    def run(self, world: int, fn: Task, *args: Any) -> list[Any]:
        from distrifusion.comm import run_ranks

        return run_ranks(world, partial(_call, fn, args), timeout=25.0)


class Processes:
    """The session's Gloo processes behind the interface of the fixture ``ranks``."""

    name = "gloo"

    def __init__(self, pool: ProcessPool) -> None:
        self.pool = pool

    def run(self, world: int, fn: Task, *args: Any) -> list[Any]:
        return self.pool.run(fn, world, *args)


def _call(fn: Task, args: tuple[Any, ...], comm: Any) -> Any:
    return fn(comm, *args)


def _work(pipe: Connection, rank: int, max_world: int, timeout: float, store: str) -> None:
    import torch
    import torch.distributed as dist

    from distrifusion.comm.torch_dist import TorchComm

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, max_world),
        rank=rank,
        world_size=max_world,
        timeout=timedelta(seconds=PATIENCE),
    )
    root = TorchComm(timeout=timeout)
    worlds = {max_world: root}
    while True:
        try:
            task = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            return
        try:
            fn, world, args = pickle.loads(task)
            if world not in worlds:  # only its members are here: a group of Gloo needs no others
                worlds[world] = root.split([list(range(world)), list(range(world, max_world))])
            comm = worlds[world]
            comm.meter.clear()
            outcome: Any = (fn(comm, *args),)
        except BaseException as failure:
            root.abort()  # so that the others end at once
            if hasattr(failure, "add_note"):  # Python 3.11
                failure.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
            outcome = failure
        try:
            answer = pickle.dumps(outcome)
        except Exception as failure:
            answer = pickle.dumps(RuntimeError(f"rank {rank} cannot send its outcome: {failure}\n{outcome!r}"))
        pipe.send_bytes(answer)
