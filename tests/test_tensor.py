"""Slices of the weights on different ranks: equal to one device however unevenly they are cut, and given back whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnAddedKVProcessor
from peft import LoraConfig
from torch import Tensor, nn

import distrifusion as df
from distrifusion.comm import Comm
from distrifusion.layers import FrameHolder
from distrifusion.metrics import Report
from distrifusion.models import sliced_layers, table_for
from distrifusion.models.plans import PLANS
from distrifusion.models.slices import COVERED
from distrifusion.planner import Traffic, traffic
from distrifusion.strategies.anatomy import anatomy_of_slices
from models import TEXT_DIM, build, conditioning, distance, latents
from pipelines import NUMPY_WARNINGS, controlnet, drawing, picture, sample, sd
from pipelines import check as pipeline_check
from test_transformers import COLS, MODELS, ROWS, first
from transformers_tiny import Tiny
from transformers_tiny import build as build_transformer

EXACT = 1e-5  # float32 sums of features in another order
TENSOR = df.ParallelConfig(strategy="tensor")

# The first: of diffusers, by its own Chroma.
pytestmark = [pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"), *NUMPY_WARNINGS]

Make = Callable[[], Any]
Call = Callable[[Any], Tensor]


def unet(name: str, batch: int = 2, height: int = 14, width: int = 10) -> tuple[Make, Call]:
    """A U-Net, and a call of it. DeepFloyd's default processor is refused, see below."""

    def make() -> Any:
        model = build(name) if name != "five heads" else five_heads()
        if name == "deepfloyd":
            model.set_attn_processor(AttnAddedKVProcessor())
        return model

    shape = "time-cond" if name == "five heads" else name
    arguments = conditioning(shape, batch)
    if name == "five heads":
        del arguments["timestep_cond"]
    sample = latents(shape, batch, height, width)
    return make, lambda model: model(sample, 500, **arguments).sample


@cache
def _five_heads() -> Any:
    with drawing(3):
        model = UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=(10, 20),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=2,
            cross_attention_dim=TEXT_DIM,
            attention_head_dim=(5, 10),
            norm_num_groups=5,
            use_linear_projection=True,
        )
    return model.eval().requires_grad_(False)


def five_heads() -> Any:
    """As SDXL, with 5 and 10 heads; 5 groups."""
    return copy.deepcopy(_five_heads())  # drawing one in each rank would disturb what others draw: they are threads


def transformer(tiny: Tiny, batch: int = 2) -> tuple[Make, Call]:
    arguments = tiny.arguments(batch, ROWS, COLS)
    guests = tiny.guests(ROWS, COLS)

    def call(model: Any) -> Tensor:
        whole = first(model(**arguments))  # a parallel model leaves out what it predicts for guests
        return whole.narrow(1, 0, whole.shape[1] - (guests if model.__dict__.get("forward") is None else 0))

    return lambda: build_transformer(tiny), call


def wider(name: str, arguments: str | None = None, **changes: Any) -> Tiny:
    """The same class with more heads, and the arguments of another model of it: residuals have their own width."""

    def build_wider() -> Any:
        found = MODELS[name].build()
        settings = {key: value for key, value in found.config.items() if not key.startswith("_")}
        return type(found)(**{**settings, **changes})

    given = MODELS[arguments or name]
    return Tiny(build_wider, given.arguments, given.latents, given.guests)


UNEVEN = {
    "pixart": wider("pixart", num_attention_heads=5, attention_head_dim=12, cross_attention_dim=60),
    "sd35": wider("sd35", "sd3", num_attention_heads=5, caption_projection_dim=40),
    "flux": wider("flux", num_attention_heads=5),
    "flux2": wider("flux2", num_attention_heads=5),
    "ovis": wider("ovis", num_attention_heads=5),
    "qwen": wider("qwen", "qwen-edit", num_attention_heads=5),
    "lumina2": wider("lumina2", hidden_size=80, num_attention_heads=10, num_kv_heads=5),
    "wan": wider("wan", num_attention_heads=5),
    "ltx": wider("ltx", num_attention_heads=5, cross_attention_dim=50),
    "hunyuan-video": wider("hunyuan-video", num_attention_heads=5),
}
"""Five heads, on worlds that do not divide them; of Lumina ten, of which two and two share keys."""


def on_ranks(
    case: tuple[Make, Call], world: int, config: df.ParallelConfig = TENSOR, steps: int = 2
) -> list[tuple[list[Tensor], Report]]:
    """Every rank's results of some calls, and its report."""
    make, call = case

    def rank(comm: Comm) -> tuple[list[Tensor], Report]:
        model = df.parallelize(make(), config, comm)
        return [call(model) for _ in range(steps)], df.report(model)

    return df.run_ranks(world, rank)


