"""What does not go together, in one line that names the value. Each raises `ConfigError`."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, get_args

from ..errors import ConfigError
from ..forms import MEASURED, SHIFTS, one_of, quoted, whole
from .names import OF_SHIFTED, RECORDED, UNCODED, Blocks

if TYPE_CHECKING:
    from .parallel import ParallelConfig


def check_slices(config: ParallelConfig) -> None:
    """Refuse what is about patches where every rank has the whole picture."""
    if config.patch not in (None, 1):
        raise ConfigError(f"patch={config.patch} does not go with strategy='tensor', whose ranks share the weights")
    if config.balance is not None:
        raise ConfigError(
            f"balance={config.balance!r} is about rows and stages, which strategy='tensor' has not; leave it out"
        )


def check_stages(config: ParallelConfig) -> None:
    """Refuse what does not go with a model that is cut over its depth."""
    if config.strategy == "pipelined" and config.patches is not None and config.patch not in (None, 1):
        raise ConfigError(
            f"patch={config.patch} does not go with patches={config.patches}, which stream through stages of one rank "
            "each: leave one of them out"
        )
    whole("stride", config.stride, 1)
    if config.stride > 2:
        raise ConfigError(f"stride={config.stride} must be 1 or 2")
    if not isinstance(config.time_shift, bool):
        raise ConfigError(f"time_shift={config.time_shift!r} must be True or False")
    asked = ("pipe", config.pipe or 1, 1), ("stride", config.stride, 1), ("time_shift", config.time_shift, False)
    for name, value, plain in asked:
        if config.strategy != "pipelined" and value != plain:
            raise ConfigError(
                f"{name}={value} goes with strategy='pipelined' only, not with {config.strategy!r}; leave it out"
            )
    if config.time_shift and config.patches is not None:
        raise ConfigError(
            f"time_shift=True does not go with patches={config.patches}, which stream through stages that are all at "
            "one time step: leave one of them out"
        )
    if config.time_shift and config.pipe == 1:
        raise ConfigError("time_shift=True is about stages of several time steps: pipe must be at least 2")
    if config.stride == 1:
        return
    for name in ("patch", "patches"):
        if getattr(config, name) not in (None, 1) or (name == "patches" and config.patches is not None):
            raise ConfigError(
                f"stride={config.stride} does not go with {name}={getattr(config, name)}: it is for stages of one rank "
                "each, which compute the whole picture; leave one of them out"
            )
    if config.pipe == 1:
        raise ConfigError("stride=2 takes two ranks for the last stage: pipe must be at least 2")


def check_graphs(config: ParallelConfig) -> None:
    """Refuse what cannot be recorded."""
    if not isinstance(config.cuda_graphs, bool):
        raise ConfigError(f"cuda_graphs={config.cuda_graphs!r} must be True or False")
    if not config.cuda_graphs:
        return
    if config.strategy not in RECORDED:
        raise ConfigError(
            f"cuda_graphs=True is known for strategy={quoted(RECORDED)}, whose steps are alike, not for "
            f"{config.strategy!r}; leave it out"
        )
    for name in ("codec", "max_memory"):
        if getattr(config, name) is not None:
            raise ConfigError(f"cuda_graphs=True does not go with {name}={getattr(config, name)!r}: leave one out")


def check_streams(config: ParallelConfig) -> None:
    """Refuse patches that could not stream."""
    if config.patches is not None and config.strategy != "pipelined":
        raise ConfigError(
            f"patches={config.patches} goes with strategy='pipelined' only, not with {config.strategy!r}, where patch= "
            "is the number of ranks along the picture"
        )
    if config.blocks is not None:
        one_of("blocks", config.blocks, get_args(Blocks))
    if config.blocks == "freed" and config.patches is None:
        raise ConfigError(
            f"blocks={config.blocks!r} goes with strategy='pipelined' and patches only: without patches, each rank "
            "computes the first steps with all blocks"
        )
    if config.patches is not None and config.balance is not None:
        raise ConfigError(
            f"balance={config.balance!r} does not go with patches={config.patches}, where stages follow the size of "
            "the blocks: leave one of them out"
        )


def check_balance(config: ParallelConfig) -> None:
    """Refuse weights and measures of what there is not."""
    if config.balance == MEASURED and config.warmup_steps < 1:
        raise ConfigError(
            f"balance={MEASURED!r} with warmup_steps={config.warmup_steps} leaves no step to measure: "
            "warmup_steps must be at least 1"
        )
    if config.strategy == "pipelined" and config.weights is not None and config.patch in (None, 1):
        raise ConfigError(
            f"balance={config.balance!r} are weights of patches, which strategy='pipelined' has not without patch=: "
            f"leave it out, or choose {MEASURED!r}"
        )


def check_coded(config: ParallelConfig) -> None:
    """Refuse fewer bytes of what does not travel."""
    for name in ("codec", "context_window"):
        why = UNCODED.get(config.strategy)
        if why is not None and getattr(config, name) is not None:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} does nothing under strategy={config.strategy!r}, which {why}; "
                "leave it out"
            )


def check_topology(config: ParallelConfig) -> None:
    """Refuse ends that could not meet."""
    if config.topology != "plane" and config.strategy in ("pipelined", "tensor"):
        raise ConfigError(
            f"topology={config.topology!r} is known for patches and for one device, not for "
            f"strategy={config.strategy!r}"
        )


def check_shifted(config: ParallelConfig) -> None:
    """Refuse moves that are none, and moves of patches that stand still."""
    if config.shift is not None and (
        isinstance(config.shift, bool)
        or not (config.shift in SHIFTS or isinstance(config.shift, int))
        or (isinstance(config.shift, int) and config.shift < 0)
    ):
        raise ConfigError(f"shift={config.shift!r} must be one of {quoted(SHIFTS)}, or a number of rows")
    whole("shift_seed", config.shift_seed, 0)
    whole("overlap", config.overlap, 0)
    if not isinstance(config.remember, bool):
        raise ConfigError(f"remember={config.remember!r} must be True or False")
    if config.strategy == "shifted" and config.split == "frames":
        raise ConfigError("split='frames' is not for strategy='shifted', whose borders move over a picture")
    if config.strategy != "shifted":
        for field in fields(config):
            value = getattr(config, field.name)
            if field.name in OF_SHIFTED and value != field.default:
                raise ConfigError(
                    f"{field.name}={value!r} does nothing under strategy={config.strategy!r}, only under 'shifted'; "
                    "leave it out"
                )
