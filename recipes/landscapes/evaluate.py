"""Evaluation: the autoencoder's PSNR, and a classifier of renders that reads the attributes off generated pictures.

python -m recipes.landscapes.evaluate train --cache DIR --out DIR --minutes 15
python -m recipes.landscapes.evaluate read --out DIR --model FOLDER --pictures 100
python -m recipes.landscapes.evaluate autoencoder --model FOLDER --pictures 32
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from .captions import PALETTE_WORDS, TERRAIN_WORDS, THING_WORDS, TIME_WORDS, WEATHER_WORDS
from .data import pictures_path, scene_of
from .painter import paint
from .scene import TERRAINS, THINGS, TIMES, WEATHERS, Scene, sample_scene

SIZE = 128  # pictures are read at this size
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (("terrain", TERRAINS), ("time", TIMES), ("weather", WEATHERS))
OUTPUTS = sum(len(options) for _, options in KINDS) + len(THINGS)


def make_reader() -> nn.Module:
    """A small convolutional classifier: [B, 3, 128, 128] in -1..1 -> [B, OUTPUTS]."""
    layers: list[nn.Module] = []
    width = 3
    for wider in (24, 48, 96, 128):
        layers += [
            nn.Conv2d(width, wider, 3, stride=2, padding=1),
            nn.BatchNorm2d(wider),
            nn.ReLU(),
            nn.Conv2d(wider, wider, 3, padding=1, groups=8),
            nn.BatchNorm2d(wider),
            nn.ReLU(),
        ]
        width = wider
    return nn.Sequential(
        *layers, nn.AdaptiveMaxPool2d((4, 1)), nn.Flatten(), nn.Dropout(0.1), nn.Linear(width * 4, OUTPUTS)
    )


def labels_of(scene: Scene) -> tuple[list[int], list[float]]:
    """Class numbers for terrain, time and weather, and a 0/1 for every thing."""
    classes = [options.index(getattr(scene, kind)) for kind, options in KINDS]
    return classes, [float(thing in scene.things) for thing in THINGS]


def reader_loss(outputs: Tensor, classes: Tensor, things: Tensor) -> Tensor:
    """Cross entropy of the three kinds plus that of the things."""
    loss, offset = torch.zeros(()), 0
    for column, (_, options) in enumerate(KINDS):
        loss = loss + nnf.cross_entropy(outputs[:, offset : offset + len(options)], classes[:, column])
        offset += len(options)
    return loss + 4 * nnf.binary_cross_entropy_with_logits(outputs[:, offset:], things)


def as_input(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, SIZE, SIZE] in -1..1."""
    tensor = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return nnf.interpolate(tensor, size=(SIZE, SIZE), mode="area")


def train_reader(options: argparse.Namespace) -> None:
    """Train on the cached renders, shifted along x and a little noisy or blurred."""
    torch.manual_seed(0)
    reader, rng, begin = make_reader(), np.random.default_rng(0), time.monotonic()
    pictures = np.load(pictures_path(options.cache, "256x256"), mmap_mode="r")[: options.count]
    small = np.concatenate(
        [
            nnf.avg_pool2d(torch.from_numpy(pictures[at : at + 200]).permute(0, 3, 1, 2).float(), 2)
            .permute(0, 2, 3, 1)
            .round()
            .byte()
            .numpy()
            for at in tqdm(range(0, len(pictures), 200), desc="shrinking")
        ]
    )
    labels = [labels_of(scene_of("256x256", index)) for index in range(len(small))]
    optimizer = torch.optim.AdamW(reader.parameters(), 2e-3, weight_decay=0.02)
    with tqdm(unit="step") as bar:
        while (share := (time.monotonic() - begin) / (options.minutes * 60)) < 1:
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - share)
            chosen = rng.integers(len(small), size=32)
            rolled = np.stack([np.roll(small[index], int(rng.integers(SIZE)), axis=1) for index in chosen])
            batch = as_input(rolled)
            if rng.random() < 0.5:
                batch = nnf.avg_pool2d(batch, 3, stride=1, padding=1, count_include_pad=False)
            batch = batch + float(rng.random() * 0.06) * torch.randn_like(batch)
            outputs = reader(batch)
            loss = reader_loss(
                outputs,
                torch.tensor([labels[index][0] for index in chosen]),
                torch.tensor([labels[index][1] for index in chosen]),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    torch.save(reader.state_dict(), options.out / "reader.pt")
    for held_out in (False, True):
        rng = np.random.default_rng(10**6)
        scenes = [sample_scene(rng, held_out) for _ in range(200)]
        report(
            f"renders, held-out combinations: {held_out}",
            reader,
            scenes,
            np.stack([paint(scene, 256, 256) for scene in scenes]),
        )


@torch.inference_mode()
def report(title: str, reader: nn.Module, scenes: list[Scene], pictures: np.ndarray) -> None:
    """Print how often each attribute was read as it was asked for; things: those named that were found."""
    reader.eval()
    outputs = torch.cat([reader(as_input(pictures[at : at + 50])) for at in range(0, len(pictures), 50)])
    right: dict[str, list[bool]] = defaultdict(list)
    for scene, output in zip(scenes, outputs, strict=True):
        offset = 0
        for kind, options in KINDS:
            right[kind].append(options[int(output[offset : offset + len(options)].argmax())] == getattr(scene, kind))
            offset += len(options)
        for thing in scene.things:
            found = bool(output[offset + THINGS.index(thing)] > 0)
            right["things"].append(found)
            right[f"  {thing}"].append(found)
    print(title)
    for kind, marks in sorted(right.items(), key=lambda entry: (entry[0].startswith(" "), entry[0])):
        print(f"  {kind:16s} {np.mean(marks):6.1%} of {len(marks)}")
    kinds = [np.mean(right[kind]) for kind in ("terrain", "time", "weather", "things") if right[kind]]
    print(f"  mean of the four {np.mean(kinds):6.1%}")


def plain_prompt(scene: Scene) -> str:
    """The plainest caption that names everything."""
    parts = [f"{TERRAIN_WORDS[scene.terrain][0]} {TIME_WORDS[scene.time][0]}"]
    parts += [WEATHER_WORDS[scene.weather][0], *(THING_WORDS[thing][0] for thing in scene.things)]
    parts += [PALETTE_WORDS[scene.palette][0]] if scene.palette != "natural" else []
    return ", ".join(parts)


def read_model(options: argparse.Namespace) -> None:
    """Generate pictures for random scenes and read them."""
    reader = make_reader()
    reader.load_state_dict(torch.load(options.out / "reader.pt"))
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
    parser.add_argument("what", choices=("train", "read", "autoencoder"))
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.5)
    options = parser.parse_args()
    {"train": train_reader, "read": read_model, "autoencoder": measure_autoencoder}[options.what](options)


if __name__ == "__main__":
    main()
