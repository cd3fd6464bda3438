"""Transformers in which image tokens attend to each other, and to the text in attentions of their own."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.models.attention_processor import (
    PAGCFGSanaLinearAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
)

from ...errors import ConfigError
from ...layers.tokens import Tokens
from ..grid import Grid, of_latent
from ..plan import Plan
from ..table import Call


def _of_square_latent(model: Any, call: Call) -> Grid:
    """See of_latent. DiT takes every picture for a square one: of 4 x 9 tokens it makes 6 x 6."""
    grid = of_latent(model, call)
    if grid.rows != grid.cols:
        height, width = call.sample.shape[-2:]
        raise ConfigError(f"a latent of {height} x {width} does not fit this model: it makes square pictures only")
    return grid


_KEYS_AND_VALUES = ("transformer_blocks.*.attn2.to_k", "transformer_blocks.*.attn2.to_v")

CROSS = (
    Plan(
        diffusers.PixArtTransformer2DModel,
        ("PixArt-alpha", "PixArt-sigma"),
        entries={"pos_embed": Tokens()},
        seams={"transformer_blocks.*.attn1": "last"},
        texts=("transformer_blocks.*.attn2",),
        prompts=("caption_projection", *_KEYS_AND_VALUES),
        grid=of_latent,
        unknown=("attention_mask",),
    ),
    Plan(
        diffusers.DiTTransformer2DModel,
        ("DiT",),
        entries={"pos_embed": Tokens()},
        seams={"transformer_blocks.*.attn1": "last"},
        exit="proj_out_2",
        grid=_of_square_latent,
        conditions=("class_labels",),
    ),
    Plan(
        diffusers.HunyuanDiT2DModel,
        ("HunyuanDiT",),
        entries={"pos_embed": Tokens()},
        seams={"blocks.*.attn1": "last"},
        cuts={"image_rotary_emb": Tokens(0), "controlnet_block_samples": Tokens()},
        texts=("blocks.*.attn2",),
        prompts=("text_embedder",),
        grid=of_latent,
        conditions=("encoder_hidden_states", "encoder_hidden_states_t5"),
    ),
    Plan(
        diffusers.SanaTransformer2DModel,
        ("Sana", "Sana-1.5", "Sana-Sprint"),
        entries={"patch_embed": Tokens()},
        seams={},
        sums={
            "transformer_blocks.*.attn1": (
                SanaLinearAttnProcessor2_0,
                PAGCFGSanaLinearAttnProcessor2_0,
                PAGIdentitySanaLinearAttnProcessor2_0,
            )
        },
        convs=tuple(f"transformer_blocks.*.ff.conv_{name}" for name in ("inverted", "depth", "point")),
        sides=("transformer_blocks.*",),
        cuts={"controlnet_block_samples": Tokens()},
        texts=("transformer_blocks.*.attn2",),
        prompts=("caption_projection", "caption_norm", *_KEYS_AND_VALUES),
        grid=of_latent,
    ),
)
