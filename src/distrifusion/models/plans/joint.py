"""Transformers in which image and text tokens attend to each other in one sequence."""

from __future__ import annotations

from math import prod
from typing import Any

import diffusers

from ...errors import UnsupportedModel
from ...layers import Frame
from ...layers.base import Ragged
from ...layers.tokens import TOKENS, Cut, Tokens, Words, own_tokens
from ..grid import Grid, of_latent, of_positions
from ..plan import Plan
from ..table import Call


def _first(tokens: Tokens) -> Cut:
    """A tuple of something about image tokens, and something about text."""
    return lambda output, frame: (own_tokens(output[0], tokens, frame), *output[1:])


def _both(output: Any, frame: Frame) -> Any:
    """A pair of something about image tokens, and something about text, along their first dim."""
    return own_tokens(output[0], Tokens(0), frame), own_tokens(output[1], Words(0), frame)


def _of_shapes(model: Any, call: Call) -> Grid:
    """Of Qwen-Image's ``img_shapes``: for each sample ``(frames, rows, cols)`` of the picture, then of its guests.

    With layers, the picture is all of equal size but the last, which is a guest.
    """
    samples = [shapes if isinstance(shapes, list) else [shapes] for shapes in call.arguments["img_shapes"]]
    (frames, rows, cols), *guests = samples[0]
    if model.config.use_layer3d_rope:
        *layers, last = samples[0]
        if any(tuple(layer) != (frames, rows, cols) for layer in layers):
            raise UnsupportedModel(f"in patches, the layers of a picture have one size, not {layers}")
        frames, guests = frames * len(layers), [last]
    num_tokens, num_guests = frames * rows * cols, sum(prod(guest) for guest in guests)
    if num_tokens + num_guests != call.sample.shape[1] or any(shapes != samples[0] for shapes in samples):
        raise UnsupportedModel(
            f"in patches, all samples of a call have the same img_shapes, which {call.sample.shape[1]} tokens fit; "
            f"not {samples}"
        )
    return Grid(rows, cols, frames, num_guests)


def _lumina(output: Any, frame: Frame) -> Any:
    """What Lumina's embedding of positions returns, and the note of where the picture of each sample is."""
    patches, text_rope, image_rope, rope, text_lengths, lengths = output
    frame.ragged = Ragged(list(text_lengths), lengths)
    own_rope = own_tokens(rope, Tokens(1, "ragged"), frame)
    lengths[:] = [length + frame.num_tokens(TOKENS)[frame.patch] for length in text_lengths]
    patches, image_rope = own_tokens([patches, image_rope], Tokens(), frame)
    return patches, text_rope, image_rope, own_rope, text_lengths, lengths


def _z_image(output: Any, frame: Frame) -> Any:
    """What Z-Image's ``patchify_and_embed`` returns: lists by sample, pictures padded at their end."""
    image, text, sizes, image_places, text_places, image_padding, text_padding = output
    image, image_places, image_padding = own_tokens([image, image_places, image_padding], Tokens(0, "first"), frame)
    return image, text, sizes, image_places, text_places, image_padding, text_padding


