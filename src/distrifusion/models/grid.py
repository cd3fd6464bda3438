"""How the tokens of a transformer's call stand, and how that is read off its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedModel
from .table import Call


@dataclass(frozen=True)
class Grid:
    """How the tokens of a call's picture stand: ``frames`` x ``rows`` x ``cols``, and ``guests`` after them.

    Guests are tokens of further pictures to look at.
    """

    rows: int
    cols: int
    frames: int = 1
    guests: int = 0


def of_latent(model: Any, call: Call) -> Grid:
    """The grid of latents ``[B, C, H, W]`` in square patches.

    Raises:
        ConfigError: sides that are no multiples of the patch.
    """
    height, width = call.sample.shape[-2:]
    patch = int(model.config.patch_size)
    if height % patch or width % patch:
        raise ConfigError(f"a latent of {height} x {width} does not fit patches of {patch}: use multiples of {patch}")
    return Grid(height // patch, width // patch)


def of_positions(name: str) -> Callable[[Any, Call], Grid]:
    """The grid of latents that come as tokens with positions ``[tokens, axes]``, or ``[B, tokens, axes]``, by ``name``.

    Axis 0 tells pictures apart, axes 1 and 2 are row and column. The first picture is the one to be made. Positions are
    read once per tensor that holds them: on an accelerator the host waits for it.
    """

    def grid(model: Any, call: Call) -> Grid:
        ids = call.arguments[name]
        tokens = call.sample.shape[1]
        if ids.is_inference():  # no version tells whether it was written to
            return _read_positions(ids, tokens)
        known: tuple[int, int, Grid] | None = getattr(ids, _GRID, None)
        if known is None or known[:2] != (ids._version, tokens):
            known = ids._version, tokens, _read_positions(ids, tokens)
            setattr(ids, _GRID, known)
        return known[2]

    return grid


_GRID = "_distrifusion_grid"  # on positions: their version, the number of tokens, and the grid that was read off them


def _read_positions(ids: Tensor, num_tokens: int) -> Grid:
    places = (ids[0] if ids.ndim == 3 else ids)[:, :3].detach().to("cpu", torch.float64)
    is_own = (places[:, 0] == places[0, 0]).long().cumprod(0).bool()  # up to where another picture begins
    own = places[is_own]
    cols = int((own[:, 1] == own[0, 1]).long().cumprod(0).sum())  # in the first row
    rows = len(own) // cols
    raster = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).double() + own[0, 1:]
    # In the positions' own dtype, in which large ones may be rounded.
    if len(places) != num_tokens or not torch.equal(own[:, 1:], raster.to(ids.dtype).double()):
        raise UnsupportedModel(
            f"positions of {len(own)} of {num_tokens} tokens are not those of {rows} x {cols} in raster order: further "
            "pictures to look at are known where they come after the first one and differ from it in axis 0"
        )
    return Grid(rows, cols, guests=num_tokens - len(own))
