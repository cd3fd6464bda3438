"""A classifier of renders that reads terrain, time, weather and things off pictures; the model is judged by it.

python -m recipes.landscapes.reader --cache DIR --out DIR --minutes 15
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from tqdm import tqdm

from .data import pictures_path, scene_of
from .painter import paint
from .scene import TERRAINS, THINGS, TIMES, WEATHERS, Scene, sample_scene

SIZE = 256  # pictures are read at this size: birds and stars are a few pixels wide there
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (("terrain", TERRAINS), ("time", TIMES), ("weather", WEATHERS))
CLASSES = sum(len(options) for _, options in KINDS)
POSITIVE = 4.0  # a thing that is there weighs so much more than one that is not; taken off the logit where it is read
SHARPNESS = 4.0  # of the maximum over places by which a thing is found


class Reader(nn.Module):
    """[B, 3, 256, 256] in -1..1 -> [B, CLASSES + things]: logits of the kinds, then one of every thing.

    The kinds are read off the whole picture in four bands of height, a thing off the one place that shows it.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        for before, after, stride in ((12, 32, 2), (32, 64, 1), (64, 96, 2), (96, 96, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.near = nn.Sequential(*layers)  # [B, 96, 32, 32]
        layers = []
        for before, after, stride in ((96, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.far = nn.Sequential(*layers)  # [B, 128, 16, 16]
        self.kinds = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(128 * 8, CLASSES))
        self.small, self.large = nn.Conv2d(96, len(THINGS), 1), nn.Conv2d(128, len(THINGS), 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits."""
        near = self.near(pictures)
        far = self.far(near)
        bands = torch.cat([nnf.adaptive_avg_pool2d(far, (4, 1)), nnf.adaptive_max_pool2d(far, (4, 1))], dim=1)
        places = self.small(near).float() + nnf.interpolate(self.large(far).float(), scale_factor=2)
        places = SHARPNESS * places.flatten(2)  # [B, things, 32 * 32]
        found = (places.logsumexp(-1) - np.log(places.shape[-1])) / SHARPNESS
        return torch.cat([self.kinds(bands).float(), found], dim=1)


def labels_of(scene: Scene) -> tuple[list[int], list[float]]:
    """Class numbers for terrain, time and weather, and a 0/1 for every thing."""
    classes = [options.index(getattr(scene, kind)) for kind, options in KINDS]
    return classes, [float(thing in scene.things) for thing in THINGS]


def reader_loss(outputs: Tensor, classes: Tensor, things: Tensor) -> Tensor:
    """Cross entropy of the three kinds plus that of the things."""
    parts = outputs[:, :CLASSES].split([len(options) for _, options in KINDS], dim=1)
    kinds = sum(nnf.cross_entropy(part, classes[:, column]) for column, part in enumerate(parts))
    weight = torch.tensor(POSITIVE)
    return kinds + 8 * nnf.binary_cross_entropy_with_logits(outputs[:, CLASSES:], things, pos_weight=weight)


def as_input(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, SIZE, SIZE] in -1..1."""
    tensor = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor if tensor.shape[-2:] == (SIZE, SIZE) else nnf.interpolate(tensor, size=(SIZE, SIZE), mode="area")


def train(options: argparse.Namespace) -> Reader:
    """Train on the cached renders, shifted along x and a little noisy or blurred."""
    torch.manual_seed(0)
    reader, step, begin = Reader(), 0, time.monotonic()
    if (options.out / "reader.pt").exists():  # goes on, with other pictures and a rate that begins anew
        reader, step = load_reader(options.out), torch.load(options.out / "reader.pt")["step"]
    rng = np.random.default_rng([0, step])
    reader = reader.to(memory_format=torch.channels_last)
    pictures = np.load(pictures_path(options.cache, f"{SIZE}x{SIZE}"), mmap_mode="r")
    labels = [labels_of(scene_of(f"{SIZE}x{SIZE}", index)) for index in range(len(pictures))]
    classes, things = torch.tensor([entry[0] for entry in labels]), torch.tensor([entry[1] for entry in labels])
    optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=0.02)
    losses: list[float] = []
    with tqdm(unit="step", mininterval=5) as bar:
        while (share := (time.monotonic() - begin) / (options.minutes * 60)) < 1:
            optimizer.param_groups[0]["lr"] = options.rate * min(1.0, (bar.n + 1) / 100) * (1 - share)
            chosen = np.sort(rng.integers(len(pictures), size=32))
            rolled = [np.roll(pictures[index], int(rng.integers(SIZE)), axis=1) for index in chosen]
            batch = as_input(np.stack(rolled))
            if rng.random() < 0.5:
                batch = nnf.avg_pool2d(batch, 3, stride=1, padding=1, count_include_pad=False)
            batch = batch + float(rng.random() * 0.06) * torch.randn_like(batch)
            with torch.autocast("cpu", torch.bfloat16):
                outputs = reader(batch.contiguous(memory_format=torch.channels_last))
            loss = reader_loss(outputs, classes[chosen], things[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.update()
            if bar.n % 50 == 0:
                bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        step += bar.n
    torch.save({"weights": reader.state_dict(), "step": step}, options.out / "reader.pt")
    return reader


def load_reader(folder: Path) -> Reader:
    """The classifier that `train` left in a folder."""
    reader = Reader()
    reader.load_state_dict(torch.load(folder / "reader.pt")["weights"])
    return reader


@torch.inference_mode()
def report(title: str, reader: Reader, scenes: Sequence[Scene], pictures: np.ndarray) -> None:
    """Print how often each attribute was read as it was asked for.

    Things count twice: those named that were found, and those not named that were not.
    """
    reader.eval()
    outputs = torch.cat([reader(as_input(pictures[at : at + 50])) for at in range(0, len(pictures), 50)])
    right: dict[str, list[bool]] = defaultdict(list)
    for scene, output in zip(scenes, outputs, strict=True):
        offset = 0
        for kind, options in KINDS:
            right[kind].append(options[int(output[offset : offset + len(options)].argmax())] == getattr(scene, kind))
            offset += len(options)
        for thing, logit in zip(THINGS, output[CLASSES:], strict=True):
            found = bool(logit > np.log(POSITIVE))  # more likely there than not
            if thing in scene.things:
                right["things named"].append(found)
                right[f"  {thing}"].append(found)
            else:
                right["things not named"].append(not found)
    print(title)
    for kind, marks in right.items():
        print(f"  {kind:18s} {np.mean(marks):6.1%} of {len(marks)}")
    kinds = [np.mean(right[kind]) for kind in ("terrain", "time", "weather", "things named")]
    print(f"  mean of terrain, time, weather and things named {np.mean(kinds):6.1%}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    reader = train(options)
    for held_out in (False, True):
        rng = np.random.default_rng(10**6)
        scenes = [sample_scene(rng, held_out) for _ in range(300)]
        renders = np.stack([paint(scene, SIZE, SIZE) for scene in tqdm(scenes, desc="renders")])
        report(f"renders, held-out combinations: {held_out}", reader, scenes, renders)


if __name__ == "__main__":
    main()
