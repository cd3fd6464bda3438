"""Encode the cached renders once; --shrink 2 encodes them at half their size for an early stage.

python -m recipes.landscapes.encode_latents --cache DIR --autoencoder DIR/autoencoder.pt --form 256x256 --shrink 2
"""

import argparse
import multiprocessing
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from diffusers import AutoencoderTiny
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

from .data import parse_format, pictures_path
from .networks import FACTOR, LATENT_CHANNELS, make_autoencoder
from .train_autoencoder import encode

CHUNK = 200  # pictures per task
WRAP = 32  # pixels of the other side that the encoder sees beyond the seam


def load_autoencoder(path: Path, device: torch.device) -> AutoencoderTiny:
    """The autoencoder of a training checkpoint."""
    autoencoder = make_autoencoder()
    autoencoder.load_state_dict(torch.load(path, map_location="cpu")["weights"])
    return autoencoder.to(device, memory_format=torch.channels_last).eval()  # 1.6x on a CPU


def encode_wrapped(autoencoder: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """Latents [B, 4, H/8, W/8] of wrapping pictures [B, 3, H, W], so that they may be rolled along x."""
    wrapped = nnf.pad(pictures, (WRAP, WRAP, 0, 0), mode="circular")
    margin = WRAP // FACTOR
    return encode(autoencoder, wrapped)[..., margin:-margin]


def encode_chunk(options: argparse.Namespace, path: Path, first: int) -> int:
    """Fill one chunk of the latents at `path`; the number of its first picture."""
    torch.set_num_threads(max(1, torch.get_num_threads() // options.workers))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = load_autoencoder(options.autoencoder, device)
    pictures = np.load(pictures_path(options.cache, options.form), mmap_mode="r")
    latents = np.load(path, mmap_mode="r+")
    last = min(first + CHUNK, len(latents))
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        for at in range(first, last, options.batch):
            batch = torch.tensor(pictures[at : min(at + options.batch, last)]).to(device).permute(0, 3, 1, 2)
            batch = batch.float() / 127.5 - 1
            if options.shrink > 1:
                batch = nnf.avg_pool2d(batch, options.shrink)
            latents[at : at + len(batch)] = encode_wrapped(autoencoder, batch).float().cpu().numpy()
    return first


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--form", required=True, help="such as 256x256")
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--count", type=int, help="only the first so many")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else multiprocessing.cpu_count())
    options = parser.parse_args()
    count = len(np.load(pictures_path(options.cache, options.form), mmap_mode="r")[: options.count])
    height, width = (side // options.shrink for side in parse_format(options.form))
    path = options.cache / f"latents_{height}x{width}.npy"
    shape = (count, LATENT_CHANNELS, height // FACTOR, width // FACTOR)
    unfinished = path.with_suffix(".partial")
    open_memmap(unfinished, mode="w+", dtype=np.float16, shape=shape).flush()
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        chunks = pool.imap_unordered(partial(encode_chunk, options, unfinished), range(0, count, CHUNK))
        for _ in tqdm(chunks, desc=path.name, total=-(-count // CHUNK), unit_scale=CHUNK, unit="picture"):
            pass
    unfinished.replace(path)
    latents = np.load(path, mmap_mode="r")
    print(f"{path.name}: mean {latents.mean(dtype=np.float64):.3f}, deviation {latents.std(dtype=np.float64):.3f}")


if __name__ == "__main__":
    main()
