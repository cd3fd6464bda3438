"""Transformers a few channels wide with every feature of the real ones, and the arguments of a call for each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mould import Mould

torch.set_num_threads(1)  # ranks are threads: with more, they would fight over the cores


@dataclass(frozen=True)
class Tiny:
    """A class of transformers.

    ``arguments(batch, rows, cols)`` are those of one call, by name, for a picture of ``rows`` x ``cols`` tokens;
    ``latents`` is the name of the latents, ``guests`` the number of their tokens that are of further pictures.
    """

    build: Callable[[], nn.Module]
    arguments: Callable[[int, int, int], dict[str, Any]]
    latents: str = "hidden_states"
    guests: Callable[[int, int], int] = lambda rows, cols: 0


def noise(*shape: int, seed: int = 77) -> Tensor:
    """The same values for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


_LOCK = threading.RLock()  # a build may ask for another


@lru_cache
def _mould(build: Callable[[], nn.Module]) -> Mould:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build()
        for name, weight in model.named_parameters():
            # Zeros at the end of blocks (AdaLN) would hide what happens in them; and attention must tell tokens apart,
            # or a mix-up of patches would not show.
            scale = 1.5 / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 0.3
            weight.data = torch.randn_like(weight) * scale + (1.0 if weight.ndim == 1 and "norm" in name else 0.0)
    return Mould(model.eval().requires_grad_(False))


def build(tiny: Tiny) -> Any:
    """A new model with weights that are the same every time, also for ranks, which are threads with one generator."""
    with _LOCK:
        return _mould(tiny.build).cast()


def build_double(tiny: Tiny) -> Any:
    """The same in float64."""
    return build(tiny).double()


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments in float64, where they are in float32."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
        for name, value in arguments.items()
    }


def positions(rows: int, cols: int) -> Tensor:
    """Positions ``[rows * cols, 3]`` of image tokens."""
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, col], -1).view(-1, 3).float()
