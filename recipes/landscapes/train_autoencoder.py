"""Train the autoencoder on crops of the cached renders; stops at --minutes and goes on from where it stopped.

torchrun --nproc-per-node 2 -m recipes.landscapes.train_autoencoder --cache DIR --out DIR --minutes 25
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from diffusers import AutoencoderTiny
from torch import Tensor
from tqdm import tqdm

from .data import parse_format, pictures_path
from .networks import make_autoencoder
from .parallel import agree, average_gradients, setup

CROP = 64
NOISE = 0.03  # added to the latents, so that the decoder forgives a small error of the denoiser


def load_crops(cache: Path, forms: list[str], batch: int, rng: np.random.Generator) -> Tensor:
    """Random crops of rendered pictures in -1..1: [batch, 3, CROP, CROP]."""
    crops = np.empty((batch, CROP, CROP, 3), np.uint8)
    for index in range(batch):
        form = forms[int(rng.integers(len(forms)))]
        pictures = np.load(pictures_path(cache, form), mmap_mode="r")
        rendered = len((cache / f"pictures_{form}.done").read_text().split()) * 50
        height, width = parse_format(form)
        top, left = rng.integers(height - CROP + 1), rng.integers(width - CROP + 1)
        crops[index] = pictures[rng.integers(min(rendered, len(pictures))), top : top + CROP, left : left + CROP]
        if rng.random() < 0.5:
            crops[index] = crops[index, :, ::-1]
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1


def gradient_loss(made: Tensor, true: Tensor) -> Tensor:
    """L1 between the differences of neighbouring pixels: keeps edges and small things sharp."""
    loss = torch.zeros((), device=made.device)
    for dim in (2, 3):
        loss = loss + (made.diff(dim=dim) - true.diff(dim=dim)).abs().mean()
    return loss


def moments_loss(latents: Tensor) -> Tensor:
    """Pulls every latent channel of a batch towards mean 0 and deviation 1; latents [B, C, h, w]."""
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    return (mean**2).mean() + ((deviation - 1) ** 2).mean()


def encode(autoencoder: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """The latents of pictures [B, 3, H, W] in -1..1: [B, 4, H/8, W/8]."""
    return autoencoder.encoder(pictures)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--forms", nargs="+", default=["256x256", "512x512"])
    parser.add_argument("--decoder-only", action="store_true", help="keep the latents as they are")
    options = parser.parse_args()
    rank, world, device = setup()
    path = options.out / "autoencoder.pt"
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    autoencoder = make_autoencoder().to(device, memory_format=torch.channels_last)
    step = 0
    if path.exists():
        saved = torch.load(path, map_location=device)
        autoencoder.load_state_dict(saved["weights"])
        step = saved["step"]
    if options.decoder_only:
        autoencoder.encoder.requires_grad_(False)
    trained = [weight for weight in autoencoder.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.rate, betas=(0.9, 0.99), weight_decay=0, fused=True)
    rng = np.random.default_rng([step, rank])
    torch.manual_seed(step + rank)
    begin, budget = time.monotonic(), options.minutes * 60
    start, last_save = step, begin
    with tqdm(unit="step", initial=step, disable=rank > 0) as bar:
        while not agree((spent := time.monotonic() - begin) >= budget, world):
            factor = min(1.0, (step - start + 1) / 50) * max(0.02, 1 - min(1.0, spent / budget) ** 1.5)
            for group in optimizer.param_groups:
                group["lr"] = options.rate * factor
            true = load_crops(options.cache, options.forms, options.batch, rng).to(device)
            true = true.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16):
                latents = encode(autoencoder, true)
                made = autoencoder.decoder(latents + NOISE * torch.randn_like(latents))
            made = made.float()
            square = nnf.mse_loss(made, true)
            loss = square + 0.3 * nnf.l1_loss(made, true) + 0.5 * gradient_loss(made, true)
            loss = loss + 0.05 * moments_loss(latents.float())
            autoencoder.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(trained, world)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            step += 1
            bar.update()
            if step % 25 == 0:
                bar.set_postfix(psnr=f"{10 * np.log10(4 / square.item()):.2f}", loss=f"{loss.item():.4f}")
            if rank == 0 and time.monotonic() - last_save > 120:
                torch.save({"weights": autoencoder.state_dict(), "step": step}, path)
                last_save = time.monotonic()
    if rank == 0:
        torch.save({"weights": autoencoder.state_dict(), "step": step}, path)


if __name__ == "__main__":
    main()
