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


def _sd35(batch: int, rows: int, cols: int) -> dict[str, Any]:
    """With the residuals of a ControlNet for every other block."""
    residuals = [noise(batch, rows * cols, 16, seed=seed) for seed in (8, 9)]
    return {**_sd3(batch, rows, cols), "block_controlnet_hidden_states": residuals}


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


def _flux_kontext(batch: int, rows: int, cols: int) -> dict[str, Any]:
    """With a picture of 3 x 4 tokens to look at, and ControlNet residuals for both kinds of blocks."""
    guest = positions(3, 4)
    guest[:, 0] = 1
    own = _flux(batch, rows, cols)
    tokens = rows * cols + len(guest)
    return {
        **own,
        "hidden_states": torch.cat([own["hidden_states"], noise(batch, len(guest), 4, seed=6)], 1),
        "img_ids": torch.cat([own["img_ids"], guest]),
        "controlnet_block_samples": [noise(batch, tokens, 16, seed=7)],
        "controlnet_single_block_samples": [noise(batch, tokens, 16, seed=seed) for seed in (8, 9)],
    }


def _flux2(batch: int, rows: int, cols: int) -> dict[str, Any]:
    own = _flux(batch, rows, cols)
    del own["pooled_projections"]
    text = torch.zeros(batch, TEXT, 4)
    text[..., 3] = torch.arange(TEXT)
    image = torch.cat([positions(rows, cols), torch.zeros(rows * cols, 1)], -1)
    return {**own, "img_ids": image.repeat(batch, 1, 1), "txt_ids": text}


def _flux2_edit(batch: int, rows: int, cols: int) -> dict[str, Any]:
    own = _flux2(batch, rows, cols)
    guests = torch.cat([positions(3, 2), positions(2, 4)])
    guests[:, 0] = torch.tensor([10.0] * 6 + [20.0] * 8)
    guests = torch.cat([guests, torch.zeros(14, 1)], -1).repeat(batch, 1, 1)
    return {
        **own,
        "hidden_states": torch.cat([own["hidden_states"], noise(batch, 14, 4, seed=6)], 1),
        "img_ids": torch.cat([own["img_ids"], guests], 1),
    }


def _chroma(batch: int, rows: int, cols: int) -> dict[str, Any]:
    own = _flux(batch, rows, cols)
    del own["pooled_projections"], own["guidance"]
    mask = torch.cat([text_mask(batch), torch.ones(batch, rows * cols, dtype=torch.bool)], 1)
    return {**own, "attention_mask": mask}


def _ovis(batch: int, rows: int, cols: int) -> dict[str, Any]:
    own = _flux(batch, rows, cols)
    del own["pooled_projections"], own["guidance"]
    return own


def _longcat(batch: int, rows: int, cols: int) -> dict[str, Any]:
    """Its pictures begin at row and column 512, and are told from the text, and pictures to look at, by axis 0."""
    own = _ovis(batch, rows, cols)
    guest = positions(3, 4)
    guest[:, 0] = 2
    ids = torch.cat([own["img_ids"] + torch.tensor([1.0, 0, 0]), guest]) + torch.tensor([0.0, 512, 512])
    return {**own, "hidden_states": noise(batch, rows * cols + 12, 64), "img_ids": ids}  # as many as its pipeline makes


def _qwen(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, rows * cols, 4),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "encoder_hidden_states_mask": text_mask(batch),
        "timestep": torch.full((batch,), 0.3),
        "img_shapes": [[(1, rows, cols)]] * batch,
        "controlnet_block_samples": [noise(batch, rows * cols, 16, seed=8)],
    }


def _qwen_edit(batch: int, rows: int, cols: int) -> dict[str, Any]:
    own = _qwen(batch, rows, cols)
    del own["controlnet_block_samples"]
    return {
        **own,
        "hidden_states": torch.cat([own["hidden_states"], noise(batch, 10, 4, seed=6)], 1),
        "img_shapes": [[(1, rows, cols), (1, 3, 2), (1, 2, 2)]] * batch,
    }


def _qwen_layers(batch: int, rows: int, cols: int) -> dict[str, Any]:
    """Two layers, which are seen and made together, and the picture that is to be taken apart."""
    return {
        **_qwen(batch, rows, cols),
        "hidden_states": noise(batch, 3 * rows * cols, 4),
        "img_shapes": [[(1, rows, cols)] * 3] * batch,
        "controlnet_block_samples": None,
        "additional_t_cond": torch.zeros(batch, dtype=torch.long),
    }


