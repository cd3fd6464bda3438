"""Memory that each rank holds at most while a model loads: all of it, or its own part: see docs/pipelined.md.

``OMP_NUM_THREADS=1 python benchmarks/load_memory.py`` writes a PixArt of 12 blocks and 267 M random weights in bfloat16
into a temporary folder, and loads it on 1, 2 and 4 ranks at the same time, each a process of its own: in the file's
dtype, and in float32, which is 1 GiB. After loading each weight that is there is read once, as a step would. What is
printed is the peak of the resident set beyond what the process held after loading a tiny one. Linux, on the CPU.

``torchrun --nproc-per-node 2 benchmarks/load_memory.py FOLDER`` does it on torchrun's ranks, with the folder that
``python benchmarks/load_memory.py FOLDER`` has written.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import diffusers
import torch

import distrifusion as df
from distrifusion.bench.memory import PeakMemory
from distrifusion.loading import read
from distrifusion.metrics import human_bytes

WAYS = {
    "whole": None,
    "tensor": df.ParallelConfig(strategy="tensor"),
    "pipelined, patches=4": df.ParallelConfig(strategy="pipelined", patches=4, blocks="freed"),
}
WORLDS = (1, 2, 4)
NOTHING = dict.fromkeys(("vae", "text_encoder", "tokenizer"))


def write(folder: Path, width: int = 72) -> None:
    torch.set_default_dtype(torch.bfloat16)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=32,
        num_layers=12,
        num_attention_heads=16,
        attention_head_dim=width,
        cross_attention_dim=16 * width,
        caption_channels=1024,
        use_additional_conditions=False,
    )
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.normal_(std=0.02)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    diffusers.PixArtSigmaPipeline(transformer=transformer, scheduler=scheduler, **NOTHING).save_pretrained(folder)


def measure(folder: Path, way: str, dtype: torch.dtype, rank: int, world: int) -> tuple[int, int]:
    """Bytes of weights that the rank holds, and of its peak while they are loaded."""
    load(folder / "tiny", way, dtype, rank, world)
    memory = PeakMemory(torch.device("cpu"))
    before = memory.read()
    weights = load(folder, way, dtype, rank, world)
    after = memory.read()
    assert None not in (before, after), "needs /proc/self/clear_refs"
    return sum(weight.nbytes for weight in weights), (after or 0) - (before or 0)


def load(folder: Path, way: str, dtype: torch.dtype, rank: int, world: int) -> list[torch.Tensor]:
    config = WAYS[way]
    if config is None:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, **NOTHING)
    else:
        pipe = read(folder, config, rank, world, dtype=dtype, **NOTHING)
    weights = list(pipe.transformer.parameters())
    for weight in weights:
        weight.detach().view(-1)[:: 4096 // weight.element_size()].sum()  # each page
    return weights


def _child(ends: list[object], rank: int, *case: object) -> None:
    torch.set_num_threads(1)
    ends[rank].send(measure(*case[:3], rank, case[3]))  # type: ignore[attr-defined, arg-type]


def alone(folder: Path) -> None:
    """All worlds, on processes that start with the libraries there."""
    fork = multiprocessing.get_context("fork")
    for dtype in (torch.bfloat16, torch.float32):
        for world in WORLDS:
            for way in WAYS:
                if world == 1 and way != "whole":
                    continue
                pipes = [fork.Pipe(duplex=False) for _ in range(world)]
                given = ([end for _, end in pipes],)
                ranks = [fork.Process(target=_child, args=(*given, r, folder, way, dtype, world)) for r in range(world)]
                for process in ranks:
                    process.start()
                show(dtype, world, way, [here.recv() for here, _ in pipes])
                for process in ranks:
                    process.join()


def show(dtype: torch.dtype, world: int, way: str, found: list[tuple[int, int]]) -> None:
    held, peaks = (", ".join(human_bytes(each[i]) for each in found) for i in (0, 1))
    print(f"{str(dtype).removeprefix('torch.')}, {world} ranks, {way}: weights {held}; peak {peaks}", flush=True)


def main() -> None:
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        if "RANK" in os.environ:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            for dtype in (torch.bfloat16, torch.float32):
                for way in WAYS:
                    show(dtype, world, f"rank {rank}, {way}", [measure(folder, way, dtype, rank, world)])
            return
        if not (folder / "model_index.json").is_file():
            write(folder)
            write(folder / "tiny", 2)
        alone(folder)


if __name__ == "__main__":
    main()
