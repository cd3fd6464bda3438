"""What a model exchanges, learned from one call of it on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..comm import Pending
from ..comm.base import Done
from ..geometry import Halo, Split
from ..layers import (
    Frame,
    FrameHolder,
    JoinedSlice,
    Layer,
    PatchAttention,
    PatchConv,
    PatchLinearAttention,
    PatchUpsample,
    SlicedNorm,
    SummedSlice,
)
from ..layers.tokens import TOKENS
from ..models import sliced_layers, table_for
from ..moments import combine
from ..planner import Anatomy, Context, Conv, Joint, Norm, Seam, Sums, Total, Upsampling


def anatomy_of(model: nn.Module, *args: Any, **kwargs: Any) -> Anatomy:
    """The seams of a denoiser that is not parallel, from a call with these arguments.

    Seams have no size of the picture, so one call of a small one tells for all. U-Nets may be on the ``meta`` device,
    where nothing is computed.

    Raises:
        UnsupportedModel: as `parallelize`.
    """
    table, holder = table_for(model), FrameHolder()
    call = table.bind(args, kwargs)
    layers = list(table.layers(holder))
    noting = _Noting(layers, call.sample.shape[0])
    frame = Frame(
        0, 2, table.levels(*table.size(call), (1.0,), 2), noting, table.third(call, 2), table.num_guests(call)
    )
    # All of what the ranks would share out is this one's.
    num_words = table.num_words(call)
    frame.words = Split((0, num_words)) if num_words else None
    frame.guests = Split((0, frame.num_guests)) if frame.num_guests else None
    noting.frame = frame
    with ExitStack() as attached, torch.no_grad():
        for layer in layers:
            layer.attach()
            attached.callback(layer.detach)
            hook = noting.rows_of(layer)
            if hook is not None:
                attached.callback(layer.module.register_forward_pre_hook(hook).remove)
        own = table.localise(call, frame, fed=False)
        holder.frame = frame
        result = table.finish(type(model).forward(model, **own.arguments), frame)
        prediction = table.fold(result[0], own, frame)
    return Anatomy(tuple(noting.seams), prediction.shape[1], prediction.element_size())


def anatomy_of_slices(model: nn.Module, *args: Any, **kwargs: Any) -> Anatomy:
    """The same for ``strategy="tensor"``: what is added up, and joined, in a call with these arguments.

    Of their size. Models may be on the ``meta`` device, where nothing is computed.

    Raises:
        UnsupportedModel: as `parallelize`.
    """
    table = table_for(model)
    call = table.bind(args, kwargs)
    batch, item, seams = call.sample.shape[0], call.sample.element_size(), list[Seam]()

    def note(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            numbers = output.numel() // batch
            if isinstance(layer, JoinedSlice):
                seams.append(Joint(output.shape[1], numbers))
            elif isinstance(layer, SlicedNorm):  # the squares of a token, in float32
                seams.append(Total(numbers // output.shape[-1], 4))
            else:
                seams.append(Total(numbers, item))

        return hook

    with ExitStack() as hooked, torch.no_grad():
        for layer in sliced_layers(model, 0, 1, FrameHolder()):
            if isinstance(layer, SummedSlice | JoinedSlice | SlicedNorm):
                hooked.callback(layer.module.register_forward_hook(note(layer)).remove)
        result = type(model).forward(model, **call.arguments)
    levels = table.levels(*table.size(call), (1.0,), 2)
    frame = Frame(0, 2, levels, _Noting([], batch), table.third(call, 2), table.num_guests(call))
    prediction = table.fold(result[0], call, frame)
    return Anatomy(tuple(seams), prediction.shape[1], prediction.element_size())


class _Noting:
    """See Exchange: one patch, which has the whole picture. Notes what it is asked."""

    kind = "sync"
    sees_peers = True
    is_slow = False

    def __init__(self, layers: Sequence[Layer], batch: int) -> None:
        self.seams: list[Seam] = []
        self.frame: Frame | None = None
        self._layers = {layer.key: layer for layer in layers}
        self._batch = batch

    def rows_of(self, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...]], None] | None:
        """A hook for layers that read rows of their neighbours, which with one patch they have nobody to ask for."""
        if isinstance(layer, PatchConv) and not layer.reads_whole:
            level, level_out, windows = layer.level, layer.level_out, layer.windows
            return lambda _, args: self.seams.append(Conv(args[0].shape[1], level, level_out, windows))
        if isinstance(layer, PatchUpsample) and layer.module.interpolate:
            level, level_out = layer.level, layer.level_out
            return lambda _, args: self.seams.append(Upsampling(args[0].shape[1], level, level_out))
        return None

    def begin(self) -> None:
        """See Exchange."""

    def neighbours(
        self, key: str, patch: Tensor, plan: Halo, dim: int, kind: str = "halo"
    ) -> Pending[Mapping[int, Tensor]]:
        """See Exchange."""
        return Done({})

    def gather(
        self, key: str, own: Sequence[Tensor], sizes: Sequence[int], dim: int, kind: str = "context"
    ) -> Pending[list[Sequence[Tensor]]]:
        """See Exchange."""
        layer, shape = self._layers[key], tuple(own[0].shape)
        width = sum(part.shape[-1] for part in own)
        if isinstance(layer, PatchLinearAttention):
            self.seams.append(Sums((*shape[1:-1], width)))
        else:
            assert self.frame is not None, "set before the call"
            level, others = TOKENS, self._others(self.frame, shape[dim])
            if isinstance(layer, PatchAttention):
                level, others = layer.level, ()
            self.seams.append(Context(level, width, shape[1:dim], shape[dim + 1 : -1], self.frame.third, others))
        return Done([own])

    def _others(self, frame: Frame, num_tokens: int) -> tuple[int, ...]:
        """Guests, and words where they are among ``num_tokens`` that are exchanged."""
        num_words = num_tokens - frame.num_keys(TOKENS, has_words=False)[0] if frame.words is not None else 0
        return tuple(count for count in (num_words, frame.num_guests) if count)

    def moments(self, key: str, own: Tensor) -> Tensor:
        """See Exchange."""
        self.seams.append(Norm((own.numel() - 1) // 2 // self._batch))
        return combine([own])

    def finish(self) -> bool:
        """See Exchange."""
        return True
