"""Where a rank's CPU time goes beyond its share of one rank's step.

``OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/rank_cost.py sdxl-mini``

The bare model on one rank, on every rank at once, displaced and sync in turn, round after round. ``--products`` gives
the bare model the matrix products of the ranks, so that what is told apart is the splitting alone. The first line is
what the machine takes: CPU seconds of a bare step beside those of the other ranks over those of one alone. First line
of a strategy: CPU seconds of all ranks over those of one bare step beside others, medians over the rounds. Then, by
operator, what rank 0 spends beyond its share of the bare step, in per cent of that share: thread time of each call, the
least of the rounds, so that other load on the machine counts little. ``python`` is what is left: Python itself, and the
host's work at messages and waits.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from time import process_time, thread_time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import distrifusion as df
from distrifusion.bench.plan import LATENT
from distrifusion.bench.sharing import share_weights
from distrifusion.bench.workload import Workload, load
from distrifusion.comm import Comm
from distrifusion.comm.torch_dist import TorchComm
from distrifusion.products import fast_products, is_wanted

BARE = "bare"
Around = Callable[[], AbstractContextManager[Any]]
"""What a step runs in."""

STEPS = {BARE: 2, "displaced": 4, "sync": 2}  # the last is timed, which asks for no new memory; then one is looked into


class Clock(TorchDispatchMode):
    """Thread time of each operator, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = thread_time()
        result = func(*args, **(kwargs or {}))
        self.calls.append((str(func), thread_time() - started))
        return result


def step(work: Workload, number: int, around: Around = nullcontext) -> float:
    """CPU seconds of a step."""
    sample = work.sample(number)
    started = process_time()
    with around():
        work.run(sample)
    return process_time() - started


def turn(comm: Comm, work: Workload, case: str, around: Around) -> tuple[float, list[tuple[str, float]]]:
    """CPU seconds of a step, and the calls of the next one."""
    if case != BARE:
        df.parallelize(work.model, df.ParallelConfig(strategy=case, warmup_steps=0), comm)  # type: ignore[arg-type]
    for number in range(STEPS[case]):
        comm.barrier()
        seconds = step(work, number, around)
    comm.barrier()
    with Clock() as clock:
        step(work, STEPS[case], around)
    df.restore(work.model)
    return seconds, clock.calls


def by_operator(runs: list[list[tuple[str, float]]]) -> dict[str, float]:
    """Milliseconds of each operator: of each of its calls the least of the runs that made the same calls."""
    names = [tuple(name for name, _ in run) for run in runs]
    usual = Counter(names).most_common(1)[0][0]
    found: dict[str, float] = defaultdict(float)
    for calls in zip(*(run for run, made in zip(runs, names, strict=True) if made == usual), strict=True):
        found[calls[0][0]] += 1e3 * min(seconds for _, seconds in calls)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="sdxl-mini")
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text-tokens", type=int, default=77)
    parser.add_argument("--products", action="store_true", help="the ranks' matrix products for the bare model too")
    parser.add_argument("--least", type=float, default=0.1, help="per cent: what is less is not printed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    comm = TorchComm.from_environment("cpu")
    assert comm is not None, "started by torchrun"
    side = given.size // LATENT
    work = load(given.model, side, side, text_tokens=given.text_tokens)
    share_weights(work.model, comm)
    bare: Around = partial(fast_products, work.sample(0), work.model) if given.products and is_wanted() else nullcontext
    seconds, calls = defaultdict[str, list[float]](list), defaultdict[str, list[Any]](list)
    alone = []
    for _ in range(given.rounds):
        comm.barrier()
        if comm.rank == 0:
            alone.append([step(work, number, bare) for number in range(STEPS[BARE])][-1])
        for case in STEPS:  # each begins with a barrier
            taken, made = turn(comm, work, case, bare if case == BARE else nullcontext)
            seconds[case].append(taken)
            calls[case].append(made)
    everyone = comm.all_gather_object(dict(seconds))
    if comm.rank == 0:
        report(comm.world, alone, everyone, {case: by_operator(runs) for case, runs in calls.items()}, given.least)
    comm.barrier()
    comm.close()


def report(
    world: int,
    alone: list[float],
    everyone: list[dict[str, list[float]]],
    spent: dict[str, dict[str, float]],
    least: float,
) -> None:
    """Print the tables and a JSON line."""
    found: dict[str, Any] = {}
    for case, ops in spent.items():
        ops["python"] = 1e3 * min(everyone[0][case]) - sum(ops.values())
    bare = [sum(each) / world for each in zip(*(rank[BARE] for rank in everyone), strict=True)]  # all ran one
    beside = median(many / one for many, one in zip(bare, alone, strict=True))
    print(f"bare steps of {world} ranks at once: {beside:.3f} of the CPU seconds of one alone")
    found["at once"] = {"ratio": beside}
    share = 1e3 * min(everyone[0][BARE]) / world
    for case in (case for case in STEPS if case != BARE):
        totals = [sum(each) for each in zip(*(rank[case] for rank in everyone), strict=True)]
        ratios = [total / one for total, one in zip(totals, bare, strict=True)]
        names = {*spent[case], *spent[BARE]}
        beyond = {name: spent[case].get(name, 0.0) - spent[BARE].get(name, 0.0) / world for name in names}
        rows = {name: round(100 * ms / share, 3) for name, ms in sorted(beyond.items(), key=lambda item: -item[1])}
        print(f"\n{case}, {world} ranks: {median(ratios):.3f} of the CPU seconds of one rank")
        for name, percent in rows.items():
            if abs(percent) >= least:
                print(f"  {name:60} {percent:7.2f} %")
        found[case] = {"ratio": median(ratios), "ratios": ratios, "beyond": rows}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
