"""Transformers over image tokens: where the tokens of a picture are cut to own rows, and where they meet again.

Tokens stand in raster order, frame by frame; text, or whatever else is not of the picture, may stand before or after
them in one tokens. It stays whole on every rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModel
from .base import Frame, FrameHolder, Layer

LATENTS, TOKENS = 0, 1
"""Levels of a transformer: rows of the latent, and rows of tokens, each of which is ``patch_size`` rows of it."""

Place = Literal["first", "last"]


@dataclass(frozen=True)
class Tokens:
    """How a tensor holds image tokens: along ``dim``, before (``"first"``) or after (``"last"``) the rest there.

    ``is_map``: they stand not in one dim but in three, frames, rows and columns, of which ``dim`` is the first.
    """

    dim: int = 1
    place: Place = "last"
    is_map: bool = False

    def parts(self, x: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The ``num_tokens`` image tokens, and the rest."""
        num_rest = x.shape[self.dim] - num_tokens
        if num_rest < 0:
            raise UnsupportedModel(f"{x.shape[self.dim]} tokens cannot hold the {num_tokens} of the picture")
        if self.place == "first":
            image, rest = torch.split(x, [num_tokens, num_rest], self.dim)
        else:
            rest, image = torch.split(x, [num_rest, num_tokens], self.dim)
        return image, rest

    def joined(self, images: list[Tensor], rest: Tensor) -> Tensor:
        """Image tokens and the rest in their order."""
        if not rest.shape[self.dim]:
            return images[0] if len(images) == 1 else torch.cat(images, self.dim)
        return torch.cat([*images, rest] if self.place == "first" else [rest, *images], self.dim)


class PatchEntry(Layer):
    """A module whose output is about all tokens, on every rank: own rows out.

    The embedding of patches ``[B, tokens, C]`` or ``[B, C, frames, rows, cols]``, or a table of positions
    ``[text and tokens, D]``; every tensor of a tuple of them. The module itself runs whole, which costs little, so that
    it needs to know nothing of patches.
    """

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder, *, tokens: Tokens) -> None:
        super().__init__(module, key, holder)
        self._tokens = tokens

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return own_tokens(type(self.module).forward(self.module, *args, **kwargs), self._tokens, self.frame)


class PatchExit(Layer):
    """The last module over tokens: own rows ``[B, tokens, C]`` in; out the whole picture's, zeros but for the own.

    What the model does after it, it does for the whole picture, by its own arithmetic of height and width; then the own
    rows are taken of the result.
    """

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        own: Tensor = type(self.module).forward(self.module, *args, **kwargs)
        frame, split = self.frame, self.frame.split(TOKENS)
        whole = own.new_zeros(own.shape[0], frame.num_frames, *frame.sides(TOKENS, split.size), own.shape[2])
        span = split.span(frame.patch)
        part = whole.narrow(frame.dim, span.start, len(span))  # [B, frames, rows, cols, C]: its dims 2 and 3 are ours
        part.copy_(own.view(part.shape))
        return whole.flatten(1, 3)


class PatchSides(Layer):
    """A block over own tokens that is told sizes of the picture in tokens: it gets the patch's.

    A block that lays the tokens out in rows ``[B, C, rows, W]``, for a convolution, asks for ``height`` and ``width``;
    one that treats the first frame of a video in a way of its own asks for the ``num_tokens`` of a frame.
    """

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder) -> None:
        super().__init__(module, key, holder)
        self._signature = inspect.signature(type(module).forward)

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        frame, call = self.frame, self._signature.bind(self.module, *args, **kwargs)
        own = frame.split(TOKENS).sizes[frame.patch]
        height, width = frame.sides(TOKENS, own)
        sizes = {"height": height, "width": width, "num_tokens": height * width}
        call.arguments.update({name: sizes[name] for name in self._signature.parameters if name in sizes})
        return type(self.module).forward(*call.args, **call.kwargs)


