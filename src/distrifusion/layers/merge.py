"""Attention to own tokens while those of the peers travel.

softmax over all keys is a mean of softmaxes over parts of them, weighted by the parts' sums of exponentials, which the
kernel gives as their logarithms (FlashAttention, arXiv 2205.14135, section 3.1; Ring Attention, arXiv 2310.01889). So
nothing is approximate: the results differ by the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..products import FLASH

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_merge(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> bool:
    """Whether ``scaled_dot_product_attention`` with these arguments is one that `attend_own_first` knows."""
    options = {"dropout_p": 0.0, "is_causal": False, "enable_gqa": False, **kwargs}
    options.pop("scale", None)
    is_plain = attn_mask is None and not args and options == {"dropout_p": 0.0, "is_causal": False, "enable_gqa": False}
    is_known = query.device.type == "cpu" and query.dtype in _DTYPES and query.ndim == 4
    return is_plain and is_known and key.shape == value.shape and query.shape[-1] == key.shape[-1]


def attend_own_first(
    query: Tensor, key: Tensor, value: Tensor, others: Callable[[], tuple[Tensor, Tensor]], scale: float | None = None
) -> Tensor:
    """Attention ``[B, heads, tokens, D]`` to ``key`` and ``value`` ``[B, heads, own, D]``, and then to the ``others``.

    ``others`` waits for keys and values ``[B, heads, n, D]``; n may be 0.
    """
    own, own_lse = _attention(query, key, value, scale)
    k, v = others()
    if not k.shape[2]:
        return own
    other, other_lse = _attention(query, k, v, scale)
    share = torch.sigmoid(own_lse - other_lse).unsqueeze(-1)  # [B, heads, tokens, 1], float32
    return torch.lerp(other.float(), own.float(), share).to(own.dtype)


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """The result and the logarithm of the sum of exponentials ``[B, heads, tokens]``."""
    out, lse = FLASH(query, key, value, scale=scale)
    return out, lse
