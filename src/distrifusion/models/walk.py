"""The walk through a model's modules, which makes layers of those that are known and refuses the others by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import UnsupportedModel
from ..layers import FrameHolder, Layer


@dataclass(frozen=True)
class Place:
    """Where the walk through a model stands: what the modules below inherit."""

    level: int
    level_out: int
    extra: tuple[int, int] = (0, 0)  # zeros that the module around pads before and after
    reads_whole: bool = False

    def then(self, level: int) -> Place:
        """A place wholly on ``level``."""
        return Place(level, level)


HARMLESS_HOOKS = frozenset(
    {
        "group_offloading",
        "layer_execution_tracker",
        "layerwise_casting",
        "lazy_prefetch_group_offloading",
        "peft_autocast_disable",
    }
)
"""Hooks of diffusers that move or cast weights and leave the computation alone."""


@dataclass
class Walk:
    """Goes through a module tree and turns what it knows into layers. Everything must be known by class."""

    holder: FrameHolder
    known_seams: Mapping[type, Rule]
    containers: tuple[type, ...]
    local: tuple[type, ...]
    adapter: Callable[[nn.Module], Rule | None]
    seen: set[int] = field(default_factory=set)  # a module may be registered under two names

    def __call__(self, module: nn.Module, name: str, place: Place) -> Iterator[Layer]:
        """Layers of ``module`` and everything below it.

        Raises:
            UnsupportedModel: names the module and its class.
        """
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        check_module(module, name)
        rule = self.known_seams.get(type(module)) or self.adapter(module)
        if rule is not None:
            yield from rule(self, module, name, place)
        elif type(module) in self.containers:
            yield from self.children(module, name, place)
        elif not isinstance(module, nn.Linear) and type(module) not in self.local:
            raise unsupported(module, name)

    def children(self, module: nn.Module, name: str, place: Place, skip: Sequence[str] = ()) -> Iterator[Layer]:
        """Layers of all children but those named in ``skip``."""
        for child_name, child in module.named_children():
            if child_name not in skip:
                yield from self(child, f"{name}.{child_name}", place)


def check_module(module: nn.Module, name: str) -> None:
    """Refuse what makes any module wrong in patches, whatever its class.

    Raises:
        UnsupportedModel: dropout that is on, or a forward that another library has put in place of the class's own,
            which may do anything.
    """
    if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
        raise UnsupportedModel(f"{name} drops at random, differently on each rank: call .eval() on the model")
    forward = module.__dict__.get("forward")
    if forward is None or isinstance(getattr(forward, "__self__", None), Layer):
        return
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
    strange = [hook for hook in hooks if hook not in HARMLESS_HOOKS] if hooks is not None else []
    if strange:
        raise unsupported(module, name, f"has the hook {strange[0]!r}, which is not known; take it off")
    if hooks is None and not hasattr(module, "_hf_hook"):
        raise unsupported(module, name, "has a forward that another library has put in place of its own; take it off")


Rule = Callable[[Walk, Any, str, Place], Iterator[Layer]]
"""The layers of one kind of module: ``(walk, module, name, place)``."""


def unsupported(
    module: nn.Module, name: str, why: str = "is not known, and may read beyond its rows"
) -> UnsupportedModel:
    """The error that names a module."""
    return UnsupportedModel(f"{name} ({type(module).__name__}) {why}")
