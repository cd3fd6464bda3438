"""Faults on the link, in whole models: a peer that stands still is waited for, one that is gone is lost, and a damaged
frame never gets into a picture."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.comm import Comm, residual
from models import build, conditioning, latents
from process_pool import ProcessPool

STILL = 5.0  # seconds
STEPS, FAULT = 4, 2  # of a picture, and the one in which it happens
NAME = "time-cond"
Cases = list[tuple[str, str]]
EVERY: Cases = [(strategy, wire) for strategy in ("sync", "displaced") for wire in ("shared memory", "gloo")]


def picture(comm: Comm, settings: df.ParallelConfig, fault: Callable[[], None] = lambda: None) -> Tensor:
    """The latents after some steps, with a fault in the middle of one."""
    model, step = df.parallelize(build(NAME), settings, comm), 0
    model.mid_block.register_forward_pre_hook(lambda *_: fault() if step == FAULT else None)
    sample, arguments = latents(NAME, 1, 19, 12), conditioning(NAME)
    for step in range(STEPS):
        sample = sample - 0.1 * model(sample, 900 - 100 * step, **arguments).sample
    return sample


def config(strategy: Any, **settings: Any) -> df.ParallelConfig:
    return df.ParallelConfig(strategy=strategy, warmup_steps=0, **settings)


def over(comm: Comm, wire: str) -> Comm:
    """All ranks of ``comm`` over ``wire``."""
    os.environ["DISTRIFUSION_SHARED_MEMORY"] = "0" if wire == "gloo" else "1"
    try:
        part = comm.split([list(range(comm.world))])
    finally:
        del os.environ["DISTRIFUSION_SHARED_MEMORY"]
    assert part.wire == wire
    return part


def at_once(cases: Cases, comms: list[Comm], fault: Callable[[], None]) -> list[Any]:
    """A picture of each case, all at the same time in threads; what one raised in place of it."""
    found: list[Any] = [None] * len(cases)

    def paint(i: int) -> None:
        try:
            found[i] = picture(comms[i], config(cases[i][0]), fault)
        except df.DistrifusionError as error:
            found[i] = error

    threads = [threading.Thread(target=paint, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def faulty(comm: Comm, cases: Cases, number: int) -> tuple[list[bool], list[str], float]:
    """Rank 1 sends itself a signal in the middle of every case: whether each picture is that without it, what was
    raised instead, and how long it took."""
    comms = [over(comm, wire) for _, wire in cases]
    calm = at_once(cases, comms, lambda: None)
    all_there = threading.Barrier(len(cases))

    def fault() -> None:
        if comm.rank == 1 and all_there.wait() == 0:
            os.kill(os.getpid(), number)

    comm.barrier()
    started = time.perf_counter()
    late = at_once(cases, comms, fault)
    equal = [isinstance(each, Tensor) and torch.equal(each, wanted) for each, wanted in zip(late, calm, strict=True)]
    raised = [type(each).__name__ for each in late if not isinstance(each, Tensor)]
    return equal, raised, time.perf_counter() - started


@pytest.fixture
def fragile() -> Iterator[ProcessPool]:
    """Two processes of this test's own, which it may stop."""
    pool = ProcessPool(2, timeout=25.0)
    yield pool
    pool.stop()


def is_stopped(pid: int) -> bool:
    """Whether a process stands still, as Linux says it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_peer_that_stands_still_for_5_seconds_is_waited_for(fragile: ProcessPool) -> None:
    """Stopped in the middle of a step, sync and displaced, over both wires: the picture is the undisturbed one."""
    fragile.start()
    pid, is_over, stopped = fragile.processes[1].pid, threading.Event(), []

    def wake() -> None:
        while not is_stopped(pid):
            if is_over.wait(0.05):
                return
        stopped.append(pid)
        time.sleep(STILL)
        os.kill(pid, signal.SIGCONT)

    waker = threading.Thread(target=wake)
    waker.start()
    try:
        found = fragile.outcomes(faulty, 2, EVERY, int(signal.SIGSTOP))
    finally:
        is_over.set()
        waker.join()
    assert stopped == [pid]
    for outcome in found:
        assert not isinstance(outcome, BaseException), outcome
        equal, raised, seconds = outcome
        assert raised == []
        assert equal == [True] * len(EVERY)
        assert seconds >= STILL - 0.5


@pytest.mark.parametrize("case", [("sync", "gloo"), ("displaced", "shared memory")])
def test_a_peer_that_is_gone_in_the_middle_of_a_step_is_lost(fragile: ProcessPool, case: tuple[str, str]) -> None:
    alive, dead = fragile.outcomes(faulty, 2, [case], int(signal.SIGKILL))
    assert dead is None
    equal, raised, seconds = alive
    assert (equal, raised) == ([False], ["PeerLost"])
    assert seconds < 15  # far below the timeout of 25


@pytest.mark.parametrize("strategy", ["sync", "displaced"])
@pytest.mark.parametrize(
    ("name", "codec"),
    [("mid_block.resnets.1.conv1", "int8"), ("mid_block.resnets.1.conv1", "1bit"), ("output", "int8")],
)
@pytest.mark.parametrize(
    ("byte", "said"), [(0, "turn"), (4, "bytes"), (8, "name, shape and codec"), (12, "checksum"), (21, "checksum")]
)
def test_a_damaged_frame_ends_the_picture(
    monkeypatch: pytest.MonkeyPatch, strategy: str, name: str, codec: str, byte: int, said: str
) -> None:
    """One bit, in any field of the header or in the payload, on the way between two of three ranks."""
    write = residual.Sender.write

    def damaged(self: residual.Sender, value: Tensor, frame: Tensor) -> None:
        write(self, value, frame)
        if self._name.startswith(name) and int(self._due[0]) == 2:
            frame[byte] ^= 1

    monkeypatch.setattr(residual.Sender, "write", damaged)
    painted: list[Tensor] = []

    def rank(comm: Comm) -> None:
        painted.append(picture(comm, config(strategy, codec=codec)))

    with pytest.raises(df.RanksDisagree, match=rf"{re.escape(name)}.*: the {codec} frame of rank . has {said}"):
        df.run_ranks(3, rank, timeout=20)
    assert painted == []