def check(case: tuple[Make, Call], world: int, config: df.ParallelConfig = TENSOR) -> list[Report]:
    """Every rank's results are one device's, and each other's to the last bit."""
    truth = case[1](case[0]())
    assert truth.isfinite().all()
    ran = on_ranks(case, world, config)
    for results, report in ran:
        assert report.kinds == ["sync", "sync"]
        for result, same in zip(results, ran[0][0], strict=True):
            assert distance(result, truth) <= EXACT
            assert torch.equal(result, same)
    return [report for _, report in ran]


# --- equal to one device


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("sd15", 3),
        ("sd21", 2),
        ("sdxl", 2),
        ("only-cross", 2),
        ("resnet-resample", 4),
        ("deepfloyd", 2),
        ("ddpm", 3),
        ("unconditional-resnet", 2),
        ("five heads", 3),
        ("five heads", 4),
        ("five heads", 5),
    ],
)
def test_unets_equal_one_device(name: str, world: int) -> None:
    size = (16, 12) if name in ("resnet-resample", "deepfloyd", "ddpm", "unconditional-resnet") else (15, 10)
    (report, *_) = check(unet(name, 2, *size), world)
    assert report.patches == (size[0],)  # every rank has the whole picture
    assert report.mesh == f"cfg 1 x patch 1 x tensor {world}"


# The second tiny models of a class that have nothing new about its weights; Lumina's keys are of one head here.
SKIPPED = {"flux-kontext", "flux2-edit", "qwen-edit", "qwen-layers", "wan-token-times", "lumina2"}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in SKIPPED])
def test_transformers_equal_one_device(name: str) -> None:
    check(transformer(MODELS[name]), 2)


@pytest.mark.parametrize("world", [3, 5])
@pytest.mark.parametrize("name", UNEVEN)
def test_transformers_with_uneven_heads(name: str, world: int) -> None:
    check(transformer(UNEVEN[name]), world)


def test_every_plan_is_covered() -> None:
    assert {plan.model for plan in PLANS} <= set(COVERED)


@pytest.mark.parametrize(("batch", "world"), [(1, 4), (2, 2), (3, 6)])
def test_branches_of_guidance_on_separate_ranks(batch: int, world: int) -> None:
    check(unet("five heads", batch), world, df.ParallelConfig(strategy="tensor", cfg=2, split="cols"))


def test_two_calls_per_guided_step_at_the_same_time() -> None:
    """The other half of the ranks has the first call's prediction by the time that the second is answered."""
    tiny = UNEVEN["flux"]
    branches = [tiny.arguments(1, ROWS, COLS), tiny.arguments(1, ROWS, COLS)]
    branches[1]["encoder_hidden_states"] = branches[1]["encoder_hidden_states"] + 1

    def steps(model: Any) -> list[Tensor]:
        return [sum(first(model(**branch)) * (i + 1) for i, branch in enumerate(branches)) for _ in range(3)]

    truth = steps(build_transformer(tiny))

    def rank(comm: Comm) -> list[Tensor]:
        return steps(df.parallelize(build_transformer(tiny), df.ParallelConfig(strategy="tensor", cfg=2), comm))

    for results in df.run_ranks(6, rank):
        assert all(distance(result, wanted) <= EXACT for result, wanted in zip(results, truth, strict=True))


