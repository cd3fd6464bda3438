"""What processes do in test_stream.py: few imports, since each of them makes its own."""

from __future__ import annotations

import diffusers
import torch
from torch import Tensor

import distrifusion as df
from distrifusion.comm import Comm
from transformers_joint import JOINT, POOLED, TEXT, TEXT_DIM
from transformers_tiny import build, noise


def paints(comm: Comm) -> Tensor:
    """The final latents of a FLUX of 7 x 5 tokens in three patches."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(transformer=build(JOINT["flux"]), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    df.parallelize(pipe, df.ParallelConfig(strategy="pipelined", patches=3, warmup_steps=1), comm)
    with torch.no_grad():
        result: Tensor = pipe(
            prompt_embeds=noise(1, TEXT, TEXT_DIM, seed=1),
            pooled_prompt_embeds=noise(1, POOLED, seed=3),
            height=112,
            width=80,
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    return result
