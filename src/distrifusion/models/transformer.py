"""Diffusion transformers: one table for all, which does what the plan of a class says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..geometry import Levels, Split
from ..layers import (
    Frame,
    FrameHolder,
    Layer,
    PatchArguments,
    PatchEntry,
    PatchExit,
    PatchLinearAttention,
    PatchPrompt,
    PatchSeam,
    PatchSides,
)
from ..layers.tokens import LATENTS, TOKENS, Tokens, Words, own_tokens
from .blocks import Fingerprint, walk_over
from .plan import Plan, matching
from .table import Call, bind
from .walk import Place as OnLevel
from .walk import check_module, unsupported


class TransformerTable:
    """See Table. ``plan`` knows the class of ``model``."""

    gathers = True
    has_window = False
    has_positions = True

    def __init__(self, model: Any, plan: Plan) -> None:
        self.model = model
        self.fingerprint = Fingerprint(model)
        self._plan = plan
        self.has_frames = plan.frames is not None
        self._forward = type(model).forward

    def size(self, call: Call) -> tuple[int, int]:
        """See Table."""
        grid, patch = self._plan.grid(self.model, call), self._plan.patch(self.model)
        return grid.rows * patch, grid.cols * patch

    def third(self, call: Call, dim: int) -> int:
        """See Table."""
        grid = self._plan.grid(self.model, call)
        return grid.rows if dim == 1 else grid.frames

    def num_guests(self, call: Call) -> int:
        """See Table."""
        return self._plan.grid(self.model, call).guests

    def num_words(self, call: Call) -> int:
        """See Table."""
        return 0 if self._plan.words is None else int(call.arguments[self._plan.words].shape[1])

    def levels(self, height: int, width: int, weights: tuple[float, ...], dim: int, frames: int = 1) -> Levels:
        """See Table. Level 0 is the latent's, level 1 that of its tokens."""
        patch = unit = self._plan.patch(self.model)
        along, across = (width, height) if dim == 3 else (height, width)
        num_rows, what = along // patch, "columns of tokens" if dim == 3 else "rows of tokens"
        if dim == 1:
            assert self._plan.frames is not None, "split='frames' is refused for pictures"
            num_rows, unit, what = frames, self._plan.frames.patch(self.model), "frames of tokens"
        tokens = Split.weighted(num_rows, weights, what=what)
        latents = Split(tuple(unit * bound for bound in tokens.bounds))
        return Levels((latents, tokens), (across, across // patch), (unit,))

    def layers(self, holder: FrameHolder) -> Iterator[Layer]:
        """See Table."""
        plan, used = self._plan, set[str]()
        walk = walk_over(holder)
        for method, cut in plan.methods.items():
            yield PatchEntry(self.model, method, holder, cut=cut, method=method)
        for name, module in self.model.named_modules():
            if module is self.model or id(module) in walk.seen:
                continue
            check_module(module, name)
            if (pattern := matching(name, plan.entries)) is not None:
                yield PatchEntry(module, name, holder, cut=plan.entries[pattern])
            elif (pattern := matching(name, plan.inputs)) is not None:
                yield PatchArguments(module, name, holder, cuts=plan.inputs[pattern])
            elif (pattern := matching(name, plan.seams)) is not None:
                yield PatchSeam(module, name, holder, place=plan.seams[pattern])
            elif (pattern := matching(name, plan.sums)) is not None:
                yield PatchLinearAttention(module, name, holder, processors=plan.sums[pattern])
            elif (pattern := matching(name, plan.sides)) is not None:
                yield PatchSides(module, name, holder)
            elif (pattern := matching(name, plan.convs)) is not None:
                yield from walk(module, name, OnLevel(TOKENS, TOKENS))  # of what an adapter has put around it, too
            elif name == plan.exit:
                pattern = name
                yield PatchExit(module, name, holder, tokens=plan.leaving)
            elif (pattern := matching(name, plan.prompts)) is not None:
                yield PatchPrompt(module, name, holder)
            elif hasattr(module, "processor") and matching(name, plan.texts) is None:
                raise unsupported(module, name, "is an attention that the plan of its model does not name")
            elif isinstance(module, _READS_BEYOND) and not any(name.startswith(entry) for entry in plan.entries):
                raise unsupported(module, name)
            used.add(pattern or "")
        missing = {*plan.entries, plan.exit} - used
        if missing:
            raise UnsupportedModel(f"{type(self.model).__name__} has no module {sorted(missing)[0]!r}")

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """See Table."""
        plan, arguments = self._plan, bind(self._forward, self.model, args, kwargs)
        call = Call(arguments, plan.sample, plan.lists, plan.several, plan.shared, plan.time)
        samples = call.arguments[self._plan.sample]
        if isinstance(samples, list | tuple):
            call = call.having(**{self._plan.sample: _stacked(samples)})
        for name in self._plan.unknown:
            if call.arguments.get(name) is not None:
                raise UnsupportedModel(f"{type(self.model).__name__} in patches takes no {name}; leave it out")
        return call

    def conditioning(self, call: Call) -> Any:
        """See Table."""
        given = [call.arguments.get(name) for name in self._plan.conditions]
        return tuple(part for each in given for part in (each if isinstance(each, list) else [each]))

    def localise(self, call: Call, frame: Frame, *, fed: bool) -> Call:
        """See Table. Tokens that come of the latents are cut by the entries, inside the model."""
        cut = {name: tokens for name, tokens in self._plan.cuts.items() if call.arguments.get(name) is not None}
        return call.having(**{name: _own(call.arguments[name], tokens, frame) for name, tokens in cut.items()})

    def fold(self, output: Any, call: Call, frame: Frame) -> Tensor:
        """See Table: of tokens ``[B, tokens, C]``, pictures ``[B, C, H, W]`` or videos ``[B, C, frames, H, W]``.

        Also of a list of one of the latter two for each picture of the batch.
        """
        whole: Tensor = torch.stack(output) if isinstance(output, list) else output
        split = frame.split(TOKENS)
        if whole.ndim == 3:
            image = whole[:, : sum(frame.num_tokens(TOKENS))]
            whole = torch.unflatten(image.transpose(1, 2), 2, frame.shape(TOKENS, split.size))
        if frame.dim == 1:
            whole = whole if self._has_frames_first(output) else whole.transpose(1, 2)
        elif whole.ndim == 5:
            whole = whole.flatten(1, 2)
        return frame.own(LATENTS, whole)

    def unfold(self, whole: Tensor, like: Any) -> Any:
        """See Table. What the model predicts for guests is left out, as pipelines have no use for it."""
        if isinstance(like, list):
            return list(self.unfold(whole, like[0][None]))
        if whole.ndim == 5:  # split by frames, which stand first here
            whole = (whole if self._has_frames_first(like) else whole.transpose(1, 2)).flatten(1, 2)
        if like.ndim == 3:
            return whole.flatten(2).view(len(whole), like.shape[2], -1).transpose(1, 2).contiguous()
        return torch.unflatten(whole, 1, like.shape[1:3]) if like.ndim == 5 else whole

    def _has_frames_first(self, output: Tensor) -> bool:
        """Whether the model's output is of ``[B, frames, C, H, W]``, and not of ``[B, C, frames, H, W]``."""
        return output.ndim == 5 and self._plan.frames is not None and self._plan.frames.dim == 1

    def finish(self, result: Any, frame: Frame) -> Any:
        """See Table."""
        return result

    def unit(self, call: Call, *, fed: bool) -> int:
        """See Table."""
        return self._plan.patch(self.model)

    def needs_whole_batch(self, call: Call) -> bool:
        """See Table."""
        return False

    def splits_guidance(self) -> bool:
        """See Table. PAG's processors expect all branches in one batch."""
        return not any("PAG" in type(getattr(each, "processor", None)).__name__ for each in self.model.modules())


def _own(value: Any, tokens: Tokens | Words, frame: Frame) -> Any:
    is_map = isinstance(value, Tensor) and isinstance(tokens, Tokens)
    is_for_all = is_map and (value.ndim <= tokens.dim or value.shape[tokens.dim] == 1)
    return value if is_for_all else own_tokens(value, tokens, frame)


_READS_BEYOND = (nn.modules.conv._ConvNd, nn.GroupNorm, nn.modules.pooling._AvgPoolNd, nn.modules.batchnorm._NormBase)


def _stacked(samples: Any) -> Tensor:
    if not all(isinstance(each, Tensor) and each.shape == samples[0].shape for each in samples):
        raise UnsupportedModel("in patches, the pictures of one call are tensors of one size")
    return torch.stack(list(samples))
