"""ControlNets: half a U-Net beside the U-Net. Their outputs stay in patches, since only the U-Net reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn

from ..geometry import Levels
from ..layers import Frame, FrameHolder, Layer
from ..layers.conv import windows
from ..layers.stem import PatchStem
from .blocks import (
    Fingerprint,
    branches_share_batch,
    down_and_mid,
    downsampling_windows,
    levels_of,
    skip_levels,
    walk_over,
)
from .table import Call, bind
from .walk import Place, Walk, check_module, unsupported


class ControlNetTable:
    """``ControlNetModel``, alone or in a ``MultiControlNetModel``."""

    gathers = False
    has_window = True
    has_positions = False
    has_frames = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.fingerprint = Fingerprint(model)
        self._forward = type(model).forward

    def size(self, call: Call) -> tuple[int, int]:
        """See Table."""
        return call.sample.shape[2], call.sample.shape[3]

    def third(self, call: Call, dim: int) -> int:
        """See Table."""
        return 1

    def num_guests(self, call: Call) -> int:
        """See Table."""
        return 0

    def num_words(self, call: Call) -> int:
        """See Table."""
        return 0

    def levels(self, height: int, width: int, weights: tuple[float, ...], dim: int, frames: int = 1) -> Levels:
        """See Table."""
        return levels_of(self.model, height, width, weights, dim)

    def layers(self, holder: FrameHolder) -> Iterator[Layer]:
        """See Table."""
        model = self.model
        walk = walk_over(holder)
        yield from down_and_mid(model, walk)
        yield from _embedding(walk, model.controlnet_cond_embedding, "controlnet_cond_embedding")
        for i, (zero_conv, level) in enumerate(zip(model.controlnet_down_blocks, skip_levels(model), strict=True)):
            yield from walk(zero_conv, f"controlnet_down_blocks.{i}", Place(level, level))
        last = len(downsampling_windows(model)[0])
        yield from walk(model.controlnet_mid_block, "controlnet_mid_block", Place(last, last))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See Table."""
        return Call(bind(self._forward, self.model, args, kwargs))

    def conditioning(self, call: Call) -> Any:
        """See Table. With guess_mode the text is a new view of the same memory at every step."""
        return call.arguments.get("encoder_hidden_states"), call.arguments.get("controlnet_cond")

    def localise(self, call: Call, frame: Frame, *, fed: bool) -> Call:
        """See Table. Latents and condition image are read whole."""
        return call

    def fold(self, output: Tensor, call: Call, frame: Frame) -> Tensor:
        """See Table."""
        return output

    def unfold(self, whole: Tensor, like: Tensor) -> Tensor:
        """See Table."""
        return whole

    def finish(self, result: Any, frame: Frame) -> Any:
        """See Table. ``global_pool_conditions`` asks for means over the picture; the model has taken the patch's."""
        if not self.model.config.global_pool_conditions:
            return result
        *down, mid = self._pooled([*result[0], result[1]], frame)
        if isinstance(result, tuple):
            return down, mid
        return type(result)(down_block_res_samples=down, mid_block_res_sample=mid)

    def _pooled(self, means: list[Tensor], frame: Frame) -> list[Tensor]:
        """Means ``[B, C, 1, 1]`` over the picture from those over the own patch; one message."""
        levels = [*skip_levels(self.model), len(frame.levels.splits) - 1]
        rows = [frame.split(level).sizes for level in levels]
        # The mean of a patch without rows is NaN.
        sums = [
            mean.flatten(1).float() * size[frame.patch] if size[frame.patch] else mean.flatten(1).float().zero_()
            for mean, size in zip(means, rows, strict=True)
        ]
        own = torch.cat(sums, dim=1)[None]  # [1, B, all channels]
        num_patches = frame.levels.splits[0].num_patches
        # Statistics of the whole picture, as moments are: never coded.
        gathered = frame.exchange.gather("controlnet_pool", [own], [1] * num_patches, 0, kind="moments").wait()
        parts = [part for (part,) in gathered]
        total = torch.cat(parts).sum(0)
        present = [rank for rank, part in enumerate(parts) if len(part)]
        pooled = []
        for mean, size, part in zip(
            means, rows, torch.split(total, [mean.shape[1] for mean in means], dim=1), strict=True
        ):
            count = sum(size[rank] for rank in present)
            pooled.append((part / max(count, 1)).to(mean.dtype)[:, :, None, None])
        return pooled

    def unit(self, call: Call, *, fed: bool) -> int:
        """See Table."""
        return 1

    def needs_whole_batch(self, call: Call) -> bool:
        """See Table. In guess_mode the pipeline puts zeros for the other branch before what it gets."""
        return bool(call.arguments.get("guess_mode"))

    def splits_guidance(self) -> bool:
        """See Table."""
        return not branches_share_batch(self.model)


def fits(controlnet: Any, unet: Any) -> bool:
    """Whether ``controlnet`` is of a kind that has a table, and makes the patches that ``unet`` has."""
    return type(controlnet) is ControlNetModel and downsampling_windows(controlnet) == downsampling_windows(unet)


def _embedding(walk: Walk, module: Any, name: str) -> Iterator[Layer]:
    check_module(module, name)
    if type(module) is not ControlNetConditioningEmbedding:
        raise unsupported(module, name)
    stack = [module.conv_in, *module.blocks, module.conv_out]
    # With an adapter in it, a convolution is more than one; the stack then runs whole, which is always right.
    known = all(type(conv) is nn.Conv2d for conv in stack)
    pairs = [windows(conv, name=f"{name}.{i}") for i, conv in enumerate(stack)] if known else None
    yield PatchStem(module, name, walk.holder, windows=pairs)
