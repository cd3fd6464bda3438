"""How much memory tensors take while a model runs, told by a run in which nothing is computed."""

from __future__ import annotations

import ctypes
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import UnsupportedModel

T = TypeVar("T")


class Rehearsal:
    """A run without computing: tensors have shapes and dtypes, and claim their device, but no memory.

    ``peak`` is the most bytes that tensors had which were made in it, and what kernels need beside them.
    """

    def __init__(self, mode: FakeTensorMode, model: nn.Module) -> None:
        self._mode = mode
        self._footprint = _Footprint()
        self._model = model
        self.stand_in(list(_weights(model)))

    @property
    def peak(self) -> int:
        """Bytes."""
        return self._footprint.peak

    def stand_in(self, value: T) -> T:
        """The same with a tensor without memory in the place of each tensor, which counts as there already."""

        def replaced(tensor: Tensor) -> Tensor:
            fake = tensor if isinstance(tensor, FakeTensor) else self._mode.from_tensor(tensor)
            self._footprint.know(fake)
            return fake

        result: T = tree_map_only(Tensor, replaced, value)
        return result

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, torch computes nothing, and the memory is counted.

        Raises:
            UnsupportedModel: the model asks what is in a tensor.
        """
        try:
            with self._weightless(), self._mode, self._footprint, torch.no_grad():
                yield
        except (DataDependentOutputException, DynamicOutputShapeException) as failure:
            raise UnsupportedModel(
                f"{type(self._model).__name__} looks at values while it runs ({failure.func}), so that max_memory "
                "cannot be planned; leave it out"
            ) from failure

    @contextmanager
    def _weightless(self) -> Iterator[None]:
        """Stand-ins in the place of the weights: torch remembers what an operation gives for these, not for others."""
        modules = list(self._model.modules())
        caching = {family: _caching(family) for family in set(map(type, modules))}
        with _as_before(self._model):
            for module in modules:
                tables: tuple[dict[str, Any], ...] = module._parameters, module._buffers
                for table in tables:
                    table.update({name: self.stand_in(each) for name, each in table.items() if each is not None})
                for name in caching[type(module)]:
                    vars(module)[name] = MethodType(inspect.unwrap(getattr(type(module), name)), module)
            yield


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Afterwards ``model`` holds what it held: tables of positions that it has made within have no numbers in them."""
    kept = [(each, each.copy()) for each in _holdings(model)]
    try:
        yield
    finally:
        for each, before in kept:
            if isinstance(each, list):
                each[:] = before
                continue
            for name in each.keys() - before.keys():
                del each[name]
            each.update({name: value for name, value in before.items() if each.get(name, kept) is not value})


def _holdings(model: nn.Module) -> Iterator[Any]:
    """Dicts and lists in which modules keep things, and so do objects of theirs that are none, such as processors."""
    found: list[Any] = list(model.modules())
    seen = set[int]()
    while found:
        each = found.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        own = each if type(each) in (dict, list) else vars(each)
        yield own
        for value in own.values() if isinstance(own, dict) else own:
            is_object = type(getattr(value, "__dict__", None)) is dict
            if type(value) in (dict, list) or (is_object and type(value).__module__.split(".")[0] not in _OTHERS):
                found.append(value)


_OTHERS = {"builtins", "torch", __package__}
"""Whose objects are not of a model: functions, tensors and weights, layers of ours."""


def _caching(family: type[nn.Module]) -> set[str]:
    """Methods of a class that are `functools.lru_cache`'s, or functions around one, as diffusers makes them."""

    def is_cached(value: Any) -> bool:
        with suppress(ValueError):  # a cell that is empty
            inside = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
            return hasattr(value, "__wrapped__") and any(hasattr(each, "cache_parameters") for each in (value, *inside))
        return False

    return {name for base in family.__mro__ for name, value in vars(base).items() if is_cached(value)}


def rehearsal(model: nn.Module) -> Rehearsal:
    """A rehearsal of ``model``, whose weights count as there already. They may be `imagined`.

    Raises:
        UnsupportedModel: parts of it are compiled: what a graph holds is not known before it has run.
    """
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise UnsupportedModel(
            f"{type(model).__name__} is compiled, so that max_memory cannot be planned; leave one out"
        )
    modes = [weight.fake_mode for weight in _weights(model) if isinstance(weight, FakeTensor)]
    return Rehearsal(modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True), model)


def imagined(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A model that ``make`` builds, with weights of ``dtype`` that take no memory: for rehearsals alone."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make().eval()
        for module in model.modules():  # Module.to cannot exchange weights without memory
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = nn.Parameter(_cast(weight.detach(), dtype), requires_grad=False)
            for name, values in module._buffers.items():
                module._buffers[name] = None if values is None else _cast(values, dtype)
    return model


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) if values.is_floating_point() else values


def weight_bytes(*models: nn.Module) -> int:
    """Bytes of the weights and buffers of ``models``, each once."""
    tensors = {id(each): each for model in models for each in _weights(model)}
    return sum(each.numel() * each.element_size() for each in tensors.values())


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


class _Footprint(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes behind tensors from their making to their end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._sizes: dict[int, int] = {}  # by storage
        self._known: dict[int, Any] = {}  # storages that do not count, held so that no other gets their address

    def know(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's hook below every operation."""
        result = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        for tensor in made:
            storage = tensor.untyped_storage()
            place = storage._cdata
            if place not in self._sizes and place not in self._known:
                self._sizes[place] = storage.nbytes()
                self._live += self._sizes[place]
                weakref.finalize(storage, self._free, place)
        self.peak = max(self.peak, self._live + _scratch(func, args, made))
        return result

    def _free(self, place: int) -> None:
        self._live -= self._sizes.pop(place)


def _scratch(func: Any, args: Any, made: list[Tensor]) -> int:
    """What a kernel needs beside its result.

    On a CPU oneDNN lays out the input of a convolution anew, and then its output, but for 1 x 1 in float32. Where torch
    keeps a convolution of frames to itself, of few channels, it has a column of all that is read for each pixel that is
    made. On accelerators the libraries choose by what is free.
    """
    if func is not torch.ops.aten.convolution.default or args[0].device.type != "cpu":
        return 0
    x: Tensor = args[0]
    weight: Tensor = args[1]
    if torch._C._select_conv_backend(*args).name == "Slow3d":
        return weight[0].numel() * made[0].numel() // len(weight) * x.element_size()
    is_matmul = weight.shape[2:].numel() == 1 and x.dtype == torch.float32
    return 0 if is_matmul else max(each.numel() * each.element_size() for each in (x, made[0]))


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
_BLOCK = 1 << 20


def give_back_at_once() -> None:
    """On a CPU, let the system have freed tensors of over a MiB back, in this process and from now on.

    glibc keeps blocks of up to 32 MiB for itself, in pieces that fit nothing else: with activations of some 10 MiB a
    process came to hold twice what its tensors took. Elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _BLOCK)
        mallopt(_TRIM_THRESHOLD, _BLOCK)
