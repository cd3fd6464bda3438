"""Matrix products of float32 on the CPU: by oneDNN, where that is much faster here than what torch takes by itself.

Torch gives convolutions to oneDNN and matrix products to MKL, whose AVX-512 kernels are for Intel's processors. On
others that have AVX-512 at full width oneDNN is about twice as fast (`benchmarks/products.py`). Both are float32
throughout, and differ in the order of sums. So that is not decided by the name of a processor, both are timed once.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

from .errors import ConfigError

T = TypeVar("T", bound=Callable[..., Any])

SWITCH = "DISTRIFUSION_ONEDNN"
LEAST_GAIN = 1.3  # over torch's own: far enough from 2.2, which was measured, that every run decides alike
LEAST_WORK = 1 << 24  # multiplications: less takes so little time that torch may go on with it, to the bit
LEAST_KEYS = 256  # of fewer, torch's own attention is as fast
SCORES = 1 << 20  # of a thread at a time: 4 MiB, which stay in a cache
FEWEST, MOST = 64, 1024  # queries of a thread at a time: of fewer, reading the keys again takes the time


def fast_products(sample: Tensor, model: nn.Module) -> AbstractContextManager[Any]:
    """Within it, this thread's float32 linear layers, plain attention and 1 x 1 convolutions are oneDNN's.

    Not where a part of ``model`` is compiled: torch's compiler cannot follow all that is hooked, and chooses by itself.
    It is for where they are wanted (`is_wanted`), and no memory is planned: oneDNN lays weights out anew, in memory
    that a rehearsal does not see.
    """
    is_ours = sample.device.type == "cpu" and sample.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return Products() if is_ours and not _has_graphs(model) else nullcontext()


def _has_graphs(model: nn.Module) -> bool:
    """Whether a module was compiled in place, or within another."""
    modules = model.modules()
    return any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in modules)


def is_wanted() -> bool:
    """Whether oneDNN's products are much faster on this machine, or DISTRIFUSION_ONEDNN is 1; where it is 0, never.

    Raises:
        ConfigError: the variable is something else.
    """
    asked = asked_for()
    return _has_onednn() and (asked if asked is not None else _is_faster())


def asked_for() -> bool | None:
    """What DISTRIFUSION_ONEDNN says; None: nothing.

    Raises:
        ConfigError: it is neither 0 nor 1.
    """
    text = os.environ.get(SWITCH, "").strip()
    if text not in ("", "0", "1"):
        raise ConfigError(f"{SWITCH}={text!r} must be 0 (torch's own matrix products) or 1 (oneDNN's)")
    return text == "1" if text else None


class Products(TorchFunctionMode):
    """See `fast_products`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's hook above every operation."""
        return _OURS.get(func, func)(*args, **(kwargs or {}))


