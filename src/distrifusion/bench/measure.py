"""Seconds per step of strategies, worlds and sizes, measured side by side in one run.

Each case runs in turn, again and again (``rounds``), so that a noisy machine is noisy for all; what is printed are
medians and ratios. One thread per rank on CPU. The bare model on one rank, and on one process with all threads, are
cases like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from time import perf_counter, process_time
from typing import Any

import torch

from ..comm import Comm
from ..pipeline import parallelize, report, restore
from ..products import Products, fast_products, is_wanted
from .memory import PeakMemory
from .picture import Picture
from .plan import LATENT, Case, Plan
from .shapes import is_shape
from .sharing import share_weights
from .timing import Timing
from .trace import Recorder, merge, refuse_other_clocks
from .workload import Workload, load


class Bench:
    """One plan on all ranks of ``comm``, which may be more than it needs. Making one loads the model.

    Every rank makes the same calls.

    Raises:
        ConfigError: a trace is asked for, and the ranks have different clocks.
    """

    def __init__(self, plan: Plan, comm: Comm, tell: Callable[[int, int], None] = lambda done, total: None) -> None:
        self._plan, self._comm = plan, comm
        if plan.traces:
            refuse_other_clocks(comm)
        self._comms = {world: _first(comm, world) for world in sorted({case.world for case in plan.cases})}
        height, width = plan.sizes[0]
        work = load(plan.model, height // LATENT, width // LATENT, plan.batch, getattr(torch, plan.dtype), plan.device)
        if is_shape(plan.model):  # weights of a folder lie in a file as they are
            share_weights(work.model, comm)
        self._work = {(rows, cols): work.resized(rows // LATENT, cols // LATENT) for rows, cols in plan.sizes}
        self.products = "oneDNN" if isinstance(_products(work), Products) else "torch"
        """Whose matrix products the ranks of a parallel model take."""
        self._timings = [Timing(case, size) for size in plan.sizes for case in plan.cases]
        self._tell, self._num_done = tell, 0

    def measure(self) -> list[Timing]:
        """Time every case in every round; rank 0's timings count. ``tell(done, total)`` is called after each case."""
        for _ in range(self._plan.rounds):
            for timing in self._turns():
                self._time(timing)
        return self._timings

    def trace(self) -> dict[str, Any] | None:
        """Run every case once more with everything noted, untimed: Chrome's trace of all ranks on rank 0, else None."""
        recorder = Recorder(self._comm)
        for timing in self._turns():
            self._trace(timing, recorder)
        gathered = self._comm.all_gather_object(recorder.result())
        return merge(gathered) if self._comm.rank == 0 else None

    def _turns(self) -> Iterator[Timing]:
        """The cases in which this rank has a part, once each; the others wait meanwhile."""
        total = (self._plan.rounds + self._plan.traces) * len(self._timings)
        for timing in self._timings:
            self._comm.barrier()
            if self._comm.rank < timing.case.world:
                yield timing
            self._num_done += 1
            self._tell(self._num_done, total)

    def _num_steps(self, case: Case) -> int:
        """Of a turn."""
        return case.num_untimed + case.stride * self._plan.steps

    def _time(self, timing: Timing) -> None:
        comm, work, case = self._comms[timing.case.world], self._work[timing.size], timing.case
        together = self._plan.steps if case.streams else case.stride  # steps that are not apart are timed as one
        memory, busy = PeakMemory(work.device), list[float]()
        with _spread(work, case, comm, self._num_steps(case)) as steps:
            comm.barrier()
            # None between the steps: as in a picture, what is late has no more time to arrive than the next step takes.
            for number, step in enumerate(steps):
                started, used, waited = perf_counter(), process_time(), comm.meter.waited
                step()
                if number < case.num_untimed:
                    continue
                taken = perf_counter() - started, process_time() - used, comm.meter.waited - waited
                for seconds, each in zip((timing.seconds, busy, timing.waited), taken, strict=True):
                    if (number - case.num_untimed) % together == 0:
                        seconds.append(0.0)
                    seconds[-1] += each / together
            timing.cpu_seconds += map(sum, zip(*comm.all_gather_object(busy), strict=True))
            ran = report(work.model)
            if ran.messages:
                messages, num_bytes = sum(ran.messages[-together:]), sum(ran.bytes[-together:])
                timing.messages, timing.num_bytes = messages / together, num_bytes // together
                timing.slot_bytes = ran.slot_bytes
            for tally in ran.vae.values():
                timing.messages, timing.num_bytes = tally.messages // tally.calls, tally.bytes // tally.calls
            peaks = comm.all_gather_object(memory.read())
            timing.peaks = [_largest(*pair) for pair in zip(timing.peaks or peaks, peaks, strict=True)]

    def _trace(self, timing: Timing, recorder: Recorder) -> None:
        comm, work = self._comms[timing.case.world], self._work[timing.size]
        ranks = "1 rank" if comm.world == 1 else f"{comm.world} ranks"
        label = f"{timing.case.name}, {ranks}, {timing.size[0]} x {timing.size[1]}"
        case = timing.case
        with recorder.modules(work.model), _spread(work, case, comm, self._num_steps(case)) as steps:
            for number, step in enumerate(steps):
                if number <= case.num_untimed or not case.streams:
                    comm.barrier()
                if number == case.num_untimed:
                    recorder.start()
                with recorder.step(label):
                    step()
        recorder.stop()  # after the model was restored, which waits for all that is under way


@contextmanager
def _spread(work: Workload, case: Case, comm: Comm, num_steps: int) -> Iterator[list[Callable[[], None]]]:
    """The model as ``case`` wants it, and its steps in order."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    samples = [work.sample(step) for step in range(num_steps)]
    blocks = work.blocks if case.compiled else []
    for block in blocks:
        block.compile()
    steps: list[Callable[[], None]] = [partial(_to_its_end, work, partial(work.run, sample)) for sample in samples]
    try:
        if case.streams:
            picture = Picture.of(work, num_steps)
            parallelize(picture, case.config, comm)
            steps = [picture.step] * (num_steps - 1) + [partial(_to_its_end, work, picture.step)]
        elif case.strategy is not None:
            parallelize(work.model, case.config, comm)
        with torch.no_grad(), _products(work) if case.products else nullcontext():
            yield steps
    finally:
        restore(work.model)
        for block in blocks:
            block._compiled_call_impl = None  # which nn.Module.compile has set
        if blocks:
            torch.compiler.reset()  # the next turn has other layers; torch gives up where it has too many graphs
        torch.set_num_threads(before)


def _products(work: Workload) -> AbstractContextManager[Any]:
    """What ranks of a parallel model compute in."""
    return fast_products(work.sample(0), work.model) if is_wanted() else nullcontext()


def _to_its_end(work: Workload, step: Callable[[], Any]) -> None:
    step()
    if work.device.type != "cpu":
        torch.accelerator.synchronize()


def _largest(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _first(comm: Comm, world: int) -> Comm:
    """The communicator of the first ``world`` ranks (of the others, on the others)."""
    if world == comm.world:
        return comm
    return comm.split([list(range(world)), list(range(world, comm.world))])