def test_biases_are_added_once() -> None:
    """With weights of zero nothing else is left of a layer that sums."""
    make, call = unet("five heads")

    def heavy() -> Any:
        model = make()
        for name, parameter in model.named_parameters():
            if name.endswith(("to_out.0.weight", "net.2.weight", "conv2.weight")):
                parameter.zero_()
            if name.endswith(("to_out.0.bias", "net.2.bias", "conv2.bias")):
                parameter.fill_(1.5)
        return model

    check((heavy, call), 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fewer_bits_are_summed_in_float32(dtype: torch.dtype) -> None:
    """As far from float32 as one device in the same dtype, or about: parts are rounded before they travel."""
    make, call = transformer(UNEVEN["sd35"], 1)
    truth = call(make())

    def cast(model: Any) -> Tensor:
        arguments = UNEVEN["sd35"].arguments(1, ROWS, COLS)
        cast = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
        return first(model(**cast)).float()

    alone = distance(cast(nn.Module.to(make(), dtype)), truth)
    for (result,), _ in on_ranks((lambda: nn.Module.to(make(), dtype), cast), 3, steps=1):
        assert distance(result, truth) <= 2 * alone


@pytest.mark.parametrize("cfg", [1, 2])
def test_a_controlnet_runs_whole_on_every_rank(cfg: int) -> None:
    def make() -> Any:
        return sd(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet())

    def call(pipe: Any) -> Tensor:
        return sample(pipe, image=picture(), num_inference_steps=2, height=..., width=...)

    pipeline_check(make, call, config=df.ParallelConfig(strategy="tensor", cfg=cfg), worlds=(2 * cfg,))


# --- weights


def test_a_rank_holds_its_slices_and_restore_gives_all_back() -> None:
    make, call = unet("five heads")
    whole = make()
    truth = call(whole)
    sizes = {name: parameter.numel() for name, parameter in whole.named_parameters()}
    heads = {name: module.heads for name, module in whole.named_modules() if hasattr(module, "heads")}

    def rank(comm: Comm) -> dict[str, int]:
        model = make()
        parameters = dict(model.named_parameters())
        before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in parameters.items()}
        df.parallelize(model, TENSOR, comm)
        call(model)
        held = {name: parameter.numel() for name, parameter in model.named_parameters()}
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        df.restore(model)
        for name, parameter in model.named_parameters():
            assert parameter is parameters[name]
            assert parameter.data_ptr() == before[name][0]  # the memory that it had
            assert torch.equal(parameter, before[name][1])
        assert {name: module.heads for name, module in model.named_modules() if hasattr(module, "heads")} == heads
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert torch.equal(call(model), truth)
        return held

    ran = df.run_ranks(3, rank)
    cut = [name for name in sizes if any(held[name] != sizes[name] for held in ran)]
    assert all(sum(held[name] for held in ran) == sizes[name] for name in cut)  # each weight on one rank
    kinds = (
        *("conv1.weight", "conv1.bias", "time_emb_proj.weight", "resnets.0.norm2.weight", "conv2.weight"),
        *("attn1.to_q.weight", "attn2.to_v.weight", "attn1.to_out.0.weight"),
        *("net.0.proj.weight", "net.0.proj.bias", "net.2.weight", "samplers.0.conv.weight"),
    )
    for kind in kinds:
        assert all(name in cut for name in sizes if name.endswith(kind)), kind
    assert not any(name.endswith(("conv2.bias", "to_out.0.bias", "net.2.bias", "conv_shortcut.weight")) for name in cut)
    assert sum(sizes[name] for name in cut) > 0.85 * sum(sizes.values())
    assert max(sum(held[name] for name in cut) for held in ran) <= 0.42 * sum(sizes[name] for name in cut)  # 2 of 5


