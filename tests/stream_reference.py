"""Patches that stream through stages, on one device, written without the package: what `patches` must give.

The whole model runs once for each patch, on the whole picture. Before each attention over image tokens, those of the
other patches are replaced by what they were in their own last run: of this step for patches that went before, of the
step before for those to come. What comes out is right for the tokens of the patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class StreamReference:
    """One step after the other: the first ``num_exact`` calls are exact.

    ``attentions`` are the names of modules whose ``hidden_states`` end with the picture's tokens; ``bounds`` are those
    of the patches, in tokens.
    """

    def __init__(self, model: Any, attentions: Sequence[str], bounds: Sequence[int], num_exact: int = 1) -> None:
        self._model, self._bounds, self._num_exact = model, bounds, num_exact
        self._seen: dict[str, Tensor] = {}
        self._patch: int | None = None
        for name in attentions:
            model.get_submodule(name).register_forward_pre_hook(self._hook(name), with_kwargs=True)

    def step(self, rows: Sequence[slice], dim: int, **arguments: Any) -> Tensor:
        """The prediction; ``rows`` of it along ``dim`` are those of the patches."""
        if self._num_exact > 0:
            self._num_exact -= 1
            return self._model(**arguments)[0]
        parts = []
        for self._patch, own in enumerate(rows):
            whole = self._model(**arguments)[0]
            parts.append(whole.narrow(dim, own.start, own.stop - own.start))
        self._patch = None
        return torch.cat(parts, dim)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            image = hidden[:, -self._bounds[-1] :]
            if self._patch is None:
                self._seen[name] = image.clone()
                return None
            own = slice(self._bounds[self._patch], self._bounds[self._patch + 1])
            self._seen[name][:, own] = image[:, own]
            mixed = torch.cat([hidden[:, : -self._bounds[-1]], self._seen[name]], 1)
            return ((mixed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": mixed})

        return hook
