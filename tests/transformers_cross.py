"""Tiny transformers with cross-attention to text: see transformers_tiny.py."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from transformers_tiny import Tiny, noise

TEXT, TEXT_DIM = 5, 6


def _pixart(batch: int, rows: int, cols: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.int64)
    mask[0, 3:] = 0
    return {
        "hidden_states": noise(batch, 4, 2 * rows, 2 * cols),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "encoder_attention_mask": mask,
        "timestep": torch.full((batch,), 321),
        "added_cond_kwargs": {"resolution": noise(batch, 2), "aspect_ratio": noise(batch, 1)},
    }


CROSS = {
    "pixart": Tiny(
        lambda: diffusers.PixArtTransformer2DModel(
            sample_size=16,
            num_layers=2,
            patch_size=2,
            attention_head_dim=6,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=12,
            caption_channels=TEXT_DIM,
            attention_bias=True,
            use_additional_conditions=True,
        ),
        _pixart,
    ),
}
