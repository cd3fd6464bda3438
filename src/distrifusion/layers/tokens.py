"""Transformers over image tokens: where the tokens of a picture are cut to own rows, and where they are whole again.

Tokens stand in raster order, frame by frame; text, or whatever else is not of the picture, may stand before or after
them in one tensor. It stays whole on every rank, or the ranks share it out (`Frame.words`, `Frame.guests`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..exchange import concatenated
from .base import Frame, FrameHolder, Layer
from .rows import own_rows, put_rows

LATENTS, TOKENS = 0, 1
"""Levels of a transformer: rows of the latent, and rows of tokens, each of which is ``patch_size`` rows of it."""

Place = Literal["first", "last", "ragged"]
"""Where image tokens stand. ``"last"`` is before the frame's own guests; ``"ragged"`` after the text of each sample,
where the frame says, with padding after them."""

PLACES: tuple[Place, ...] = get_args(Place)

Cut = Callable[[Any, Frame], Any]
"""What a module or method returned about the whole picture -> the same for the frame's patch."""


@dataclass(frozen=True)
class Tokens:
    """How a tensor holds image tokens: along ``dim``, and where among the rest there.

    ``is_map``: they stand not in one dim but in three, frames, rows and columns, of which ``dim`` is the first.
    """

    dim: int = 1
    place: Place = "last"
    is_map: bool = False

    def parts(
        self, x: Tensor, num_tokens: int, frame: Frame, num_guests: int | None = None
    ) -> tuple[Tensor, Callable[[list[Tensor]], Tensor]]:
        """The ``num_tokens`` image tokens, and what puts others in their stead.

        ``num_guests``: behind them; None: the rank's own.

        Raises:
            UnsupportedModel: there are not so many.
        """
        if self.place == "ragged":
            return self._ragged_parts(x, num_tokens, frame)
        dim = self.dim % x.ndim
        num_guests = frame.num_own_guests if num_guests is None else num_guests
        num_after = x.shape[dim] - num_tokens if self.place == "first" else num_guests
        num_before = x.shape[dim] - num_tokens - num_after
        if num_before < 0 or num_after < 0:
            raise UnsupportedModel(f"{x.shape[dim]} tokens cannot hold the {num_tokens} of the picture")
        before, image, after = torch.split(x, [num_before, num_tokens, num_after], dim)

        def joined(images: list[Tensor]) -> Tensor:
            parts = [*([before] if num_before else []), *images, *([after] if num_after else [])]
            return concatenated(parts, dim)

        return image, joined

    def exchanged(self, x: Tensor, num_own: int, frame: Frame) -> tuple[Tensor, Callable[[list[Tensor]], Tensor]]:
        """What of keys ``x`` the peers need, ``num_own`` tokens in all, and what puts everyone's in their stead."""
        if num_own == x.shape[self.dim]:  # nothing that all ranks have
            return x, lambda parts: concatenated(parts, self.dim)
        return self.parts(x, num_own, frame, frame.num_common_guests)

    def _ragged_parts(
        self, x: Tensor, num_tokens: int, frame: Frame
    ) -> tuple[Tensor, Callable[[list[Tensor]], Tensor]]:
        assert frame.ragged is not None, "the entry of the model says where the pictures are"
        starts, dim = frame.ragged.starts, self.dim % x.ndim - 1
        image = torch.stack([each.narrow(dim, start, num_tokens) for each, start in zip(x, starts, strict=True)])

        def joined(images: list[Tensor]) -> Tensor:
            num_images = sum(part.shape[dim + 1] for part in images)
            result = []
            for i, start in enumerate(starts):
                text = x[i].narrow(dim, 0, start)
                sample = torch.cat([text, *(part[i] for part in images)], dim)
                padding = [0, 0] * (sample.ndim - 1 - dim) + [0, max(starts) - start]
                result.append(F.pad(sample, padding))
            assert result[0].shape[dim] == max(starts) + num_images
            return torch.stack(result)

        return image, joined


@dataclass(frozen=True)
class Words:
    """How a tensor holds tokens of the text and nothing else: along ``dim``. Cut where the ranks share them out."""

    dim: int = 1

    def own(self, x: Tensor, frame: Frame) -> Tensor:
        """Those that this rank computes."""
        return x if frame.words is None else own_rows(x, frame.words, frame.patch, self.dim)


