"""A pipeline of which a rank reads the weights that it needs: no rank ever has the whole denoiser.

The denoiser is built on torch's ``meta`` device from its configuration, as diffusers does itself; what the rank needs
of each weight is then read from the safetensors files. Where that cannot be, diffusers loads it whole, and the report
says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .checkpoint import Checkpoint
from .comm import Comm, alone
from .config import ParallelConfig
from .errors import DistrifusionError
from .mesh import Mesh
from .metrics import human_bytes
from .pipeline import READ, parallelize
from .planner.memory import LIBRARIES, Budget
from .reading import Dtypes, Reading, readings_of
from .strategies.budget import shared_bytes

_LOCK = RLock()  # building on the meta device changes torch for all threads, which ranks may be


def load(
    model: str | Path | None = None,
    config: ParallelConfig | None = None,
    comm: Comm | None = None,
    *,
    device: str = "cpu",
    dtype: Dtypes = None,
    **arguments: Any,
) -> Any:
    """A pipeline, loaded and spread over the ranks: ``from_pretrained`` and `parallelize` in one.

    Under ``strategy="tensor"``, and ``"pipelined"`` with ``patches``, each rank reads its own weights of the denoiser
    only, so that a model need not fit any rank. Every rank calls this with the same arguments.

    Args:
        model: a diffusers pipeline's folder or a hub id; None: the bundled model.
        config: how; None: ``ParallelConfig()``.
        comm: the ranks; None: as for `parallelize`, on ``device``.
        device: ``"cpu"``, ``"cuda"`` or ``"xpu"``, where there is no ``comm``. The pipeline goes to the device of this
            rank.
        dtype: of the weights, as ``from_pretrained`` takes it.
        **arguments: of ``from_pretrained``, such as ``variant`` or a component. What a denoiser is read with otherwise
            (quantisation) has it loaded whole, and the report says so.

    Returns:
        The pipeline. `restore` makes it whole again: it reads the rest from the files, or, of blocks, has it sent.

    Raises:
        ConfigError: no such model, a world that does not fit, or more weights than ``max_memory``.
        UnsupportedModel: see `parallelize`.
        DistrifusionError: the model does not load.
    """
    config = settled(config if config is not None else ParallelConfig())
    if comm is None:
        from .comm.torch_dist import TorchComm

        comm = TorchComm.from_environment(device) or alone(torch.device(device))
    hub = {name: arguments.pop(name) for name in checkpoint.HUB_KEYWORDS if name in arguments}
    without = [name for name, part in arguments.items() if part is None]
    found = checkpoint.find(model, variant=arguments.get("variant"), without=without, **hub)
    dtype = arguments.pop("torch_dtype", dtype)
    pipeline = read(found.path, config, comm.rank, comm.world, dtype=dtype, device=comm.device.type, **arguments)
    if config.blocks != "freed":
        pipeline.to(comm.device)
    parallelize(pipeline, config, comm)
    return pipeline.to(comm.device)


def settled(config: ParallelConfig) -> ParallelConfig:
    """``config`` for a pipeline that is loaded for it: what a rank does not need, it need not hold."""
    is_open = config.patches is not None and config.blocks is None
    return replace(config, blocks="freed") if is_open else config


def read(
    path: str | Path,
    config: ParallelConfig,
    rank: int,
    world: int,
    *,
    dtype: Dtypes = None,
    device: str = "cpu",
    **arguments: Any,
) -> Any:
    """The pipeline in the folder ``path`` with what ``rank`` needs of it; says nothing to the other ranks.

    `parallelize` takes it from there, with the same ``config`` and world.

    Raises:
        ConfigError: more weights than ``max_memory``, or see `holding`.
        UnsupportedModel: see `holding`.
        DistrifusionError: something does not load.
    """
    try:
        with _LOCK:
            return _read(Path(path), config, rank, Mesh.fit(config, world), dtype, device, arguments)
    except DistrifusionError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError ...: whatever part of it did not load
        reason = " ".join(str(error).split())
        raise DistrifusionError(f"{path} does not load: {type(error).__name__}: {reason}") from error


def _read(
    path: Path, config: ParallelConfig, rank: int, mesh: Mesh, dtype: Dtypes, device: str, arguments: dict[str, Any]
) -> Any:
    import diffusers

    readings = readings_of(path, config, mesh, dtype, arguments)
    if config.max_memory is not None:
        without = [name for name, part in arguments.items() if part is None]
        found = checkpoint.inspect(path, str(path), arguments.get("variant"), without)
        weights_budget(found, config, mesh, readings, dtype=dtype, device=device).check_weights()
    read = {each.name: each.fill(config, mesh, rank) for each in readings if each.model is not None}
    # diffusers maps safetensors and assigns the mapped tensors where the dtype is the file's own: ranks of one
    # machine then share the pages, and nothing is copied.
    pipeline = diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtype, **arguments, **read)
    for each in readings:
        part = getattr(pipeline, each.name, None)
        if isinstance(part, nn.Module):
            setattr(part, READ, each.line)
    return pipeline


def weights_budget(
    found: Checkpoint, config: ParallelConfig, mesh: Mesh, readings: list[Reading], *, dtype: Dtypes, device: str
) -> Budget:
    """What a rank has to hold whatever it does, of the rank that has the most.

    Args:
        found: the model.
        config: with ``max_memory``.
        mesh: of the ranks.
        readings: see `readings_of`.
        dtype: of the weights; None: the denoiser's files' own.
        device: of the ranks.
    """
    from .comm.shared import is_allowed

    assert isinstance(config.max_memory, int)
    of_all = dtype.get("default", torch.float32) if isinstance(dtype, Mapping) else dtype
    item = (of_all if of_all is not None else getattr(torch, found.dtype or "float32")).itemsize
    weights, share = found.num_weights * item, ""
    parted = [each for each in readings if each.model is not None]
    if parted:
        everyone = [sum(each.held_bytes(config, mesh, rank) for each in parted) for rank in range(mesh.world)]
        in_all = sum(each.num_bytes for each in parted)
        weights += max(everyone) - in_all
        most = everyone.index(max(everyone))
        share = f" on rank {most}, with {human_bytes(max(everyone))} of {human_bytes(in_all)} of the denoiser"
    is_cpu = device == "cpu"
    rings = shared_bytes(mesh, streams=config.patches is not None) if is_cpu and is_allowed() else 0
    return Budget(config.max_memory, weights, LIBRARIES if is_cpu else 0, rings, share=share)
