"""A rank that fails between two calls, and what the others hear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import distrifusion as df
from distrifusion.comm import Comm


def check_a_lost_rank_is_lost_to_all(
    make: Callable[[], Any], config: df.ParallelConfig, world: int, call: Callable[[Any], Any], num_calls: int
) -> None:
    """Rank 1 fails after ``num_calls`` calls of the model; all others get PeerLost from the next, with the reason."""
    heard: dict[int, str] = {}

    def rank(comm: Comm) -> None:
        model = df.parallelize(make(), config, comm)
        for _ in range(num_calls):
            call(model)
        if comm.rank == 1:
            raise ArithmeticError("only here")
        try:
            call(model)
        except df.PeerLost as loss:
            heard[comm.rank] = str(loss)

    with pytest.raises(ArithmeticError, match="only here"):
        df.run_ranks(world, rank, timeout=20)
    assert sorted(heard) == [each for each in range(world) if each != 1]
    assert all("rank 1 failed: ArithmeticError: only here" in message for message in heard.values())
