"""Nearest interpolation by 2 and the 3 x 3 convolution after it as one, with 4 of 9 multiplications.

Of the three rows that the window has over a doubled picture, two are the same row of the picture before: an even row of
output reads the rows (i - 1, i, i) of it, an odd one (i, i, i + 1); columns likewise. So each of the four kinds of
pixels is a 2 x 2 convolution of the picture before, with weights that are sums of the 3 x 3 ones. Exact but for the
rounding of these sums, which is why it is for float32 and above; on the CPU, where it was measured to be faster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Frame
from .chunks import Pads
from .prompt import Kept, mark_weights

_SOURCE = "_distrifusion_source"  # on a patch: what it is twice as large as, and the writes to the patch until then
_TAPS = ((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1))  # [phase, tap of 2, tap of 3]


def mark_doubled(x: Tensor, source: Tensor) -> Tensor:
    """``x``, made of ``source`` ``[B, C, H, W]``; known to be, where it has each row and column twice."""
    is_doubled = x.shape[2:] == (2 * source.shape[2], 2 * source.shape[3])
    if is_doubled and not torch.compiler.is_compiling() and not x.is_inference():  # which has no count of writes
        setattr(x, _SOURCE, (source, x._version))
    return x


def source_of(x: Tensor, module: nn.Module, frame: Frame) -> Tensor | None:
    """What ``x`` was doubled from, where ``module`` can be applied to that instead; otherwise None."""
    source, version = getattr(x, _SOURCE, (None, None))
    if source is None or version != x._version or frame.chunk is not None or not _fits(module):
        return None
    is_fast = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and source.is_contiguous()
    is_same = module.weight.dtype == x.dtype and not torch.is_autocast_enabled("cpu")
    return source if is_fast and is_same and not torch.is_grad_enabled() else None


def _fits(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d or module.kernel_size != (3, 3) or module.groups != 1:
        return False
    return module.stride == module.dilation == module.padding == (1, 1)


def with_edges(source: Tensor, rows: Tensor, dim: int) -> Tensor:
    """``source`` between the first and the last of ``rows``: the patch made of it, doubled, with a halo of one row.

    The rows of a neighbour are doubled too, so every second number of them is enough.
    """
    shape = list(source.shape)
    shape[dim] += 2
    out = source.new_empty(shape)
    out.narrow(dim, 1, source.shape[dim]).copy_(source)
    for place, row in ((0, 0), (shape[dim] - 1, rows.shape[dim] - 1)):
        edge = rows.select(dim, row)  # [B, C, twice as many]
        out.select(dim, place).copy_(edge[..., ::2])
    return out


def convolved_doubled(module: Any, rows: Tensor, padding: Pads, frame: Frame, key: str) -> Tensor:
    """What ``module``, a 3 x 3 `Conv2d`, makes of ``rows`` ``[B, C, H, W]`` doubled: ``[B, C', 2 H, 2 W]``.

    Less a halo: along a dim where ``padding`` is 0, one row of ``rows`` on each side is not the patch's own.
    """
    num_phases, channels = 4, module.out_channels
    bias = None if module.bias is None else module.bias.repeat(num_phases)
    phases = F.conv2d(rows, _weights(module, frame, key), bias, padding=padding)  # [B, 4 C', height + 1, width + 1]
    height, width = phases.shape[2] - 1, phases.shape[3] - 1
    out = phases.new_empty(phases.shape[0], channels, 2 * height, 2 * width)
    for phase, part in enumerate(torch.split(phases, channels, 1)):
        row, col = divmod(phase, 2)
        out[:, :, row::2, col::2].copy_(part[:, :, row : row + height, col : col + width])
    return out


def _weights(module: nn.Conv2d, frame: Frame, key: str) -> Tensor:
    """`summed` weights: made once in a picture, as long as nothing is written to the module's own."""
    mark: list[Any] = []
    held: list[Tensor] = []
    is_known = mark_weights(module, mark, held)
    kept: Kept | None = frame.memory.get(key)
    if kept is None or not is_known or kept.mark != mark:
        kept = frame.memory[key] = Kept(mark, held, summed(module.weight))
    weights: Tensor = kept.result
    return weights


def summed(weight: Tensor) -> Tensor:
    """``[C', C, 3, 3]`` -> ``[4 C', C, 2, 2]``: for even rows and columns, even and odd, odd and even, odd."""
    taps = torch.tensor(_TAPS, dtype=weight.dtype, device=weight.device)
    phases = torch.einsum("prk,qsl,oikl->pqoirs", taps, taps, weight)
    return phases.reshape(4 * weight.shape[0], weight.shape[1], 2, 2)
