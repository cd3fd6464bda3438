"""Matrix products by oneDNN: the same numbers, only where asked for or much faster, and nothing else touched."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import distrifusion as df
from distrifusion import pipeline, products
from distrifusion.products import FLASH, Products, fast_products, without_products
from models import build, conditioning, distance, latents
from transformers_cross import CROSS
from transformers_joint import JOINT
from transformers_tiny import build as build_transformer
from vaes import build_vae, decoded, latents_of

pytestmark = pytest.mark.skipif(not products._has_onednn(), reason="this torch is built without oneDNN")

# Sums of some hundred float32 products in another order: 3e-7 against float64, torch's own as much.
EXACT = 1e-6
# As in test_unet_exact.py: such sums once per layer.
EXACT_MODEL = 1e-5


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Asked for, however small; what oneDNN was given."""
    found: list[Any] = []
    product, convolution = products._product, torch.mkldnn_convolution
    monkeypatch.setenv(products.SWITCH, "1")
    monkeypatch.setattr(products, "LEAST_WORK", 0)
    monkeypatch.setattr(products, "LEAST_KEYS", 1)
    monkeypatch.setattr(products, "_product", lambda *given: found.append(given) or product(*given))
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda *given: found.append(given) or convolution(*given))
    with torch.no_grad():
        yield found


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(num_tokens: int, seed: int, *, width: int = 40) -> Tensor:
    """``[2, 3, tokens, D]`` in an attention's layout, which is not contiguous."""
    return noise(2, num_tokens, 3, width, seed=seed).transpose(1, 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 300, 64), (2, 7, 64), (64,), (3, 2, 5, 64), (0, 64)])
def test_linear_is_the_same(calls: list[Any], shape: tuple[int, ...], bias: bool) -> None:
    layer, x = nn.Linear(64, 33, bias=bias), noise(*shape)
    with Products():
        result = layer(x)
    assert calls
    assert result.shape == (*shape[:-1], 33)
    assert not result.numel() or distance(result, layer.double()(x.double())) <= EXACT


def test_linear_of_what_is_not_contiguous_is_the_same(calls: list[Any]) -> None:
    weight = noise(64, 33)
    for x in (noise(64, 90).t(), noise(2, 90, 128)[..., ::2], noise(2, 3, 90, 64).transpose(1, 2)):
        for rows in (weight.t(), noise(33, 128)[:, :64], noise(1, 64).expand(33, 64)):
            with Products():
                result = F.linear(x, rows)
            assert distance(result, F.linear(x.double(), rows.double())) <= EXACT
    assert len(calls) == 9


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_window_of_one_pixel_is_the_same(calls: list[Any], memory_format: torch.memory_format) -> None:
    layer, x = nn.Conv2d(40, 24, 1), noise(2, 40, 9, 7).to(memory_format=memory_format)
    with Products():
        result = layer(x)
    assert len(calls) == 1
    assert distance(result, layer.double()(x.double())) <= EXACT


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("queries", "keys"), [(70, 90), (1, 90), (70, 1), (600, 1100)])
def test_attention_is_the_same(calls: list[Any], queries: int, keys: int, scale: float | None) -> None:
    query, key, value = heads(queries, 1), heads(keys, 2), heads(keys, 3)
    precise = [each.double() for each in (query, key, value)]
    truth = F.scaled_dot_product_attention(*precise, scale=scale)
    with Products():
        result = F.scaled_dot_product_attention(query, key, value, scale=scale)
        one_by_one = list(calls)
        also, sums = FLASH(query, key, value, 0.0, False, attn_mask=None, scale=scale)  # as compilers call it
    assert one_by_one
    assert len(calls) == 2 * len(one_by_one)
    assert result.shape == query.shape
    assert result.transpose(1, 2).is_contiguous()  # as torch's own: heads side by side again without a copy
    assert torch.equal(result, also)
    assert distance(result, truth) <= EXACT
    scores = precise[0] @ precise[1].transpose(2, 3) * (40**-0.5 if scale is None else scale)
    assert sums.dtype == torch.float32
    assert distance(sums, scores.logsumexp(-1)) <= EXACT


