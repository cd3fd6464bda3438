"""Displaced patch parallelism on one device, written without the package: what `displaced` must give, step by step.

The whole model runs once per rank, on whole feature maps. Before each layer that looks beyond its position, the map is
mixed: own positions of this run, all others as their owners had them one step ago. What comes out is right in the own
positions, and wrong in the others, where it is replaced before the next such layer.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


def owners(bounds: tuple[int, ...], height: int, width: int, dim: int) -> Tensor:
    """Who owns each position ``[height, width]`` of a level, whose patches begin at ``bounds`` along ``dim``."""
    positions = torch.arange(height).view(-1, 1) if dim == 2 else torch.arange(width).view(1, -1)
    return torch.bucketize(positions, torch.tensor(bounds[1:-1]), right=True).expand(height, width)


class DisplacedReference:
    """One step after the other: the first call is exact, each later one uses the peers' features of the call before.

    ``levels`` has the owners ``[height, width]`` of each level of the model; no two levels have the same size.
    """

    def __init__(self, model: Any, levels: list[Tensor], num_ranks: int, group_norm: str) -> None:
        self._model = model
        self._owners = {tuple(level.shape): level for level in levels}
        self._by_tokens = {level.numel(): level.reshape(-1) for level in levels}
        self._num_ranks = num_ranks
        self._group_norm = group_norm
        self._before: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        self._rank: int | None = None
        for name, module in model.named_modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_hook(self._norm(name))
            elif isinstance(module, Attention | Upsample2D) or (isinstance(module, nn.Conv2d) and name != "conv_in"):
                module.register_forward_pre_hook(self._mixing(name), with_kwargs=True)

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The prediction of the next step."""
        self._now = {}
        if not self._before:
            whole = self._model(*args, **kwargs).sample
        else:
            whole = torch.zeros_like(args[0])
            for rank in range(self._num_ranks):
                self._rank = rank
                whole = torch.where(self._mine(whole), self._model(*args, **kwargs).sample, whole)
            self._rank = None
        self._before = self._now
        return whole

    def _mine(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return self._owners[tuple(x.shape[2:])] == self._rank
        return (self._by_tokens[x.shape[1]] == self._rank).unsqueeze(-1)

    def _mix(self, name: str, x: Tensor) -> Tensor:
        if self._rank is None:
            self._now[name] = x.clone()
            return x
        mine = self._mine(x)
        self._now[name] = torch.where(mine, x, self._now.get(name, x))
        return torch.where(mine, x, self._before[name])

    def _mixing(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if kwargs.get("encoder_hidden_states") is not None:
                return None  # to text, which is whole
            return (self._mix(name, args[0]), *args[1:]), kwargs

        return hook

    def _norm(self, name: str) -> Any:
        def hook(module: nn.GroupNorm, args: tuple[Tensor], output: Tensor) -> Tensor:
            (x,) = args
            before = self._before.get(name)
            mixed = self._mix(name, x)
            if self._rank is None:
                return output
            assert before is not None
            mine = self._mine(x).expand_as(x)
            groups = [t.reshape(x.shape[0] * module.num_groups, -1) for t in (x, before, mixed, mine)]
            own, own_before = groups[0][groups[3]], groups[1][groups[3]]
            own, own_before = (t.view(len(groups[0]), -1).double() for t in (own, own_before))
            mean, var = self._statistics(own, own_before, groups[1].double(), groups[2].double())
            shape = (x.shape[0], module.num_groups, 1, 1, 1)
            split = x.double().view(x.shape[0], module.num_groups, -1, *x.shape[2:])
            normed = ((split - mean.view(shape)) / (var.view(shape) + module.eps).sqrt()).view(x.shape)
            affine = normed * module.weight.double().view(-1, 1, 1) + module.bias.double().view(-1, 1, 1)
            return affine.to(x.dtype)

        return hook

    def _statistics(self, own: Tensor, own_before: Tensor, before: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of groups ``[K, elements]``; corrected ones as in the paper, by raw moments, and the own
        variance where they are less than what the own patch adds to the whole.
        """
        if self._group_norm == "separate":
            return own.mean(1), own.var(1, unbiased=False)
        if self._group_norm == "stale":
            return mixed.mean(1), mixed.var(1, unbiased=False)
        first = before.mean(1) + own.mean(1) - own_before.mean(1)
        second = (before**2).mean(1) + (own**2).mean(1) - (own_before**2).mean(1)
        var = second - first**2
        added = ((own - first[:, None]) ** 2).sum(1) / before.shape[1]
        return first, torch.where(var < 0.99 * added, own.var(1, unbiased=False), var)
