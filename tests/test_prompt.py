"""What is made of the prompt: once per picture, and anew as soon as anything that it is made of has changed."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import distrifusion as df
from distrifusion.exchange import Absent
from distrifusion.geometry import Levels, Split
from distrifusion.layers import Frame, FrameHolder, PatchPrompt
from models import build, conditioning, distance, latents
from pipelines import NUMPY_WARNINGS, sample, sd
from transformers_cross import CROSS
from transformers_tiny import build as build_transformer
from transformers_video import VIDEO

pytestmark = NUMPY_WARNINGS

EXACT = 1e-5  # as everywhere: float32 sums in another order


class Once:
    """A layer over ``module``, the calls that ran it, and the plain module to compare with."""

    def __init__(self, module: nn.Module) -> None:
        holder = FrameHolder()
        self.module = module.eval().requires_grad_(False)
        self.layer = PatchPrompt(self.module, "text", holder)
        self.num_runs = 0
        compute = self.layer.compute

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.num_runs += 1
            return compute(*args, **kwargs)

        self.layer.compute = counted  # type: ignore[method-assign]
        self.layer.attach()
        levels = Levels((Split.even(4, 2),), (4,))
        holder.frame = Frame(0, 2, levels, Absent(0))
        self.memory = holder.frame.memory

    @torch.no_grad()
    def runs(self, *args: Any, **kwargs: Any) -> int:
        """How often the module ran in this call, whose result is the module's own."""
        before = self.num_runs
        result = self.module(*args, **kwargs)
        truth = type(self.module).forward(self.module, *args, **kwargs)
        assert torch.equal(result, truth)
        return self.num_runs - before


def lora() -> Any:
    module = nn.Sequential(nn.Linear(4, 3))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights="gaussian"), module)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    return module[0]


@pytest.fixture
def text() -> Tensor:
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


def test_the_same_tensor_runs_it_once_and_a_view_of_it_too(text: Tensor) -> None:
    once = Once(nn.Linear(4, 3))
    assert [once.runs(text), once.runs(text), once.runs(text.view(2, 5, 4)), once.runs(text[:])] == [1, 0, 0, 0]
    with torch.no_grad():
        assert once.module(text) is once.module(text)  # so that what follows knows it again


def test_another_tensor_of_equal_values_or_another_part_runs_it(text: Tensor) -> None:
    once = Once(nn.Linear(4, 3))
    assert [once.runs(text), once.runs(text), once.runs(text.clone())] == [1, 0, 1]
    once = Once(nn.Linear(4, 3))
    assert [once.runs(text), once.runs(text), once.runs(text[:1]), once.runs(text[:1])] == [1, 0, 1, 0]
    assert once.runs(text[1:]) == 1


def test_a_write_to_the_text_runs_it(text: Tensor) -> None:
    once = Once(nn.Linear(4, 3))
    for write in (lambda: text.add_(1), lambda: text[0].zero_(), lambda: text.view(-1).neg_()):
        assert [once.runs(text), once.runs(text)] == [1, 0]
        write()


def _assigns(module: Any) -> None:
    module.weight = nn.Parameter(torch.ones(3, 4), requires_grad=False)


def _swaps_data(module: Any) -> None:
    module.weight.data = module.weight.data * 2


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.weight.mul_(2),
        lambda module: module.bias.zero_(),
        _swaps_data,
        _assigns,
        lambda module: module.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.ones(3)}),
    ],
)
def test_a_change_of_weights_runs_it(text: Tensor, change: Callable[[Any], Any]) -> None:
    once = Once(nn.Linear(4, 3))
    assert [once.runs(text), once.runs(text)] == [1, 0]
    change(once.module)
    assert [once.runs(text), once.runs(text)] == [1, 0]


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.set_scale("default", 0.3),
        lambda module: module.scale_layer(0.5),
        lambda module: module.enable_adapters(False),
        lambda module: module.merge(),
        lambda module: module.lora_B["default"].weight.add_(1),
    ],
)
def test_a_change_of_an_adapter_runs_it(text: Tensor, change: Callable[[Any], Any]) -> None:
    once = Once(lora())
    assert [once.runs(text), once.runs(text)] == [1, 0]
    change(once.module)
    assert [once.runs(text), once.runs(text)] == [1, 0]


