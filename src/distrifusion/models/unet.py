"""The U-Nets of diffusers: which level each module works on, and how their arguments are cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from ..errors import ConfigError
from ..geometry import Levels
from ..layers import Frame, FrameHolder, Layer
from .blocks import (
    Fingerprint,
    block,
    branches_share_batch,
    down_and_mid,
    downsampling_windows,
    levels_of,
    skip_levels,
    walk_over,
)
from .table import Call, bind, own_part, residual_part
from .walk import Place, unsupported


class UNetTable:
    """``UNet2DConditionModel`` and ``UNet2DModel``."""

    gathers = True
    has_window = True
    has_positions = False
    has_frames = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.fingerprint = Fingerprint(model)
        self._forward = type(model).forward
        self._is_conditional = isinstance(model, UNet2DConditionModel)
        upsamplers = [up for block in model.up_blocks for up in getattr(block, "upsamplers", None) or ()]
        # Only Upsample2D is told the size to reach; the other upsamplers double, whatever the skip connection has.
        self._only_doubles = not self._is_conditional or any(isinstance(up, ResnetBlock2D) for up in upsamplers)

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
        unit = 2 ** len(downsampling_windows(self.model)[0])
        if self._only_doubles and (height % unit or width % unit):
            raise ConfigError(
                f"a latent of {height} x {width} does not fit this model: both must be multiples of {unit}"
            )
        return levels_of(self.model, height, width, weights, dim)

    def layers(self, holder: FrameHolder) -> Iterator[Layer]:
        """See Table."""
        model = self.model
        walk = walk_over(holder)
        yield from down_and_mid(model, walk)
        level = len(downsampling_windows(model)[0])
        for i, up_block in enumerate(model.up_blocks):
            if all(getattr(up_block, name, None) for name in ("s1", "s2", "b1", "b2")):
                why = "has FreeU on, a Fourier filter over the picture; call disable_freeu()"
                raise unsupported(up_block, f"up_blocks.{i}", why)
            level = yield from block(walk, up_block, f"up_blocks.{i}", level, "upsamplers", -1)
        if model.conv_norm_out is not None:
            yield from walk(model.conv_norm_out, "conv_norm_out", Place(0, 0))
            yield from walk(model.conv_act, "conv_act", Place(0, 0))
        yield from walk(model.conv_out, "conv_out", Place(0, 0))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See Table."""
        return Call(bind(self._forward, self.model, args, kwargs))

    def conditioning(self, call: Call) -> Any:
        """See Table."""
        return call.arguments.get("encoder_hidden_states" if self._is_conditional else "class_labels")

    def localise(self, call: Call, frame: Frame, *, fed: bool) -> Call:
        """See Table."""
        changes: dict[str, Any] = {}
        mid = call.arguments.get("mid_block_additional_residual")
        down = call.arguments.get("down_block_additional_residuals")
        if mid is not None:
            changes["mid_block_additional_residual"] = residual_part(mid, frame, len(frame.levels.splits) - 1, fed)
        if down is not None and mid is not None:
            levels = skip_levels(self.model)
            changes["down_block_additional_residuals"] = tuple(
                residual_part(residual, frame, level, fed) for residual, level in zip(down, levels, strict=False)
            )
        elif down is not None:  # the old way to pass a T2I-Adapter's features
            changes["down_block_additional_residuals"] = [own_part(residual, frame) for residual in down]
        adapter = call.arguments.get("down_intrablock_additional_residuals")
        if adapter is not None:
            changes["down_intrablock_additional_residuals"] = [own_part(residual, frame) for residual in adapter]
        return call.having(**changes)

    def fold(self, output: Tensor, call: Call, frame: Frame) -> Tensor:
        """See Table."""
        return output

    def unfold(self, whole: Tensor, like: Tensor) -> Tensor:
        """See Table."""
        return whole

    def finish(self, result: Any, frame: Frame) -> Any:
        """See Table."""
        return result

    def unit(self, call: Call, *, fed: bool) -> int:
        """See Table. Whole feature maps of deep levels can only be cut where these have a row."""
        maps = ("mid_block_additional_residual", "down_block_additional_residuals")
        has_whole = not fed and any(call.arguments.get(name) is not None for name in maps)
        has_whole = has_whole or call.arguments.get("down_intrablock_additional_residuals") is not None
        return 2 ** len(downsampling_windows(self.model)[0]) if has_whole else 1

    def needs_whole_batch(self, call: Call) -> bool:
        """See Table."""
        return False

    def splits_guidance(self) -> bool:
        """See Table."""
        return not (self._is_conditional and branches_share_batch(self.model))


FAMILIES = (UNet2DConditionModel, UNet2DModel)
