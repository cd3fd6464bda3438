"""The strategies, the values that settings may have, and which settings go with what."""

from __future__ import annotations

from typing import Literal, get_args

StrategyName = Literal["sync", "displaced", "naive", "shifted", "pipelined", "tensor"]
SplitDim = Literal["rows", "cols", "frames"]
GroupNormMode = Literal["corrected", "carried", "stale", "separate", "sync"]
TextEncoders = Literal["once", "freed", "every"]

Topology = Literal["plane", "ring-x", "torus"]
Latents = Literal["rows", "whole"]
Blocks = Literal["every", "freed"]

BUILT: tuple[StrategyName, ...] = get_args(StrategyName)
"""The strategies, in the order of tables."""

UNCODED: dict[StrategyName, str] = {
    "naive": "exchanges nothing inside the denoiser",
    "shifted": "exchanges nothing inside the denoiser",
    "pipelined": "sends outputs of blocks",
    "tensor": "has no patches",
}
"""Strategies for which ``codec`` and ``context_window`` do nothing, and why."""


RECORDED = ("sync", "displaced", "naive")
"""Strategies whose steps can be recorded."""

OF_SHIFTED = ("shift", "shift_seed", "overlap", "latents", "remember")
"""Settings of ``shifted`` alone."""

EXTRAS = (
    "codec",
    "context_window",
    "balance",
    "topology",
    "shift_seed",
    "overlap",
    "latents",
    "remember",
    "patches",
    "blocks",
    "stride",
    "time_shift",
    "cuda_graphs",
)
"""Settings beyond the strategy that a report names where they are not the default."""

OF_STAGES = ("patches", "blocks", "stride", "time_shift")
"""Settings that do nothing where the model is one stage."""