LORA = ["to_q", "to_v", "to_out.0", "net.0.proj", "net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]


def lora(model: Any, *more: str) -> Any:
    with drawing(4):
        model.add_adapter(LoraConfig(r=3, target_modules=[*LORA, *more], init_lora_weights=False))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("is_before", [True, False])
def test_a_lora_loaded_before_or_after(is_before: bool) -> None:
    make, call = unet("five heads")
    conv = "downsamplers.0.conv"
    truth = call(lora(make(), conv))
    assert distance(truth, call(make())) > 0.01

    def rank(comm: Comm) -> tuple[Tensor, Tensor]:
        model = make() if not is_before else lora(make(), conv)
        df.parallelize(model, TENSOR, comm)
        if not is_before:
            call(model)
            lora(model, conv)
        return call(model), call(df.restore(model))

    for result, restored in df.run_ranks(3, rank):
        assert distance(result, truth) <= EXACT
        assert torch.equal(restored, truth)


def test_a_lora_that_is_fused_into_slices_is_unfused_before_restore() -> None:
    make, call = unet("five heads")
    truth = call(lora(make()))

    def rank(comm: Comm) -> None:
        model = df.parallelize(lora(make()), TENSOR, comm)
        model.fuse_lora()
        assert distance(call(model), truth) <= EXACT
        with pytest.raises(
            df.ConfigError, match=r"a LoRA of UNet2DConditionModel was fused, or unfused, after df\.par"
        ):
            df.restore(model)
        model.unfuse_lora()
        assert distance(call(df.restore(model)), truth) <= EXACT

    df.run_ranks(2, rank)


# --- what travels


def counted(case: tuple[Make, Call], world: int, config: df.ParallelConfig) -> list[Traffic]:
    make, call = case

    def rank(comm: Comm) -> Traffic:
        model = df.parallelize(make(), config, comm)
        call(model)
        comm.meter.clear()
        call(model)
        return Traffic(comm.meter.messages.copy(), comm.meter.bytes.copy())

    return df.run_ranks(world, rank)


@pytest.mark.parametrize(
    ("name", "world", "cfg"),
    [("five heads", 2, 1), ("five heads", 5, 1), ("five heads", 6, 2), ("flux", 3, 1), ("wan", 5, 1)],
)
def test_counted_equals_predicted(name: str, world: int, cfg: int) -> None:
    batch, config = 2, df.ParallelConfig(strategy="tensor", cfg=cfg)
    if name in UNEVEN:
        case, arguments = transformer(UNEVEN[name], batch), UNEVEN[name].arguments(batch, ROWS, COLS)
    else:
        case, shape = unet(name, batch, 15, 10), "time-cond" if name == "five heads" else name
        arguments = {"sample": latents(shape, batch, 15, 10), "timestep": 500, **conditioning(shape, batch)}
        arguments.pop("timestep_cond", None)
    model = case[0]()
    anatomy, table = anatomy_of_slices(model, **arguments), table_for(model)
    levels = table.levels(*table.size(table.bind((), arguments)), (1.0,) * (world // cfg), 2)
    for rank, said in enumerate(counted(case, world, config)):
        wanted = traffic(anatomy, levels, config, rank, batch=batch)
        assert said.messages == wanted.messages, rank
        assert said.bytes == wanted.bytes, rank


def test_one_sum_per_pair_of_layers() -> None:
    """Of SDXL's shape: two attentions and a feed-forward per block, a resnet, a sampler; and the prediction."""
    make, call = unet("five heads")
    kinds = [type(module).__name__ for module in make().modules()]
    sums = kinds.count("Attention") + kinds.count("FeedForward") + kinds.count("ResnetBlock2D")
    joined = kinds.count("Upsample2D") + kinds.count("Downsample2D")
    for world, messages in ((2, sums + joined + 1), (3, 3 * sums + joined + 1)):
        for _, report in on_ranks((make, call), world):
            assert report.messages == [messages, messages]


# --- refused


@pytest.mark.parametrize(
    ("name", "world", "message"),
    [
        ("ddpm", 5, r"down_blocks\.0\.resnets\.0\.norm2 has 4 groups, which 5 ranks cannot share: start at most 4 "),
        ("sd21", 3, r"down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn1 has 2 heads, which 3 ranks cannot"),
    ],
)
def test_more_ranks_than_heads_or_groups_are_refused(name: str, world: int, message: str) -> None:
    with pytest.raises(df.ConfigError, match=message):
        on_ranks(unet(name), world)


def test_more_ranks_than_heads_with_keys_of_their_own_are_refused() -> None:
    with pytest.raises(df.ConfigError, match=r"attn has 1 heads with keys of their own, which 2 ranks cannot share"):
        on_ranks(transformer(MODELS["lumina2"]), 2)


def refused(model: Any) -> None:
    """Ask for the layers of one of two ranks."""
    list(sliced_layers(model, 1, 2, FrameHolder()))


def test_what_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(df.UnsupportedModel, match=r"does not know Linear; it knows UNet2DConditionModel, .*Flux2Trans"):
        refused(nn.Linear(2, 2))
    with pytest.raises(df.UnsupportedModel, match=r"has the processor AttnAddedKVProcessor2_0, .* set AttnAddedKVProc"):
        refused(build("deepfloyd"))
    fused = build("sd15")
    fused.fuse_qkv_projections()
    with pytest.raises(df.UnsupportedModel, match=r"attn1 .* not known in slices of the weights; call unfuse_qkv_proj"):
        refused(fused)
    packed = five_heads()
    packed.up_blocks[0].resnets[0].conv1.__class__ = type("PackedConv2d", (nn.Conv2d,), {})
    with pytest.raises(df.UnsupportedModel, match=r"conv1 \(PackedConv2d\) holds its weights in a way of its own"):
        refused(packed)
    dora = five_heads()
    dora.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
    with pytest.raises(df.UnsupportedModel, match=r"to_q \(Linear\) is an adapter that is not known in slices of wei"):
        refused(dora)


def test_weights_of_a_class_of_their_own_are_refused_and_nothing_is_left() -> None:
    class Quantised(Tensor):
        pass

    def rank(comm: Comm) -> None:
        model = five_heads()
        conv = model.up_blocks[-1].resnets[0].conv2  # not the first that is cut
        conv.weight = nn.Parameter(conv.weight.data.as_subclass(Quantised), requires_grad=False)
        shapes = [parameter.shape for parameter in model.parameters()]
        with pytest.raises(
            df.UnsupportedModel, match=r"conv2 \(Conv2d\): its weight is a Quantised, of which no slice"
        ):
            df.parallelize(model, TENSOR, comm)
        assert [parameter.shape for parameter in model.parameters()] == shapes
        assert not any("forward" in module.__dict__ for module in model.modules())

    df.run_ranks(2, rank)