class PatchEntry(Layer):
    """A module, or a method of one, that returns something about all tokens, on every rank: own rows out.

    The embedding of patches ``[B, tokens, C]`` or ``[B, C, frames, rows, cols]``, or a table of positions
    ``[text and tokens, D]``; every tensor of a tuple of them. The module itself runs whole, which costs little, so that
    it needs to know nothing of patches.
    """

    def __init__(
        self, module: nn.Module, key: str, holder: FrameHolder, *, cut: Tokens | Cut, method: str = "forward"
    ) -> None:
        self.method = method
        super().__init__(module, key, holder)
        self._cut = cut

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        whole = self.plain(self.module, *args, **kwargs)
        if isinstance(self._cut, Tokens):
            return own_tokens(whole, self._cut, self.frame)
        return self._cut(whole, self.frame)


class PatchArguments(Layer):
    """A module that runs on own tokens, and is given something about all of them: those arguments are cut.

    They are given by name; the one that is None is left alone.
    """

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder, *, cuts: Mapping[str, Tokens | Words]) -> None:
        super().__init__(module, key, holder)
        self._cuts = cuts

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        own = {name: own_tokens(kwargs[name], tokens, self.frame) for name, tokens in self._cuts.items()}
        return self.plain(self.module, *args, **{**kwargs, **own})


class PatchExit(Layer):
    """The last module over tokens: own rows ``[B, tokens, C]`` in; out the whole picture's, zeros but for the own.

    What the model does after it, it does for the whole picture, by its own arithmetic of height and width; then the own
    rows are taken of the result.
    """

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder, *, tokens: Tokens) -> None:
        super().__init__(module, key, holder)
        self._tokens = tokens

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        out: Tensor = self.plain(self.module, *args, **kwargs)
        frame, split = self.frame, self.frame.split(TOKENS)
        if split.num_patches == 1:
            return out
        sizes = frame.num_tokens(TOKENS)
        own, joined = self._tokens.parts(out, sizes[frame.patch], frame)
        whole = own.new_zeros(own.shape[0], *frame.shape(TOKENS, split.size), own.shape[2])
        # [B, frames, rows, cols, C]: its dims 1, 2 and 3 are ours
        own = own.reshape(len(own), *frame.shape(TOKENS, split.sizes[frame.patch]), own.shape[2])
        put_rows(whole, own, split.place(frame.patch), frame.dim)
        if frame.ragged is not None:
            frame.ragged.lengths[:] = [start + sum(sizes) for start in frame.ragged.starts]
        return joined([whole.flatten(1, 3)])


class PatchSides(Layer):
    """A block over own tokens that is told sizes of the picture in tokens: it gets the patch's.

    A block that lays the tokens out in rows ``[B, C, rows, W]``, for a convolution, asks for ``height`` and ``width``;
    one that treats the first frame of a video in a way of its own asks for its ``num_tokens``, which are none where
    another rank has that frame.
    """

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder) -> None:
        super().__init__(module, key, holder)
        names = list(inspect.signature(type(module).forward).parameters)[1:]  # without self
        self._told = [(name, names.index(name)) for name in ("height", "width", "num_tokens") if name in names]

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        frame, given = self.frame, list(args)
        own = frame.split(TOKENS).span(frame.patch)
        _, height, width = frame.shape(TOKENS, len(own))
        has_first = frame.dim != 1 or own.start == 0
        sizes = {"height": height, "width": width, "num_tokens": height * width if has_first else 0}
        for name, position in self._told:
            if position < len(given):
                given[position] = sizes[name]
            else:
                kwargs[name] = sizes[name]
        return self.plain(self.module, *given, **kwargs)


def own_tokens(x: Any, tokens: Tokens | Words, frame: Frame) -> Any:
    """Own rows of tensors that hold the tokens of the whole picture, or the text's; of each in a tuple or list.

    Raises:
        UnsupportedModel: a tensor of fewer tokens, or a map of another size.
    """
    if isinstance(x, tuple | list):
        return type(x)(own_tokens(each, tokens, frame) for each in x)
    if not isinstance(x, Tensor):
        return x
    if isinstance(tokens, Words):
        return tokens.own(x, frame)
    split, dim = frame.split(TOKENS), tokens.dim % x.ndim
    shape = frame.shape(TOKENS, split.size)
    if tokens.is_map:
        if tuple(x.shape[dim : dim + 3]) != shape:
            raise UnsupportedModel(f"a map of {tuple(x.shape[dim : dim + 3])} tokens is not one of {shape}")
        return frame.own(TOKENS, x, dim + frame.dim - 1)
    if frame.guests is not None and tokens.place == "last":
        rest, guests = torch.split(x, [x.shape[dim] - frame.num_guests, frame.num_guests], dim)
        x = torch.cat([rest, own_rows(guests, frame.guests, frame.patch, dim)], dim)
    image, joined = tokens.parts(x, sum(frame.num_tokens(TOKENS)), frame)
    own = frame.own(TOKENS, torch.unflatten(image, dim, shape), dim + frame.dim - 1)
    return joined([own.flatten(dim, dim + 2)])
