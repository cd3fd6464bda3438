"""Modules that read the prompt and nothing else: they run once per picture, not once per step.

Of a step on N ranks everything over image tokens is done once in all, but what is done to the prompt is done on every
rank: projections of the text, and its keys and values in every cross-attention. It is also the part that is the same in
every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..products import without_products
from .base import Layer

_LORA = "peft.tuners.lora.layer.Linear"


@dataclass
class Kept:
    """A result, and what it was made of."""

    mark: Any
    held: list[Tensor]  # all that the mark names, so that no id and no address is used again while this is kept
    result: Any
    versions: Any = None  # of the result, which a processor may have written to
    was_used: bool = False


class PatchPrompt(Layer):
    """A module of the prompt: tensors, or lists of them, of any shape -> the same as ever, bit for bit.

    The result of the last call in this picture and guidance branch is given again where the input is the same tensor,
    or the same view of it, unwritten since, and so are all weights, and an adapter's scale and state. "Unwritten" is
    read off torch's version counters, so the host waits for nothing; a tensor that has none (made in inference mode) or
    is of a class of its own (quantised) is never taken for known. What a write through ``tensor.data`` changes is not
    seen until the next picture. Chains need no more than this: a projection that gives its result again is known input
    to the next.

    Inside of a compiled block the module is part of the graph, and runs in every step.
    """

    is_optional = True

    @property
    def forward(self) -> Callable[..., Any]:
        """See Layer."""
        return self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        frame = self._holder.frame
        if torch.compiler.is_compiling() or frame is None or kwargs or torch.is_grad_enabled():
            return self.compute(*args, **kwargs)
        memory = frame.memory
        before: Kept | None = memory.get(self.key)
        if before is None and self.key in memory:
            return self.compute(*args)
        held: list[Tensor] = []
        mark = _mark(self.module, args, held)
        is_same = mark is not None and before is not None and before.mark == mark
        if before is not None and is_same and before.versions == _versions(before.result):
            before.was_used = True
            return before.result
        result = self.compute(*args)
        versions = _versions(result)
        # What is out of date before it was ever of use is new in every step: not worth its memory.
        is_new_always = before is not None and not before.was_used
        is_known = mark is not None and versions is not None and not is_new_always
        memory[self.key] = Kept(mark, held, result, versions) if is_known else None
        return result

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward."""
        return self.plain(self.module, *args, **kwargs)


@without_products
def _mark(module: nn.Module, args: Any, held: list[Tensor]) -> Any:
    """Compares equal where ``module`` would give the same; None where that cannot be told. ``held``: see Kept."""
    parts: list[Any] = []
    for tensor in _tensors(args):
        if tensor is None or not _is_plain(tensor):
            return None
        root = tensor if tensor._base is None else tensor._base
        held += [tensor, root]
        # The root's id: two roots over the same memory would count their writes each for itself.
        parts += [id(root), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version]
    if not held or held[0].is_meta:  # there is nothing to keep of shapes alone
        return None
    kind = held[0].device.type
    parts += [torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)]
    return tuple(parts) if mark_weights(module, parts, held) else None


def mark_weights(module: nn.Module, parts: list[Any], held: list[Tensor]) -> bool:
    """Add what is known of the weights below ``module``; whether that is all there is to know."""
    owner = type(module).__module__
    if owner.startswith("peft."):
        if f"{owner}.{type(module).__qualname__}" != _LORA:
            return False
        lora: Any = module
        parts += [lora.disable_adapters, *lora.active_adapters, *lora.merged_adapters, *lora.scaling.items()]
    for weight in (*module._parameters.values(), *module._buffers.values()):
        if weight is None:
            continue
        if not _is_plain(weight):
            return False
        held.append(weight)
        parts += [id(weight), weight.data_ptr(), weight._version]
    return all(child is None or mark_weights(child, parts, held) for child in module._modules.values())


def _versions(result: Any) -> tuple[int, ...] | None:
    """Writes to the tensors of a result so far; None where they are not counted."""
    tensors = list(_tensors(result))
    if not all(tensor is not None and _is_plain(tensor) for tensor in tensors):
        return None
    return tuple(tensor._version for tensor in tensors if tensor is not None)


def _tensors(value: Any) -> Iterator[Tensor | None]:
    """The tensors of nested lists and tuples; None for anything else in them."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    else:
        yield value if isinstance(value, Tensor) else None


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()
