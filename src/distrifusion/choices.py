"""What the user chose, checked and completed before a process starts."""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Collection, Iterable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint
from .config import ParallelConfig
from .errors import ConfigError, UnsupportedModel
from .geometry import Split
from .mesh import Mesh
from .painter import Request

if TYPE_CHECKING:
    import torch

DEVICES = ("cpu", "cuda", "xpu")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def check_device(device: str, *, cuda_graphs: bool = False) -> None:
    """Whether ``device`` is a kind of device, and one that has ``cuda_graphs`` where they are asked for.

    Raises:
        ConfigError: it is not.
    """
    if device not in DEVICES:
        raise ConfigError(
            f"device={device!r} must be one of {', '.join(map(repr, DEVICES))}: the rank picks its number"
        )
    if cuda_graphs and device != "cuda":
        raise ConfigError(f"cuda_graphs=True needs device='cuda', not {device!r}: leave one of them out")


def check_size(found: Checkpoint, config: ParallelConfig, mesh: Mesh, height: int | None, width: int | None) -> None:
    """Whether a picture of this size (None: the model's own) can be spread over ``mesh``.

    Raises:
        ConfigError: a size the model cannot take, or fewer rows of latent or tokens than ranks, or than patches that
            stream; says what would fit.
        UnsupportedModel: a split by frames of pictures, or patches that stream through a U-Net.
    """
    size = found.latent_size(height, width)
    if config.split == "frames" and not found.sizes.is_video:
        raise UnsupportedModel(
            f"split='frames' is for models of videos, and {found.pipeline} makes pictures: use 'rows' or 'cols'"
        )
    streams = config.patches is not None and mesh.size("pipe") > 1
    if streams and found.denoiser == "unet":
        raise UnsupportedModel(
            f"patches={config.patches} of strategy='pipelined' are for transformers, not for the U-Net of "
            f"{found.pipeline}: leave patches out"
        )
    if size is not None:
        num_rows, patch = size[0] if config.split == "rows" else size[1], found.sizes.patch
        Split.even(num_rows // patch, mesh.size("patch"), what="rows of latent" if patch == 1 else "rows of tokens")
        if streams and num_rows // patch < (config.patches or 1):
            raise ConfigError(
                f"patches={config.patches} are more than the {num_rows // patch} {config.split} of tokens of this "
                f"picture: patches={num_rows // patch} is the most"
            )


def num_workers(config: ParallelConfig, nproc: int | None, device: str) -> int:
    """The number of workers, see `Engine`.

    Raises:
        ConfigError: no whole number, or more than there are devices.
    """
    if nproc is not None and (isinstance(nproc, bool) or not isinstance(nproc, int) or nproc < 1):
        raise ConfigError(f"nproc={nproc!r} must be a whole number of at least 1")
    patch = config.patch or (len(config.weights) if config.weights else None)
    axis = config.pipe if config.strategy == "pipelined" else patch  # which else takes all ranks that there are
    least = config.cfg * (config.pipe or 1) * (patch or 1)
    if device == "cpu":
        return nproc if nproc is not None else least
    import torch

    num_devices: int = getattr(torch, device).device_count()
    wanted = nproc or (least if axis is not None else max(num_devices // least, 1) * least)
    if num_devices < wanted:
        raise ConfigError(
            f"{wanted} workers need as many {device} devices, and this machine has {num_devices}: take fewer, "
            "or device='cpu'"
        )
    return wanted


def stagings(**choices: Iterable[Any]) -> list[dict[str, Any]]:
    """The settings of ``pipelined`` that ``choices`` give, values by name: their product, each once.

    What does not go together is left out of it.

    Raises:
        ConfigError: a value that cannot be, or that goes with none of the others.
    """
    found: list[dict[str, Any]] = []
    refused: dict[tuple[str, Any], ConfigError] = {}
    for values in product(*(dict.fromkeys(each) for each in choices.values())):
        given = dict(zip(choices, values, strict=True))
        try:
            ParallelConfig(strategy="pipelined", **given)
        except ConfigError as error:
            for item in given.items():
                refused.setdefault(item, error)
        else:
            found.append(given)
    for (name, value), why in refused.items():
        if all(given[name] != value for given in found):
            raise why
    return found


def check_staged(strategies: Collection[str], options: Mapping[str, Any]) -> None:
    """Whether ``options`` of the command line that are about ``pipelined``, values by name, are given beside it.

    Raises:
        ConfigError: they are not.
    """
    for option, given in options.items():
        if given and "pipelined" not in strategies:
            raise ConfigError(f"{option} is of strategy='pipelined': give --strategy pipelined too, or leave it out")


def dtype_name(dtype: str | torch.dtype | None, device: str, found: Checkpoint) -> str | None:
    """torch's name of ``dtype``, see `Engine`.

    Raises:
        ConfigError: an unknown name.
    """
    if dtype is None:
        return "float32" if device == "cpu" else found.dtype
    name = str(dtype).removeprefix("torch.")
    name = DTYPES.get(name, name)
    if name not in DTYPES.values():
        raise ConfigError(f"dtype={str(dtype)!r} must be one of {', '.join(map(repr, DTYPES))}")
    return name


def make_request(
    seed: int | None, arguments: Mapping[str, Any], default_size: tuple[int, int] | None = None
) -> Request:
    """The request with a seed for sure, and without the arguments that are None.

    Where only one of height and width is given, the other comes from ``default_size``: SD's pipelines would drop the
    given one.

    Raises:
        ConfigError: a seed or number of steps that cannot be, or an argument that cannot travel.
    """
    if seed is None:
        seed = secrets.randbits(32)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1")
    for name in ("num_inference_steps", "num_images_per_prompt"):
        value = arguments.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name.replace('num_inference_', '')}={value!r} must be a whole number of at least 1")
    given = {name: value for name, value in arguments.items() if value is not None}
    if default_size is not None and ("height" in given) != ("width" in given):
        given = {"height": default_size[0], "width": default_size[1], **given}
    try:
        pickle.dumps(given)
    except Exception as error:  # pickle raises what the objects raise
        raise ConfigError(f"an argument cannot travel to the workers: {error}") from error
    return Request(seed, given)
