"""Tokens beside the picture's, of the text and of further pictures: the ranks share them out, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import distrifusion as df
import transformers_joint
from distrifusion.exchange import Fresh
from distrifusion.geometry import Levels, Split
from distrifusion.layers import Frame
from distrifusion.layers.masks import widened
from models import distance
from transformers_joint import JOINT
from transformers_tiny import build

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

EXACT = 1e-5
ROWS, COLS = 7, 5
SYNC = df.ParallelConfig(strategy="sync")
DISPLACED = df.ParallelConfig(strategy="displaced", warmup_steps=0)


def arguments_of(name: str, num_words: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(transformers_joint, "TEXT", num_words)
    return JOINT[name].arguments(batch, ROWS, COLS)


@pytest.mark.parametrize(
    ("name", "num_words", "world", "batch"),
    [
        ("flux", 3, 2, 2),
        ("flux", 4, 5, 1),  # fewer words than ranks: all compute all
        ("sd35", 13, 3, 2),
        ("qwen", 7, 5, 2),  # with texts of several lengths: a mask of keys
        ("chroma", 11, 3, 2),  # with a mask of queries and keys
        ("flux2-edit", 5, 5, 1),
    ],
)
def test_texts_of_any_length_are_exact(
    name: str, num_words: int, world: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sync, and displaced with a held input, of whose words the peers' are one step old."""
    arguments = arguments_of(name, num_words, batch, monkeypatch)
    truth = build(JOINT[name])(**arguments)[0]

    def rank(comm: Any) -> list[Tensor]:
        fresh = df.parallelize(build(JOINT[name]), SYNC, comm)(**arguments)[0]
        model = df.parallelize(build(JOINT[name]), DISPLACED, comm)
        return [fresh, *(model(**arguments)[0] for _ in range(3))]

    for results in df.run_ranks(world, rank):
        for result in results:
            num_tokens = result.shape[1]  # a picture's own, where guests follow
            assert distance(result, truth[:, :num_tokens]) <= EXACT


@pytest.mark.parametrize("name", ["flux", "flux-kontext", "sd3", "qwen-layers"])
def test_the_work_of_a_rank_falls_with_the_world_however_long_the_text(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 words beside 35 tokens of picture, and up to 35 of guests: a rank would have three quarters of the work."""
    arguments = arguments_of(name, 70, 1, monkeypatch)

    def work(model: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            model(**arguments)
        return counter.get_total_flops()

    whole = work(build(JOINT[name]))
    for part in df.run_ranks(2, lambda comm: work(df.parallelize(build(JOINT[name]), SYNC, comm))):
        assert part < 0.6 * whole  # 4 of 7 rows are 0.57; what is done for a picture and not for a token, on all ranks


@pytest.mark.parametrize(
    ("strategy", "world", "num_words", "shares"),
    [
        ("sync", 3, 8, [3, 2, 3]),  # as of 7 rows, which are cut at 3 and 5
        ("displaced", 2, 5, [2, 3]),
        ("sync", 3, 2, [2, 2, 2]),
        ("naive", 2, 8, [8, 8]),
    ],
)
def test_who_computes_which_words(
    strategy: Any, world: int, num_words: int, shares: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without peers, or words for all of them, every rank computes all."""
    arguments = arguments_of("flux", num_words, 1, monkeypatch)
    config = df.ParallelConfig(strategy=strategy, warmup_steps=0)

    def rank(comm: Any) -> set[int]:
        model, seen = build(JOINT["flux"]), set[int]()
        model.context_embedder.register_forward_hook(lambda _module, _args, out: seen.add(out.shape[1]))
        df.parallelize(model, config, comm)
        for _ in range(2):
            model(**arguments)
        return seen

    assert df.run_ranks(world, rank) == [{share} for share in shares]


def test_a_mask_of_all_queries_that_was_not_made_for_the_patch_is_refused() -> None:
    """Of 4 of 7 rows of 5, and 3 of 5 words."""
    split = Split((0, 4, 7))
    frame = Frame(0, 2, Levels((split, split), (5, 5)), Fresh(None), words=Split((0, 3, 5)))  # type: ignore[arg-type]
    assert widened(torch.ones(1, 1, 1, 25), frame, "last", 23, 40, "attn").shape == (1, 1, 1, 40)
    with pytest.raises(df.UnsupportedModel, match=r"attn: .*\(1, 1, 60, 60\) goes across patches; only one of 5 tok"):
        widened(torch.ones(1, 1, 60, 60), frame, "last", 23, 40, "attn")
