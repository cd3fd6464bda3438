"""Linear attention of a patch to the whole picture: sums over tokens cross the ranks, not the tokens.

Of the keys K and values V ``[B, heads, tokens, D]`` of all tokens, a query reads no more than ``V^T K`` and the sum of
K. Both have one size, whatever the picture's, and each rank adds up its own tokens' part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModel
from .base import Frame, FrameHolder, Layer
from .seam import traceable
from .tokens import TOKENS


class PatchLinearAttention(Layer):
    """An attention module over own tokens ``[B, tokens, C]`` whose sums over tokens become those of the picture.

    The processor that the user set runs as it is. Its first matrix product is ``[B, heads, D + 1, tokens]`` (values,
    and a row of ones, for the sum of keys) by ``[B, heads, tokens, D]`` (keys): that of all tokens is the sum of the
    patches' products, whatever their sizes. They are added in order of rank, in the dtype that the processor computes
    in, which is float32.

    Args:
        module: the attention.
        key: its name.
        holder: of the present frame.
        processors: classes of processors that are known to begin with that product.
    """

    def __init__(self, module: nn.Module, key: str, holder: FrameHolder, *, processors: tuple[type, ...]) -> None:
        super().__init__(module, key, holder)
        self._processors = processors

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        processor = type(self.module.processor)
        if processor not in self._processors:
            raise UnsupportedModel(
                f"{self.key}: {processor.__name__} is not known to sum over tokens as "
                f"{self._processors[0].__name__} does; use that one"
            )
        summing = _Summing(self, self.frame)
        with summing:
            result = self.plain(self.module, *args, **kwargs)
        assert summing.is_done, f"{self.key}: {processor.__name__} has not multiplied values by keys"
        return result

    def total(self, frame: Frame, own: Tensor) -> Tensor:
        """The sum ``[B, heads, D + 1, D]`` of all patches' ``own`` ones; of the own alone where no peer is heard."""
        if torch.compiler.is_compiling():
            return self.ask([own], [own.shape[2]], 2)[0]
        sizes = [own.shape[2]] * frame.split(0).num_patches
        parts = [part for (part,) in frame.exchange.gather(self.key, (own,), sizes, 2).wait() if part.shape[2]]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def answer(self, tensors: list[Tensor], dim: int, question: int) -> Sequence[Tensor]:
        """See Layer."""
        return [self.total(self.frame, tensors[0])]


class _Summing(TorchFunctionMode):
    """While the module runs in this thread: its first product over own tokens is over those of the whole picture."""

    def __init__(self, layer: PatchLinearAttention, frame: Frame) -> None:
        super().__init__()
        self._layer, self._frame = layer, frame
        self._num_tokens = frame.num_tokens(TOKENS)[frame.patch]
        self.is_done = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = traceable(func)(*args, **(kwargs or {}))
        # The processor's own, not one inside of a quantised projection, which is over channels.
        if self.is_done or func is not torch.matmul or args[0].ndim != 4 or args[0].shape[3] != self._num_tokens:
            return result
        self.is_done = True
        return self._layer.total(self._frame, result)
