"""What a model exchanges, learned from one call of it on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..comm import Pending
from ..comm.base import Done
from ..config import ParallelConfig
from ..dataflow import Dataflow
from ..exchange import Recall
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
from ..models import sliced_layers, stream_layers, table_for
from ..moments import combine
from ..planner import Anatomy, Context, Conv, Crossing, Joint, Norm, Seam, Sums, Total, Upsampling
from .budget import Pretended
from .streamed import stages_of


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


def anatomy_of_stages(model: nn.Module, config: ParallelConfig, *args: Any, **kwargs: Any) -> Anatomy:
    """The same for ``strategy="pipelined"`` with ``patches`` and ``pipe``: what goes from stage to stage.

    Of the size of the call. Its blocks run as a whole once, and once for each patch.

    Raises:
        UnsupportedModel: as `parallelize`.
        ConfigError: fewer blocks than stages.
    """
    assert config.patches is not None
    assert config.pipe is not None
    table, holder = table_for(model), FrameHolder()
    call, dim = table.bind(args, kwargs), {"rows": 2, "cols": 3, "frames": 1}[config.split]
    batch, size, frames = call.sample.shape[0], table.size(call), table.third(call, 2)
    units, owners = stages_of(list(stream_layers(model, config.pipe, holder)), config.pipe)
    stages = dict(zip(units, owners, strict=True))
    whole = _Blocks(stages)
    with torch.no_grad(), whole.watched(), Dataflow() as flow:
        whole.flow = flow
        result = type(model).forward(model, **call.arguments)
        last_readers = whole.last_readers(flow.sources(result), config.pipe - 1)
    passes: list[_Blocks] = []
    levels = table.levels(*size, (1.0,) * config.patches, dim, frames)
    third, num_guests = table.third(call, dim), table.num_guests(call)
    with ExitStack() as attached, torch.no_grad():
        for layer in list(table.layers(holder)):
            layer.attach()
            attached.callback(layer.detach)
        for patch in range(config.patches):
            holder.frame = Frame(patch, dim, levels, Pretended(), third, num_guests)
            passes.append(_Blocks(stages))
            with passes[-1].watched():
                type(model).forward(model, **table.localise(call, holder.frame, fed=False).arguments)
    seams = [
        Crossing(link, tuple(each.made[name][1] // batch for each in passes), count // batch, item)
        for link in range(config.pipe - 1)
        for name, (stage, count, item) in whole.made.items()
        if stage <= link < last_readers.get(name, 0)
    ]
    alone = Frame(0, 2, table.levels(*size, (1.0,), 2, frames), _Noting([], batch), frames, num_guests)
    prediction = table.fold(result[0], call, alone)
    return Anatomy(tuple(seams), prediction.shape[1], prediction.element_size())


class _Blocks:
    """Notes what the blocks of stages make in one pass: by name the stage, how many numbers, bytes of one."""

    def __init__(self, stages: Mapping[nn.Module, int]) -> None:
        self._stages = stages
        self.made: dict[str, tuple[int, int, int]] = {}
        self.flow: Dataflow | None = None
        self._reads: list[tuple[int, frozenset[str]]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While the model runs."""
        with ExitStack() as hooked:
            for unit in self._stages:
                hooked.callback(unit.register_forward_pre_hook(self._read, with_kwargs=True).remove)
                hooked.callback(unit.register_forward_hook(self._note).remove)
            yield

    def last_readers(self, output: frozenset[str], last: int) -> dict[str, int]:
        """The last stage that reads a tensor, by its name; ``output`` is read by the ``last`` one."""
        found: dict[str, int] = {}
        for stage, names in [*self._reads, (last, output)]:
            found |= {name: max(stage, found.get(name, 0)) for name in names}
        return found

    def _read(self, unit: nn.Module, args: Any, kwargs: Any) -> None:
        if self.flow is not None:
            self._reads.append((self._stages[unit], self.flow.sources(args, kwargs)))

    def _note(self, unit: nn.Module, _: Any, output: Any) -> None:
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                name = str(len(self.made))
                self.made[name] = self._stages[unit], value.numel(), value.element_size()
                if self.flow is not None:
                    self.flow.mark(value, name)


class _Noting:
    """See Exchange: one patch, which has the whole picture. Notes what it is asked."""

    kind = "sync"
    sees_peers = True
    is_slow = False
    recall: Recall | None = None

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
        self,
        key: str,
        own: Sequence[Tensor],
        sizes: Sequence[int],
        dim: int,
        kind: str = "context",
        *,
        level: int | None = None,
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
