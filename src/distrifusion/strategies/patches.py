"""Predictions that come patch by patch, and what is made of them: no step of a picture waits for all of another.

A scheduler, and most of what a pipeline does to latents, treats every value alone. Of `Patches` such operations are
written down, and done for a patch when the model asks for that patch of the latents. Whatever else is asked of them, by
a scheduler with thresholds or by a decoder, waits for all patches and runs on the whole tensor: exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..geometry import Split
from .values import OF_SHAPE, InParts, is_along_another, is_by_value

_VIEWS = {
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.select.int,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.unbind.int,
    torch.ops.aten.unsqueeze.default,
}


class Once:
    """A value that is made when it is first asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make: Callable[[], Any] | None = make
        self._value: Any = None

    def __call__(self) -> Any:
        """The value."""
        if self._make is not None:
            self._value, self._make = self._make(), None  # what it was made of is let go
        return self._value


@dataclass
class Ending:
    """Of a picture: whether everything is to be whole from now on, since the last step has begun."""

    is_over: bool = False


class Patches(InParts):
    """A tensor of the whole shape whose patches are made when they are asked for.

    Args:
        like: of its shape and dtype.
        parts: the patches.
        split: the rows of each.
        dim: of the rows, counted from the end.
        device: that it is on.
        ending: of the picture.
    """

    _parts: Sequence[Callable[[], Tensor]]
    _split: Split
    _dim: int
    _whole: Tensor | None
    _views: list[tuple[weakref.ref[Patches], Callable[[Tensor], Tensor]]]
    _parent: Patches | None
    _ending: Ending

    @staticmethod
    def __new__(
        cls, like: Tensor, parts: Sequence[Callable[[], Tensor]], split: Split, dim: int, device: Any, ending: Ending
    ) -> Patches:
        """See the class."""
        made: Patches = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)
        made._parts, made._split, made._dim = parts, split, dim
        made._whole, made._views, made._parent, made._ending = None, [], None, ending
        return made

    def __init__(
        self, like: Tensor, parts: Sequence[Callable[[], Tensor]], split: Split, dim: int, device: Any, ending: Ending
    ) -> None: ...

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Patches(shape={tuple(self.shape)}, rows={self._split.sizes}, is_whole={self._whole is not None})"

    @property
    def is_open(self) -> bool:
        """Whether its patches may still be under way."""
        return self._whole is None

    @property
    def cut(self) -> tuple[Split, int]:
        """The rows of each patch, and their dim, counted from the end."""
        return self._split, self._dim

    def part(self, patch: int) -> Tensor:
        """One patch, plain. Waits for that one only."""
        if self._whole is None:
            return self._parts[patch]()
        span = self._split.span(patch)
        return self._whole.narrow(self._dim, span.start, len(span))

    def whole(self) -> Tensor:
        """All patches, plain. Waits for them."""
        if self._whole is None:
            if self._parent is not None:
                self._parent.whole()  # and so its views
            else:
                self._settle(torch.cat([part() for part in self._parts], self._dim))
        assert self._whole is not None
        return self._whole

    def _settle(self, whole: Tensor) -> None:
        """Be ``whole`` from now on, and all views of this parts of it: what is written to one is then seen in all."""
        self._whole = whole
        for reference, view in self._views:
            child = reference()
            if child is not None:
                child._settle(view(whole))
        self._parts, self._views, self._parent = [], [], None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Torch's hook below every operation."""
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        if func in OF_SHAPE:
            leaves[0] = torch.empty(leaves[0].shape, dtype=leaves[0].dtype, device=leaves[0].device)
        opened = [leaf for leaf in leaves if isinstance(leaf, Patches) and leaf.is_open]
        if opened and _can_wait(func, args, kwargs, opened):
            return _written_down(func, leaves, spec, opened[0])
        args, kwargs = tree_unflatten([leaf.whole() if isinstance(leaf, Patches) else leaf for leaf in leaves], spec)
        result = func(*args, **kwargs)
        return leaves[0] if func._schema.is_mutable and isinstance(leaves[0], Patches) else result


def _can_wait(func: Any, args: Any, kwargs: Any, opened: list[Patches]) -> bool:
    """Whether an operation can be done patch by patch. Those that write to memory are done at once."""
    first = opened[0]
    if first._ending.is_over or func._schema.is_mutable or any(each.cut != first.cut for each in opened):
        return False
    return is_by_value(func) or is_along_another(func, args, kwargs, first, first._dim)


def _written_down(func: Any, leaves: list[Any], spec: Any, first: Patches) -> Any:
    """An operation that is done for each patch when that is asked for."""
    split, dim = first._split, first._dim
    is_open = [isinstance(leaf, Patches) and leaf.is_open for leaf in leaves]
    # As they are now: tensors may be written to before the patch is there.
    kept = [leaf._parts if is_open[i] else _copied(leaf) for i, leaf in enumerate(leaves)]

    def done(patch: int) -> list[Any]:
        span, local = split.span(patch), list(kept)
        for i, leaf in enumerate(kept):
            if is_open[i]:
                local[i] = leaf[patch]()
            elif isinstance(leaf, Tensor) and leaf.ndim >= -dim and leaf.shape[dim] == split.size:
                local[i] = leaf.narrow(dim, span.start, len(span))
        args, kwargs = tree_unflatten(local, spec)
        return tree_flatten(func(*args, **kwargs))[0]

    results = [Once(partial(done, patch)) for patch in range(split.num_patches)]
    shapes, tree, device = _shapes(func, leaves, spec, first.device)
    made = [
        Patches(shape, [Once(partial(_item, each, i)) for each in results], split, dim, device, first._ending)
        for i, shape in enumerate(shapes)
    ]
    if func in _VIEWS:
        args, kwargs = tree_unflatten(leaves, spec)
        for i, child in enumerate(made):
            child._parent = first
            first._views.append((weakref.ref(child), partial(_view, func, args[1:], kwargs, i)))
    return tree_unflatten(made, tree)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Patches):
        leaf = leaf.whole()
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _item(results: Once, place: int) -> Any:
    return results()[place]


def _view(func: Any, rest: Any, kwargs: Any, place: int, whole: Tensor) -> Tensor:
    found: Tensor = tree_flatten(func(whole, *rest, **kwargs))[0][place]
    return found


def _shapes(func: Any, leaves: list[Any], spec: Any, device: Any) -> tuple[list[Tensor], Any, Any]:
    """What an operation gives, on no device; as which tree, and on which device it would be."""
    shapes = [
        torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    ]
    args, kwargs = tree_unflatten(shapes, spec)
    device = kwargs.get("device") or device
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("meta")}
    found, tree = tree_flatten(func(*args, **kwargs))
    return found, tree, device