def _of_z_image(model: Any, call: Call) -> Grid:
    _, _, frames, height, width = call.sample.shape
    patch = model.all_patch_size[0]
    asked = call.arguments.get("patch_size", 2), call.arguments.get("f_patch_size", 1), frames
    if asked != (patch, 1, 1) or height % patch or width % patch:
        raise UnsupportedModel(
            f"Z-Image in patches takes one frame of multiples of {patch}, with patch_size {patch} and f_patch_size 1; "
            f"not {frames} of {height} x {width} with {asked[:2]}"
        )
    return Grid(height // patch, width // patch)


_FLUX_SEAMS: dict[str, Any] = {"transformer_blocks.*.attn": "last", "single_transformer_blocks.*.attn": "last"}
_FLUX_CUTS: dict[str, Tokens | Words] = {
    "hidden_states": Tokens(),
    "img_ids": Tokens(-2),
    "encoder_hidden_states": Words(),
    "txt_ids": Words(-2),
}
_FLUX_CONTROL = {"controlnet_block_samples": Tokens(), "controlnet_single_block_samples": Tokens()}

JOINT = (
    Plan(
        diffusers.SD3Transformer2DModel,
        ("Stable Diffusion 3", "Stable Diffusion 3.5"),
        entries={"pos_embed": Tokens()},
        seams={"transformer_blocks.*.attn": "first", "transformer_blocks.*.attn2": "first"},
        grid=of_latent,
        cuts={"block_controlnet_hidden_states": Tokens(), "encoder_hidden_states": Words()},
        words="encoder_hidden_states",
        texts=("image_proj.layers.*.attn",),
        conditions=("encoder_hidden_states", "pooled_projections"),
    ),
    Plan(
        diffusers.FluxTransformer2DModel,
        ("FLUX.1", "FLUX.1 Kontext"),
        seams=_FLUX_SEAMS,
        grid=of_positions("img_ids"),
        cuts=_FLUX_CUTS | _FLUX_CONTROL,
        words="encoder_hidden_states",
        patch=lambda model: 1,
        conditions=("encoder_hidden_states", "pooled_projections"),
    ),
    Plan(
        diffusers.ChromaTransformer2DModel,
        ("Chroma",),
        seams=_FLUX_SEAMS,
        grid=of_positions("img_ids"),
        cuts=_FLUX_CUTS | _FLUX_CONTROL | {"attention_mask": Tokens()},
        words="encoder_hidden_states",
        patch=lambda model: 1,
    ),
    Plan(
        diffusers.OvisImageTransformer2DModel,
        ("Ovis-Image",),
        seams=_FLUX_SEAMS,
        grid=of_positions("img_ids"),
        cuts=_FLUX_CUTS,
        words="encoder_hidden_states",
        patch=lambda model: 1,
    ),
    Plan(
        diffusers.LongCatImageTransformer2DModel,
        ("LongCat-Image", "LongCat-Image-Edit"),
        seams=_FLUX_SEAMS,
        grid=of_positions("img_ids"),
        cuts=_FLUX_CUTS,
        words="encoder_hidden_states",
        patch=lambda model: 1,
    ),
    Plan(
        diffusers.Flux2Transformer2DModel,
        ("FLUX.2",),
        seams=_FLUX_SEAMS,
        grid=of_positions("img_ids"),
        cuts=_FLUX_CUTS,
        words="encoder_hidden_states",
        patch=lambda model: 1,
        unknown=("kv_cache_mode", "kv_cache"),
    ),
    Plan(
        diffusers.QwenImageTransformer2DModel,
        ("Qwen-Image", "Qwen-Image-Edit"),
        entries={"pos_embed": _both},
        seams={"transformer_blocks.*.attn": "last"},
        grid=_of_shapes,
        cuts={"hidden_states": Tokens(), "controlnet_block_samples": Tokens()},
        # The model makes positions and a mask for as many words as it was given, so these are cut behind that.
        inputs={
            "transformer_blocks.0": {"modulate_index": Tokens(), "encoder_hidden_states": Words()},
            "transformer_blocks.*": {"modulate_index": Tokens()},
        },
        words="encoder_hidden_states",
        patch=lambda model: 1,
        lists=("img_shapes",),
    ),
    Plan(
        diffusers.AuraFlowTransformer2DModel,
        ("AuraFlow",),
        entries={"pos_embed": Tokens()},
        seams={"joint_transformer_blocks.*.attn": "last", "single_transformer_blocks.*.attn": "last"},
        grid=of_latent,
    ),
    Plan(
        diffusers.CogView3PlusTransformer2DModel,
        ("CogView3-Plus",),
        entries={"patch_embed": Tokens()},
        seams={"transformer_blocks.*.attn1": "last"},
        grid=of_latent,
        cuts={"encoder_hidden_states": Words()},
        words="encoder_hidden_states",
    ),
    Plan(
        diffusers.CogView4Transformer2DModel,
        ("CogView4",),
        entries={"patch_embed": _first(Tokens()), "rope": Tokens(0)},
        seams={"transformer_blocks.*.attn1": "last"},
        grid=of_latent,
        unknown=("image_rotary_emb",),
    ),
    Plan(
        diffusers.Lumina2Transformer2DModel,
        ("Lumina-Image 2.0",),
        entries={"rope_embedder": _lumina},
        seams={"noise_refiner.*.attn": "first", "layers.*.attn": "ragged"},
        exit="norm_out",
        leaving=Tokens(1, "ragged"),
        texts=("context_refiner.*.attn",),
        grid=of_latent,
    ),
    Plan(
        diffusers.ZImageTransformer2DModel,
        ("Z-Image",),
        methods={"patchify_and_embed": _z_image},
        seams={"noise_refiner.*.attention": "first", "layers.*.attention": "first"},
        exit="all_final_layer.2-1",
        leaving=Tokens(1, "first"),
        texts=("context_refiner.*.attention", "siglip_refiner.*.attention"),
        grid=_of_z_image,
        patch=lambda model: int(model.all_patch_size[0]),
        sample="x",
        time="t",
        lists=("cap_feats",),
        conditions=("cap_feats",),
        unknown=("controlnet_block_samples", "siglip_feats", "image_noise_mask"),
    ),
)
