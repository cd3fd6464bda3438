"""Give the latents mean 0 and deviation 1 per channel, by folding both into the autoencoder's own weights, once.

The last convolution of the encoder is divided and shifted, the first of the decoder multiplied and shifted back.
Pictures decode as before (but for the border, where the decoder pads with zeros) and every later step sees unit
latents. Run it after the first training of the autoencoder, then train the decoder alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from .encode_latents import encode_wrapped, load_autoencoder

NUM_PICTURES, BATCH = 80, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True, help="the checkpoint; it is overwritten")
    given = parser.parse_args()
    autoencoder = load_autoencoder(given.autoencoder, torch.device("cpu"))
    pictures = np.load(given.cache / "pictures_256x256.npy", mmap_mode="r")[: 2 * NUM_PICTURES : 2]
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1  # [N, 3, 256, 256]
    with torch.inference_mode():
        latents = torch.cat([encode_wrapped(autoencoder, part) for part in x.split(BATCH)])
    mean, deviation = latents.mean((0, 2, 3)).clone(), latents.std((0, 2, 3)).clone()
    print(f"before: mean {mean.tolist()}, deviation {deviation.tolist()}")
    last, first = autoencoder.encoder.layers[-1], autoencoder.decoder.layers[0]
    with torch.no_grad():
        last.weight /= deviation[:, None, None, None]
        last.bias.copy_((last.bias - mean) / deviation)
        first.bias += (first.weight.sum((2, 3)) * mean).sum(1)
        first.weight *= deviation[None, :, None, None]
    state = torch.load(given.autoencoder)
    state["weights"] = autoencoder.state_dict()
    torch.save(state, given.autoencoder)


if __name__ == "__main__":
    main()
