"""Encode the cached renders once; --shrink 2 encodes them at half their size for an early stage.

python -m recipes.landscapes.encode_latents --cache DIR --autoencoder DIR/autoencoder.pt --form 256x256 --shrink 2
"""

import argparse
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

WRAP = 32  # pixels of the other side that the encoder sees beyond the seam


def load_autoencoder(path: Path, device: torch.device) -> AutoencoderTiny:
    """The autoencoder of a training checkpoint."""
    autoencoder = make_autoencoder()
    autoencoder.load_state_dict(torch.load(path, map_location="cpu")["weights"])
    return autoencoder.to(device).eval()


def encode_wrapped(autoencoder: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """Latents [B, 4, H/8, W/8] of wrapping pictures [B, 3, H, W], so that they may be rolled along x."""
    wrapped = nnf.pad(pictures, (WRAP, WRAP, 0, 0), mode="circular")
    margin = WRAP // FACTOR
    return encode(autoencoder, wrapped)[..., margin:-margin]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--form", required=True, help="such as 256x256")
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--count", type=int, help="only the first so many")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = load_autoencoder(options.autoencoder, device)
    pictures = np.load(pictures_path(options.cache, options.form), mmap_mode="r")[: options.count]
    height, width = (side // options.shrink for side in parse_format(options.form))
    path = options.cache / f"latents_{height}x{width}.npy"
    shape = (len(pictures), LATENT_CHANNELS, height // FACTOR, width // FACTOR)
    partial = path.with_suffix(".partial")
    latents = open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        for first in tqdm(range(0, len(pictures), options.batch), desc=path.name, unit_scale=options.batch):
            batch = torch.from_numpy(pictures[first : first + options.batch]).to(device).permute(0, 3, 1, 2)
            batch = batch.float() / 127.5 - 1
            if options.shrink > 1:
                batch = nnf.avg_pool2d(batch, options.shrink)
            latents[first : first + len(batch)] = encode_wrapped(autoencoder, batch).float().cpu().numpy()
    latents.flush()
    partial.replace(path)
    print(f"{path.name}: mean {latents.mean(dtype=np.float64):.3f}, deviation {latents.std(dtype=np.float64):.3f}")


if __name__ == "__main__":
    main()
