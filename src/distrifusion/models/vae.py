"""Autoencoders: an encoder and a decoder, each a program of its own that reads a whole picture and makes own rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from ..errors import ConfigError
from ..geometry import Levels
from ..layers import FrameHolder, Layer
from .blocks import walk_over
from .vaes import CONTAINERS, LOCAL, PLANS, SEAMS
from .vaes.plan import Plan, Tail


@dataclass(frozen=True)
class Half:
    """The encoder or the decoder of a VAE. Level 0 is that of the pixels; an encoder goes down, a decoder up."""

    kind: Literal["encode", "decode"]
    vae: Any
    module: Any
    plan: Plan

    @property
    def is_tiled(self) -> bool:
        """Whether the user has asked for tiles, so that a call may be about one of them."""
        return bool(getattr(self.vae, "use_tiling", False))

    @property
    def input_name(self) -> str:
        """What its forward calls the sample."""
        return list(inspect.signature(type(self.module).forward).parameters)[1]

    def levels(self, sample: Tensor, num_patches: int, dim: int, rings: tuple[bool, bool] = (False, False)) -> Levels:
        """The splits of a call with ``sample`` ``[B, C, (frames,) H, W]`` along ``dim`` (2 rows, 3 cols).

        ``rings``: whether rows, and whether columns, go around the picture.

        Patches are even in pixels, where the time goes, so that a patch of a small picture may have no row of latent.

        Raises:
            ConfigError: a picture too small for the encoder, or with fewer rows of pixels than patches.
        """
        pairs = self.plan.windows(self.module)
        scale = 1 if self.kind == "encode" else 2 ** len(pairs)
        height, width = scale * sample.shape[-2], scale * sample.shape[-1]
        rows, cols = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        size = height if dim == 2 else width
        if size < num_patches:
            what = "rows" if dim == 2 else "columns"
            raise ConfigError(
                f"{size} {what} of pixels cannot be split over {num_patches} ranks: the largest world for this picture "
                f"is {size}"
            )
        even = (1.0,) * num_patches
        if dim == 2:
            levels = Levels.down(height, width, even, rows, cols)
        else:
            levels = Levels.down(width, height, even, cols, rows)
        return levels.with_rings(*rings, dim)

    def level_out(self, levels: Levels) -> int:
        """The level of what it makes."""
        return len(levels.splits) - 1 if self.kind == "encode" else 0

    def layers(self, holder: FrameHolder) -> Iterator[Layer]:
        """The patch layers as the module is now, in order, not attached.

        Raises:
            UnsupportedModel: a module that may read beyond its rows and is not known.
        """
        walk = replace(walk_over(holder), known_seams=SEAMS, containers=CONTAINERS, local=LOCAL)
        yield from self.plan.layers(walk, self.module, len(self.plan.windows(self.module)))

    def without_past(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of its forward; where the sample is a picture alone, without room for what a next frame reads.

        A video's VAE calls its halves with some frames at a time, which are views of all; only of tiles they are not.
        What it keeps of them, the input of each convolution, takes as much memory as the work itself.
        """
        sample = arguments[self.input_name]
        is_alone = not self.is_tiled and sample.untyped_storage().nbytes() == sample.nbytes
        if arguments.get("feat_cache") is None or not is_alone:
            return arguments
        return {**arguments, "feat_cache": None}

    def num_calls(self, arguments: dict[str, Any]) -> int:
        """In how many calls of as many frames as this one the VAE goes through a video, about; see `without_past`."""
        sample: Tensor = arguments[self.input_name]
        return -(-sample.untyped_storage().nbytes() // max(sample.nbytes, 1))

    def tail(self) -> Tail | None:
        """What may be computed in bands of rows; None: nothing of this half is known to."""
        return self.plan.tail(self.module) if self.plan.tail is not None else None


def halves(vae: Any) -> tuple[Half, ...]:
    """Encoder and decoder, whichever the VAE still has; its class is in `PLANS`."""
    encoder, decoder = PLANS[type(vae)]
    both = (
        Half("encode", vae, getattr(vae, "encoder", None), encoder),
        Half("decode", vae, getattr(vae, "decoder", None), decoder),
    )
    return tuple(half for half in both if half.module is not None)
