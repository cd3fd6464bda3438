"""Group norm over a patch: the statistics are the whole picture's, the arithmetic is the patch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..moments import measure
from ..products import without_products
from .base import Layer


class PatchGroupNorm(Layer):
    """``nn.GroupNorm``: ``[B, C, rows, W]`` or ``[B, C, tokens]`` -> the same shape and dtype.

    Moments are float32 for every dtype of the input, the variance is biased, as in torch.
    """

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    @without_products
    def _forward(self, x: Tensor) -> Tensor:
        module, x = self.module, x.contiguous()
        batch, channels = x.shape[:2]
        if torch.compiler.is_compiling():
            own = _measured(x, module.num_groups)
            moments = self.ask([own], [own.shape[0] - 1], 0)[0].view(2, -1)
        else:
            moments = self._moments(x)
        if not x.numel():
            return x
        # Batch norm with given statistics is the affine map wanted here, in one pass and with mixed dtypes: one
        # "channel" per (sample, channel).
        width, dtype = channels // module.num_groups, torch.promote_types(x.dtype, torch.float32)
        mean, var = moments.to(dtype).repeat_interleave(width, dim=1).unbind()
        normed = F.batch_norm(
            x.view(1, batch * channels, *x.shape[2:]),
            mean,
            var,
            _per_sample(module.weight, batch, dtype),
            _per_sample(module.bias, batch, dtype),
            training=False,
            momentum=0.0,
            eps=module.eps,
        )
        return normed.view(x.shape)

    def _moments(self, x: Tensor) -> Tensor:
        """Mean and variance of the whole picture, ``[2, batch x groups]``."""
        frame, num_groups = self.frame, self.module.num_groups
        if frame.band is not None and self.key in frame.band.moments:
            return frame.band.moments[self.key]
        return frame.exchange.moments(self.key, _measured(frame.core(x).contiguous(), num_groups))

    def answer(self, tensors: list[Tensor], dim: int, question: int) -> Sequence[Tensor]:
        """See Layer. The exchange keeps own moments; the compiler writes other things where the graph's were."""
        return [self.frame.exchange.moments(self.key, tensors[0].clone()).flatten()]


def _measured(x: Tensor, num_groups: int) -> Tensor:
    """Moments of a contiguous ``[B, C, ...]``, see moments.py."""
    batch, channels = x.shape[:2]
    return measure(x.view(batch * num_groups, x[:1, : channels // num_groups].numel()))


def _per_sample(parameter: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """``[C]`` -> ``[batch x C]`` in ``dtype``; without a copy for one sample in that dtype."""
    if parameter is None or (batch == 1 and parameter.dtype == dtype):
        return parameter
    return parameter.to(dtype).expand(batch, -1).reshape(-1)
