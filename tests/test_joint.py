"""What is particular to joint attention: adapters, kernels behind diffusers' dispatch, guests, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from diffusers.models.attention_processor import PAGJointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterTimeImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor, nn

import distrifusion as df
from models import distance
from pipelines import drawing
from transformers_joint import JOINT, TEXT
from transformers_tiny import build, noise, positions

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

EXACT = 1e-5
ROWS, COLS = 7, 5
SYNC = df.ParallelConfig(strategy="sync")
DISPLACED = df.ParallelConfig(strategy="displaced", warmup_steps=0)


def check(
    make: Callable[[], Any], arguments: Callable[[], dict[str, Any]], *, worlds: tuple[int, ...] = (2, 3)
) -> None:
    """Sync equals one device, and so does displaced with a held input, all of whose seams have old words."""
    truth = make()(**arguments())[0]

    def rank(comm: Any) -> Any:
        fresh = df.parallelize(make(), SYNC, comm)(**arguments())[0]
        model = df.parallelize(make(), DISPLACED, comm)
        late = [model(**arguments())[0] for _ in range(3)]
        return [fresh, *late], df.report(model)

    for world in worlds:
        for results, report in df.run_ranks(world, rank):
            assert all(distance(result, truth) <= EXACT for result in results)
            assert report.kinds == ["sync", "displaced", "displaced"]
            assert max(report.messages[1:]) <= 8


def randomised(module: Any) -> Any:
    for i, weight in enumerate(module.parameters()):
        weight.data = 0.7 * noise(*weight.shape, seed=i)
    return module.eval().requires_grad_(False)


def flux_with_adapter() -> Any:
    """Two IP-Adapters, of four tokens each."""
    model = build(JOINT["flux"])
    with drawing(1):
        processors = {}
        for name, processor in model.attn_processors.items():
            has_tokens = not name.startswith("single")
            made = FluxIPAdapterAttnProcessor(16, 6, num_tokens=(4, 4), scale=[0.8, 1.2]) if has_tokens else processor
            processors[name] = randomised(made) if has_tokens else made
        model.set_attn_processor(processors)
        projections = [ImageProjection(image_embed_dim=9, cross_attention_dim=6, num_image_text_embeds=4) for _ in "12"]
        model.encoder_hid_proj = randomised(MultiIPAdapterImageProjection(projections))
    return model


def sd3_with_adapter() -> Any:
    model = build(JOINT["sd35"])
    with drawing(1):
        processors = {
            name: randomised(SD3IPAdapterJointAttnProcessor2_0(16, 6, 8, timesteps_emb_dim=8))
            if "attn2" not in name
            else each
            for name, each in model.attn_processors.items()
        }
        model.set_attn_processor(processors)
        model.image_proj = randomised(
            IPAdapterTimeImageProjection(
                embed_dim=9, output_dim=6, hidden_dim=8, depth=1, dim_head=4, heads=2, num_queries=4, timestep_in_dim=8
            )
        )
    return model


def with_image(name: str, embeds: Any) -> Callable[[], dict[str, Any]]:
    same = JOINT[name].arguments(1, ROWS, COLS)
    # The model takes what it reads out of the dict: another one for every call.
    return lambda: {**same, "joint_attention_kwargs": {"ip_adapter_image_embeds": embeds}}


def test_ip_adapters_of_flux() -> None:
    arguments = with_image("flux", [noise(1, 1, 9, seed=4), noise(1, 1, 9, seed=5)])
    plain = build(JOINT["flux"])(**JOINT["flux"].arguments(1, ROWS, COLS))[0]
    assert distance(flux_with_adapter()(**arguments())[0], plain) > 1000 * EXACT
    check(flux_with_adapter, arguments)


def test_ip_adapter_of_sd3_whose_second_attention_is_over_the_picture_too() -> None:
    arguments = with_image("sd35", noise(1, 3, 9, seed=4))
    plain = build(JOINT["sd35"])(**JOINT["sd35"].arguments(1, ROWS, COLS))[0]
    assert distance(sd3_with_adapter()(**arguments())[0], plain) > 1000 * EXACT
    check(sd3_with_adapter, arguments)


def plainly(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """A kernel that is not torch's, for ``[B, tokens, heads, D]``."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend that does not call torch's attention, as those of other libraries do."""
    name = diffusers.models.attention_dispatch.AttentionBackendName.XFORMERS
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, plainly)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, name, {"query", "key", "value", "attn_mask"})
    monkeypatch.setattr(diffusers.models.attention_dispatch, "_check_attention_backend_requirements", lambda name: None)
    return str(name.value)


@pytest.mark.parametrize("name", ["flux", "flux2-edit", "qwen", "z-image"])
def test_attention_of_another_library(name: str, kernel: str) -> None:
    def arguments() -> dict[str, Any]:
        return JOINT[name].arguments(2, ROWS, COLS)

    def first(result: Any) -> Tensor:
        whole = torch.stack(result[0]) if isinstance(result[0], list) else result[0]
        return whole.narrow(1, 0, whole.shape[1] - (JOINT[name].guests(ROWS, COLS) if is_truth else 0))

    with attention_backend(kernel):
        is_truth = True
        truth = first(build(JOINT[name])(**arguments()))
        is_truth = False
        for world in (2, 3):
            for result in df.run_ranks(
                world, lambda comm: first(df.parallelize(build(JOINT[name]), SYNC, comm)(**arguments()))
            ):
                assert distance(result, truth) <= EXACT


def test_a_backend_set_on_the_model_and_another_model_beside_it(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads of one process: what one has open for its seams must not reach who is not parallel."""
    arguments = JOINT["flux"].arguments(1, ROWS, COLS)
    truth = build(JOINT["flux"])(**arguments)[0]
    dispatch = transformer_flux.dispatch_attention_fn

    def rank(comm: Any) -> tuple[Tensor, Tensor]:
        model, alone = build(JOINT["flux"]), build(JOINT["flux"])
        for each in (model, alone):
            for name, module in each.named_modules():
                if name.endswith(".attn"):
                    module.processor._attention_backend = kernel
        df.parallelize(model, SYNC, comm)
        together: list[Tensor] = []
        hook = model.transformer_blocks[1].register_forward_hook(lambda *_: together.append(alone(**arguments)[0]))
        own = model(**arguments)[0]
        hook.remove()
        return own, together[0]

    for own, beside in df.run_ranks(2, rank):
        assert distance(own, truth) <= EXACT
        assert distance(beside, truth) <= EXACT
    assert transformer_flux.dispatch_attention_fn is dispatch


