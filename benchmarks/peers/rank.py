"""One rank of one library: waits for its turns and says how long a step took. `compare.py` starts it.

LIBRARY is ours, distrifuser_unet or ulysses: the module beside this one that knows it. It runs in an environment of
its own and may import nothing of distrifusion but the shapes of the benchmark.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distrifusion.bench.plan import LATENT
from distrifusion.bench.workload import Workload, load

BARE = "bare"
Cases = Mapping[str, Callable[[], AbstractContextManager[Workload]]]
"""A library's cases by name: for the time of one turn, the work as the library does it, at the start of a picture."""


@dataclass(frozen=True)
class Settings:
    """What is measured, the same for all libraries."""

    model: str
    size: int  # pixels
    text_tokens: int
    codecs: list[str | None]

    def work(self) -> Workload:
        """A model of its own with the weights that all have, and its words."""
        side = self.size // LATENT
        work = load(self.model, side, side, text_tokens=self.text_tokens)
        # As pipelines call it; diffusers' context parallelism takes nothing else.
        return replace(work, arguments={**work.arguments, "return_dict": False})


def main(library: str, address: str, settings: Settings) -> None:
    """Take turns until the driver hangs up. What goes wrong is told to it, then raised."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        with line.makefile("rw") as words:

            def say(**answer: Any) -> None:
                words.write(json.dumps(answer) + "\n")
                words.flush()

            say(rank=int(os.environ["RANK"]))
            try:
                _take_turns(library, settings, words, say)
            except Exception:
                say(failure=traceback.format_exc())
                raise


def _take_turns(library: str, settings: Settings, orders: Iterable[str], say: Callable[..., None]) -> None:
    torch.set_num_threads(1)
    cases: Cases = import_module(library).cases(settings)  # joins the ranks
    bare = settings.work()
    cases = {BARE: lambda: nullcontext(bare), **cases}
    say(result="ready")
    with torch.no_grad():
        for order in map(json.loads, orders):
            what = {"time": time_steps, "check": check}[order.pop("do")]
            say(result=what(cases, **order))
    dist.barrier()  # no rank hangs up on one that still answers
    dist.destroy_process_group()


def time_steps(cases: Cases, case: str, num_warm_up: int, num_steps: int) -> list[dict[str, float]]:
    """Seconds and CPU seconds of each step. Ranks start together, and then go as fast as their library lets them."""
    with cases[case]() as work:
        samples = [work.sample(step) for step in range(num_warm_up + num_steps)]
        for sample in samples[:num_warm_up]:
            work.run(sample)
        if case != BARE:
            dist.barrier()
        found = []
        for sample in samples[num_warm_up:]:
            started, busy = perf_counter(), process_time()
            work.run(sample)
            found.append({"seconds": perf_counter() - started, "cpu_seconds": process_time() - busy})
    return found


def check(cases: Cases, case: str, num_steps: int) -> float:
    """Relative L2 error of the last step's prediction against one device."""
    with cases[case]() as work:
        for step in range(num_steps):
            found = _prediction(work, step)
    with cases[BARE]() as work:
        truth = _prediction(work, num_steps - 1)
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def _prediction(work: Workload, step: int) -> Tensor:
    prediction: Tensor = work.run(work.sample(step))[0]
    return prediction


if __name__ == "__main__":
    if "DISTRIFUSION_TIMEOUT" not in os.environ:
        os.environ["DISTRIFUSION_TIMEOUT"] = "300"  # on a slow link a synchronous step may take a minute
    main(sys.argv[1], sys.argv[2], Settings(**json.loads(sys.argv[3])))
