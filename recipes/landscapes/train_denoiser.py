"""Train the denoiser and the text encoder on cached latents, in stages of growing size; resumable.

torchrun --nproc-per-node 2 -m recipes.landscapes.train_denoiser --cache DIR --out DIR --minutes 90
"""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from .captions import caption
from .data import marks_path, scene_of
from .networks import make_text_encoder, make_unet
from .optimizer import Optimizer
from .parallel import average_gradients, setup
from .tokenizer import encode, load_tokenizer, piece_table

# Until this share of the time: what is drawn (format: (chance, batch per process)).
STAGES: tuple[tuple[float, dict[str, tuple[float, int]]], ...] = (
    (0.22, {"128x128": (1.0, 32)}),
    (0.75, {"256x256": (0.9, 24), "256x512": (0.1, 12)}),
    (1.01, {"256x256": (0.6, 24), "256x512": (0.2, 12), "512x512": (0.2, 6)}),
)
SOURCES = {"128x128": "256x256"}  # whose scenes the format shows, where they are another's
DECAY_FROM = 0.6  # the learning rate falls to zero over the rest of the time
EMPTY_CAPTION = 0.1
# What takes longest to learn: of the pictures without any of it a third is kept, with one two thirds, with two all.
HARD_THINGS = frozenset(("birds", "crescent moon", "rainbow", "boat", "lighthouse", "cabin", "castle"))
# So much more the loss of a latent counts that shows a thing, at times when its place is settled; earlier, the weight
# would draw things to all places where they may stand.
MARKED_WEIGHT, MARKED_BEFORE = 4.0, 600
MIDDLE, MIDDLE_AT, MIDDLE_SPREAD = 0.6, -0.8, 0.9  # a share of the batch; its times' mean and deviation as logits
SAVE_EVERY = 180.0  # seconds