def test_what_a_processor_has_written_to_is_made_anew(text: Tensor) -> None:
    once = Once(nn.Linear(4, 3))
    assert once.runs(text) == 1
    with torch.no_grad():
        once.module(text)[0].zero_()
    assert [once.runs(text), once.runs(text)] == [1, 0]


def test_what_no_version_tells_runs_every_time(text: Tensor) -> None:
    once = Once(nn.Linear(4, 3))
    with torch.inference_mode():
        unknown = text * 1
        assert [once.runs(unknown), once.runs(unknown)] == [1, 1]
    assert [once.runs(text.detach()), once.runs(text.detach())] == [1, 1]  # its writes count for themselves


def test_autocast_runs_it(text: Tensor) -> None:
    once = Once(nn.Linear(4, 3))
    assert [once.runs(text), once.runs(text)] == [1, 0]
    with torch.autocast("cpu", torch.bfloat16):
        assert once.runs(text) == 1


def test_lists_of_tensors(text: Tensor) -> None:
    class Sums(nn.Module):
        def forward(self, parts: list[Tensor]) -> Tensor:
            return torch.cat(parts)

    once = Once(Sums())
    other = text.clone()
    assert [once.runs([text, other]), once.runs([text, other]), once.runs([other, text])] == [1, 0, 1]


def test_what_is_new_in_every_call_is_not_kept(text: Tensor) -> None:
    once = Once(nn.Linear(4, 3))
    for _ in range(3):
        fresh = text.clone()
        assert once.runs(fresh) == 1
    gone = weakref.ref(fresh)
    del fresh
    gc.collect()
    assert gone() is None
    assert once.memory == {"text": None}


def counting(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, str]]:
    """Runs of each module by (the module, its name): ranks have models of their own."""
    runs: Counter[tuple[int, str]] = Counter()
    compute = PatchPrompt.compute

    def counted(self: PatchPrompt, *args: Any, **kwargs: Any) -> Any:
        runs[id(self.module), self.key] += 1  # under the interpreter's lock, and no two ranks share a key
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(PatchPrompt, "compute", counted)
    return runs


def cross_attentions(model: Any) -> int:
    return sum(isinstance(each, Attention) and each.is_cross_attention for each in model.modules())


@pytest.mark.parametrize("strategy", ["sync", "displaced", "naive"])
@pytest.mark.parametrize("name", ["sdxl", "deepfloyd"])
def test_unet_keys_and_values_of_the_text_once_per_picture(
    monkeypatch: pytest.MonkeyPatch, name: str, strategy: Any
) -> None:
    runs = counting(monkeypatch)
    text, x = conditioning(name, 2), latents(name, 2)
    num_steps, models = 4, []

    def rank(comm: Any) -> list[Tensor]:
        model = df.parallelize(build(name), df.ParallelConfig(strategy=strategy), comm)
        models.append(model)  # so that no other module gets the id of one of its
        results = [model(x, 900 - 100 * i, **text).sample for i in range(num_steps)]
        df.reset(model)
        return [*results, model(x, 900, **text).sample]

    found = df.run_ranks(3, rank)
    assert set(runs.values()) == {2}  # pictures
    assert len(runs) >= 3 * 2 * cross_attentions(models[0])
    if strategy == "sync":
        truths = [build(name)(x, 900 - 100 * i, **text).sample for i in range(num_steps)]
        for results in found:
            assert all(distance(a, b) <= EXACT for a, b in zip(results, [*truths, truths[0]], strict=True))


