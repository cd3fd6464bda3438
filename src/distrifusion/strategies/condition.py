"""A ControlNet that runs whole on every rank looks at what rank 0's looks at.

Pipelines of SD3 and HunyuanDiT draw the latents of a control image from torch's global generator, whatever generator
they were given: each rank has other ones, and patches that were led by other pictures do not fit together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..comm import Comm
from ..models.table import bind
from .agreement import agree

_NAME = "controlnet_cond"


class SharedCondition:
    """Before each call of ``net``, its condition becomes rank 0's, from `attach` to `detach`. It travels once."""

    def __init__(self, net: nn.Module, comm: Comm) -> None:
        self._net, self._comm = net, comm
        self._given: Any = None  # held, so that no other can have come to lie in its place
        self._shared: Any = None
        self._hook: RemovableHandle | None = None

    def attach(self) -> None:
        """Begin."""
        self._hook = self._net.register_forward_pre_hook(self._share, with_kwargs=True)

    def detach(self) -> None:
        """Leave the ControlNet as it was."""
        if self._hook is not None:
            self._hook.remove()

    def _share(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        arguments = bind(type(net).forward, net, args, kwargs)
        given = arguments.get(_NAME)
        if not isinstance(given, Tensor):
            return args, kwargs
        if given is not self._given:
            agree(self._comm, {"control image": f"{tuple(given.shape)}, {given.dtype}"})
            self._given, self._shared = given, given.detach().contiguous().clone()
            self._comm.broadcast(self._shared)
        return (), {**arguments, _NAME: self._shared}
