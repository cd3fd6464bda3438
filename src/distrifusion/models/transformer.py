"""Diffusion transformers: one table for all, and a plan for each that says where its tokens are cut and exchanged.

Between its embedding and its last projection a transformer works on each token alone, but for attention. So a plan
names the modules after which tokens stand in a sequence (``entries``), the one after which they do not (``exit``), the
attentions over image tokens (``seams``, ``sums``), and how to read the size of the picture off a call. Plans are in
`plans`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModel
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
from ..layers.tokens import LATENTS, TOKENS, Cut, Place, Tokens, Words, own_tokens
from .blocks import Fingerprint, walk_over
from .table import Call, bind, check_module, unsupported
from .table import Place as OnLevel


@dataclass(frozen=True)
class Grid:
    """How the tokens of a call's picture stand: ``frames`` x ``rows`` x ``cols``, and ``guests`` after them.

    Guests are tokens of further pictures to look at.
    """

    rows: int
    cols: int
    frames: int = 1
    guests: int = 0


@dataclass(frozen=True)
class Frames:
    """Frames of a video's latents: ``patch`` of them behind a frame of tokens; along ``dim`` of latents of five."""

    patch: Callable[[Any], int]
    dim: int = 2


@dataclass(frozen=True)
class Plan:
    """What one class of transformers is made of. Module names are patterns, as of a shell; none reaches over a dot.

    Args:
        model: the class, exactly.
        names: models that have it, for people.
        seams: attentions over image tokens, in the order in which they run, and where these stand among the keys.
        grid: of a call's picture.
        entries: modules whose output holds the tokens of the whole picture, and how, or what cuts it.
        exit: the last module over tokens.
        leaving: how the output of ``exit`` holds them.
        methods: methods of the model, as ``entries``.
        inputs: modules that are given something about all tokens, or the text's, among their arguments by name.
        words: the argument ``[B, tokens, C]`` with the text whose tokens the ranks share out, where each is computed by
            itself but for the seams, so that `cuts`, `inputs` and `entries` can cut them; None: all ranks compute all.
        sample: the argument that holds the latents.
        time: the argument that holds the time of the step.
        lists: arguments that are lists with an item for each picture of the batch.
        several: arguments that hold several rows for each picture of the batch, one picture's after the other's.
        shared: arguments that are not of single pictures, and might be taken for it where there are as many of them.
        patch: rows of a latent behind a row of tokens; 1 where the latents come as tokens.
        frames: of a model of videos, how its latents hold them; None: it makes pictures.
        sums: linear attentions over image tokens, and the processors that may be theirs: see PatchLinearAttention.
        convs: convolutions over tokens in rows.
        sides: blocks that are told sizes of the picture in tokens: see PatchSides.
        cuts: arguments that hold the tokens of the whole picture, or are lists or tuples of such, and how. One without
            that dim, or of 1 there, is for all tokens and stays, such as a timestep. Or those of the text alone.
        texts: attentions that see no image token among their keys, or belong to the text alone.
        prompts: modules that read the text and nothing else, the same in every step: they run once per picture.
        conditions: arguments that stay the same in a picture and guidance branch.
        unknown: arguments that are refused when given.
    """

    model: type[nn.Module]
    names: tuple[str, ...]
    seams: Mapping[str, Place]
    grid: Callable[[Any, Call], Grid]
    entries: Mapping[str, Tokens | Cut] = field(default_factory=dict)
    exit: str = "proj_out"
    leaving: Tokens = field(default_factory=Tokens)
    methods: Mapping[str, Cut] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, Tokens | Words]] = field(default_factory=dict)
    words: str | None = None
    sample: str = "hidden_states"
    time: str = "timestep"
    lists: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    patch: Callable[[Any], int] = field(default=lambda model: int(model.config.patch_size))
    frames: Frames | None = None
    sums: Mapping[str, tuple[type, ...]] = field(default_factory=dict)
    convs: tuple[str, ...] = ()
    sides: tuple[str, ...] = ()
    cuts: Mapping[str, Tokens | Words] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ("encoder_hidden_states",)
    unknown: tuple[str, ...] = ()


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


def matching(name: str, patterns: Iterable[str]) -> str | None:
    """The pattern of as many parts as the name has: a ``*`` stands for one of them."""
    depth = name.count(".")
    return next((each for each in patterns if each.count(".") == depth and fnmatchcase(name, each)), None)


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


def _stacked(samples: Any) -> Tensor:
    if not all(isinstance(each, Tensor) and each.shape == samples[0].shape for each in samples):
        raise UnsupportedModel("in patches, the pictures of one call are tensors of one size")
    return torch.stack(list(samples))
