"""One copy of the weights for the ranks of a machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distrifusion as df
from distrifusion.bench.sharing import share_weights


def shared_by(num_ranks: int) -> list[tuple[bool, Tensor, Tensor]]:
    """Of each rank: whether it has the common weights, its own before, those it has then."""

    def rank(comm: Any) -> tuple[bool, Tensor, Tensor]:
        model = nn.Linear(3, 2)
        before = model.weight.detach().clone()
        return share_weights(model, comm), before, model.weight

    return df.run_ranks(num_ranks, rank)


def test_ranks_of_a_machine_have_one_copy_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ranks = shared_by(3)
    assert all(is_shared and torch.equal(weight, ranks[0][1]) for is_shared, _, weight in ranks)
    assert not list(tmp_path.iterdir())


def test_ranks_without_room_for_it_keep_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert all(not is_shared and torch.equal(weight, before) for is_shared, before, weight in shared_by(2))


def test_one_rank_alone_keeps_its_weights() -> None:
    [(is_shared, before, weight)] = shared_by(1)
    assert not is_shared
    assert torch.equal(weight, before)
