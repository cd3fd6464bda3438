"""Transformers in which image and text tokens attend to each other in one sequence."""

from __future__ import annotations

import diffusers

from ...layers.tokens import Tokens
from ..transformer import Plan, of_latent, of_positions

JOINT = (
    Plan(
        diffusers.SD3Transformer2DModel,
        ("Stable Diffusion 3", "Stable Diffusion 3.5"),
        entries={"pos_embed": Tokens()},
        seams={"transformer_blocks.*.attn": "first", "transformer_blocks.*.attn2": "first"},
        grid=of_latent,
        conditions=("encoder_hidden_states", "pooled_projections"),
    ),
    Plan(
        diffusers.FluxTransformer2DModel,
        ("FLUX.1",),
        entries={"x_embedder": Tokens(), "pos_embed": Tokens(0)},
        seams={"transformer_blocks.*.attn": "last", "single_transformer_blocks.*.attn": "last"},
        grid=of_positions("img_ids"),
        patch=lambda model: 1,
        conditions=("encoder_hidden_states", "pooled_projections"),
    ),
)
