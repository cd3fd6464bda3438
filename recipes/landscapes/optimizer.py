"""Muon for the matrices, AdamW for the rest; over processes, each orthogonalises its share of the matrices."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

SMALLEST = 16  # rows and columns of a matrix that is worth orthogonalising


class Optimizer:
    """Steps a model whose gradients are the same on all processes.

    A convolution's weight ``[out, in, k, k]`` counts as the matrix ``[out, in k k]``. Embeddings, norms, biases and
    thin matrices go to AdamW. Muon's steps are scaled to the size of AdamW's (``match_rms_adamw``): one rate for both.
    """

    def __init__(self, model: nn.Module, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self._weights: list[Tensor] = []
        others: list[Tensor] = []
        for weight in model.parameters():
            thin = weight.ndim < 2 or min(weight.shape[0], weight[0].numel()) < SMALLEST
            (others if thin or id(weight) in embeddings else self._weights).append(weight)
        self._matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in self._weights]
        assert all(m.data_ptr() == w.data_ptr() for m, w in zip(self._matrices, self._weights, strict=True))
        self._muon = torch.optim.Muon(
            self._share(rank), momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        self._adam = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def step(self, rate: float) -> None:
        """One step at ``rate``."""
        for optimizer in (self._muon, self._adam):
            for group in optimizer.param_groups:
                group["lr"] = rate
        for matrix, weight in zip(self._matrices, self._weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self._muon.step()
        self._adam.step()
        for owner in range(self._world if self._world > 1 else 0):
            self._spread(owner)

    def save(self, folder: Path) -> None:
        """Write this process's state."""
        path = self._path(folder)
        torch.save({"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote with the same number of processes; start anew where there is none."""
        if self._path(folder).exists():
            saved = torch.load(self._path(folder))
            self._muon.load_state_dict(saved["muon"])
            self._adam.load_state_dict(saved["adam"])

    def _share(self, rank: int) -> list[nn.Parameter]:
        by_size = sorted(range(len(self._matrices)), key=lambda index: -self._matrices[index].numel())
        return [self._matrices[index] for index in by_size[rank :: self._world]]

    @torch.no_grad()
    def _spread(self, owner: int) -> None:
        share = self._share(owner)
        flat = torch.cat([matrix.reshape(-1) for matrix in share])
        dist.broadcast(flat, owner)
        if owner != self._rank:
            for matrix, values in zip(share, flat.split([matrix.numel() for matrix in share]), strict=True):
                matrix.copy_(values.view_as(matrix))

    def _path(self, folder: Path) -> Path:
        return folder / f"optimizer_{self._rank}_of_{self._world}.pt"
