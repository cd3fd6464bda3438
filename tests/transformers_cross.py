"""Tiny transformers with cross-attention to text: see transformers_tiny.py."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed

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


def _dit(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 2 * rows, 2 * rows),  # it makes square pictures only
        "timestep": torch.full((batch,), 321),
        "class_labels": torch.arange(3, 3 + batch),
    }


def _hunyuan(batch: int, rows: int, cols: int) -> dict[str, Any]:
    masks = torch.ones(2, batch, TEXT, dtype=torch.int64)
    masks[0, 0, 3:] = 0
    masks[1, -1, 2:] = 0
    return {
        "hidden_states": noise(batch, 4, 2 * rows, 2 * cols),
        "timestep": torch.full((batch,), 321.0),
        "encoder_hidden_states": noise(batch, TEXT, 10),
        "text_embedding_mask": masks[0],
        "encoder_hidden_states_t5": noise(batch, TEXT, 8),
        "text_embedding_mask_t5": masks[1],
        "image_meta_size": torch.tensor([[64.0, 64, 56, 40, 0, 0]]).repeat(batch, 1),
        "style": torch.zeros(batch, dtype=torch.int64),
        "image_rotary_emb": get_2d_rotary_pos_embed(
            4, ((0, 0), (rows, cols)), (rows, cols), device=torch.device("cpu"), output_type="pt"
        ),
    }


def _sana(batch: int, rows: int, cols: int) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.int64)
    mask[0, 3:] = 0
    return {
        "hidden_states": noise(batch, 4, 2 * rows, 2 * cols),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "encoder_attention_mask": mask,
        "timestep": torch.full((batch,), 0.3),
        "guidance": torch.full((batch,), 4.5),
        "controlnet_block_samples": tuple(0.3 * noise(batch, rows * cols, 16, seed=seed) for seed in (1, 2)),
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
    "dit": Tiny(
        lambda: diffusers.DiTTransformer2DModel(
            sample_size=14,
            num_layers=2,
            patch_size=2,
            attention_head_dim=6,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=10,
        ),
        _dit,
    ),
    "hunyuan": Tiny(
        lambda: diffusers.HunyuanDiT2DModel(
            sample_size=16,
            num_layers=6,  # blocks 4 and 5 get the outputs of 1 and 0
            patch_size=2,
            attention_head_dim=4,
            num_attention_heads=4,
            in_channels=4,
            hidden_size=16,
            cross_attention_dim=10,
            cross_attention_dim_t5=8,
            pooled_projection_dim=7,
            text_len=TEXT,
            text_len_t5=TEXT,
        ),
        _hunyuan,
    ),
    "sana": Tiny(
        lambda: diffusers.SanaTransformer2DModel(
            sample_size=16,
            num_layers=3,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=TEXT_DIM,
            attention_bias=True,
            norm_elementwise_affine=True,
            interpolation_scale=1,  # adds positions
            guidance_embeds=True,
            qk_norm="rms_norm_across_heads",
        ),
        _sana,
    ),
}
