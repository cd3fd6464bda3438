"""Attention over image tokens: K and V of the peers are put beside the own ones where the attention is called.

A processor may call torch's ``scaled_dot_product_attention`` or diffusers' ``dispatch_attention_fn``, behind which are
the kernels of other libraries. Both are met where they are called, with positions and norms applied, for the time of
one module's forward and in its thread only.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModel
from .base import Frame, FrameHolder, Layer
from .masks import widened
from .merge import attend_own_first, can_merge
from .tokens import PLACES as _PLACES
from .tokens import TOKENS, Place, Tokens

_DISPATCH = "dispatch_attention_fn"

_ASK_AGAIN = frozenset({"SD3IPAdapterJointAttnProcessor2_0"})
"""Processors whose second attention is over the picture too, with an adapter's tokens after it."""


class PatchSeam(Layer):
    """An attention module in whose keys the image tokens of a patch become those of the whole picture.

    The processor that the user set runs as it is, on own tokens.
    """

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder, *, place: Place) -> None:
        super().__init__(module, key, holder)
        self._where = place

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        processor = self.module.processor
        attending = _Attending(self, self.frame, 2 if type(processor).__name__ in _ASK_AGAIN else 1)
        if torch.compiler.is_compiling():  # which sees through diffusers' dispatch to torch's attention
            with attending:
                result = self.plain(self.module, *args, **kwargs)
        else:
            with attending, _dispatching(processor, attending):
                result = self.plain(self.module, *args, **kwargs)
        if not attending.num_calls and torch.compiler.is_compiling():
            raise UnsupportedModel(
                f"{self.key}: in a compiled graph, attention is torch's own: call set_attention_backend('native')"
            )
        if not attending.num_calls:
            raise UnsupportedModel(
                f"{self.key}: {type(processor).__name__} calls neither torch's scaled_dot_product_attention nor "
                "diffusers' dispatch_attention_fn; use a processor that does"
            )
        return result

    def gather(
        self, frame: Frame, k: Tensor, v: Tensor, dim: int, place: Place, *, has_words: bool
    ) -> tuple[Tensor, Tensor]:
        """K and V with all tokens along ``dim``, of own image tokens and the rest.

        What the ranks share out of the rest comes with each rank's image tokens. ``has_words``: the text is in it.
        """
        sizes, tokens = frame.num_keys(TOKENS, has_words=has_words), Tokens(dim, place)
        if torch.compiler.is_compiling():
            num_others = sum(sizes) - sizes[frame.patch] if frame.sees_peers else frame.num_remembered(TOKENS)
            num_keys = k.shape[dim] + num_others
            k, v = self.ask([k, v], [num_keys, num_keys], dim, 2 * _PLACES.index(place) + has_words)
            return k, v
        (own_k, all_k), (own_v, all_v) = (tokens.exchanged(x, sizes[frame.patch], frame) for x in (k, v))
        parts = frame.exchange.gather(self.key, (own_k, own_v), sizes, dim, level=TOKENS).wait()
        return all_k([part[0] for part in parts]), all_v([part[1] for part in parts])

    def answer(self, tensors: list[Tensor], dim: int, question: int) -> Sequence[Tensor]:
        """See Layer."""
        k, v = tensors
        return self.gather(self.frame, k, v, dim, _PLACES[question // 2], has_words=bool(question % 2))

    def attend(
        self,
        frame: Frame,
        attention: Callable[..., Any],
        dim: int,
        is_first: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """``attention`` of own queries over the keys of the whole picture, which stand along ``dim``."""
        place: Place = self._where if is_first else "first"
        num_image = frame.num_keys(TOKENS, has_words=False)[frame.patch] + frame.num_common_guests
        has_words = is_first and key.shape[dim] > num_image  # not SD3.5's second attention of the picture to itself
        is_torch = attention is F.scaled_dot_product_attention and place != "ragged"
        is_eager = is_torch and not torch.compiler.is_compiling()
        if is_eager and frame.exchange.is_slow and can_merge(query, key, value, attn_mask, *args, **kwargs):
            return self._attend_own_first(frame, place, has_words, query, key, value, **kwargs)
        if dim == 1 and key.device.type == "cpu":
            # Put together head by head: the CPU's kernel reads keys that lie so faster, and the bits are the same.
            own = key.transpose(1, 2), value.transpose(1, 2)
            k, v = (x.transpose(1, 2) for x in self.gather(frame, *own, 2, place, has_words=has_words))
        else:
            k, v = self.gather(frame, key, value, dim, place, has_words=has_words)
        mask = attn_mask
        if mask is not None:
            mask = widened(mask, frame, self._where, key.shape[dim], k.shape[dim], self.key)
        return attention(query, k, v, mask, *args, **kwargs)

    def _attend_own_first(
        self,
        frame: Frame,
        place: Place,
        has_words: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        """To own image tokens and the rest, while the peers' image tokens travel."""
        sizes, tokens = frame.num_keys(TOKENS, has_words=has_words), Tokens(2, place)
        own = [tokens.exchanged(x, sizes[frame.patch], frame)[0] for x in (key, value)]
        pending = frame.exchange.gather(self.key, own, sizes, 2, level=TOKENS)

        def others() -> tuple[Tensor, Tensor]:
            parts = [part for rank, part in enumerate(pending.wait()) if rank != frame.patch]
            return torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)

        return attend_own_first(query, key, value, others, scale)


def traceable(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func``, which a mode was given, or what torch.compile can follow in its stead."""
    # A method that is written in Python asks its super().
    return torch.unflatten if func is Tensor.unflatten else func


class PatchFrameAttention(Layer):
    """Attention within each frame of a video, in a block without a processor: ``WanAttentionBlock``.

    ``[B, C, frames, rows, W]`` -> the same; queries are of the own rows, keys and values of the whole frame.
    """

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder, *, level: int) -> None:
        super().__init__(module, key, holder)
        self.level = level

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # takes part in what its peers gather
            nothing = x.new_empty(x.shape[0] * x.shape[2], 1, 0, x.shape[1])
            self._gather(self.frame, nothing, nothing, 2)
            return x
        with _Attending(self, self.frame, 1):
            output: Tensor = type(self.module).forward(self.module, x)
        return output

    def attend(
        self,
        frame: Frame,
        attention: Callable[..., Any],
        dim: int,
        is_first: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Any:
        """``attention`` of own queries ``[B x frames, 1, tokens, C]`` over the keys of their whole frames."""
        return attention(query, *self._gather(frame, key, value, dim))

    def _gather(self, frame: Frame, k: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        parts = frame.exchange.gather(self.key, (k, v), frame.num_tokens(self.level), dim, level=self.level).wait()
        return torch.cat([part[0] for part in parts], dim), torch.cat([part[1] for part in parts], dim)


class _Attending(TorchFunctionMode):
    """While a seam's module runs in this thread: its first attentions are over the whole picture."""

    def __init__(self, seam: PatchSeam | PatchFrameAttention, frame: Frame, limit: int) -> None:
        super().__init__()
        self._seam, self._frame, self._limit = seam, frame, limit
        self._is_inside = False  # an attention, which calls another
        self._num_keys = 0  # of the first attention, before its peers' are there
        self.num_calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or self._is_inside:
            return traceable(func)(*args, **(kwargs or {}))
        return self.attend(func, 2, *args, **(kwargs or {}))

    def attend(self, attention: Callable[..., Any], dim: int, *args: Any, **kwargs: Any) -> Any:
        """An attention that the module calls: with (query, key, value), as they all take them.

        Raises:
            UnsupportedModel: it is over the picture once more, as PAG's in joint attention.
        """
        self.num_calls += 1
        key = args[1] if len(args) > 1 else kwargs["key"]
        if self.num_calls == 1:
            self._num_keys = key.shape[dim]
        elif self.num_calls > self._limit and key.shape[dim] == self._num_keys:
            raise UnsupportedModel(
                f"{self._seam.key}: {type(self._seam.module.processor).__name__} attends to the picture once more, "
                "which is not known in patches; use another processor"
            )
        self._is_inside = True
        try:
            if self.num_calls > self._limit:  # to an adapter's tokens
                return attention(*args, **kwargs)
            return self._seam.attend(self._frame, attention, dim, self.num_calls == 1, *args, **kwargs)
        finally:
            self._is_inside = False


_HERE = threading.local()  # .attending: that of the seam whose module runs in this thread
_LOCK = threading.Lock()
_OPEN: dict[int, tuple[Any, int]] = {}  # id of a module's names -> its own dispatch_attention_fn, and who needs ours


@contextmanager
def _dispatching(processor: Any, attending: _Attending) -> Iterator[None]:
    """The processor's ``dispatch_attention_fn`` is met, in this thread; other threads of its module get their own."""
    names = getattr(type(processor).__call__, "__globals__", {})
    if _DISPATCH not in names:
        yield
        return
    with _LOCK:
        original, num_users = _OPEN.get(id(names), (names[_DISPATCH], 0))
        _OPEN[id(names)] = original, num_users + 1
        if not num_users:
            names[_DISPATCH] = _met(original)
    before = getattr(_HERE, "attending", None)
    _HERE.attending = attending
    try:
        yield
    finally:
        _HERE.attending = before
        with _LOCK:
            original, num_users = _OPEN.pop(id(names))
            if num_users > 1:
                _OPEN[id(names)] = original, num_users - 1
            else:
                names[_DISPATCH] = original


def _met(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(dispatch)
    def dispatch_here(*args: Any, **kwargs: Any) -> Any:
        attending: _Attending | None = getattr(_HERE, "attending", None)
        if attending is None:
            return dispatch(*args, **kwargs)
        return attending.attend(dispatch, 1, *args, **kwargs)

    return dispatch_here
