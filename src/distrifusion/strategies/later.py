"""A prediction that is not there yet, so that the two calls of a guided step can run at the same time.

Pipelines that call the denoiser twice per step, for the conditional and for the unconditional prediction, look at the
first only when they have the second. With ``cfg=2`` the first call therefore returns a `Later`: one half of the ranks
has computed it then, the other half goes on to the second call at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_STILL_LATER = {
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.select.int,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.view.default,
    torch.ops.aten.unsqueeze.default,
}
"""Operations that only name a part of it."""


class Later(Tensor):
    """A tensor of known shape whose values are asked for when they are needed.

    Taking a part of it gives a `Later` again; every other operation, also one inside of torch, runs on the values.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _ask: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def __new__(cls, like: Tensor, ask: Callable[[], Tensor]) -> Later:
        """Of the shape, strides, dtype and device of ``like``, whose values do not matter."""
        made: Later = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made._ask, made._value = ask, None
        return made

    def __init__(self, like: Tensor, ask: Callable[[], Tensor]) -> None: ...

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Later(shape={tuple(self.shape)}, is_here={self._value is not None})"

    def fill(self, value: Tensor) -> None:
        """Give the values."""
        self._value = value

    def value(self) -> Tensor:
        """The values; asked for where they have not been given."""
        if self._value is None:
            self._value = self._ask()
        return self._value

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Torch's hook below every operation."""
        kwargs = kwargs or {}
        if func in _STILL_LATER and isinstance(args[0], Later) and args[0]._value is None:
            whole, rest = args[0], args[1:]
            empty = torch.empty_strided(whole.shape, whole.stride(), dtype=whole.dtype, device=whole.device)
            return Later(func(empty, *rest, **kwargs), lambda: func(whole.value(), *rest, **kwargs))
        args, kwargs = tree_map_only(Later, Later.value, (args, kwargs))
        return func(*args, **kwargs)
