"""Evaluation: the autoencoder's PSNR, and the attributes that the classifier of renders reads off pictures.

python -m recipes.landscapes.evaluate read --reader DIR --model FOLDER --pictures 100
python -m recipes.landscapes.evaluate decoded --reader DIR --model FOLDER --pictures 200
python -m recipes.landscapes.evaluate autoencoder --model FOLDER --pictures 32
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from tqdm import tqdm

from .captions import PALETTE_WORDS, TERRAIN_WORDS, THING_WORDS, TIME_WORDS, WEATHER_WORDS
from .data import scene_of
from .painter import paint
from .reader import load_reader, report
from .scene import Scene, sample_scene


def plain_prompt(scene: Scene) -> str:
    """The plainest caption that names everything."""
    parts = [f"{TERRAIN_WORDS[scene.terrain][0]} {TIME_WORDS[scene.time][0]}"]
    parts += [WEATHER_WORDS[scene.weather][0], *(THING_WORDS[thing][0] for thing in scene.things)]
    parts += [PALETTE_WORDS[scene.palette][0]] if scene.palette != "natural" else []
    return ", ".join(parts)


def read_model(options: argparse.Namespace) -> None:
    """Generate pictures for random scenes and read them."""
    reader = load_reader(options.reader)
    pipeline = StableDiffusionPipeline.from_pretrained(options.model)
    pipeline.set_progress_bar_config(disable=True)
    for held_out in (False, True):
        rng = np.random.default_rng(2 * 10**6)
        scenes = [sample_scene(rng, held_out) for _ in range(options.pictures)]
        made = []
        for at in tqdm(range(0, len(scenes), 4), unit_scale=4, unit="picture"):
            prompts = [plain_prompt(scene) for scene in scenes[at : at + 4]]
            generators = [torch.Generator().manual_seed(at + index) for index in range(len(prompts))]
            made.append(
                pipeline(
                    prompts,
                    height=options.size,
                    width=options.size,
                    num_inference_steps=options.steps,
                    guidance_scale=options.guidance,
                    generator=generators,
                    output_type="np",
                ).images
            )
        pictures = (np.concatenate(made) * 255).round().astype(np.uint8)
        report(f"generated, held-out combinations: {held_out}", reader, scenes, pictures)


@torch.inference_mode()
def read_decoded(options: argparse.Namespace) -> None:
    """Read renders that went through the autoencoder: no denoiser can show more than that."""
    reader, autoencoder = load_reader(options.reader), AutoencoderTiny.from_pretrained(options.model, subfolder="vae")
    rng = np.random.default_rng(10**6)
    scenes = [sample_scene(rng) for _ in range(options.pictures)]
    made = []
    for scene in tqdm(scenes, unit="picture"):
        picture = torch.from_numpy(paint(scene, options.size, options.size)).permute(2, 0, 1)[None]
        decoded = autoencoder.decode(autoencoder.encode(picture.float() / 127.5 - 1).latents).sample.clamp(-1, 1)
        made.append(((decoded[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    report("renders, decoded", reader, scenes, np.stack(made))


@torch.inference_mode()
def measure_autoencoder(options: argparse.Namespace) -> None:
    """PSNR on renders of held-out scenes at 256 and 512 px."""
    autoencoder = AutoencoderTiny.from_pretrained(options.model, subfolder="vae")
    for size in (256, 512):
        values = []
        for index in tqdm(range(options.pictures), desc=f"{size} px"):
            picture = paint(scene_of(f"{size}x{size}", index, held_out=True), size, size)
            true = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
            made = autoencoder.decode(autoencoder.encode(true).latents).sample.clamp(-1, 1)
            values.append(10 * np.log10(4 / nnf.mse_loss(made, true).item()))
        print(f"{size} px: {np.mean(values):.2f} dB (least {np.min(values):.2f})")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("read", "decoded", "autoencoder"))
    parser.add_argument("--reader", type=Path, help="the folder with reader.pt")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.5)
    options = parser.parse_args()
    {"read": read_model, "decoded": read_decoded, "autoencoder": measure_autoencoder}[options.what](options)


if __name__ == "__main__":
    main()
