"""Memory that a rank takes to decode one picture, beyond what it holds at rest: the figures of docs/benchmarks.md.

``OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/vae_memory.py vae-mini 1024``: a shape of
``distrifusion bench``, and pixels per side. Linux, on the CPU. With one process, the bare model.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import distrifusion as df
from distrifusion.bench.memory import PeakMemory
from distrifusion.bench.workload import load
from distrifusion.comm.torch_dist import TorchComm
from distrifusion.metrics import human_bytes


def resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def main(name: str, side: int) -> None:
    torch.set_num_threads(1)
    comm = TorchComm.from_environment("cpu")
    work = load(name, side // 8, side // 8)
    df.parallelize(work.model, df.ParallelConfig(strategy="sync"), comm)
    with torch.no_grad():
        small = work.resized(16, 16)
        small.run(small.sample(0))  # kernels and messages have what they keep
        memory, rest = PeakMemory(torch.device("cpu")), resident()
        work.run(work.sample(0))
    peak = memory.read()
    assert peak is not None, "this system does not count anew"
    print(f"rank {os.environ['RANK']}: peak {human_bytes(peak)}, {human_bytes(peak - rest)} beyond rest", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
