"""Which weights a rank needs, before there are any: of strategies under which the ranks share the model."""

from __future__ import annotations

from torch import nn

from ..config import ParallelConfig
from ..layers import FrameHolder, Sliced
from ..mesh import Mesh
from ..models import sliced_layers, stream_layers
from ..weights import Spans
from .streamed import stages_of

Held = tuple[Spans, int]
"""Of one weight: spans of a dim; none: nothing of it."""


def shares_model(mesh: Mesh) -> bool:
    """Whether the ranks of a branch of guidance share the model, and not the picture."""
    return mesh.size("pipe") > 1 or mesh.size("tensor") > 1


def shares_weights(config: ParallelConfig, mesh: Mesh) -> bool:
    """Whether each rank needs some of the weights only."""
    return mesh.size("tensor") > 1 or (mesh.size("pipe") > 1 and config.patches is not None)


def holding(model: nn.Module, config: ParallelConfig, mesh: Mesh, rank: int) -> dict[str, Held]:
    """What ``rank`` needs of the weights of ``model``, which may be on the ``meta`` device, by name.

    What is not named is needed whole.

    Raises:
        ConfigError: fewer blocks than stages, or fewer heads, groups or features than ranks.
        UnsupportedModel: the model, or a part of it, is not known in stages or in slices.
    """
    holder, found = FrameHolder(), dict[int, Held]()
    num_slices, num_stages = mesh.size("tensor"), mesh.size("pipe")
    if num_slices > 1:
        for layer in sliced_layers(model, mesh.coordinate(rank, "tensor"), num_slices, holder):
            assert isinstance(layer, Sliced)
            found |= {id(getattr(layer.module, name)): held for name, held in layer.slices.items()}
    elif num_stages > 1 and config.patches is not None:
        units, owners = stages_of(list(stream_layers(model, num_stages, holder)), num_stages)
        for unit, owner in zip(units, owners, strict=True):
            if owner != mesh.coordinate(rank, "pipe"):
                found |= {id(weight): ((), 0) for weight in unit.parameters()}
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {names[key]: held for key, held in found.items()}