def test_large_logits_do_not_overflow(calls: list[Any]) -> None:
    query, key, value = 100 * heads(20, 1), heads(30, 2), heads(30, 3)
    truth = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    with Products():
        result, sums = FLASH(query, key, value)
    assert calls
    assert torch.isfinite(sums).all()
    # Scores are some hundred, so that float32 rounds them at 1e-5, and their exponentials with them.
    assert distance(result, truth) <= 1e-4


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.linear(noise(4, 8).double(), noise(3, 8).double()),
        lambda: F.linear(noise(4, 8).bfloat16(), noise(3, 8).bfloat16()),
        lambda: F.linear(noise(4, 8), noise(8)),
        lambda: F.conv2d(noise(1, 8, 5, 5), noise(3, 8, 3, 3)),
        lambda: F.conv2d(noise(1, 8, 5, 5), noise(3, 8, 1, 1), None, (2, 2), (0, 0), (1, 1), 1),
        lambda: F.conv2d(noise(1, 8, 5, 5), noise(8, 2, 1, 1), None, (1, 1), (0, 0), (1, 1), 4),
        lambda: F.conv2d(noise(1, 8, 5, 5), noise(3, 8, 1, 1), padding=1),
        lambda: F.scaled_dot_product_attention(heads(9, 1), heads(7, 2), heads(7, 3), torch.zeros(9, 7)),
        lambda: F.scaled_dot_product_attention(heads(9, 1), heads(9, 2), heads(9, 3), is_causal=True),
        lambda: F.scaled_dot_product_attention(heads(9, 1)[0], heads(7, 2)[0], heads(7, 3)[0]),
        lambda: F.scaled_dot_product_attention(heads(9, 1), heads(7, 2)[:, :1], heads(7, 3)[:, :1], enable_gqa=True),
        lambda: FLASH(heads(9, 1), heads(7, 2), heads(7, 3), attn_mask=torch.zeros(9, 7))[0],
        lambda: F.linear(noise(4, 8).to_mkldnn(), noise(3, 8).to_mkldnn()).to_dense(),
    ],
)
def test_what_is_not_known_is_left_to_torch(calls: list[Any], call: Any) -> None:
    expected = call()
    with Products():
        result = call()
    assert torch.equal(result, expected)
    assert not calls


def test_what_is_small_is_left_to_torch(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST_WORK", 1 << 22)  # less than in earnest, so that the test takes no time
    monkeypatch.setattr(products, "LEAST_KEYS", 256)
    few, many = noise(1023, 64), noise(1024, 64)
    with Products():
        F.linear(few, noise(64, 64))
        F.scaled_dot_product_attention(heads(900, 1), heads(255, 2), heads(255, 3))
        assert not calls
        F.linear(many, noise(64, 64))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("said", "gain", "expected"), [("", 1.29, False), ("", 1.31, True), ("0", 9.0, False), ("1", 1.0, True)]
)
def test_it_is_taken_where_it_pays_or_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, said: str, gain: float, expected: bool
) -> None:
    times = []
    monkeypatch.setattr(products, "_may_gain", lambda: True)
    monkeypatch.setattr(products, "_measured", lambda: times.append(1) or gain)
    monkeypatch.setattr(products, "_found", functools.cache(products._found.__wrapped__))
    monkeypatch.setenv(products.SWITCH, said)
    for _ in range(2):
        assert products.is_wanted() == expected
    assert len(times) == (said == "")


def test_only_float32_of_the_cpu_is_hooked() -> None:
    assert isinstance(fast_products(noise(1), nn.Identity()), Products)
    for other in (noise(1).double(), noise(1).bfloat16(), torch.empty(1, device="meta")):
        assert not isinstance(fast_products(other, nn.Identity()), Products)
    with torch.autocast("cpu", torch.bfloat16):
        assert not isinstance(fast_products(noise(1), nn.Identity()), Products)


def test_a_rank_that_does_not_want_them_decides_for_all(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, False])  # thread ranks share an environment: the second to ask says no
    monkeypatch.setattr(pipeline, "is_wanted", lambda: next(answers))

    def rank(comm: Any) -> None:
        df.parallelize(build("sd15"), None, comm)(latents("sd15"), 500, **conditioning("sd15"))

    df.run_ranks(2, rank)
    assert not calls


def test_what_cannot_gain_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_may_gain", lambda: False)
    monkeypatch.setattr(products, "_measured", lambda: pytest.fail("timed"))
    assert not products._found.__wrapped__()


def test_timing_tells_how_many_times_faster_it_is() -> None:
    assert 0.1 < products._measured(rounds=1) < 100