def test_positions_are_read_as_the_pipelines_round_them() -> None:
    """In bfloat16, in which FLUX's pipeline gives them, those above 256 are rounded."""
    from distrifusion.models.grid import _read_positions

    for rows, cols in ((300, 2), (2, 300)):
        grid = _read_positions(positions(rows, cols).bfloat16(), rows * cols)
        assert (grid.rows, grid.cols, grid.guests) == (rows, cols, 0)


def test_positions_that_were_written_to_are_read_again() -> None:
    """So are those made in inference mode, which know no versions."""
    arguments = JOINT["flux"].arguments(1, ROWS, COLS)
    other = {**JOINT["flux"].arguments(1, COLS, ROWS), "hidden_states": arguments["hidden_states"]}
    truth, turned = (build(JOINT["flux"])(**each)[0] for each in (arguments, other))
    assert distance(truth, turned) > 1000 * EXACT

    def rank(comm: Any) -> list[Tensor]:
        model = df.parallelize(build(JOINT["flux"]), SYNC, comm)
        own = {**arguments, "img_ids": arguments["img_ids"].clone()}
        results = [model(**own)[0]]
        own["img_ids"].copy_(other["img_ids"])
        df.reset(model)
        results.append(model(**own)[0])
        with torch.inference_mode():
            ids = arguments["img_ids"].clone()
            df.reset(model)
            results.append(model(**{**arguments, "img_ids": ids})[0])
        return results

    for results in df.run_ranks(3, rank):
        for result, expected in zip(results, (truth, turned, truth), strict=True):
            assert distance(result, expected) <= EXACT


