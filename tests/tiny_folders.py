"""Whole pipelines of transformers in folders, as save_pretrained writes them: random weights, a few channels wide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from pipelines import drawing

_LETTERS = [chr(code) for code in range(33, 127)]
_MAX_TEXT = 12


def _t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in _LETTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=_MAX_TEXT)


def _t5(width: int, family: Any = transformers.T5EncoderModel) -> Any:
    config = family.config_class(
        vocab_size=len(_t5_tokenizer()), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return family(config)


def _clip_tokenizer() -> Any:
    words = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=_MAX_TEXT)


def _clip(width: int, family: Any) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(_clip_tokenizer()),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=_MAX_TEXT,
        projection_dim=width,
        bos_token_id=188,
        eos_token_id=189,
        pad_token_id=189,
    )
    return family(config)


def _qwen_tokenizer() -> Any:
    words = [*_LETTERS, "Ġ", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ċ"]
    vocab = {word: i for i, word in enumerate(words)}
    end = "<|endoftext|>"
    return transformers.Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=end, eos_token=end, pad_token=end)


def _qwen(width: int) -> Any:
    text = {
        "vocab_size": len(_qwen_tokenizer()),
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10000.0},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _image_vae(num_levels: int = 3, channels: int = 4) -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=(4,) * num_levels,
        latent_channels=channels,
        norm_num_groups=2,
        shift_factor=0.1,
        sample_size=64,
    )


def _video_vae(family: Any) -> Any:
    stats = {"latents_mean": [0.1] * 4, "latents_std": [0.9] * 4}
    return family(base_dim=3, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, **stats)


def pixart() -> Any:
    """128 latents of 2 pixels wide, and a text of T5."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=32,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=8,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5(8),
        vae=_image_vae(),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def sd3() -> Any:
    """Texts of two CLIPs, 8 + 8 wide, and of T5."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=32,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_image_vae(),
        text_encoder=_clip(8, transformers.CLIPTextModelWithProjection),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(8, transformers.CLIPTextModelWithProjection),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(16),
        tokenizer_3=_t5_tokenizer(),
    )


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_image_vae(),
        text_encoder=_clip(8, transformers.CLIPTextModel),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(16),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
    )


def qwen() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_video_vae(diffusers.AutoencoderKLQwenImage),
        text_encoder=_qwen(16),
        tokenizer=_qwen_tokenizer(),
        transformer=transformer,
    )


def wan() -> Any:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    )
    return diffusers.WanPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5(16, transformers.UMT5EncoderModel),
        vae=_video_vae(diffusers.AutoencoderKLWan),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
    )


FOLDERS: dict[str, Callable[[], Any]] = {"pixart": pixart, "sd3": sd3, "flux": flux, "qwen": qwen, "wan": wan}


def save(name: str, folder: Path) -> Path:
    """Write the pipeline to ``folder`` and return it."""
    transformers.utils.logging.disable_progress_bar()
    with drawing(0):
        pipe = FOLDERS[name]()
    with torch.no_grad():
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                for weight in part.parameters():
                    weight.add_(0.02)  # nothing at zero
    pipe.save_pretrained(folder)
    return folder
