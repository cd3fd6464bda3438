"""Transformers of videos: tokens of all frames in one sequence, split by frames, or by the rows or columns of each."""

from __future__ import annotations

from typing import Any

import diffusers

from ...errors import ConfigError, UnsupportedModel
from ...layers.tokens import Tokens
from ..grid import Grid
from ..plan import Frames, Plan
from ..table import Call


def _patches(model: Any) -> tuple[int, int]:
    """Frames and rows of latents behind a token: ``patch_size`` is a triple, or has ``patch_size_t`` beside it."""
    size = model.config.patch_size
    if isinstance(size, int):
        return int(model.config.get("patch_size_t") or 1), size
    frames, rows, cols = size
    if rows != cols:
        raise UnsupportedModel(f"{type(model).__name__} with patches of {rows} x {cols} is not known: only square ones")
    return int(frames), int(rows)


def _rows_of_patch(model: Any) -> int:
    return _patches(model)[1]


def _frames_of_patch(model: Any) -> int:
    return _patches(model)[0]


def _of_video(model: Any, call: Call) -> Grid:
    """The grid of latents ``[B, C, frames, H, W]``."""
    return _of_sides(model, *call.sample.shape[2:])


def _of_frames(model: Any, call: Call) -> Grid:
    """The grid of latents ``[B, frames, C, H, W]``."""
    frames, _, height, width = call.sample.shape[1:]
    return _of_sides(model, frames, height, width)


def _of_sides(model: Any, frames: int, height: int, width: int) -> Grid:
    """The grid of so many frames, rows and columns of latents.

    Raises:
        ConfigError: one that is no multiple of the patch.
    """
    patch_t, patch = _patches(model)
    if frames % patch_t or height % patch or width % patch:
        raise ConfigError(
            f"a latent of {frames} frames of {height} x {width} does not fit patches of {patch_t} x {patch} x {patch}"
        )
    return Grid(height // patch, width // patch, frames // patch_t)


def _of_arguments(model: Any, call: Call) -> Grid:
    """The grid of latents that come as tokens, with their numbers in ``num_frames``, ``height`` and ``width``.

    Raises:
        UnsupportedModel: these are not given, or do not multiply to the tokens, as where there are tokens of
            conditions beside those of the video.
    """
    names = ("num_frames", "height", "width")
    frames, height, width = (call.arguments.get(name) for name in names)
    tokens = call.sample.shape[1]
    if frames is None or height is None or width is None or frames * height * width != tokens:
        given = ", ".join(f"{name}={call.arguments.get(name)}" for name in names)
        raise UnsupportedModel(
            f"{type(model).__name__} in patches asks for num_frames, height and width of its {tokens} tokens: "
            f"{given} are not; tokens of conditions are not known"
        )
    return Grid(height, width, frames)


VIDEO: tuple[Plan, ...] = (
    Plan(
        diffusers.WanTransformer3DModel,
        ("Wan 2.1", "Wan 2.2"),
        entries={"rope": Tokens(), "patch_embedding": Tokens(2, is_map=True)},
        seams={"blocks.*.attn1": "last"},
        texts=("blocks.*.attn2",),
        prompts=(
            "condition_embedder.text_embedder",
            "condition_embedder.image_embedder",
            *(f"blocks.*.attn2.{name}" for name in ("to_k", "to_v", "to_kv", "add_k_proj", "add_v_proj")),
        ),
        cuts={"timestep": Tokens()},
        grid=_of_video,
        patch=_rows_of_patch,
        frames=Frames(_frames_of_patch),
        several=("encoder_hidden_states_image",),  # a first and a last image
        conditions=("encoder_hidden_states", "encoder_hidden_states_image"),
    ),
    Plan(
        diffusers.WanVACETransformer3DModel,
        ("Wan 2.1 VACE",),
        entries={
            "rope": Tokens(),
            "patch_embedding": Tokens(2, is_map=True),
            "vace_patch_embedding": Tokens(2, is_map=True),
        },
        seams={"vace_blocks.*.attn1": "last", "blocks.*.attn1": "last"},
        texts=("blocks.*.attn2", "vace_blocks.*.attn2"),
        grid=_of_video,
        patch=_rows_of_patch,
        frames=Frames(_frames_of_patch),
        several=("encoder_hidden_states_image",),
        shared=("control_hidden_states_scale",),
        conditions=("encoder_hidden_states", "encoder_hidden_states_image"),
    ),
    Plan(
        diffusers.LTXVideoTransformer3DModel,
        ("LTX-Video",),
        entries={"rope": Tokens(), "proj_in": Tokens()},
        seams={"transformer_blocks.*.attn1": "last"},
        texts=("transformer_blocks.*.attn2",),
        prompts=("caption_projection", "transformer_blocks.*.attn2.to_k", "transformer_blocks.*.attn2.to_v"),
        cuts={"timestep": Tokens()},
        grid=_of_arguments,
        patch=lambda model: 1,
        frames=Frames(lambda model: 1),
    ),
    Plan(
        diffusers.CogVideoXTransformer3DModel,
        ("CogVideoX 2B", "CogVideoX 5B", "CogVideoX 1.5"),
        entries={"patch_embed": Tokens()},
        seams={"transformer_blocks.*.attn1": "last"},
        cuts={"image_rotary_emb": Tokens(0)},
        grid=_of_frames,
        patch=_rows_of_patch,
        frames=Frames(_frames_of_patch, dim=1),
    ),
    Plan(
        diffusers.HunyuanVideoTransformer3DModel,
        ("HunyuanVideo",),
        entries={"rope": Tokens(0), "x_embedder": Tokens()},
        seams={"transformer_blocks.*.attn": "first", "single_transformer_blocks.*.attn": "first"},
        sides=("transformer_blocks.*", "single_transformer_blocks.*"),
        texts=("context_embedder.token_refiner.refiner_blocks.*.attn",),
        grid=_of_video,
        patch=_rows_of_patch,
        frames=Frames(_frames_of_patch),
        conditions=("encoder_hidden_states", "pooled_projections"),
    ),
)
