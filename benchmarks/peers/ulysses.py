"""diffusers' own context parallelism (Ulysses), as `rank.py` asks for it: on Gloo and the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from rank import Cases, Settings


def cases(settings: Settings) -> Cases:
    """Ulysses over all ranks."""
    dist.init_process_group("gloo")
    work = settings.work()
    # It takes the rank modulo the number of accelerators, of which a CPU has none.
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):
        work.model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    return {"ulysses": lambda: nullcontext(work)}