class PatchSeam(Layer):
    """An attention module in whose keys the image tokens of a patch become those of the whole picture.

    The processor that the user set runs as it is, on own tokens. Where it calls torch's attention, with positions and
    norms already applied, K and V ``[B, heads, tokens, D]`` of the peers are put beside the own ones.
    """

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder, *, place: Place) -> None:
        super().__init__(module, key, holder)
        self._tokens = Tokens(2, place)

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Attending(self, self.frame) as attending:
            result = type(self.module).forward(self.module, *args, **kwargs)
        if not attending.num_calls:
            raise UnsupportedModel(
                f"{self.key}: {type(self.module.processor).__name__} does not call torch's "
                "scaled_dot_product_attention; use a processor or an attention backend that does"
            )
        return result

    def gather(self, frame: Frame, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V ``[B, heads, all tokens, D]`` of own image tokens and the rest."""
        sizes = frame.num_tokens(TOKENS)
        (own_k, rest_k), (own_v, rest_v) = (self._tokens.parts(x, sizes[frame.patch]) for x in (k, v))
        parts = frame.exchange.gather(self.key, (own_k, own_v), sizes, self._tokens.dim).wait()
        return (
            self._tokens.joined([part[0] for part in parts], rest_k),
            self._tokens.joined([part[1] for part in parts], rest_v),
        )

    def mask(self, frame: Frame, mask: Tensor, num_keys: int) -> Tensor:
        """An attention mask ``[..., keys]`` for own image tokens and text -> for all ``num_keys``.

        Image tokens are never masked, so those of the peers get the value of the first own one. A mask that was made
        for the whole picture stays.

        Raises:
            UnsupportedModel: a mask with a row for each query, which belongs to whole pictures.
        """
        if mask.shape[-1] == num_keys and (mask.ndim < 2 or mask.shape[-2] == 1):
            return mask
        if mask.ndim > 1 and mask.shape[-2] != 1:
            raise UnsupportedModel(
                f"{self.key}: an attention mask of shape {tuple(mask.shape)} goes across patches; only one that hides "
                "text tokens from all queries, [batch, 1, 1, keys], is known"
            )
        sizes = frame.num_tokens(TOKENS)
        image, rest = Tokens(mask.ndim - 1, self._tokens.place).parts(mask, sizes[frame.patch])
        everyone = image[..., :1].expand(*image.shape[:-1], sum(sizes))
        return Tokens(mask.ndim - 1, self._tokens.place).joined([everyone], rest)


class _Attending(TorchFunctionMode):
    """While a seam's module runs in this thread: its first attention is over the whole picture."""

    def __init__(self, seam: PatchSeam, frame: Frame) -> None:
        super().__init__()
        self._seam, self._frame = seam, frame
        self.num_calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.num_calls += 1
        if self.num_calls > 1:  # to an adapter's tokens
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        k, v = self._seam.gather(self._frame, key, value)
        mask = None if attn_mask is None else self._seam.mask(self._frame, attn_mask, k.shape[-2])
        return F.scaled_dot_product_attention(query, k, v, mask, *args, **kwargs)


def own_tokens(x: Any, tokens: Tokens, frame: Frame) -> Any:
    """Own rows of tensors that hold the tokens of the whole picture; of each in a tuple or list.

    Raises:
        UnsupportedModel: a tensor of fewer tokens, or a map of another size.
    """
    if isinstance(x, tuple | list):
        return type(x)(own_tokens(each, tokens, frame) for each in x)
    if not isinstance(x, Tensor):
        return x
    split, dim = frame.split(TOKENS), tokens.dim % x.ndim
    shape, span = (frame.num_frames, *frame.sides(TOKENS, split.size)), split.span(frame.patch)
    if tokens.is_map:
        if tuple(x.shape[dim : dim + 3]) != shape:
            raise UnsupportedModel(f"a map of {tuple(x.shape[dim : dim + 3])} tokens is not one of {shape}")
        return x.narrow(dim + frame.dim - 1, span.start, len(span))
    image, rest = tokens.parts(x, sum(frame.num_tokens(TOKENS)))
    own = torch.unflatten(image, dim, shape).narrow(dim + frame.dim - 1, span.start, len(span))
    return Tokens(dim, tokens.place).joined([own.flatten(dim, dim + 2)], rest)
