"""Tiny transformers with joint attention of image and text: see transformers_tiny.py."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from transformers_tiny import Tiny, noise, positions

TEXT, TEXT_DIM, POOLED = 5, 6, 7


def _sd3(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 2 * rows, 2 * cols),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "pooled_projections": noise(batch, POOLED),
        "timestep": torch.full((batch,), 321.0),
    }


def _flux(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, rows * cols, 4),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "pooled_projections": noise(batch, POOLED),
        "timestep": torch.full((batch,), 0.3),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": positions(rows, cols),
        "txt_ids": torch.zeros(TEXT, 3),
    }


JOINT = {
    "sd3": Tiny(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=16,
            pooled_projection_dim=POOLED,
            pos_embed_max_size=32,
        ),
        _sd3,
    ),
    "sd35": Tiny(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=16,
            pooled_projection_dim=POOLED,
            pos_embed_max_size=32,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
        _sd3,
    ),
    "flux": Tiny(
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=POOLED,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        ),
        _flux,
    ),
}
