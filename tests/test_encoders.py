"""Text encoders that run once: the same picture on every rank, who runs them, and memory where that was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

import distrifusion as df
from distrifusion.strategies.encoders import SharedEncoder
from models import distance
from pipelines import EXACT, NUMPY_WARNINGS, check, drawing, sample, sd, sdxl

pytestmark = NUMPY_WARNINGS

WAYS = ("once", "freed", "every")
PROMPTS = ["a hill", "lakes"]


def config(way: str, **more: Any) -> df.ParallelConfig:
    return df.ParallelConfig(strategy="sync", text_encoders=way, **more)  # type: ignore[arg-type]


def counted(module: Any, runs: list[str], name: str) -> None:
    """Notes each run of the encoder itself: of its embedding, since its ``forward`` is taken over."""
    module.get_input_embeddings().register_forward_hook(lambda *_: runs.append(name))


@pytest.mark.parametrize("way", WAYS)
def test_the_picture_is_one_devices(way: str) -> None:
    latents = torch.ones(2, 4, 16, 16)
    check(sdxl, lambda pipe: sample(pipe, PROMPTS, generator=None, latents=latents), config=config(way))
    check(sd, lambda pipe: sample(pipe, negative_prompt="red"), config=config(way, cfg=2), worlds=(2, 4))


@pytest.mark.parametrize(("way", "expected"), [("once", 1), ("freed", 1), ("every", 3)])
def test_each_encoder_runs_on_one_rank(way: str, expected: int) -> None:
    def rank(comm: Any) -> list[str]:
        pipe, runs = sdxl(), []
        counted(pipe.text_encoder, runs, "first")
        counted(pipe.text_encoder_2, runs, "second")
        df.parallelize(pipe, config(way), comm)
        sample(pipe, guidance_scale=1.0)
        return runs

    runs = df.run_ranks(3, rank)
    assert sum(each.count("first") for each in runs) == expected
    assert sum(each.count("second") for each in runs) == expected
    if way != "every":
        assert runs == [["first"], ["second"], []], "spread over the ranks"


def test_freed_memory_comes_back_with_restore() -> None:
    def num_values(pipe: Any) -> int:
        return sum(weight.numel() for weight in pipe.text_encoder.parameters())

    def rank(comm: Any) -> tuple[int, int, int, Tensor]:
        pipe = sd()
        vectors = sum(weight.numel() for weight in pipe.text_encoder.parameters() if weight.dim() == 1)
        truth = {name: weight.clone() for name, weight in pipe.text_encoder.state_dict().items()}
        before = num_values(pipe)
        df.parallelize(pipe, config("freed"), comm)
        freed = num_values(pipe)
        assert pipe.text_encoder.dtype == torch.float32
        assert pipe.device == torch.device("cpu")
        df.restore(pipe)
        found = pipe.text_encoder.state_dict()
        assert found.keys() == truth.keys()
        assert all(torch.equal(found[name], truth[name]) for name in truth), "bit for bit"
        assert "forward" not in pipe.text_encoder.__dict__
        assert freed == (before if comm.rank == 0 else vectors)
        return before, vectors, num_values(pipe), sample(pipe)

    alone = sample(sd())
    for before, vectors, after, latents in df.run_ranks(3, rank):
        assert after == before > 5 * vectors
        assert torch.equal(latents, alone)


def test_pipelines_that_share_an_encoder() -> None:
    def both(pipes: tuple[Any, Any]) -> Tensor:
        return torch.stack([sample(pipe) for pipe in pipes])

    def rank(comm: Any) -> Tensor:
        first = sd()
        second = sd(text_encoder=first.text_encoder)
        pipes = df.parallelize(first, config("once"), comm), df.parallelize(second, config("once"), comm)
        found = both(pipes)
        df.restore(first)
        return torch.stack([found, both(pipes)])  # the second runs its encoder on every rank now

    truth = both((sd(), sd()))
    for found in df.run_ranks(2, rank):
        assert distance(found[0], truth) <= EXACT
        assert distance(found[1], truth) <= EXACT


def test_an_offload_hook_on_one_rank_is_told_and_one_that_came_later_is_not_left_behind() -> None:
    def rank(comm: Any) -> None:
        pipe = sd()
        if comm.rank:
            pipe.text_encoder._hf_hook = "as accelerate marks it"
        df.parallelize(pipe, config("once"), comm)

    with pytest.raises(df.RanksDisagree, match="text encoders that run once differs: rank 0 has text_encoder, rank 1"):
        df.run_ranks(2, rank)

    def later(comm: Any) -> None:
        pipe = df.parallelize(sd(), config("once"), comm)
        pipe.text_encoder._hf_hook = "as accelerate marks it"
        pipe.text_encoder.forward = pipe.text_encoder.forward.__wrapped__
        with pytest.raises(df.ConfigError, match="the forward of text_encoder was replaced"):
            df.restore(pipe)

    df.run_ranks(2, later)


def test_other_prompts_are_told() -> None:
    def rank(comm: Any) -> None:
        sample(df.parallelize(sd(), config("once"), comm), PROMPTS[comm.rank])

    with pytest.raises(df.RanksDisagree, match=r"input of text_encoder \(the prompt\) differs"):
        df.run_ranks(2, rank)


def test_a_failing_encoder_is_told_on_every_rank() -> None:
    class Broken(torch.nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            raise IndexError(f"token {int(tokens.max())} of 5")

    def rank(comm: Any) -> str:
        module = Broken()
        SharedEncoder(module, "text_encoder", comm, owner=1)
        with pytest.raises((IndexError, df.DistrifusionError)) as caught:
            module(torch.tensor([9]))
        return f"{caught.type.__name__}: {caught.value}"

    told = "text_encoder failed on rank 1: IndexError: token 9 of 5"
    assert df.run_ranks(3, rank) == [
        f"DistrifusionError: {told}",
        "IndexError: token 9 of 5",
        f"DistrifusionError: {told}",
    ]


def test_what_an_encoder_gives_arrives_as_it_is(ranks: Any) -> None:
    for found in ranks.run(2, hidden_states):
        assert found == (True, True, True, True)


def hidden_states(comm: Any) -> tuple[bool, bool, bool, bool]:
    with drawing(5):
        settings = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=11)
        encoder = T5EncoderModel(settings).eval().requires_grad_(False).to(torch.bfloat16)
    tokens, mask = torch.tensor([[3, 4, 1], [5, 1, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    truth = encoder(tokens, attention_mask=mask, output_hidden_states=True)
    SharedEncoder(encoder, "text_encoder", comm, owner=comm.world - 1)
    found = encoder(tokens, attention_mask=mask, output_hidden_states=True)
    same = [torch.equal(mine, yours) for mine, yours in zip(found.hidden_states, truth.hidden_states, strict=True)]
    is_one = found.hidden_states[-1] is found.last_hidden_state
    was_one = truth.hidden_states[-1] is truth.last_hidden_state
    return type(found) is type(truth), torch.equal(found[0], truth[0]), all(same) and len(same) == 3, is_one == was_one


def test_no_such_way() -> None:
    with pytest.raises(df.ConfigError, match=r"text_encoders='twice' must be one of 'once', 'freed', 'every'"):
        config("twice")
