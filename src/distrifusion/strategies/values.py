"""Tensors that are known in parts: which operations can do with a part, and what those that cannot ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_OPS = torch.ops.aten
_ALSO = {_OPS._to_copy.default, _OPS.alias.default, _OPS.clone.default, _OPS.detach.default}
"""Operations on each value alone that torch does not count among them."""

_OF_ONE_DIM = {
    _OPS.cat.default: 1,
    _OPS.select.int: 1,
    _OPS.slice.Tensor: 1,
    _OPS.split.Tensor: 2,
    _OPS.squeeze.dim: 1,
    _OPS.stack.default: 1,
    _OPS.unbind.int: 1,
    _OPS.unsqueeze.default: 1,
}
"""Operations along one dim, by the place of that argument; its default is 0."""

_OVER_DIMS = {_OPS.linalg_vector_norm.default: 2, _OPS.mean.dim: 1, _OPS.sum.dim_IntList: 1}
"""Sums over dims, by the place of that argument; the next one says whether the dims are kept."""

OF_SHAPE = {
    _OPS.empty_like.default,
    _OPS.full_like.default,
    _OPS.ones_like.default,
    _OPS.rand_like.default,
    _OPS.randn_like.default,
    _OPS.zeros_like.default,
}
"""Operations that ask for the shape alone. Noise is drawn for the whole, so that it is one device's."""


class InParts(Tensor):
    """A tensor of the whole shape of which parts are known, and the whole where it is asked for."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def whole(self) -> Tensor:
        """All of it, plain."""
        raise NotImplementedError

    # What reads a tensor's memory, not its values.

    def numpy(self, *, force: bool = False) -> Any:
        """All of it, as ``Tensor.numpy``."""
        return self.whole().numpy(force=force)

    def tolist(self) -> Any:
        """All of it, as ``Tensor.tolist``."""
        return self.whole().tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.whole().numpy()
        return array if dtype is None else array.astype(dtype)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.whole().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.whole().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def is_by_value(func: Any) -> bool:
    """Whether an operation treats each value alone, and gives one for each: torch counts `equal` among them."""
    is_named = func in _ALSO or (torch.Tag.pointwise in func.tags and func is not _OPS.equal.default)
    return is_named and torch.Tag.nondeterministic_seeded not in func.tags  # noise is drawn for the whole


def is_along_another(func: Any, args: Any, kwargs: Any, like: Tensor, dim: int) -> bool:
    """Whether an operation is along a dim of ``like``, and leaves ``dim``, counted from the end, alone."""
    ndim = like.ndim
    if func in _OVER_DIMS:
        place = _OVER_DIMS[func]
        over = args[place] if len(args) > place else kwargs.get("dim")
        is_kept = args[place + 1] if len(args) > place + 1 else kwargs.get("keepdim")
        return bool(over) and bool(is_kept) and all(each % ndim != ndim + dim for each in over)
    if func is _OPS.repeat.default:
        return bool(args[1][dim] == 1)
    if func not in _OF_ONE_DIM:
        return False
    place = _OF_ONE_DIM[func]
    given = args[place] if len(args) > place else kwargs.get("dim", 0)
    ndim += func in (_OPS.unsqueeze.default, _OPS.stack.default)
    own, along = given % ndim, ndim + dim
    if func is _OPS.slice.Tensor and own == along:  # of all rows
        start, stop = (args[i] if len(args) > i else kwargs.get(name) for i, name in ((2, "start"), (3, "end")))
        step = args[4] if len(args) > 4 else kwargs.get("step", 1)
        return not start and (stop is None or stop >= like.shape[dim]) and step == 1
    keeps = func in (_OPS.cat.default, _OPS.slice.Tensor, _OPS.split.Tensor)
    return own < along or (own > along and keeps)
