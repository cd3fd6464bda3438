"""One step whose patches stream: the model's forward, once for each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..geometry import Levels, Split
from ..layers import Frame, FrameHolder
from ..layers.rows import own_rows
from ..layers.tokens import TOKENS
from ..models import Call, Table
from ..stream import Back, Pass
from .base import State
from .guidance import Guidance
from .patches import Ending, Once, Patches
from .streamed import Streamed

_WAITS = "steps wait for each other"


@dataclass(frozen=True)
class Flow:
    """What the passes of one step gave on this rank."""

    result: Any  # of the model, in the last pass
    own: Tensor  # [B, C, rows, W] of the whole picture; only the last rank's holds the prediction
    levels: Levels  # of the patches
    kind: str
    coming: Any = None  # the prediction of the whole batch, where its patches are on their way to all ranks
    note: str | None = None  # what the report is to say


class Streaming:
    """Runs the steps of `Streamed`: the model's forward once for each patch.

    Args:
        strategy: says which steps are whole.
        table: of the model.
        num_patches: of the picture.
        holder: of the frames.
        dim: along which the picture is cut, see Frame.
        guidance: the ranks of this branch, in order of their stages.
    """

    def __init__(
        self,
        strategy: Streamed,
        table: Table,
        num_patches: int,
        holder: FrameHolder,
        dim: int,
        guidance: Guidance,
    ) -> None:
        self._strategy, self._table, self._holder = strategy, table, holder
        self._num_patches, self._dim = num_patches, dim
        self._guidance = guidance
        self._ending = Ending()

    def start(self) -> None:
        """Begin a picture."""
        self._ending = Ending()

    def output_split(self, size: int) -> Split:
        """Who has which of the prediction's ``size`` rows: the last rank has all."""
        return Split((*[0] * self._guidance.patches.world, size))

    def step(self, call: Call, own_call: Call, state: State, model: Callable[..., Any], *, is_last: bool) -> Flow:
        """One step of ``own_call``, this rank's part of the batch of ``call``.

        ``is_last``: everybody is to have the whole prediction at once, since nobody steps on a patch of it.

        Raises:
            ConfigError: more patches than rows of tokens.
        """
        assert state.course is not None
        links = state.course.links
        was_over, self._ending.is_over = self._ending.is_over, self._ending.is_over or is_last
        is_whole, num_patches = self._strategy.is_whole(state), self._num_patches
        levels = self._levels(own_call, 1 if is_whole else num_patches)
        tokens = self._levels(own_call, num_patches).splits[TOKENS]
        table, shares = self._table, [len(share) for share in self._guidance.shares(call.sample.shape[0])]
        third, num_guests = table.third(own_call, self._dim), table.num_guests(own_call)
        is_open = not is_whole and not is_last and sum(shares) == call.sample.shape[0]
        latents = _Latents(own_call, None if is_whole else state.course.layout)

        def cut(x: Tensor, dim: int) -> list[Tensor]:
            shape = self._holder.now().shape(TOKENS, tokens.size)
            x, along = torch.unflatten(x, dim, shape), dim + self._dim - 1
            return [own_rows(x, tokens, patch, along).flatten(dim, dim + 2) for patch in range(num_patches)]

        links.is_broken = True  # until the step has ended
        own: list[Tensor] = []
        coming: list[Back.Coming] = []
        patches: list[int | None] = [None] if is_whole else list(range(num_patches))
        for patch, following in zip(patches, [*patches[1:], None], strict=True):
            keeps = self._strategy.is_last_whole(state)
            policy = Pass(state.course, patch, tokens, cut, keeps=keeps, following=following)
            frame = Frame(
                patch or 0, self._dim, levels, policy, third, num_guests, memory=state.memory, asks_always=is_whole
            )
            self._holder.frame = frame
            policy.begin()
            result = policy.run(model, **table.localise(latents.call(patch), frame, fed=False).arguments)
            own.append(table.fold(result[0], own_call, frame))
            is_open = is_open and self._is_contiguous(result[0], third)
            if is_open:
                coming.append(links.back.launch(own[-1], shares))
                state.course.note(coming[-1], num_patches)
        # Some wires move a large message only while its sender waits for it: not to be left to the next step.
        links.drain()
        links.is_broken = False
        whole = own[0] if is_whole else torch.cat(own, self._dim)
        kind, note = policy.kind, None if was_over else latents.note
        if not is_open:
            state.course.layout = None
            if not is_whole and not is_last and num_patches > 1:
                note = f"{_WAITS}: the predictions of this call come as a whole"
            return Flow(result, whole, levels, kind, note=note)
        is_list = isinstance(result[0], list)
        made = self._made(result[0][0][None] if is_list else result[0], own, coming, sum(shares))
        state.course.layout = made.cut
        return Flow(result, whole, levels, kind, list(made.unbind()) if is_list else made, note)

    def _is_contiguous(self, output: Any, third: int) -> bool:
        """Whether the patches of a prediction lie one after the other along a dim of it."""
        if self._num_patches == 1:
            return False
        return isinstance(output, list) or output.ndim > 3 or self._dim == 1 or (self._dim == 2 and third == 1)

    def _made(self, like: Tensor, own: list[Tensor], coming: list[Back.Coming], batch: int) -> Patches:
        """The prediction of the whole batch in the form of ``like``, of patches that are under way."""
        table = self._table
        shapes = [table.unfold(part, like).shape for part in own]
        dim = next(i for i in range(1, like.ndim) if shapes[0][i] != like.shape[i]) - like.ndim
        split = Split((0, *accumulate(shape[dim] for shape in shapes)))
        shape = list(like.shape)
        shape[0], shape[dim] = batch, split.size
        parts = [Once(lambda each=each: table.unfold(each.wait(), like)) for each in coming]  # type: ignore[misc]
        return Patches(
            torch.empty(shape, dtype=like.dtype, device="meta"), parts, split, dim, like.device, self._ending
        )

    def _levels(self, call: Call, num_patches: int) -> Levels:
        table, size, frames = self._table, self._table.size(call), self._table.third(call, 2)
        tokens = table.levels(*size, (1.0,), self._dim, frames).splits[TOKENS]
        if tokens.size < num_patches:
            what = {1: "frames", 2: "rows", 3: "columns"}[self._dim]
            raise ConfigError(
                f"patches={num_patches} are more than the {tokens.size} {what} of tokens of this picture: "
                f"patches={tokens.size} is the most"
            )
        return table.levels(*size, (1.0,) * num_patches, self._dim, frames)


class _Latents:
    """The latents of a call, as a model can read them: whole, or one patch of them and zeros."""

    def __init__(self, call: Call, layout: tuple[Split, int] | None) -> None:
        sample = call.sample
        self._coming: Patches | None = None
        if isinstance(sample, Patches) and layout is not None and sample.is_open and sample.cut == layout:
            self._coming = sample
        self.note: str | None = None
        if layout is not None and self._coming is None:
            self.note = f"{_WAITS}: the latents are asked for as a whole between them"
        others = {name: value for name, value in call.arguments.items() if value is not self._coming}
        self._call = call.having(**{name: v.whole() for name, v in others.items() if isinstance(v, Patches)})

    def call(self, patch: int | None) -> Call:
        """For one patch, whose latents alone are waited for."""
        if self._coming is None or patch is None:
            return self._call
        coming, plain = self._coming, torch.zeros_like(self._coming)
        split, dim = coming.cut
        span = split.span(patch)
        plain.narrow(dim, span.start, len(span)).copy_(coming.part(patch))
        return self._call.having(**{self._call.sample_name: plain})
