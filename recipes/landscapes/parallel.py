"""Data-parallel training over processes: `torchrun --nproc-per-node N -m recipes.landscapes.train_...`.

On a CPU, one process of one thread per core is much faster than one process of many threads, and
shares the machine well with others.
"""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def setup() -> tuple[int, int, torch.device]:
    """Join the group when started by torchrun: (rank, number of processes, device of this process)."""
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
        if not cuda:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    return rank, world, device


def average_gradients(parameters: Sequence[Tensor], world: int) -> None:
    """Replace every gradient by its mean over the processes."""
    if world == 1:
        return
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def agree(flag: bool, world: int) -> bool:
    """Whether any process says so."""
    if world == 1:
        return flag
    vote = torch.tensor([float(flag)])
    dist.all_reduce(vote)
    return bool(vote.item() > 0)
