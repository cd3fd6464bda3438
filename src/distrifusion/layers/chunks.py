"""Layers that work on a part of their patch at a time, where memory is short: the same result, smaller temporaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Span, Window
from .base import Layer

Pads = tuple[int, int]

WIDENING = 12  # of a token inside a gated feed-forward: the projection to 8 times its width, and the product


class PatchFeedForward(Layer):
    """diffusers' ``FeedForward``: ``[..., tokens, C]`` -> ``[..., tokens, C']``, each token by itself."""

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        chunk = self.frame.chunk
        if chunk is None or not hidden_states.numel() or hidden_states.ndim < 2:
            plain: Tensor = self.plain(self.module, hidden_states, *args, **kwargs)
            return plain
        made: Tensor | None = None
        num_tokens = hidden_states.shape[-2]
        for span in Span(0, num_tokens).cut(-(-WIDENING * bytes_of(hidden_states) // chunk)):
            part = self.plain(self.module, hidden_states.narrow(-2, span.start, len(span)), *args, **kwargs)
            made = _room(part, -2, num_tokens) if made is None else made
            made.narrow(-2, span.start, len(span)).copy_(part)
        assert made is not None
        return made


def convolved(
    apply: Callable[[Tensor, Pads], Tensor], x: Tensor, padding: Pads, window: Window, dim: int, chunk: int
) -> Tensor:
    """What ``apply(x, padding)`` makes of ``[B, C, H, W]``, about ``chunk`` bytes at a time along ``dim`` (2 or 3).

    ``window`` is that of the convolution along ``dim``, but for its padding.
    """
    size, both = x.shape[dim], (padding[dim - 2],) * 2
    along = replace(window, padding=both)
    across = (0, padding[1]) if dim == 2 else (padding[0], 0)
    num_rows = along.out_size(size)
    made: Tensor | None = None
    for span in Span(0, num_rows).cut(-(-2 * bytes_of(x) // chunk)):
        reads = along.reads(span)
        inside = reads & Span(0, size)
        rows, ends = x.narrow(dim, inside.start, len(inside)), (inside.start - reads.start, reads.stop - inside.stop)
        if any(ends):
            rows = F.pad(rows, (0, 0, *ends) if dim == 2 else ends)
        part = apply(rows, across)
        made = _room(part, dim, num_rows) if made is None else made
        made.narrow(dim, span.start, len(span)).copy_(part)
    assert made is not None
    return made


def bytes_of(x: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return x.numel() * x.element_size()


def _room(part: Tensor, dim: int, size: int) -> Tensor:
    shape = list(part.shape)
    shape[dim] = size
    return torch.empty(shape, dtype=part.dtype, device=part.device)