def make_noise_scheduler() -> DDPMScheduler:
    """v-prediction on Stable Diffusion's schedule, stretched to end in pure noise."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


class Batches:
    """Latents with fresh captions; a batch is a function of the step and the rank."""

    def __init__(self, cache: Path, rank: int, tokenizer: Any) -> None:
        self.cache, self.rank, self.tokenizer = cache, rank, tokenizer
        self.table = piece_table(tokenizer)
        self.latents: dict[str, np.ndarray] = {}
        self.marks: dict[str, np.ndarray] = {}

    def draw(self, step: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, 4, h, w], how much of each a thing covers [B, 1, h, w] and token numbers [B, L].

        The share 0..1 of the training time chooses the stage.
        """
        stage = next(mix for until, mix in STAGES if share < until)
        stage = {form: entry for form, entry in stage.items() if (self.cache / f"latents_{form}.npy").exists()}
        if not stage:
            raise FileNotFoundError(f"no latents in {self.cache} for this stage; run encode_latents first")
        chances = np.array([chance for chance, _ in stage.values()])
        common = np.random.default_rng([step, 1])  # all processes draw the same format
        form = str(common.choice(list(stage), p=chances / chances.sum()))
        if form not in self.latents:
            self.latents[form] = np.load(self.cache / f"latents_{form}.npy", mmap_mode="r")
            self.marks[form] = np.load(marks_path(self.cache, SOURCES.get(form, form)), mmap_mode="r")
        rng, source = np.random.default_rng([step, 2, self.rank]), self.latents[form]
        latents, marks, captions = [], [], []
        for _ in range(stage[form][1]):
            empty = rng.random() < EMPTY_CAPTION
            index = int(rng.integers(len(source)))
            while not empty and 3 * rng.random() > 1 + self._count_hard(form, index):  # not where no caption asks
                index = int(rng.integers(len(source)))
            shift = int(rng.integers(source.shape[-1]))
            latents.append(np.roll(source[index], shift, axis=-1))
            finer = self.marks[form].shape[-1] // source.shape[-1]
            marks.append(np.roll(self.marks[form][index, ::finer, ::finer], shift, axis=-1))
            captions.append("" if empty else caption(scene_of(SOURCES.get(form, form), index), rng))
        tokens = self.table[encode(self.tokenizer, captions)]
        return torch.from_numpy(np.stack(latents)).float(), torch.from_numpy(np.stack(marks))[:, None] / 255, tokens

    @staticmethod
    def _count_hard(form: str, index: int) -> int:
        return len(HARD_THINGS.intersection(scene_of(SOURCES.get(form, form), index).things))


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """Times 0..999 [count]: most around the middle, where things take shape, the others over the whole schedule.

    Half of the schedule has a signal below a third of the noise, which shows no more than light and terrain. Each part
    is spread evenly over its distribution, which halves the noise of the loss.
    """
    middle = round(count * MIDDLE)
    shares = [
        (torch.arange(part) + torch.rand(part, generator=generator)) / part for part in (middle, count - middle) if part
    ]
    shares[0] = torch.sigmoid(MIDDLE_AT + MIDDLE_SPREAD * torch.special.ndtri(shares[0]))
    return (torch.cat(shares) * 1000).long().clamp(0, 999)


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, step: int) -> None:
    """Exponential moving average of the weights, quick at first."""
    keep = min(0.995, (1 + step) / (10 + step))
    for name, weight in model.state_dict().items():
        average[name].lerp_(weight.float(), 1 - keep) if weight.is_floating_point() else average[name].copy_(weight)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90, help="of training in all, earlier runs counted in")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--resume", type=Path, help="a checkpoint to start from; one in --out is gone on with instead")
    parser.add_argument("--begin", type=float, default=0.0, help="leave out the stages before this share of the time")
    options = parser.parse_args()
    rank, world, device = setup()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(options.out / "tokenizer")
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "unet": make_unet(),
            "text_encoder": make_text_encoder(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id),
        }
    ).to(device)
    average = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = list(model.parameters())
    optimizer = Optimizer(model, rank, world)
    path, step, elapsed, pictures, begun = options.out / "denoiser.pt", 0, 0.0, 0, 0
    start = path if path.exists() else options.resume
    if start is not None:
        saved = torch.load(start, map_location=device)
        model.load_state_dict(saved.get("weights", saved["average"]))
        average = {name: weight.to(average[name].dtype, copy=True) for name, weight in saved["average"].items()}
        step, pictures = saved["step"], saved["pictures"]
        if start == path:
            optimizer.load(options.out)
            elapsed, begun = saved["elapsed"], saved["begun"]
        else:  # another run's weights: the stages and the rate start anew
            begun = step

    def save() -> None:
        if rank == 0:
            state = {
                "weights": model.state_dict(),
                "average": average,
                "step": step,
                "elapsed": elapsed,
                "pictures": pictures,
                "begun": begun,
            }
            torch.save(state, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        optimizer.save(options.out)

    scheduler, batches = make_noise_scheduler(), Batches(options.cache, rank, tokenizer)
    last, last_save, losses = time.monotonic(), elapsed, []
    with tqdm(unit="step", initial=step, disable=rank > 0, mininterval=5) as bar:
        while True:
            clock = torch.tensor([elapsed], dtype=torch.float64)
            if world > 1:
                dist.broadcast(clock, 0)
            elapsed = float(clock)
            if elapsed - last_save > SAVE_EVERY:  # by the common clock: all processes at the same step
                save()
                last_save = elapsed
            share = options.begin + (1 - options.begin) * elapsed / (options.minutes * 60)
            if share >= 1:
                break
            factor = min(1.0, (step - begun + 1) / 150) * min(1.0, (1 - share) / (1 - DECAY_FROM))
            latents, marks, tokens = (value.to(device) for value in batches.draw(step, share))
            generator = torch.Generator().manual_seed(step * 64 + rank)
            times = draw_times(len(latents), generator).to(device)
            noise = torch.randn(latents.shape, generator=generator).to(device)
            noisy = scheduler.add_noise(latents, noise, times)
            target = scheduler.get_velocity(latents, noise, times)
            small = device.type == "cpu" and latents[0, 0].numel() <= 2048  # where the flash kernel is the slower one
            with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH) if small else nullcontext():
                text = model["text_encoder"](tokens)[0]
                made = model["unet"](noisy, times, text).sample
            weight = 1 + (MARKED_WEIGHT - 1) * marks * (times < MARKED_BEFORE)[:, None, None, None]
            loss = (weight * (made.float() - target) ** 2).mean()
            model.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(trained, world)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step(options.rate * factor)
            step += 1
            pictures += len(latents) * world
            now = time.monotonic()
            elapsed += min(now - last, 30.0)  # a pause of the machine does not count
            last = now
            losses.append(loss.item())
            if rank == 0:
                update_average(average, model, step)
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{np.mean(losses):.4f}", pictures=pictures, minutes=f"{elapsed / 60:.1f}")
                losses.clear()
    save()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