def _plain(batch: int, rows: int, cols: int) -> dict[str, Any]:
    """Of AuraFlow."""
    return {
        "hidden_states": noise(batch, 4, 2 * rows, 2 * cols),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "timestep": torch.full((batch,), 0.3),
    }


def _cogview(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {
        **_plain(batch, rows, cols),
        "timestep": torch.full((batch,), 321),
        "original_size": torch.tensor([[64.0, 48.0]]).repeat(batch, 1),
        "target_size": torch.tensor([[56.0, 40.0]]).repeat(batch, 1),
        "crop_coords": torch.zeros(batch, 2),
        "attention_mask": text_mask(batch).long(),
    }


def _lumina(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {**_plain(batch, rows, cols), "encoder_attention_mask": text_mask(batch).long()}


def _z_image(batch: int, rows: int, cols: int) -> dict[str, Any]:
    """Texts of 5 and 34 tokens: padded to 32 and 64, among which pictures of 35 tokens, padded to 64."""
    return {
        "x": list(noise(batch, 4, 1, 2 * rows, 2 * cols)),
        "t": torch.full((batch,), 0.3),
        "cap_feats": [noise(TEXT if i % 2 == 0 else 34, TEXT_DIM, seed=i) for i in range(batch)],
    }


def text_mask(batch: int) -> torch.Tensor:
    """Texts of 3, 5, 3, 5 ... tokens."""
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[::2, 3:] = False
    return mask


def _build_flux() -> Any:
    return diffusers.FluxTransformer2DModel(
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
    )


def _build_flux2() -> Any:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
    )


def _build_qwen(**changes: Any) -> Any:
    settings = {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "axes_dims_rope": (2, 2, 4),
    }
    return diffusers.QwenImageTransformer2DModel(**{**settings, **changes})


def _cogview3(batch: int, rows: int, cols: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 2 * rows, 2 * cols),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "timestep": torch.full((batch,), 321),
        "original_size": 10 * noise(batch, 2).abs(),
        "target_size": 10 * noise(batch, 2, seed=78).abs(),
        "crop_coords": 10 * noise(batch, 2, seed=79).abs(),
    }


_LIKE_FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": (2, 2, 4),
}

JOINT = {
    "cogview3": Tiny(
        lambda: diffusers.CogView3PlusTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=TEXT_DIM,
            time_embed_dim=12,
            condition_dim=4,
            pos_embed_max_size=16,
            sample_size=16,
        ),
        _cogview3,
    ),
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
        _sd35,
    ),
    "flux": Tiny(_build_flux, _flux),
    "flux-kontext": Tiny(_build_flux, _flux_kontext, guests=lambda rows, cols: 12),
    "flux2": Tiny(_build_flux2, _flux2),
    "flux2-edit": Tiny(_build_flux2, _flux2_edit, guests=lambda rows, cols: 14),
    "chroma": Tiny(
        lambda: diffusers.ChromaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=8,
            approximator_hidden_dim=8,
            approximator_layers=1,
        ),
        _chroma,
    ),
    "ovis": Tiny(lambda: diffusers.OvisImageTransformer2DModel(**_LIKE_FLUX, out_channels=4), _ovis),
    "longcat": Tiny(
        lambda: diffusers.LongCatImageTransformer2DModel(**{**_LIKE_FLUX, "in_channels": 64}),
        _longcat,
        guests=lambda rows, cols: 12,
    ),
    "qwen": Tiny(_build_qwen, _qwen),
    "qwen-edit": Tiny(lambda: _build_qwen(zero_cond_t=True), _qwen_edit, guests=lambda rows, cols: 10),
    "qwen-layers": Tiny(
        lambda: _build_qwen(use_layer3d_rope=True, use_additional_t_cond=True),
        _qwen_layers,
        guests=lambda rows, cols: rows * cols,
    ),
    "auraflow": Tiny(
        lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=16,
            pos_embed_max_size=400,
        ),
        _plain,
    ),
    "cogview4": Tiny(
        lambda: diffusers.CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=TEXT_DIM,
            time_embed_dim=8,
            condition_dim=4,
            rope_axes_dim=(32, 32),
        ),
        _cogview,
    ),
    "lumina2": Tiny(
        lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=32,
            in_channels=4,
            hidden_size=16,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(32, 32, 32),
            cap_feat_dim=TEXT_DIM,
        ),
        _lumina,
    ),
    "z-image": Tiny(
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT_DIM,
            axes_dims=[4, 2, 2],
            axes_lens=[128, 32, 32],
        ),
        _z_image,
        latents="x",
    ),
}
