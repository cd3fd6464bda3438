"""One copy of random weights for all ranks of a machine, as they have of those that lie in a file."""

from __future__ import annotations

import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from ..comm import Comm


def share_weights(model: nn.Module, comm: Comm) -> bool:
    """Give ``model``, which has the same weights on every rank of ``comm``, those of rank 0, in memory that ranks of
    its machine have in common. Whether this rank has; elsewhere, and where there is no room, it keeps its own.

    Collective. The weights are not to be written to: a page that is becomes the writer's own.
    """
    if comm.world == 1 or next(model.parameters()).device.type != "cpu":
        return False
    path = comm.all_gather_object(Path(tempfile.gettempdir()) / f"distrifusion-{secrets.token_hex(8)}.pt")[0]
    is_shared = False
    try:
        if comm.rank == 0:
            with suppress(OSError, RuntimeError):  # no room
                torch.save(model.state_dict(), path)
        comm.barrier()
        with suppress(OSError, RuntimeError):  # another machine, or a file that was cut off
            model.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)
            is_shared = True
        comm.barrier()
    finally:
        if comm.rank == 0:
            path.unlink(missing_ok=True)  # the memory lives on in those who have mapped it
    return is_shared