def without_products(work: T) -> T:
    """``work`` where no operation is hooked by `Products`: for what has no product in it and many small operations."""

    @functools.wraps(work)
    def aside(*args: Any, **kwargs: Any) -> Any:
        mode = None if torch.compiler.is_compiling() else _get_current_function_mode()  # type: ignore[no-untyped-call]
        if not isinstance(mode, Products):
            return work(*args, **kwargs)
        with _pop_mode_temporarily():
            return work(*args, **kwargs)

    return cast(T, aside)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of ``[..., I]``, ``[O, I]`` and ``[O]``, by oneDNN where it is worth it."""
    if input.numel() * weight.shape[0] < LEAST_WORK or weight.ndim != 2 or not _are_plain(input, weight, bias):
        return F.linear(input, weight, bias)
    return _product(input, weight, bias)


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any, **named: Any) -> Tensor:
    """`torch.nn.functional.conv2d`. Of a window of one pixel, which torch takes for a product in one thread."""
    is_product = not named and options in _ONE_PIXEL and input.ndim == weight.ndim == 4 and weight.shape[2:] == (1, 1)
    if not is_product or input.numel() * weight.shape[0] < LEAST_WORK or not _are_plain(input, weight, bias):
        return F.conv2d(input, weight, bias, *options, **named)
    return torch.mkldnn_convolution(input, weight, bias, (0, 0), (1, 1), (1, 1), 1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, by oneDNN where it is worth it: ``[B, heads, tokens, D]``."""
    if attn_mask is None and not dropout_p and not is_causal and not enable_gqa and _pays(query, key, value):
        return _attention(query, key, value, scale)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def attention_and_sums(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`FLASH`: the same, with the logarithm of each query's sum of exponentials ``[B, heads, tokens]``, float32."""
    if attn_mask is None and not dropout_p and not is_causal and _pays(query, key, value):
        sums = query.new_empty(query.shape[:3])
        return _attention(query, key, value, scale, sums), sums
    out, sums = FLASH(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    return out, sums


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None, sums: Tensor | None = None) -> Tensor:
    """Some queries at a time, so that their scores for all keys stay in the cache between the two products."""
    batch, heads, num_queries, width = query.shape
    out = query.new_empty(batch, num_queries, heads, value.shape[-1])  # as torch's own lies
    step = torch.get_num_threads() * max(FEWEST, min(MOST, SCORES // key.shape[2]))
    for sample in range(batch):
        for head in range(heads):
            scaled = key[sample, head] * (width**-0.5 if scale is None else scale)  # [keys, D]
            values = value[sample, head].t().contiguous()  # [D, keys]
            for start in range(0, num_queries, step):
                rows = slice(start, start + step)
                scores = _product(query[sample, head, rows], scaled)
                if sums is not None:
                    sums[sample, head, rows] = scores.amax(-1)
                # In their place: torch goes row by row, and has read a row before it writes it.
                shares = torch.softmax(scores, -1, out=scores)
                if sums is not None:  # the largest share is exp(its score) over the sum, and at least 1 / keys
                    sums[sample, head, rows] -= shares.amax(-1).log()
                out[sample, rows, head] = _product(shares, values)
    return out.transpose(1, 2)


def _pays(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if not _are_plain(query, key, value) or not query.ndim == key.ndim == value.ndim == 4:
        return False
    (batch, heads, num_queries, width), num_keys = query.shape, key.shape[2]
    is_known = key.shape == (batch, heads, num_keys, width) and value.shape[:3] == key.shape[:3]
    return is_known and num_keys >= LEAST_KEYS and num_queries * num_keys * width >= LEAST_WORK


_LOCK = threading.Lock()

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
"""Torch's own attention, with the logarithm of the sums."""

_ONE_PIXEL = ((), ((1, 1), (0, 0), (1, 1), 1))  # stride, padding, dilation, groups

_OURS: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    F.conv2d: conv2d,
    F.scaled_dot_product_attention: attention,
    FLASH: attention_and_sums,
}


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return result


def _are_plain(*tensors: Tensor | None) -> bool:
    """Whether all are of float32, on the CPU, and of no class of their own."""
    for each in tensors:
        is_dense = each is None or (type(each) in (Tensor, nn.Parameter) and each.layout is torch.strided)
        if not is_dense or (each is not None and (each.dtype is not torch.float32 or each.device.type != "cpu")):
            return False
    return True


def _has_onednn() -> bool:
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_faster() -> bool:
    """Whether by `LEAST_GAIN`; the thread that asks first finds out, alone."""
    with _LOCK:
        return _found()


@functools.cache
def _found() -> bool:
    return _may_gain() and _measured() >= LEAST_GAIN


def _may_gain() -> bool:
    return torch._C.has_mkl and torch.backends.cpu.get_cpu_capability() == "AVX512"


@torch.no_grad()
def _measured(rounds: int = 7) -> float:
    """Seconds of torch's own over oneDNN's, of one product: the least of several, which other load spoils least."""
    x = torch.ones(256 * torch.get_num_threads(), 512, dtype=torch.float32, device="cpu")
    weight = torch.ones(512, 512, dtype=torch.float32, device="cpu")
    best = [float("inf")] * 2
    for _ in range(rounds):
        for which, work in enumerate((F.linear, _product)):
            started = perf_counter()
            work(x, weight)
            best[which] = min(best[which], perf_counter() - started)
    return best[0] / best[1]
