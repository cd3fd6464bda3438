"""torchrun's variables, the device of a rank and its backend, checked before anything starts."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..errors import ConfigError

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}


@dataclass(frozen=True)
class Launched:
    """How torchrun started this process."""

    rank: int
    world: int
    local_rank: int | None  # None: not given
    address: str  # of rank 0, as host:port


def read_environment() -> Launched | None:
    """What torchrun's variables say; None outside torchrun (no RANK and no WORLD_SIZE).

    Raises:
        ConfigError: a variable that is missing, is not a number, or does not fit the others.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if not os.environ.get(name)]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be set beside the others of {', '.join(wanted)}: use torchrun")
    rank, world, port = _number("RANK"), _number("WORLD_SIZE"), _number("MASTER_PORT")
    if rank >= world:
        raise ConfigError(f"RANK={rank} must be below WORLD_SIZE={world}")
    local_rank = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else None
    return Launched(rank, world, local_rank, f"{os.environ['MASTER_ADDR']}:{port}")


def pick_device(device_type: str | None, launched: Launched) -> torch.device:
    """The device of this rank, made current; LOCAL_RANK is its index.

    ``device_type`` None takes an accelerator if there is one, else the CPU.

    Raises:
        ConfigError: no such device here, or fewer than LOCAL_RANK asks for.
    """
    if device_type is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device_type = found.type if found is not None else "cpu"
    if device_type == "cpu":
        return torch.device("cpu")
    if launched.local_rank is None and launched.world > 1:
        raise ConfigError(f"LOCAL_RANK must be set: it picks this rank's {device_type} device; use torchrun")
    index = launched.local_rank or 0
    count = num_devices(device_type)
    if index >= count:
        raise ConfigError(
            f"LOCAL_RANK={index} needs {index + 1} {device_type} devices on this machine, which has {count}: "
            f"start at most {count} ranks here"
        )
    torch.get_device_module(device_type).set_device(index)
    return torch.device(device_type, index)


def num_devices(device_type: str) -> int:
    """Devices of one accelerator type that this process sees.

    Raises:
        ConfigError: torch here knows no such type, or sees none.
    """
    try:
        module = torch.get_device_module(device_type)
        count = int(module.device_count()) if module.is_available() else 0
    except (RuntimeError, AttributeError):
        count = 0
    if count == 0:
        raise ConfigError(
            f"device={device_type!r} is not on this machine; use 'cpu', or a torch built for {device_type}"
        )
    return count


def device_of(group: dist.ProcessGroup | None, device_type: str | None) -> torch.device:
    """The device whose tensors ``group`` carries here.

    Raises:
        ConfigError: its backend does not carry that type.
    """
    backends = dict(item.split(":") for item in dist.get_backend_config(group).split(","))
    carried = [kind for kind, backend in backends.items() if kind == "cpu" or backend == BACKENDS.get(kind)]
    if device_type is None:
        device_type = next(
            (kind for kind in carried if kind != "cpu" and torch.get_device_module(kind).is_available()), "cpu"
        )
    if device_type == "cpu":
        return torch.device("cpu")
    if device_type not in carried:
        raise ConfigError(
            f"the process group ({dist.get_backend_config(group)}) does not carry {device_type!r} tensors; "
            f"known are {', '.join(f'{kind} over {backend}' for kind, backend in BACKENDS.items())}"
        )
    num_devices(device_type)
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def backend_of(device_type: str) -> str:
    """The backend of torch.distributed for tensors of one device type.

    Raises:
        ConfigError: an unknown type, or a torch built without its backend.
    """
    if device_type not in BACKENDS:
        raise ConfigError(f"device={device_type!r} must be one of {', '.join(map(repr, BACKENDS))}")
    backend = BACKENDS[device_type]
    if not dist.is_available() or not dist.is_backend_available(backend):
        raise ConfigError(f"this build of torch has no {backend}, which {device_type!r} ranks talk through")
    return backend


def _number(name: str) -> int:
    text = os.environ[name].strip()
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"{name}={text!r} must be a whole number of at least 0")
    return int(text)
