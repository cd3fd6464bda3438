"""Memory that each rank held at most while the bundled model painted, with a budget and without: docs/memory.md.

``OMP_NUM_THREADS=1 python benchmarks/memory_budget.py 1024 1 none 700MiB``: pixels per side, ranks, and budgets (none:
without). One step, since all take the same. Linux, on the CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import distrifusion as df
from distrifusion.metrics import human_bytes


def peak(pid: int) -> int:
    """Bytes of a process that were in memory at a time, at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main(side: int, num_ranks: int, *budgets: str) -> None:
    for budget in budgets:
        config = df.ParallelConfig(strategy="sync", max_memory=None if budget == "none" else budget)
        with df.Engine(config=config, nproc=num_ranks) as engine:
            found = engine.generate("green hills", height=side, width=side, steps=1, seed=0, guidance_scale=2.5)
            peaks = [human_bytes(peak(pid)) for _, pid in sorted(engine.pids.items())]
        print(f"{side} px, budget {budget}: peak of each rank {', '.join(peaks)} in {found.seconds:.0f} s", flush=True)
        print("\n".join(f"  {note}" for note in found.report.notes), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
