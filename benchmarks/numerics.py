"""The figures of docs/numerics.md: ``OMP_NUM_THREADS=1 python benchmarks/numerics.py``; about a minute on one core."""

from __future__ import annotations

import copy

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

import distrifusion as df
from distrifusion.comm import Comm
from distrifusion.moments import Ahead, Shares, combine, correct, measure


def model() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
    ).eval()


def relative(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth.double()).norm() / truth.double().norm())


def sample(unet: UNet2DConditionModel, size: tuple[int, int], steps: int, batch: int = 1, held: bool = False) -> Tensor:
    """The final latents of a DDIM sampling; with ``held`` the last prediction for latents that never change."""
    scheduler = DDIMScheduler(  # Stable Diffusion's
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, *size, generator=generator)
    text = torch.randn(batch, 7, 64, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise = unet(x, scheduler.timesteps[0] if held else t, text).sample
            if not held:
                x = scheduler.step(noise, t, x).prev_sample
    return noise if held else x


def on_ranks(
    unet: UNet2DConditionModel, world: int, size: tuple[int, int], steps: int, held: bool = False, **how: object
) -> Tensor:
    def rank(comm: Comm) -> Tensor:
        mine = df.parallelize(copy.deepcopy(unet), df.ParallelConfig(**how), comm)  # type: ignore[arg-type]
        return sample(mine, size, steps, held=held)

    return df.run_ranks(world, rank)[0]


def sampling() -> None:
    unet, size = model(), (27, 22)
    one = sample(unet, size, 10)
    other = sample(copy.deepcopy(unet).to(memory_format=torch.channels_last), size, 10)
    print("\n10 steps of DDIM, float32, latents 27 x 22, relative L2 of the final latents against one device:\n")
    print(
        "| world | sync, rows | sync, cols | displaced, warm-up 10 | displaced, warm-up 2 | naive |\n"
        "|---|---|---|---|---|---|"
    )
    for world in (2, 3, 4, 5, 7):
        cells = [
            on_ranks(unet, world, size, 10, strategy="sync"),
            on_ranks(unet, world, size, 10, strategy="sync", split="cols"),
            on_ranks(unet, world, size, 10, strategy="displaced", warmup_steps=10),
            on_ranks(unet, world, size, 10, strategy="displaced", warmup_steps=2),
            on_ranks(unet, world, size, 10, strategy="naive"),
        ]
        print(f"| {world} | " + " | ".join(f"{relative(cell, one):.1e}" for cell in cells) + " |")
    print(f"\nThe spread of one device: channels_last weights against contiguous ones {relative(other, one):.1e}.")
    still = sample(unet, size, 4, held=True)
    print("\nHeld input, world 3, displaced, 4th call against one device:", end="")
    for mode in ("corrected", "stale", "sync", "separate"):
        held = on_ranks(unet, 3, size, 4, held=True, strategy="displaced", warmup_steps=0, group_norm=mode)
        print(f" {mode} {relative(held, still):.1e}", end=";")
    print()


def group_norm() -> None:
    torch.manual_seed(0)
    print("\nVariance of 32 groups over 3 uneven patches (5, 9, 2 rows of 64), relative L2 against float64:\n")
    print(
        "| mean / deviation | (count, mean, M2) | E[x^2] - E[x]^2 in float32 | with n/(n-1) per patch |\n"
        "|---|---|---|---|"
    )
    for offset in (0.0, 10.0, 1000.0):
        patches = [torch.randn(32, rows * 640) + offset for rows in (5, 9, 2)]
        whole = torch.cat(patches, 1)
        truth = whole.double().var(1, correction=0)
        naive = (whole**2).mean(1) - whole.mean(1) ** 2
        counts = torch.tensor([float(p.shape[1]) for p in patches])
        unbiased = (
            sum(p.double().var(1) * n for p, n in zip(patches, counts, strict=True)) / counts.sum()
            + sum(n * (p.double().mean(1) - whole.double().mean(1)) ** 2 for p, n in zip(patches, counts, strict=True))
            / counts.sum()
        )
        _, ours = combine([measure(p) for p in patches])
        print(
            f"| {offset:g} | " + " | ".join(f"{relative(found, truth):.1e}" for found in (ours, naive, unbiased)) + " |"
        )
    print("\nThe correction in means and variances, then the formula as printed, against float64; mean / deviation 30:")
    before = [torch.randn(32, 640) + 30 for _ in range(3)]
    now = before[0] + 0.1 * torch.randn(32, 640) + 0.05
    own, *others = (measure(p) for p in before)
    each, peers = own[None], torch.stack(others)[None]
    _, var = correct(measure(now), Ahead.all_of(each, peers, Shares.of(each, peers))[0])

    def printed(dtype: torch.dtype) -> Tensor:
        e = [[(p.to(dtype) ** k).mean(1) for k in (1, 2)] for p in before]
        own = [(now.to(dtype) ** k).mean(1) for k in (1, 2)]
        first, second = (sum(p[k] for p in e) / 3 + own[k] - e[0][k] for k in (0, 1))
        return second - first**2

    truth = printed(torch.float64)
    print(f"variance {relative(var, truth):.1e} against {relative(printed(torch.float32), truth):.1e}")


if __name__ == "__main__":
    group_norm()
    sampling()
