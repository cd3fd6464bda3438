"""What ``tensor`` sends beside ``sync`` and ``displaced``: ``python benchmarks/tensor_traffic.py``.

Predicted from shapes, for a U-Net without weights: messages and bytes of one rank in a step, both branches of guidance
in one batch, two bytes for a number. Tests hold predicted and counted equal (tests/test_traffic.py,
tests/test_tensor.py). Below each table, what of the weights a rank holds.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import UNet2DConditionModel

import distrifusion as df
from distrifusion.bench.shapes import SHAPES, TEXT_TOKENS
from distrifusion.layers import FrameHolder
from distrifusion.metrics import human_bytes
from distrifusion.models import sliced_layers, table_for
from distrifusion.planner import traffic
from distrifusion.strategies.anatomy import anatomy_of, anatomy_of_slices

BATCH, LATENT = 2, 8


def call(model: Any, size: int) -> dict[str, Any]:
    """The arguments of a call for a picture of ``size`` x ``size`` pixels."""
    like: dict[str, Any] = {"device": "meta", "dtype": torch.float16}
    given = {
        "sample": torch.empty(BATCH, 4, size // LATENT, size // LATENT, **like),
        "timestep": torch.empty(BATCH, **like),
        "encoder_hidden_states": torch.empty(BATCH, TEXT_TOKENS, model.config.cross_attention_dim, **like),
    }
    if model.config.addition_embed_type == "text_time":
        pooled = model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim
        embeds = {"text_embeds": torch.empty(BATCH, pooled, **like), "time_ids": torch.empty(BATCH, 6, **like)}
        given["added_cond_kwargs"] = embeds
    return given


def weights_of(name: str, rank: int, world: int) -> tuple[int, int]:
    """Numbers that a rank holds, and those of the whole model."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**SHAPES[name])
    whole = sum(parameter.numel() for parameter in model.parameters())
    for layer in sliced_layers(model, rank, world, FrameHolder()):
        layer.attach()
    return sum(parameter.numel() for parameter in model.parameters()), whole


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl", choices=SHAPES, help="as of bench (default: sdxl)")
    parser.add_argument("--size", type=int, nargs="+", default=[1024, 2048], help="pixels (default: 1024 2048)")
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4], help="ranks (default: 2 4)")
    order = parser.parse_args()
    with torch.device("meta"):
        model = torch.nn.Module.to(UNet2DConditionModel(**SHAPES[order.model]), torch.float16).eval()
    for size in order.size:
        arguments = call(model, size)
        table = table_for(model)
        patches, slices = anatomy_of(model, **arguments), anatomy_of_slices(model, **arguments)
        print(f"\n{order.model}, {size} px, of rank 0 in a step\n")
        print("| ranks | strategy | messages | bytes |\n|---|---|---|---|")
        for world in order.world:
            levels = table.levels(size // LATENT, size // LATENT, (1.0,) * world, 2)
            for strategy in ("displaced", "sync", "tensor"):
                config = df.ParallelConfig(strategy=strategy, warmup_steps=0)
                said = traffic(slices if strategy == "tensor" else patches, levels, config, 0, batch=BATCH, step=1)
                messages, num_bytes = sum(said.messages.values()), sum(said.bytes.values())
                print(f"| {world} | {strategy} | {messages} | {human_bytes(num_bytes)} |")
    print()
    for world in order.world:
        held, whole = weights_of(order.model, 0, world)
        print(f"{world} ranks: rank 0 holds {held / whole:.1%} of {whole / 1e6:.0f} M weights")


if __name__ == "__main__":
    main()