def test_a_switch_that_says_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.SWITCH, "yes")
    model = build("sd15")

    def rank(comm: Any) -> str:
        with pytest.raises(df.ConfigError) as refused:
            df.parallelize(model, None, comm)
        return str(refused.value)

    expected = "DISTRIFUSION_ONEDNN='yes' must be 0 (torch's own matrix products) or 1 (oneDNN's)"
    assert df.run_ranks(2, rank) == [expected] * 2


@pytest.mark.parametrize(("world", "split", "batch"), [(2, "rows", 1), (3, "cols", 3), (5, "rows", 2)])
@pytest.mark.parametrize("name", ["sdxl", "deepfloyd"])
def test_sync_is_one_device(calls: list[Any], name: str, world: int, split: Any, batch: int) -> None:
    sample, arguments = latents(name, batch, 20, 12), conditioning(name, batch)
    truth = build(name)(sample, 500, **arguments).sample
    assert not calls  # of a model that is not parallel

    def rank(comm: Any) -> Tensor:
        model = df.parallelize(build(name), df.ParallelConfig(strategy="sync", split=split), comm)
        return model(sample, 500, **arguments).sample

    for result in df.run_ranks(world, rank):
        assert distance(result, truth) <= EXACT_MODEL
    assert calls


@pytest.mark.parametrize(("tiny", "world"), [(CROSS["pixart"], 3), (JOINT["flux"], 5), (JOINT["sd3"], 2)])
@pytest.mark.parametrize("strategy", ["sync", "pipelined", "tensor"])
def test_a_transformer_is_one_device(calls: list[Any], tiny: Any, world: int, strategy: Any) -> None:
    world = 2 if strategy != "sync" else world
    arguments = tiny.arguments(2, 7, 5)
    truth = build_transformer(tiny)(**arguments)[0]

    def rank(comm: Any) -> Tensor:
        config = df.ParallelConfig(strategy=strategy, warmup_steps=1)
        result: Tensor = df.parallelize(build_transformer(tiny), config, comm)(**arguments)[0]
        return result

    for result in df.run_ranks(world, rank):
        assert distance(result, truth) <= EXACT_MODEL
    assert calls


def test_a_vae_is_one_device(calls: list[Any]) -> None:
    x = latents_of("kl-attention", 2, 7, 5)
    truth = decoded(build_vae("kl-attention"), x)
    assert not calls
    for result in df.run_ranks(3, lambda comm: decoded(df.parallelize(build_vae("kl-attention"), None, comm), x)):
        assert distance(result, truth) <= EXACT_MODEL
    assert calls


def test_planned_memory_is_that_of_torchs_own(calls: list[Any]) -> None:
    def rank(comm: Any) -> None:
        config = df.ParallelConfig(max_memory="8GiB")
        df.parallelize(build("sdxl"), config, comm)(latents("sdxl"), 500, **conditioning("sdxl"))
        decoded(df.parallelize(build_vae("kl"), config, comm), latents_of("kl"))

    df.run_ranks(2, rank)
    assert not calls


def test_what_has_no_product_is_not_hooked(calls: list[Any]) -> None:
    class Other(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    @without_products
    def work(x: Tensor) -> Tensor:
        """As ever."""
        return F.linear(x, x)

    seen: list[Any] = []
    assert work.__doc__ == "As ever."
    with Products():
        work(noise(3, 3))
        assert not calls
        with Other():  # a hook that is not ours stays
            work(noise(3, 3))
        assert F.linear in seen
        assert len(calls) == 1
        F.linear(noise(3, 3), noise(3, 3))
    assert len(calls) == 2


def in_place(model: nn.Sequential) -> None:
    model.compile(backend="eager")


def a_part(model: nn.Sequential) -> None:
    model[1].compile(backend="eager")


def within(model: nn.Sequential) -> None:
    model[1] = torch.compile(model[1], backend="eager")  # type: ignore[assignment]


@pytest.mark.parametrize("compiled", [in_place, a_part, within])
def test_what_is_compiled_is_left_to_the_compiler(calls: list[Any], compiled: Any) -> None:
    """That whole models are, and run, is in test_compile.py, where all is asked for."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert isinstance(fast_products(noise(1), model), Products)
    compiled(model)
    assert not isinstance(fast_products(noise(1), model), Products)
