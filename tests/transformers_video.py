"""Tiny transformers of videos: see transformers_tiny.py."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from transformers_tiny import Tiny, noise

FRAMES = 3  # of tokens
TEXT, TEXT_DIM, POOLED = 5, 6, 7
IMAGE = (5, 16)  # tokens of an image, and their width
VACE = 8 + 64  # channels: latents to keep and to make anew, and a mask of 8 x 8 pixels for each
WAN_TEXT = 512  # what its attention takes for text, the tokens of an image being before it


def timesteps(batch: int, rows: int, cols: int) -> Tensor:
    """One for each token ``[B, tokens]``: 0 in the first frame, which is given, and unequal in the others."""
    times = 321 * torch.ones(batch, FRAMES, rows, cols) + torch.arange(rows)[:, None] - torch.arange(cols)
    times[:, 0] = 0
    return times.flatten(1)


def _mask(batch: int) -> Tensor:
    mask = torch.ones(batch, TEXT, dtype=torch.int64)
    mask[0, 3:] = 0
    return mask


def _wan(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, FRAMES, 2 * rows, 2 * cols),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "timestep": torch.full((batch,), 321.0),
    }


def _wan_token_times(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {**_wan(batch, rows, cols), "timestep": timesteps(batch, rows, cols)}


def _wan_image(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 12, 2 * FRAMES, 2 * rows, 2 * cols),  # latents, mask and image
        "encoder_hidden_states": noise(batch, WAN_TEXT, TEXT_DIM),
        "encoder_hidden_states_image": noise(batch, *IMAGE),
        "timestep": torch.full((batch,), 321.0),
    }


def _wan_vace(batch: int, rows: int, cols: int) -> dict[str, Any]:
    """Controlled in two of three layers, at scales of their own."""
    control = noise(batch, VACE, FRAMES, 2 * rows, 2 * cols, seed=78)
    return {
        **_wan(batch, rows, cols),
        "control_hidden_states": control,
        "control_hidden_states_scale": torch.tensor([1.0, 0.7]),
    }


def _ltx(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, FRAMES * rows * cols, 4),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "encoder_attention_mask": _mask(batch),
        "timestep": torch.full((batch,), 321.0),
        "num_frames": FRAMES,
        "height": rows,
        "width": cols,
        "rope_interpolation_scale": (8 / 25, 32.0, 32.0),
    }


def _ltx_token_times(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {**_ltx(batch, rows, cols), "timestep": timesteps(batch, rows, cols)}


def _cogvideox(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, FRAMES, 4, 2 * rows, 2 * cols),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "timestep": torch.full((batch,), 321),
    }


def _cogvideox_rotary(batch: int, rows: int, cols: int) -> dict[str, Any]:
    angles = noise(FRAMES * rows * cols, 8).repeat_interleave(2, 1)
    return {**_cogvideox(batch, rows, cols), "image_rotary_emb": (angles.cos(), angles.sin())}


def _cogvideox_image(batch: int, rows: int, cols: int) -> dict[str, Any]:
    latents = noise(batch, FRAMES, 8, 2 * rows, 2 * cols)  # and image
    return {**_cogvideox_rotary(batch, rows, cols), "hidden_states": latents}


def _cogvideox15(batch: int, rows: int, cols: int) -> dict[str, Any]:
    arguments = _cogvideox_rotary(batch, rows, cols)
    latents = noise(batch, 2 * FRAMES, 4, 2 * rows, 2 * cols)
    return {**arguments, "hidden_states": latents, "ofs": torch.full((1,), 2.0)}


def _hunyuan(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 2 * FRAMES, 2 * rows, 2 * cols),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "encoder_attention_mask": _mask(batch),
        "pooled_projections": noise(batch, POOLED),
        "timestep": torch.full((batch,), 321.0),
        "guidance": torch.full((batch,), 6000.0),
    }


def wan(**changes: Any) -> Any:
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return diffusers.WanTransformer3DModel(**{**settings, **changes})


def wan_vace() -> Any:
    return diffusers.WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
        vace_layers=[0, 2],
        vace_in_channels=VACE,
    )


def ltx(**changes: Any) -> Any:
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "cross_attention_dim": 20,
        "num_layers": 2,
        "caption_channels": TEXT_DIM,
        "qk_norm": "rms_norm_across_heads",
    }
    return diffusers.LTXVideoTransformer3DModel(**{**settings, **changes})


def cogvideox(**changes: Any) -> Any:
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": TEXT_DIM,
        "num_layers": 2,
        "sample_width": 10,
        "sample_height": 14,
        "sample_frames": 9,
        "max_text_seq_length": TEXT,
    }
    return diffusers.CogVideoXTransformer3DModel(**{**settings, **changes})


def hunyuan(**changes: Any) -> Any:
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 2,
        "patch_size": 2,
        "patch_size_t": 2,
        "guidance_embeds": True,
        "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": POOLED,
        "rope_axes_dim": (4, 4, 4),
    }
    return diffusers.HunyuanVideoTransformer3DModel(**{**settings, **changes})


ROTARY = {"use_rotary_positional_embeddings": True}

VIDEO: dict[str, Tiny] = {
    "wan": Tiny(wan, _wan),
    "wan-token-times": Tiny(wan, _wan_token_times),
    "wan-image": Tiny(
        lambda: wan(patch_size=(2, 2, 2), in_channels=12, image_dim=IMAGE[1], added_kv_proj_dim=24), _wan_image
    ),
    "wan-vace": Tiny(wan_vace, _wan_vace),
    "ltx": Tiny(ltx, _ltx),
    "ltx-token-times": Tiny(ltx, _ltx_token_times),
    "cogvideox-2b": Tiny(cogvideox, _cogvideox),
    "cogvideox-5b": Tiny(lambda: cogvideox(**ROTARY), _cogvideox_rotary),
    "cogvideox-5b-image": Tiny(
        lambda: cogvideox(**ROTARY, use_learned_positional_embeddings=True, in_channels=8), _cogvideox_image
    ),
    "cogvideox-1.5": Tiny(lambda: cogvideox(**ROTARY, patch_size_t=2, ofs_embed_dim=8, patch_bias=False), _cogvideox15),
    "hunyuan-video": Tiny(hunyuan, _hunyuan),
    "hunyuan-video-image": Tiny(lambda: hunyuan(image_condition_type="token_replace"), _hunyuan),
}
