"""Attention to own tokens while the peers' travel: equal to attention to all of them, begun before they are there."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

import distrifusion as df
from distrifusion.comm.threads import ThreadComm
from distrifusion.layers import attention, merge, seam
from distrifusion.layers.merge import attend_own_first, can_merge
from models import build, conditioning, distance, latents
from process_pool import ProcessPool
from transformers_cross import CROSS
from transformers_joint import JOINT
from transformers_tiny import build as build_transformer
from transformers_video import VIDEO

# Weights of two parts are exponentials of float32 logarithms: some 1e-7.
EXACT = 1e-5
# bfloat16 has 8 bits; each part is rounded to it once, the kernel's own result too.
EXACT_BF16 = 1e-2


def heads(num_tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[2, 3, tokens, 8]`` in an attention's layout, which is not contiguous."""
    noise = torch.randn(2, num_tokens, 3, 8, generator=torch.Generator().manual_seed(seed))
    return (2 * noise).to(dtype).transpose(1, 2)


@pytest.mark.parametrize(("own", "others"), [(7, 5), (1, 12), (40, 3), (6, 0)])
@pytest.mark.parametrize("scale", [None, 1.7])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, EXACT), (torch.bfloat16, EXACT_BF16)])
def test_equals_attention_to_all(own: int, others: int, scale: float | None, dtype: torch.dtype, limit: float) -> None:
    query = heads(own, 0, dtype)
    keys, values = ([heads(own, seed, dtype), heads(others, seed + 1, dtype)] for seed in (1, 3))
    truth = F.scaled_dot_product_attention(query, torch.cat(keys, 2), torch.cat(values, 2), scale=scale)
    result = attend_own_first(query, keys[0], values[0], lambda: (keys[1], values[1]), scale)
    assert result.dtype == dtype
    assert distance(result, truth) <= limit


def test_large_logits_do_not_overflow() -> None:
    query = 100 * heads(4, 0)
    keys, values = ([heads(4, seed), heads(5, seed + 1)] for seed in (1, 3))
    truth = F.scaled_dot_product_attention(query, torch.cat(keys, 2), torch.cat(values, 2))
    assert distance(attend_own_first(query, keys[0], values[0], lambda: (keys[1], values[1])), truth) <= EXACT


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.zeros(7, 7)},
        {"dropout_p": 0.1},
        {"is_causal": True},
        {"enable_gqa": True},
        {"of_later_torch": 1},
    ],
)
def test_what_is_not_plain_is_not_merged(options: dict[str, Any]) -> None:
    query = heads(7, 0)
    assert can_merge(query, query, query, None, scale=0.3, dropout_p=0.0)
    assert not can_merge(query, query, query, **options)
    assert not can_merge(query.double(), query.double(), query.double())


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Threads that say they are slow, and the number of own keys of every attention that began with these."""
    begun: list[int] = []

    def counted(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        begun.append(key.shape[2])
        return merge.attend_own_first(query, key, *args, **kwargs)

    monkeypatch.setattr(ThreadComm, "is_slow", True)
    monkeypatch.setattr(attention, "attend_own_first", counted)
    monkeypatch.setattr(seam, "attend_own_first", counted)
    return begun


@pytest.mark.parametrize(("world", "split"), [(2, "rows"), (3, "cols"), (5, "rows")])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "ddim"])
def test_unets(slow: list[int], name: str, world: int, split: Any) -> None:
    x, text = latents(name, 2, 20, 28), conditioning(name, 2)
    truth = build(name)(x, 500, **text).sample
    config = df.ParallelConfig(strategy="sync", split=split)
    for result in df.run_ranks(world, lambda comm: df.parallelize(build(name), config, comm)(x, 500, **text).sample):
        assert distance(result, truth) <= EXACT
    assert slow


@pytest.mark.parametrize(("world", "split"), [(2, "cols"), (3, "rows"), (5, "rows")])
@pytest.mark.parametrize("name", ["sd3", "sd35", "pixart", "hunyuan", "auraflow", "cogvideox-5b"])
def test_transformers(slow: list[int], name: str, world: int, split: Any) -> None:
    tiny = {**CROSS, **JOINT, **VIDEO}[name]
    arguments = tiny.arguments(2, 7, 5)
    truth = build_transformer(tiny)(**arguments)[0]
    config = df.ParallelConfig(strategy="sync", split=split)

    def rank(comm: Any) -> Tensor:
        return df.parallelize(build_transformer(tiny), config, comm)(**arguments)[0]

    for result in df.run_ranks(world, rank):
        assert distance(result, truth) <= EXACT
    assert slow


@pytest.mark.parametrize("name", ["qwen", "cogview4"])
def test_an_attention_through_diffusers_dispatch_or_with_a_mask_waits(slow: list[int], name: str) -> None:
    tiny = JOINT[name]
    arguments = tiny.arguments(2, 7, 5)

    def rank(comm: Any) -> Tensor:
        return df.parallelize(build_transformer(tiny), df.ParallelConfig(strategy="sync"), comm)(**arguments)[0]

    for result in df.run_ranks(2, rank):
        assert distance(result, build_transformer(tiny)(**arguments)[0]) <= EXACT
    assert not slow


def test_own_tokens_come_before_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    plain = merge._attention

    def watched(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        order.append(f"attends to {key.shape[2]}")
        return plain(query, key, value, scale)

    monkeypatch.setattr(merge, "_attention", watched)
    query = heads(4, 0)

    def arriving() -> tuple[Tensor, Tensor]:
        order.append("waits")
        return heads(5, 1), heads(5, 2)

    merge.attend_own_first(query, heads(4, 3), heads(4, 4), arriving)
    assert order == ["attends to 4", "waits", "attends to 5"]


@pytest.mark.parametrize("strategy", ["displaced", "naive"])
def test_nothing_is_split_where_nothing_is_waited_for(slow: list[int], strategy: Any) -> None:
    x, text = latents("sd15", 1), conditioning("sd15", 1)

    def rank(comm: Any) -> None:
        model = df.parallelize(build("sd15"), df.ParallelConfig(strategy=strategy, warmup_steps=0), comm)
        for _ in range(3):
            model(x, 500, **text)

    df.run_ranks(2, rank)
    attentions = [each for each in build("sd15").modules() if isinstance(each, Attention)]
    num_seams = sum(not each.is_cross_attention for each in attentions)
    assert len(slow) == (2 * num_seams if strategy == "displaced" else 0)  # in the one synchronous step, on both ranks


def over_gloo(comm: Any) -> tuple[str, Tensor]:
    os.environ["DISTRIFUSION_SHARED_MEMORY"] = "0"
    try:
        part = comm.split([list(range(comm.world))])
    finally:
        del os.environ["DISTRIFUSION_SHARED_MEMORY"]
    model = df.parallelize(build("sd15"), df.ParallelConfig(strategy="sync"), part)
    with torch.no_grad():
        result = model(latents("sd15", 2, 20, 28), 500, **conditioning("sd15", 2)).sample
    wire = part.wire
    part.close()
    return wire, result


def test_over_gloo(pool: ProcessPool) -> None:
    truth = build("sd15")(latents("sd15", 2, 20, 28), 500, **conditioning("sd15", 2)).sample
    for wire, result in pool.run(over_gloo, 3):
        assert wire == "gloo"
        assert distance(result, truth) <= EXACT
