"""The layers of one model that have taken over their modules."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import DistrifusionError
from .base import Layer


class Attached:
    """Attached layers, by their place. Models change: adapters bring modules, and take them away again."""

    def __init__(self) -> None:
        self._layers: dict[tuple[int, str], Layer] = {}

    def follow(self, layers: Iterable[Layer]) -> None:
        """Attach those of ``layers`` that are new, and let go of those that are no longer among them.

        Raises:
            DistrifusionError: one cannot be made, and nothing changes; or cannot be attached, and none is any more.
        """
        wanted = {layer.place: layer for layer in layers}
        for known in [known for known in self._layers if known not in wanted]:
            self._layers.pop(known).detach()
        for known, layer in wanted.items():
            if known not in self._layers and not layer.gives_way:
                try:
                    layer.attach()
                except DistrifusionError:
                    self.detach()
                    raise
                self._layers[known] = layer

    def detach(self) -> None:
        """Give all modules their own methods back."""
        for layer in self._layers.values():
            layer.detach()
        self._layers.clear()

    def lost(self) -> list[nn.Module]:
        """Modules that another library has taken over since."""
        return [layer.module for layer in self._layers.values() if not layer.is_attached]
