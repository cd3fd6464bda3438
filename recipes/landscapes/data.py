"""Renders kept on disk: one memory-mapped array per picture format, filled in parallel and resumable.

python -m recipes.landscapes.data --cache DIR --count 256x256=20000 --count 512x512=2500 --count 256x512=2500
"""

import argparse
import multiprocessing
import zlib
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from .networks import FACTOR
from .painter import paint_marked
from .scene import Scene, sample_scene

CHUNK = 50


def parse_format(text: str) -> tuple[int, int]:
    """'256x512' -> (height 256, width 512)."""
    height, width = text.split("x")
    return int(height), int(width)


def scene_of(form: str, index: int, *, held_out: bool = False) -> Scene:
    """The scene of a picture in the cache: a function of its format and number alone."""
    return sample_scene(np.random.default_rng([7, zlib.crc32(form.encode()), int(held_out), index]), held_out)


def pictures_path(cache: Path, form: str) -> Path:
    """Where the renders of a format lie: uint8 [N, H, W, 3]."""
    return cache / f"pictures_{form}.npy"


def marks_path(cache: Path, form: str) -> Path:
    """Where it lies which latents of a picture show a thing: uint8 0..255 [N, H/8, W/8]."""
    return cache / f"marks_{form}.npy"


def _paint_chunk(job: tuple[Path, str, int, int]) -> int:
    cache, form, first, last = job
    pictures = np.load(pictures_path(cache, form), mmap_mode="r+")
    marks = np.load(marks_path(cache, form), mmap_mode="r+")
    height, width = parse_format(form)
    for index in range(first, last):
        pictures[index], marked = paint_marked(scene_of(form, index), height, width)
        marks[index] = 255 * marked.reshape(height // FACTOR, FACTOR, width // FACTOR, FACTOR).max(axis=(1, 3))
    return first


def render(cache: Path, form: str, count: int, workers: int) -> None:
    """Fill the cache of a format up to `count` pictures; chunks already done are skipped."""
    cache.mkdir(parents=True, exist_ok=True)
    height, width = parse_format(form)
    path, done_path = pictures_path(cache, form), cache / f"pictures_{form}.done"
    if not path.exists():
        small = (count, height // FACTOR, width // FACTOR)
        open_memmap(marks_path(cache, form), mode="w+", dtype=np.uint8, shape=small).flush()
        open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, height, width, 3)).flush()
    count = min(count, len(np.load(path, mmap_mode="r")))
    done = {int(line) for line in done_path.read_text().split()} if done_path.exists() else set()
    jobs = [(cache, form, first, min(first + CHUNK, count)) for first in range(0, count, CHUNK) if first not in done]
    with multiprocessing.Pool(workers) as pool, done_path.open("a") as log:
        for first in tqdm(pool.imap(_paint_chunk, jobs), total=len(jobs), desc=form, unit_scale=CHUNK, unit="picture"):
            log.write(f"{first}\n")
            log.flush()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--count", action="append", required=True, metavar="HxW=N", help="may be given several times")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    for entry in options.count:
        form, count = entry.split("=")
        render(options.cache, form, int(count), options.workers)


if __name__ == "__main__":
    main()