@pytest.mark.parametrize("name", ["pixart", "sana", "hunyuan", "wan", "ltx"])
def test_transformers_read_the_text_once_per_picture(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    runs = counting(monkeypatch)
    tiny = {**CROSS, **VIDEO}[name]
    arguments, models = tiny.arguments(2, 7, 5), []

    def rank(comm: Any) -> list[Tensor]:
        model = df.parallelize(build_transformer(tiny), df.ParallelConfig(strategy="sync"), comm)
        models.append(model)
        return [model(**arguments)[0] for _ in range(4)]

    truth = build_transformer(tiny)(**arguments)[0]
    for results in df.run_ranks(3, rank):
        assert all(distance(result, truth) <= EXACT for result in results)
    assert runs
    assert set(runs.values()) == {1}


def test_two_branches_have_each_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = counting(monkeypatch)
    x, texts, models = latents("sd15"), [conditioning("sd15", seed=seed) for seed in (1, 2)], []

    def rank(comm: Any) -> list[Tensor]:
        model = df.parallelize(build("sd15"), df.ParallelConfig(strategy="sync"), comm)
        models.append(model)
        return [model(x, 900, **text).sample for _ in range(3) for text in texts]

    truths = [build("sd15")(x, 900, **text).sample for text in texts]
    for results in df.run_ranks(2, rank):
        assert all(distance(result, truths[i % 2]) <= EXACT for i, result in enumerate(results))
    assert set(runs.values()) == {2}


def test_a_callback_changes_the_prompt_in_mid_picture() -> None:
    """By another tensor, as pipelines that end guidance early do; by writing to it; and by a weight."""

    def draw(pipe: Any) -> list[Tensor]:
        def ends_guidance(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                pipe._guidance_scale = 1.0
                tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
            return tensors

        def writes(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            tensors["prompt_embeds"].mul_(1.3)
            return tensors

        def trains(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            for each in pipe.unet.modules():
                if isinstance(each, Attention) and each.is_cross_attention:
                    each.to_k.weight.mul_(1.5)
                    each.to_v.weight.mul_(1.5)
            return tensors

        return [
            sample(
                pipe,
                num_inference_steps=4,
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
            )
            for callback in (ends_guidance, writes, trains)
        ]

    truths, plain = draw(sd()), sample(sd(), num_inference_steps=4)
    assert all(distance(truth, plain) > 1e-3 for truth in truths)
    for results in df.run_ranks(2, lambda comm: draw(df.parallelize(sd(), df.ParallelConfig(strategy="sync"), comm))):
        assert all(distance(a, b) <= EXACT for a, b in zip(results, truths, strict=True))


def test_nothing_is_kept_after_reset_and_restore() -> None:
    x, text = latents("sd15"), conditioning("sd15")

    def rank(comm: Any) -> list[bool]:
        model = df.parallelize(build("sd15"), df.ParallelConfig(strategy="sync"), comm)
        gone = []
        for end in (df.reset, df.restore):
            model(x, 900, **text)
            memory = model._distrifusion._pictures._branches[0].state.memory
            kept = [weakref.ref(each.result) for each in memory.values()]
            del memory
            assert kept
            end(model)
            gc.collect()
            gone.append(all(ref() is None for ref in kept))
        return gone

    for gone in df.run_ranks(2, rank):
        assert gone == [True, True]


def test_a_forward_that_another_library_has_put_in_place_stays() -> None:
    """Layerwise casting, offload: the module then runs in every step, as it did."""
    tiny = CROSS["pixart"]
    arguments = tiny.arguments(1, 7, 5)

    def rank(comm: Any) -> tuple[Tensor, bool]:
        model = build_transformer(tiny)
        to_k = model.transformer_blocks[0].attn2.to_k
        to_k._hf_hook = None  # as accelerate marks it
        theirs = to_k.forward = lambda x: nn.Linear.forward(to_k, x)
        df.parallelize(model, df.ParallelConfig(strategy="sync"), comm)
        return model(**arguments)[0], to_k.forward is theirs

    truth = build_transformer(tiny)(**arguments)[0]
    for result, is_theirs in df.run_ranks(2, rank):
        assert distance(result, truth) <= EXACT
        assert is_theirs
