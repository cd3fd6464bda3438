"""Ranks that are threads take turns where they are told to: one works at a time, until it waits."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from distrifusion.comm import Comm, run_ranks
from distrifusion.comm.hub import Hub


def most_at_work(num_ranks: int, *, fails: bool = False) -> int:
    """How many ranks were found to work at the same time, in steps that each end with a message to all."""
    at_work, most, lock = 0, 0, threading.Lock()

    def rank(comm: Comm) -> None:
        nonlocal at_work, most
        for step in range(3):
            with lock:
                at_work += 1
                most = max(most, at_work)
            time.sleep(0.02)  # lets others in, if anything does
            with lock:
                at_work -= 1
            if fails and step == 1 and comm.rank == 0:
                raise ValueError("in the middle")
            parts = comm.all_gather(torch.tensor([comm.rank]), [1] * comm.world, kind="control").wait()
            assert torch.cat(parts).tolist() == list(range(comm.world))

    run_ranks(num_ranks, rank, timeout=10)
    return most


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_one_works_at_a_time(num_ranks: int) -> None:
    assert Hub.takes_turns  # conftest.py
    assert most_at_work(num_ranks) == 1


@pytest.mark.usefixtures("all_at_once")
def test_outside_of_tests_all_work() -> None:
    met = threading.Barrier(3)
    run_ranks(3, lambda comm: met.wait(20))  # raises where one has to end first


def test_who_fails_has_had_its_turn() -> None:
    with pytest.raises(ValueError, match="in the middle"):
        most_at_work(3, fails=True)


def test_a_thread_of_a_rank_waits_without_a_turn() -> None:
    """It has none, and must not give away its rank's."""

    def rank(comm: Comm) -> list[int]:
        peer, got = 1 - comm.rank, torch.zeros(1, dtype=torch.int64)
        pending = comm.swap({peer: torch.tensor([comm.rank])}, {peer: got}, kind="control")
        thread = threading.Thread(target=pending.wait)
        thread.start()
        comm.barrier()  # the rank's own wait: the other one has its turn
        thread.join(5)
        return got.tolist()

    assert run_ranks(2, rank, timeout=5) == [[1], [0]]
