"""Transformers in which image tokens attend to each other, and to the text in attentions of their own."""

from __future__ import annotations

import diffusers

from ...layers.tokens import Tokens
from ..transformer import Plan, of_latent

CROSS = (
    Plan(
        diffusers.PixArtTransformer2DModel,
        ("PixArt-alpha", "PixArt-sigma"),
        entries={"pos_embed": Tokens()},
        seams={"transformer_blocks.*.attn1": "last"},
        texts=("transformer_blocks.*.attn2",),
        grid=of_latent,
        unknown=("attention_mask",),
    ),
)
