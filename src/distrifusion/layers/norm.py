"""Group norm over a patch: the statistics are the whole picture's, the arithmetic is the patch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..moments import measure
from .base import HaloLayer, Layer
from .early import Early


class PatchGroupNorm(Layer):
    """``nn.GroupNorm``: ``[B, C, rows, W]`` or ``[B, C, tokens]`` -> the same shape and dtype.

    Moments are float32 for every dtype of the input, the variance is biased, as in torch.

    ``reader``: the layer that reads rows of neighbours of what is made of the result, value by value.
    """

    reader: HaloLayer | None = None

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if torch.compiler.is_compiling():
            own = _measured(x, self.module.num_groups)
            return self._map(x, self.ask([own], [own.shape[0] - 1], 0)[0].view(2, -1))(x)
        pending = self.reader.ask_early(x) if self.reader is not None else None
        normalise = self._map(x, self._moments(x))
        normed = normalise(x)
        if pending is not None and self.reader is not None:
            Early(self.reader.key, pending.wait()).made(normalise).put_on(normed)
        return normed

    def _map(self, x: Tensor, moments: Tensor) -> Callable[[Tensor], Tensor]:
        """What the norm does to ``x``, and to rows like those of it; ``moments`` are of the whole picture."""
        module, (batch, channels) = self.module, x.shape[:2]
        width, dtype = channels // module.num_groups, torch.promote_types(x.dtype, torch.float32)
        mean, var = moments.to(dtype).repeat_interleave(width, dim=1).unbind()
        weight, bias = (_per_sample(each, batch, dtype) for each in (module.weight, module.bias))

        def normalise(rows: Tensor) -> Tensor:
            if not rows.numel():
                return rows
            # Batch norm with given statistics is the affine map wanted here, in one pass and with mixed dtypes: one
            # "channel" per (sample, channel).
            channelwise = rows.view(1, batch * channels, *rows.shape[2:])
            normed = F.batch_norm(channelwise, mean, var, weight, bias, training=False, momentum=0.0, eps=module.eps)
            return normed.view(rows.shape)

        return normalise

    def _moments(self, x: Tensor) -> Tensor:
        """Mean and variance of the whole picture, ``[2, batch x groups]``."""
        frame, num_groups = self.frame, self.module.num_groups
        if frame.band is not None and self.key in frame.band.moments:
            return frame.band.moments[self.key]
        return frame.exchange.moments(self.key, _measured(frame.core(x).contiguous(), num_groups))

    def answer(self, tensors: list[Tensor], dim: int, question: int) -> Sequence[Tensor]:
        """See Layer."""
        return [self.frame.exchange.moments(self.key, tensors[0]).flatten()]


def _measured(x: Tensor, num_groups: int) -> Tensor:
    """Moments of a contiguous ``[B, C, ...]``, see moments.py."""
    batch, channels = x.shape[:2]
    return measure(x.view(batch * num_groups, x[:1, : channels // num_groups].numel()))


def _per_sample(parameter: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """``[C]`` -> ``[batch x C]`` in ``dtype``; without a copy for one sample in that dtype."""
    if parameter is None or (batch == 1 and parameter.dtype == dtype):
        return parameter
    return parameter.to(dtype).expand(batch, -1).reshape(-1)
