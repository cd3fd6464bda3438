"""The gallery: 24 prompts fixed beforehand, three of them wide, on one sheet.

python -m recipes.landscapes.gallery --model FOLDER --to docs/gallery.png
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# (prompt, how many times as wide as high); fixed before the first step of the denoiser.
PROMPTS: tuple[tuple[str, int], ...] = (
    ("snowy mountains at sunset over a lake, full moon", 1),
    ("misty pine forest at dawn", 1),
    ("desert dunes at night, stars", 1),
    ("rolling hills by day, a lone tree, clouds", 1),
    ("a red canyon at golden hour, birds", 1),
    ("the sea at sunset, a sailing boat, the sun", 1),
    ("rocky islands at dusk, a lighthouse, stars", 1),
    ("snowy mountains at night, aurora", 1),
    ("a pine forest by night, a cabin, full moon", 1),
    ("a mountain lake at dawn, mist, the sun", 1),
    ("green hills at golden hour, hot air balloon", 1),
    ("a stormy sea by day, a lighthouse", 1),
    ("sand dunes at sunset, the sun", 1),
    ("a castle on green hills at dusk, crescent moon", 1),
    ("a pine forest at noon, falling snow", 1),
    ("mountain peaks at dawn, pastel colours", 1),
    ("red rock mesas at night, crescent moon, stars", 1),
    ("a beach by the sea at noon, clouds, birds", 1),
    ("an alpine lake at dusk, a castle, violet colours", 1),
    ("rolling hills in the evening, autumn colours, a lone tree", 1),
    ("islands in the sea at noon, hot air balloon, clear sky", 1),
    ("a mountain lake at sunset, a sailing boat", 2),
    ("desert dunes at golden hour, the sun", 2),
    ("rocky islands at night, full moon", 2),
)
COLUMNS = 6


def paint_prompts(
    pipeline: StableDiffusionPipeline, size: int, steps: int, guidance: float, seed: int
) -> list[Image.Image]:
    """One picture per prompt, each of its own seed."""
    pictures = []
    for index, (prompt, wide) in enumerate(tqdm(PROMPTS, unit="picture")):
        generator = torch.Generator().manual_seed(seed + index)
        pictures.append(
            pipeline(
                prompt,
                height=size,
                width=size * wide,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generator,
            ).images[0]
        )
    return pictures


def sheet(pictures: list[Image.Image], captions: list[str], tile: int) -> Image.Image:
    """Pictures in rows of COLUMNS tiles (a wide one takes two), each above its caption."""
    margin, text = 8, 34
    places, column, row = [], 0, 0
    for picture in pictures:
        span = round(picture.width / picture.height)
        if column + span > COLUMNS:
            column, row = 0, row + 1
        places.append((column, row, span))
        column += span
    width, height = COLUMNS * (tile + margin) + margin, (row + 1) * (tile + text + margin) + margin
    board = Image.fromarray(np.full((height, width, 3), 250, np.uint8))
    draw, font = ImageDraw.Draw(board), ImageFont.load_default(12)
    for picture, caption, (column, row, span) in zip(pictures, captions, places, strict=True):
        left, top = margin + column * (tile + margin), margin + row * (tile + text + margin)
        wide = span * tile + (span - 1) * margin
        board.paste(picture.resize((wide, tile), Image.Resampling.LANCZOS), (left, top))
        lines = textwrap.wrap(caption, width=wide // 6)
        draw.text((left + 2, top + tile + 2), "\n".join(lines[:2]), (60, 60, 60), font)
    return board


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--tile", type=int, default=224)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(options.model)
    pipeline.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    pictures = paint_prompts(pipeline, options.size, options.steps, options.guidance, options.seed)
    options.to.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures, [prompt for prompt, _ in PROMPTS], options.tile).save(options.to, optimize=True)


if __name__ == "__main__":
    main()
