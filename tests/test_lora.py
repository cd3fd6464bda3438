"""LoRA through peft on a parallel model: loaded before or after, switched, mixed, fused, unloaded, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

import distrifusion as df
from models import distance
from pipelines import (
    ALWAYS_WARM,
    CFG,
    COLS,
    DISPLACED,
    EXACT,
    NUMPY_WARNINGS,
    SYNC,
    check,
    controlnet,
    drawing,
    picture,
    sample,
    sd,
    sdxl,
    unet,
)

pytestmark = [
    *NUMPY_WARNINGS,
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),  # two adapters
    pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning"),  # layers whose only adapter was deleted
    pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning"),  # not all layers match
]

LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
CONV = [
    *("conv_in", "conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "conv_out"),
    *("downsamplers.0.conv", "upsamplers.0.conv"),
]


def config(targets: Sequence[str]) -> Any:
    return LoraConfig(r=3, lora_alpha=3, target_modules=list(targets), init_lora_weights="gaussian")


@cache
def weights(kind: str, targets: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    """A LoRA as its files hold it, with no part zero."""
    model = unet(kind)
    with drawing(seed):
        model.add_adapter(config(targets))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    return {f"unet.{name}": value.detach().clone() for name, value in state.items()}


def load(pipe: Any, name: str, targets: Sequence[str], *, seed: int = 0, kind: str = "sd") -> Any:
    # accelerate's loading without memory swaps a method of nn.Module for all threads, and ranks are threads here.
    state = dict(weights(kind, tuple(targets), seed))
    pipe.load_lora_weights(state, adapter_name=name, low_cpu_mem_usage=False)
    return pipe


def short(pipe: Any, **more: Any) -> Tensor:
    return sample(pipe, num_inference_steps=2, **more)


for targets in (LINEAR, CONV):  # before there are ranks, whose threads would build them at once
    weights("sd", tuple(targets), 0)


@pytest.mark.parametrize("targets", [LINEAR, CONV], ids=["linear", "conv"])
def test_loaded_before(targets: list[str]) -> None:
    def make() -> Any:
        return load(sd(), "a", targets)

    assert distance(short(make()), short(sd())) > 0.02
    check(make, short)


@pytest.mark.parametrize(("kind", "config"), [("sd", COLS), ("sd-pads-after", SYNC)])
def test_convolutions_that_stride(kind: str, config: df.ParallelConfig) -> None:
    """LoRA's second convolution stands behind the stride, its first before."""
    weights(kind, tuple(CONV), 0)
    check(
        lambda: sd(kind=kind), lambda pipe: short(load(pipe, "a", CONV, kind=kind), height=72, width=56), config=config
    )


def changing(pipe: Any) -> list[Tensor]:
    """All that one does to adapters, with a picture after each."""
    pictures = [short(pipe)]
    load(pipe, "a", LINEAR)
    pictures.append(short(pipe))
    pictures.append(short(pipe, cross_attention_kwargs={"scale": 0.5}))
    load(pipe, "b", CONV)
    pictures.append(short(pipe))
    pipe.set_adapters(["a", "b"], [0.3, 0.8])
    pictures.append(short(pipe))
    pipe.disable_lora()
    pictures.append(short(pipe))
    pipe.enable_lora()
    pipe.delete_adapters("a")
    pictures.append(short(pipe))
    pipe.fuse_lora()
    pictures.append(short(pipe))
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    pictures.append(short(pipe))
    return pictures


@pytest.mark.parametrize(("config", "world"), [(SYNC, 3), (ALWAYS_WARM, 2), (CFG, 4)], ids=str)
def test_loaded_switched_mixed_fused_and_unloaded_after(config: df.ParallelConfig, world: int) -> None:
    pictures = changing(sd())
    for i, one in enumerate(pictures):
        same = [j for j, other in enumerate(pictures) if distance(one, other) < 1e-4 and j != i]
        assert same == {0: [5, 8], 5: [0, 8], 8: [0, 5], 6: [7], 7: [6]}.get(i, []), f"picture {i} is as {same}"
    check(sd, changing, worlds=(world,), config=config)


def test_sdxl() -> None:
    weights("sdxl", tuple(LINEAR), 0)
    check(sdxl, lambda pipe: short(load(pipe, "a", LINEAR, kind="sdxl")), worlds=(2,))


def test_loading_in_a_callback_starts_anew() -> None:
    def midway(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            load(pipe, "a", CONV)
        return tensors

    def call(pipe: Any) -> Tensor:
        return sample(pipe, num_inference_steps=4, callback_on_step_end=midway)

    check(sd, call, worlds=(3,))

    def rank(comm: Any) -> list[str]:
        pipe = df.parallelize(sd(), DISPLACED, comm)
        call(pipe)
        return df.report(pipe).kinds

    assert df.run_ranks(2, rank) == [["sync", "displaced"]] * 2  # those of the model as it is since


def test_an_adapter_of_the_same_name_is_another() -> None:
    """Without a scheduler nothing but the adapters tells that the model has changed."""
    x, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(5)
    text = torch.zeros(1, 9, 12)

    def calls(model: Any) -> list[Tensor]:
        outputs = [model(x, t, text).sample]
        for targets in (LINEAR, CONV, CONV):
            with drawing(1):
                model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "same")
            outputs.append(model(x, t, text).sample)
            model.delete_adapters("same")
        return [output.detach() for output in outputs]

    def bare() -> Any:
        return unet("sd")

    truths = calls(bare())
    assert distance(truths[2], truths[3]) < 1e-6
    assert distance(truths[2], truths[0]) > 0.02 < distance(truths[2], truths[1])
    check(bare, calls, worlds=(3,))


def test_restored_while_loaded() -> None:
    def rank(comm: Any) -> None:
        pipe = load(sd(), "a", CONV)
        before = short(pipe)
        df.parallelize(pipe, SYNC, comm)
        assert distance(short(pipe), before) <= EXACT
        df.restore(pipe)
        assert not any("forward" in module.__dict__ for module in pipe.unet.modules())
        assert torch.equal(short(pipe), before)
        pipe.unload_lora_weights()
        assert torch.equal(short(pipe), short(sd()))

    df.run_ranks(2, rank)


def test_on_a_controlnet() -> None:
    """In its stem too: it then runs whole, and only its output is cut."""

    def make() -> Any:
        pipe = sd(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet())
        with drawing(4):
            targets = [*LINEAR, "conv1", "conv_in", "controlnet_cond_embedding.conv_out", "controlnet_mid_block"]
            pipe.controlnet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        return pipe

    def call(pipe: Any) -> Tensor:
        return short(pipe, image=picture(), height=..., width=...)

    plain = call(sd(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet()))
    assert distance(call(make()), plain) > 0.02
    check(make, call, worlds=(3,))