class Refusing(nn.Module):
    """A processor with arithmetic of its own."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *_: Any, **__: Any) -> Any:
        return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


def changed(name: str, **changes: Any) -> Callable[[], tuple[Any, dict[str, Any]]]:
    return lambda: (build(JOINT[name]), {**JOINT[name].arguments(1, ROWS, COLS), **changes})


def own_arithmetic() -> tuple[Any, dict[str, Any]]:
    model = build(JOINT["flux"])
    model.set_attn_processor(Refusing())
    return model, JOINT["flux"].arguments(1, ROWS, COLS)


def shuffled() -> tuple[Any, dict[str, Any]]:
    arguments = JOINT["flux"].arguments(1, ROWS, COLS)
    return build(JOINT["flux"]), {**arguments, "img_ids": arguments["img_ids"].flip(0)}


def guest_first() -> tuple[Any, dict[str, Any]]:
    arguments = JOINT["flux-kontext"].arguments(1, ROWS, COLS)
    ids = arguments["img_ids"].clone()
    ids[:, 0] = 0
    return build(JOINT["flux"]), {**arguments, "img_ids": ids}


REFUSED: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], str]] = {
    "a processor with its own attention": (own_arithmetic, "Refusing calls neither torch's"),
    "tokens in another order": (shuffled, "not those of 7 x 5 in raster order"),
    "a guest that looks like the picture": (guest_first, "further pictures to look at are known where"),
    "FLUX.2's cache": (changed("flux2", kv_cache_mode="extract"), "takes no kv_cache_mode"),
    "Qwen-Image's shapes of another size": (changed("qwen", img_shapes=[[(1, 3, 3)]]), "same img_shapes"),
    "CogView4's own positions": (changed("cogview4", image_rotary_emb=(1, 2)), "takes no image_rotary_emb"),
    "Z-Image's sizes": (changed("z-image", x=[noise(4, 1, 8, 8), noise(4, 1, 8, 6)]), "tensors of one size"),
    "Z-Image's omni mode": (changed("z-image", x=[[noise(4, 1, 8, 8)]]), "tensors of one size"),
    "Z-Image's odd sizes": (changed("z-image", x=[noise(4, 1, 8, 7)]), "one frame of multiples of 2"),
    "Z-Image's ControlNet": (changed("z-image", controlnet_block_samples={0: noise(1)}), "no controlnet_block"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_line(name: str) -> None:
    make, match = REFUSED[name]

    def rank(comm: Any) -> None:
        model, arguments = make()
        df.parallelize(model, SYNC, comm)
        with pytest.raises(df.UnsupportedModel, match=match):
            model(**arguments)

    df.run_ranks(2, rank)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", ["lumina2", "z-image", "qwen", "chroma", "cogview4"])
def test_texts_of_several_lengths_see_what_each_sees_alone(name: str, world: int) -> None:
    """In a batch, a text's padding is not seen: each sample is as in a batch of its own, where the model has it so."""
    tiny = JOINT[name]
    both = tiny.arguments(2, ROWS, COLS)

    def rank(comm: Any) -> tuple[Tensor, list[Tensor]]:
        model = df.parallelize(build(tiny), SYNC, comm)
        together = model(**both)[0]
        apart = []
        for i in range(2):
            alone = {
                key: value[i : i + 1] if isinstance(value, Tensor | list) and len(value) == 2 else value
                for key, value in both.items()
            }
            if name == "qwen":
                alone["controlnet_block_samples"] = [each[i : i + 1] for each in both["controlnet_block_samples"]]
            apart.append(model(**alone)[0][0])
        return together, apart

    lengths = {len(text) for text in both["cap_feats"]} if name == "z-image" else {3, TEXT}
    assert len(lengths) == 2
    for together, apart in df.run_ranks(world, rank):
        for one, alone in zip(together, apart, strict=True):
            assert distance(one, alone) <= EXACT


def test_methods_and_names_are_given_back() -> None:
    model = build(JOINT["z-image"])
    before = {**model.__dict__}
    dispatch = sys.modules[type(model).__module__].dispatch_attention_fn

    def rank(comm: Any) -> set[str]:
        own = build(JOINT["z-image"])
        df.parallelize(own, SYNC, comm)
        own(**JOINT["z-image"].arguments(1, ROWS, COLS))
        assert "patchify_and_embed" in own.__dict__
        df.restore(own)
        return set(own.__dict__)

    assert df.run_ranks(2, rank) == [set(before)] * 2
    assert sys.modules[type(model).__module__].dispatch_attention_fn is dispatch


def test_perturbed_attention_over_text_and_picture_is_refused() -> None:
    """It masks each image token's view of the others, which are those of the patch there."""

    def rank(comm: Any) -> None:
        model = df.parallelize(build(JOINT["sd3"]), df.ParallelConfig(strategy="sync"), comm)
        model.transformer_blocks[1].attn.processor = PAGJointAttnProcessor2_0()
        with pytest.raises(df.UnsupportedModel, match=r"blocks\.1\.attn: PAGJointAttnProcessor2_0 attends to"):
            model(**JOINT["sd3"].arguments(2, 7, 5))

    df.run_ranks(2, rank)
