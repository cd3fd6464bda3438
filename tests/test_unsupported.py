"""Never a silently wrong picture: what reads beyond its rows and is not known is refused, and the module named."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.upsampling import Upsample2D
from peft import LoHaConfig, LoraConfig
from torch import Tensor, nn

import distrifusion as df
from distrifusion.models import supported
from distrifusion.models.plans import PLANS
from distrifusion.models.vaes import PLANS as VAES
from models import distance
from pipelines import DISPLACED, EXACT, NUMPY_WARNINGS, SYNC, UNETS, check, drawing, sample, sd, unet

pytestmark = NUMPY_WARNINGS


def refused(make: Callable[[], Any], match: str, error: type[Exception] = df.UnsupportedModel) -> None:
    """``parallelize`` refuses the model, and leaves nothing behind."""

    def rank(comm: Any) -> None:
        model = make()
        before = {name for name, module in model.named_modules() if "forward" in module.__dict__}
        with pytest.raises(error, match=match):
            df.parallelize(model, SYNC, comm)
        assert {name for name, module in model.named_modules() if "forward" in module.__dict__} == before
        assert not hasattr(model, "_distrifusion")

    df.run_ranks(2, rank)


def refused_later(change: Callable[[Any], Any], match: str, undo: Callable[[Any], Any] | None = None) -> None:
    """The next picture of a parallel pipeline is refused; once the change is undone, it is exact again."""
    truth = sample(sd(), num_inference_steps=2)

    def rank(comm: Any) -> None:
        pipe = df.parallelize(sd(), DISPLACED, comm)
        sample(pipe, num_inference_steps=2)
        change(pipe)
        with pytest.raises(df.UnsupportedModel, match=match):
            sample(pipe, num_inference_steps=2)
        with pytest.raises(df.UnsupportedModel, match=match):  # and does not go through at the second try
            sample(pipe, num_inference_steps=2)
        if undo is not None:
            undo(pipe)
            df.restore(pipe)
            df.parallelize(pipe, SYNC, comm)
            assert distance(sample(pipe, num_inference_steps=2), truth) <= EXACT

    df.run_ranks(2, rank)


class Blur(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 3, 1, 1)


def with_blur() -> Any:
    model = unet("sd")
    model.up_blocks[1].resnets[0].nonlinearity = Blur()
    return model


def with_blocks(*names: str) -> Any:
    """UNet2DModel of other blocks, wide enough for their group norm."""
    return diffusers.UNet2DModel(
        in_channels=3,
        out_channels=3,
        down_block_types=names,
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
    ).eval()


def karras() -> Any:
    return diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=None,
        norm_eps=1e-5,
        mid_block_type=None,
        cross_attention_dim=12,
        attention_head_dim=8,
        act_fn="gelu",
        time_embedding_type="fourier",
        conv_in_kernel=1,
        conv_out_kernel=1,
        resnet_time_scale_shift="scale_shift",
        timestep_post_act="gelu",
    ).eval()


def circular() -> Any:
    model = unet("sd")
    model.down_blocks[0].resnets[0].conv1.padding_mode = "circular"
    return model


def transposed() -> Any:
    model = unet("sd")
    model.up_blocks[0].upsamplers[0] = Upsample2D(16, use_conv_transpose=True)
    return model


def gated() -> Any:
    return diffusers.UNet2DConditionModel(**{**UNETS["sd"], "attention_type": "gated"}).eval()


def train() -> Any:
    return diffusers.UNet2DConditionModel(**UNETS["sd"], dropout=0.1).train()


def adapted(config: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = unet("sd")
        with drawing(0):
            model.add_adapter(config)
        return model.eval()

    return make


def merged_tokens() -> Any:
    """As ToMe does: the class of a block replaced."""

    class ToMeBlock(BasicTransformerBlock):
        pass

    model = unet("sd")
    model.down_blocks[0].attentions[0].transformer_blocks[0].__class__ = ToMeBlock
    return model


def tiled() -> Any:
    """As HyperTile does: the forward of an attention replaced."""
    model = unet("sd")
    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.forward = functools.partial(type(attention).forward, attention)
    return model


def deep_cached() -> Any:
    """As DeepCache does: the forward of a block replaced."""
    model = unet("sd")
    block = model.down_blocks[0]
    block.forward = functools.partial(type(block).forward, block)
    return model


def offloaded() -> Any:
    return cpu_offload(unet("sd"), execution_device="cpu")


def cast() -> Any:
    model = unet("sd")
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    return model


def hooked() -> Any:
    model = unet("sd")
    HookRegistry.check_if_exists_or_initialize(model.mid_block).register_hook(ModelHook(), "first_block_cache")
    return model


class Another(diffusers.UNet2DConditionModel):
    pass


def subclass() -> Any:
    model = unet("sd")
    model.__class__ = Another
    return model


def prior() -> Any:
    return diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an unknown module": (with_blur, r"up_blocks.1.resnets.0.nonlinearity \(Blur\) is not known"),
    "skip blocks": (
        lambda: with_blocks("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        r"down_blocks.0 \(SkipDownBlock2D\) is not known",
    ),
    "Karras blocks": (karras, r"down_blocks.0 \(KDownBlock2D\) is not known"),
    "circular padding": (circular, r"down_blocks.0.resnets.0.conv1 \(Conv2d\) with padding_mode='circular'"),
    "transposed convolution": (transposed, r"up_blocks.0.upsamplers.0 \(Upsample2D\) with a transposed"),
    "GLIGEN": (gated, r"transformer_blocks.0.fuser \(GatedSelfAttentionDense\) is not known"),
    "dropout in training": (train, r"down_blocks.0.resnets.0.dropout drops at random.*\.eval\(\)"),
    "DoRA on convolutions": (
        adapted(LoraConfig(r=2, target_modules=["conv1"], use_dora=True)),
        r"conv1.lora_magnitude_vector.default \(DoraConv2dLayer\) is not known",
    ),
    "LoHa on convolutions": (
        adapted(LoHaConfig(r=2, target_modules=["conv1"])),
        r"resnets.0.conv1 \(Conv2d\) is not known",
    ),
    "ToMe": (merged_tokens, r"transformer_blocks.0 \(ToMeBlock\) is not known"),
    "HyperTile": (tiled, r"attn1 \(Attention\) has a forward that another library has put"),
    "DeepCache": (deep_cached, r"down_blocks.0 \(CrossAttnDownBlock2D\) has a forward that another library"),
    "sequential offload": (offloaded, r"conv_in \(Conv2d\): another library has replaced its forward"),
    "layerwise casting": (cast, r"conv_in \(Conv2d\): another library has replaced its forward"),
    "a cache hook": (hooked, r"mid_block \(UNetMidBlock2DCrossAttn\) has the hook 'first_block_cache'"),
    "a subclass": (subclass, r"Another has no table; known are: UNet2DConditionModel, UNet2DModel"),
    "a prior": (prior, r"PriorTransformer has no table; known are: UNet2DConditionModel, .*SD3Transformer2DModel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_first_step(name: str) -> None:
    refused(*REFUSED[name])


def test_refused_inside_a_pipeline() -> None:
    def make() -> Any:
        pipe = sd()
        pipe.unet = subclass()
        return pipe

    def rank(comm: Any) -> None:
        with pytest.raises(df.UnsupportedModel, match="Another has no table"):
            df.parallelize(make(), SYNC, comm)
        with pytest.raises(df.UnsupportedModel, match="str is neither a diffusers pipeline nor a denoiser"):
            df.parallelize("a path", SYNC, comm)

    df.run_ranks(2, rank)


def fuse(pipe: Any) -> None:
    pipe.unet.fuse_qkv_projections()


class Odd(AttnProcessor2_0):
    pass


def odd(pipe: Any) -> None:
    pipe.unet.set_attn_processor(Odd())


def seamless(pipe: Any) -> None:
    for module in pipe.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


def flat(pipe: Any) -> None:
    for module in pipe.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "zeros"


def tile(pipe: Any) -> None:
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert isinstance(attention, Attention)
    attention.forward = functools.partial(attention.forward)


LATER: dict[str, tuple[Callable[[Any], Any], str, Callable[[Any], Any] | None]] = {
    "FreeU": (lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4), "has FreeU on", lambda pipe: pipe.disable_freeu()),
    "fused projections": (
        fuse,
        r"FusedAttnProcessor2_0, which is not known; call unfuse_qkv_projections\(\)",
        lambda pipe: pipe.unet.unfuse_qkv_projections(),
    ),
    "another processor": (
        odd,
        "processor Odd, which is not known",
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
    ),
    "seamless tiles": (seamless, "padding_mode='circular'", flat),
    "HyperTile": (tile, r"attn1 \(Attention\) has a forward that another library has put", None),
    "a LoRA of another kind": (
        lambda pipe: pipe.unet.add_adapter(LoHaConfig(r=2, target_modules=["conv1"]), "late"),
        r"resnets.0.conv1 \(Conv2d\) is not known",
        None,
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_refused_at_the_next_picture(name: str) -> None:
    change, match, undo = LATER[name]
    refused_later(change, match, undo)


def test_an_attention_mask_over_image_tokens_is_refused() -> None:
    def rank(comm: Any) -> None:
        model = df.parallelize(unet("sd"), SYNC, comm)
        model(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 9, 12), attention_mask=torch.ones(1, 256))

    with pytest.raises(df.UnsupportedModel, match=r"attn1: attention_mask over image tokens"):
        df.run_ranks(2, rank)


def test_gradients_are_refused() -> None:
    def rank(comm: Any) -> None:
        model = df.parallelize(unet("sd"), SYNC, comm)
        model(torch.zeros(1, 4, 16, 16, requires_grad=True), 1, torch.zeros(1, 9, 12))

    with pytest.raises(df.UnsupportedModel, match="gives no gradients"):
        df.run_ranks(2, rank)


# What looks alike and is fine.


def test_freeu_switched_off_again() -> None:
    def calls(pipe: Any) -> Tensor:
        pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
        pipe.disable_freeu()
        return sample(pipe)

    check(sd, calls, worlds=(2,))


def test_sliced_attention_and_the_plain_processor() -> None:
    def calls(pipe: Any) -> list[Tensor]:
        pipe.enable_attention_slicing(1)
        sliced = sample(pipe, num_inference_steps=2)
        pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
        return [sliced, sample(pipe, num_inference_steps=2)]

    check(sd, calls, worlds=(3,))


def test_chunked_feed_forward() -> None:
    def calls(pipe: Any) -> Tensor:
        for module in pipe.unet.modules():
            if isinstance(module, BasicTransformerBlock):
                module.set_chunk_feed_forward(2, dim=1)
        return sample(pipe)

    check(sd, calls, worlds=(2,))


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_of_linear_layers(use_dora: bool) -> None:
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_out.0"], use_dora=use_dora, init_lora_weights=False)
    loha = LoHaConfig(r=2, target_modules=["to_v", "to_k"], init_weights=False)
    x, text = torch.randn(1, 4, 18, 14, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 9, 12)
    for each in (config, *([] if use_dora else [loha])):
        check(adapted(each), lambda model: model(x, 5, text).sample.detach(), worlds=(3,))


def test_hooks_put_on_after_are_kept_and_must_come_off_before_restore() -> None:
    def casting(pipe: Any) -> Any:
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        return pipe

    truth = sample(casting(sd()))

    def rank(comm: Any) -> None:
        pipe = casting(df.parallelize(sd(), SYNC, comm))
        assert distance(sample(pipe), truth) <= EXACT
        assert distance(sample(pipe), truth) <= EXACT
        with pytest.raises(df.ConfigError, match=r"wrapped by another library.*take that off before df.restore"):
            df.restore(pipe)
        assert distance(sample(pipe), truth) <= EXACT

    df.run_ranks(2, rank)


def test_a_model_offloaded_whole() -> None:
    """accelerate's hook on the U-Net itself, as of enable_model_cpu_offload: before or after."""
    from accelerate.hooks import ModelHook as AccelerateHook
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    truth = sample(sd())

    def rank(comm: Any) -> None:
        for before in (True, False):
            pipe = sd()
            if before:
                add_hook_to_module(pipe.unet, AccelerateHook())
            df.parallelize(pipe, SYNC, comm)
            if not before:
                add_hook_to_module(pipe.unet, AccelerateHook())
            assert distance(sample(pipe), truth) <= EXACT
            if not before:
                remove_hook_from_module(pipe.unet)
            df.restore(pipe)
            assert torch.equal(sample(pipe), truth)

    df.run_ranks(2, rank)


def test_what_is_said_to_be_supported_names_its_checks() -> None:
    root = Path(__file__).parent.parent
    entries = supported()
    denoisers = ["UNet2DConditionModel", "UNet2DModel", "ControlNetModel", *(plan.model.__name__ for plan in PLANS)]
    known = [*denoisers, *(vae.__name__ for vae in VAES)]
    assert [entry["class"] for entry in entries] == known
    assert {entry["diffusers"] for entry in entries} == {diffusers.__version__}
    for entry in entries:
        files = re.findall(r"tests/\w+\.py", entry["checked"])
        assert files
        assert [file for file in files if not (root / file).is_file()] == []
