"""Where a model may be cut into stages: the modules whose outputs can go to another rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..errors import ConfigError, UnsupportedModel
from ..layers import FrameHolder, Layer, StageUnit
from .plan import Plan, matching
from .transformer import TransformerTable
from .unet import FAMILIES

Groups = list[tuple[str, ...]]
"""Names of modules; those of one tuple stay together."""


def stage_layers(
    model: Any, plan: Plan | None, num_stages: int, holder: FrameHolder, inner: Iterable[Layer] = ()
) -> Iterator[Layer]:
    """The units of ``model`` and the layers ``inner``, not attached; ``plan`` is that of a transformer.

    Raises:
        ConfigError: fewer units than stages.
        UnsupportedModel: it is neither a transformer nor a U-Net.
    """
    if plan is None and type(model) not in FAMILIES:
        raise UnsupportedModel(f"{type(model).__name__} is not known in stages; use another strategy than 'pipelined'")
    groups = _of_blocks(model, plan) if plan is not None else _of_unet(model)
    return _units(model, groups, num_stages, holder, inner)


def stream_layers(model: Any, plan: Plan | None, num_stages: int, holder: FrameHolder) -> Iterator[Layer]:
    """The units of a transformer, in the order they run, and its patch layers: for patches that stream through stages.

    Raises:
        ConfigError: fewer units than stages.
        UnsupportedModel: it is no transformer, or has a module that would be computed wrongly in patches.
    """
    if plan is None:
        raise UnsupportedModel(
            f"patches of strategy='pipelined' are for transformers, not for {type(model).__name__}, "
            "whose convolutions read all of a picture: leave patches out"
        )
    inner = TransformerTable(model, plan).layers(holder)
    return _units(model, _of_blocks(model, plan), num_stages, holder, inner)


def _units(model: Any, groups: Groups, num_stages: int, holder: FrameHolder, inner: Iterable[Layer]) -> Iterator[Layer]:
    """``inner``, but for those that run within a unit because they are of the same module, and then the units."""
    if len(groups) < num_stages:
        raise ConfigError(
            f"{type(model).__name__} of {len(groups)} blocks cannot be cut into {num_stages} stages: "
            f"pipe={len(groups)} is the most"
        )
    units = [
        StageUnit(model.get_submodule(name), name, holder, group=group)
        for group, names in enumerate(groups)
        for name in names
    ]
    by_place = {unit.place: unit for unit in units}
    for layer in inner:
        if layer.place in by_place:
            by_place[layer.place].inside = layer
        else:
            yield layer
    yield from units


def _of_unet(model: Any) -> Groups:
    """Resnets, attentions and samplers; the other modules are small, and every rank runs them."""
    groups: Groups = [("conv_in",)]
    for name in ("down_blocks", "mid_block", "up_blocks"):
        blocks = getattr(model, name)
        if blocks is None:
            continue
        named = blocks.named_children() if isinstance(blocks, nn.ModuleList) else [("", blocks)]
        for i, block in named:
            for kind, children in block.named_children():
                if isinstance(children, nn.ModuleList):
                    prefix = ".".join(filter(None, (name, i, kind)))
                    groups += [(f"{prefix}.{j}",) for j, _ in children.named_children()]
    ends = ("conv_norm_out", "conv_act", "conv_out")
    return [*groups, tuple(name for name in ends if getattr(model, name, None) is not None)]


def _of_blocks(model: Any, plan: Plan) -> Groups:
    """The blocks with attention over image tokens, in the order they run."""
    patterns = dict.fromkeys(f"{pattern.partition('*')[0]}*" for pattern in (*plan.seams, *plan.sums))
    return [(name,) for each in patterns for name, _ in model.named_modules() if matching(name, [each])]
