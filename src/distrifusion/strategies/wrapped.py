"""A model that is not cut, whose layers go around the ends of its picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError, DistrifusionError
from ..layers import Layer


class Wrapped:
    """Attaches ``layers`` to ``model`` until ``detach``.

    Raises:
        UnsupportedModel: another library has taken one of their modules over.
    """

    def __init__(self, model: Any, layers: Iterable[Layer], topology: str) -> None:
        self.model, self.topology = model, topology
        self._layers: list[Layer] = []
        try:
            for layer in list(layers):
                layer.attach()
                self._layers.append(layer)
        except DistrifusionError:
            self._let_go()
            raise

    @property
    def models(self) -> list[Any]:
        """The model."""
        return [self.model]

    def reset(self) -> None:
        """Nothing goes on from picture to picture."""

    def detach(self) -> None:
        """Give the modules their own forward back.

        Raises:
            ConfigError: another library has wrapped one of them since; nothing is undone then.
        """
        for layer in self._layers:
            if not layer.is_attached:
                raise ConfigError(
                    f"{type(layer.module).__name__} was wrapped by another library (offload, casting or cache hooks) "
                    "after df.parallelize; take that off before df.restore"
                )
        self._let_go()

    def _let_go(self) -> None:
        for layer in self._layers:
            layer.detach()
        self._layers.clear()
