"""Layers for what several families put around their convolutions: doubling, and zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...layers import Layer, PatchInterpolate, PatchPad
from ..walk import Place, Walk, unsupported


def interpolate(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    """The rule of interpolation by two."""
    factor = module.scale_factor
    factors = factor if isinstance(factor, tuple) else (factor, factor)
    # The two kinds of nearest are the same where it doubles.
    if module.mode not in ("nearest", "nearest-exact") or factors != (2, 2):
        raise unsupported(
            module, name, f"with mode={module.mode!r} scale_factor={factor} is not known, only nearest by 2"
        )
    yield PatchInterpolate(module, name, walk.holder, level=place.level, level_out=place.level_out)


def pad(walk: Walk, module: Any, name: str, place: Place) -> Iterator[Layer]:
    """The rule of zeros around a convolution."""
    yield PatchPad(module, name, walk.holder)
