"""What CUDA graphs do, on the CPU: operations that were recorded are done again, in the same memory, without Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from distrifusion.comm.tape import Segment

HOST = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default}
"""Operations for which the host waits for the device, which no graph can hold."""


class PlayedRecorder:
    """See `distrifusion.comm.tape.Recorder`."""

    def __init__(self, device: torch.device) -> None: ...

    @contextmanager
    def recording(self) -> Iterator[None]:
        yield

    def segment(self) -> Segment:
        return PlayedSegment()


class PlayedSegment(TorchDispatchMode):
    """Operations of one stretch. They are done while they are recorded, so that the first playing does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._is_done = False

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        self._is_done = True

    def play(self) -> None:
        if self._is_done:
            self._is_done = False
            return
        with torch.no_grad():
            for func, args, kwargs, results in self.operations:
                for kept, found in zip(results, tensors(func(*args, **kwargs)), strict=True):
                    if not shares(kept, [found]):
                        kept.copy_(found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in HOST:
            raise RuntimeError(f"operation not permitted while recording: {func}")
        result = func(*args, **kwargs)
        found, given = tensors(result), tensors((args, kwargs))
        is_view = not func._schema.is_mutable and found and all(shares(each, given) for each in found)
        if not is_view:
            self.operations.append((func, args, kwargs, found))
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def shares(one: Tensor, others: list[Tensor]) -> bool:
    """Whether a tensor's memory is that of one of the others."""
    place = one.untyped_storage().data_ptr()
    return any(place == other.untyped_storage().data_ptr() for other in others)
