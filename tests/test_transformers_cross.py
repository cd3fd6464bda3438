"""What is particular to transformers with cross-attention: sums in linear attention, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

import distrifusion as df
from distrifusion.exchange import Absent
from distrifusion.geometry import Levels, Split
from distrifusion.layers import Frame, FrameHolder, PatchLinearAttention
from models import distance
from transformers_cross import CROSS
from transformers_tiny import build, noise

SYNC = df.ParallelConfig(strategy="sync")


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(in_dtype(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def on_ranks(world: int, call: Any, config: df.ParallelConfig = SYNC, name: str = "sana") -> list[Any]:
    return df.run_ranks(world, lambda comm: call(df.parallelize(build(CROSS[name]), config, comm)))


def test_sums_of_sana_in_bfloat16_stay_in_float32_and_are_as_good_as_one_device() -> None:
    """See test_unet_exact.py: one device in bfloat16 is as far from float32 as `sync` may be."""
    bf16 = torch.bfloat16
    arguments = CROSS["sana"].arguments(2, 7, 5)
    truth = build(CROSS["sana"])(**arguments).sample
    low = {name: in_dtype(value, bf16) for name, value in arguments.items()}
    plain = build(CROSS["sana"]).to(bf16)(**low).sample

    def thrice(model: Any) -> list[Tensor]:
        model.to(bf16)
        return [model(**low).sample for _ in range(3)]

    for first, *late in on_ranks(3, thrice, df.ParallelConfig(strategy="displaced", warmup_steps=0)):
        assert first.dtype == bf16
        assert distance(first, truth) <= 1.15 * distance(plain, truth)
        # Held input: words of both dtypes come back, a step later, as they were.
        assert all(torch.equal(first, each) for each in late)


@pytest.mark.parametrize("height", [7, 28])
def test_what_linear_attention_sends_does_not_grow_with_the_picture(height: int) -> None:
    def rank(comm: Any) -> int:
        model = df.parallelize(build(CROSS["sana"]), SYNC, comm)
        model(**CROSS["sana"].arguments(1, height, 5))
        sent: int = comm.meter.bytes["context"]
        return sent

    # 3 blocks of 2 heads: sums of 8 x 8 products and of 8 keys, in float32
    assert df.run_ranks(2, rank) == [3 * 2 * (8 * 8 + 8) * 4] * 2


def test_a_processor_that_may_sum_otherwise_is_refused() -> None:
    def call(model: Any) -> None:
        model.transformer_blocks[1].attn1.set_processor(AttnProcessor2_0())
        model(**CROSS["sana"].arguments(1, 7, 5))

    match = r"transformer_blocks.1.attn1: AttnProcessor2_0 is not known .* as SanaLinearAttnProcessor2_0 does"
    with pytest.raises(df.UnsupportedModel, match=match):
        on_ranks(2, call)


def test_sums_of_a_patch_alone_where_no_peer_is_heard() -> None:
    class Processor:
        def __call__(self, module: Any, x: Tensor) -> Tensor:
            return torch.matmul(x.transpose(2, 3), x)

    class Attention(nn.Module):
        processor = Processor()

        def forward(self, x: Tensor) -> Tensor:
            return self.processor(self, x)

    holder, split = FrameHolder(), Split((0, 3, 5))
    holder.frame = Frame(1, 2, Levels((split, split), (4, 4)), Absent(1))
    layer = PatchLinearAttention(Attention(), "attn", holder, processors=(Processor,))
    layer.attach()
    x = noise(1, 2, 8, 3)  # the two rows of four tokens of rank 1
    assert torch.equal(layer.module(x), x.transpose(2, 3) @ x)


def test_hunyuan_with_fused_projections_equals_one_device() -> None:
    arguments = CROSS["hunyuan"].arguments(2, 7, 5)
    truth = build(CROSS["hunyuan"])(**arguments).sample

    def call(model: Any) -> Tensor:
        model.fuse_qkv_projections()
        result: Tensor = model(**arguments).sample
        return result

    for result in on_ranks(3, call, name="hunyuan"):
        assert distance(result, truth) <= 1e-5


def test_dit_makes_square_pictures_only() -> None:
    arguments = {**CROSS["dit"].arguments(1, 4, 4), "hidden_states": noise(1, 4, 8, 18)}
    with pytest.raises(df.ConfigError, match="a latent of 8 x 18 does not fit this model: it makes square pictures"):
        on_ranks(2, lambda model: model(**arguments), name="dit")


def test_a_mask_over_image_tokens_is_refused() -> None:
    arguments = {**CROSS["pixart"].arguments(1, 4, 4), "attention_mask": torch.ones(1, 16)}
    with pytest.raises(df.UnsupportedModel, match="PixArtTransformer2DModel in patches takes no attention_mask"):
        on_ranks(2, lambda model: model(**arguments), name="pixart")


def test_arguments_of_another_size_are_refused() -> None:
    arguments = {**CROSS["sana"].arguments(1, 7, 5), "controlnet_block_samples": (noise(1, 30, 16),)}
    with pytest.raises(df.UnsupportedModel, match="30 tokens cannot hold the 35 of the picture"):
        on_ranks(2, lambda model: model(**arguments))
