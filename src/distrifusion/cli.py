"""The command line. torch is imported inside the commands: ``--help`` and a refused argument cost no time."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .bench import bench
from .compare import compare
from .config import ParallelConfig
from .errors import ConfigError, RanksDisagree, UnsupportedModel
from .forms import shift_choice

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130  # exit codes

_DEFAULT = ParallelConfig()

app = typer.Typer(
    name="distrifusion",
    help="One picture on several devices: a diffusers model spread over N ranks, exact or displaced, without training.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(value: bool) -> None:
    if value:
        print(f"distrifusion {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    model: Annotated[
        str | None, typer.Option(help="A diffusers folder or a hub id; without it, the bundled model.")
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            help="Worker processes. Without it: all GPUs, or on the CPU as many as --cfg and --patch or --pipe need."
        ),
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="sync (exact), displaced, naive, shifted, pipelined or tensor (exact).")
    ] = _DEFAULT.strategy,
    cfg: Annotated[int, typer.Option(help="2: the branches of guidance on separate ranks.")] = _DEFAULT.cfg,
    patch: Annotated[
        int | None,
        typer.Option(help="Ranks along the picture; without it, all that --cfg leaves. Of pipelined: in each stage."),
    ] = None,
    pipe: Annotated[
        int | None, typer.Option(help="Stages of pipelined; without it, all ranks that --cfg and --patch leave.")
    ] = None,
    stride: Annotated[
        int, typer.Option(help="Of pipelined: 2 runs each stage in every other step, and the last one on two ranks.")
    ] = _DEFAULT.stride,
    time_shift: Annotated[
        bool,
        typer.Option(
            "--time-shift", help="Of pipelined: tell stages the time of the step before. For pictures that are noisy."
        ),
    ] = _DEFAULT.time_shift,
    patches: Annotated[
        int | None, typer.Option(help="Of pipelined: the picture in so many patches that stream through the stages.")
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            help="Of pipelined with --patches: freed (a rank has those of its stage alone) or every. Default: freed."
        ),
    ] = _DEFAULT.blocks,
    split: Annotated[str, typer.Option(help="rows or cols of the picture, or frames of a video.")] = _DEFAULT.split,
    group_norm: Annotated[
        str, typer.Option(help="Statistics of displaced steps: corrected, carried, stale, separate or sync.")
    ] = _DEFAULT.group_norm,
    warmup_steps: Annotated[
        int, typer.Option(help="Synchronous steps: after the first, for displaced; at all, for shifted.")
    ] = _DEFAULT.warmup_steps,
    codec: Annotated[
        str | None,
        typer.Option(help="Fewer bytes: fp16, bf16, int8, int4, int2 or 1bit, or context=int8,halo=fp16. Approximate."),
    ] = None,
    context_window: Annotated[
        float | None, typer.Option(help="Attend to this share (0 to 1) of each neighbouring patch only. Approximate.")
    ] = None,
    text_encoders: Annotated[
        str, typer.Option(help="once: each on one rank; freed: and held in memory by that one alone; every: on all.")
    ] = _DEFAULT.text_encoders,
    balance: Annotated[
        str | None, typer.Option(help="Rows for unequal ranks: measured, or weights such as 2,1,1. Without it, equal.")
    ] = None,
    shift: Annotated[
        str | None,
        typer.Option(
            help="How shifted moves: patch, golden, random, or rows of latent per step. Default: patch, or golden with "
            "--no-remember."
        ),
    ] = None,
    overlap: Annotated[
        int, typer.Option(help="Rows of latent by which the patches of shifted overlap on each side.")
    ] = _DEFAULT.overlap,
    remember: Annotated[
        bool, typer.Option(help="Whether patches of shifted know the rest of the picture as they saw it last.")
    ] = _DEFAULT.remember,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="On CUDA: record a step of sync, displaced or naive, and play it.")
    ] = _DEFAULT.cuda_graphs,
    panorama: Annotated[
        bool, typer.Option("--panorama", help="360 degrees: left meets right. With a page to look around in.")
    ] = False,
    tile: Annotated[
        bool, typer.Option("--tile", help="A texture: left meets right and top meets bottom. With a page.")
    ] = False,
    height: Annotated[
        int | None, typer.Option(help="Pixels; without it, the model's own, or 512 for a panorama.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Pixels; without it, the model's own, or 1024 for a panorama.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Of a video; without it, the model's own.")] = None,
    fps: Annotated[int, typer.Option(help="Frames per second in the file of a video.")] = 16,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 30,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Strength of the guidance; without it 5, or what a transformer's pipeline has.")
    ] = None,
    true_cfg_scale: Annotated[
        float | None, typer.Option(help="Guidance by --negative-prompt, for FLUX and Qwen-Image.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to paint.")] = None,
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 0,
    max_memory: Annotated[
        str | None,
        typer.Option(help="Of each rank, such as 4GiB: work in as many pieces as that takes. The same picture."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; without it fp32 on the CPU, else the checkpoint's own.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or xpu.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The picture, or a video as .gif, .png or .webp.")
    ] = Path("out.png"),
) -> None:
    """Paint a picture from a prompt, on several processes.

    Alone, the command starts its workers itself; under torchrun it joins the given ranks, and rank 0 prints and writes.
    """
    if panorama and tile:
        raise ConfigError("--panorama and --tile are two ways for the ends to meet: give one of them")
    if panorama:
        height, width = height or 512, width or 1024
    config = ParallelConfig(
        strategy=strategy,  # type: ignore[arg-type]
        cfg=cfg,
        patch=patch,
        pipe=pipe,
        patches=patches,
        stride=stride,
        time_shift=time_shift,
        blocks=blocks,  # type: ignore[arg-type]
        split=split,  # type: ignore[arg-type]
        group_norm=group_norm,  # type: ignore[arg-type]
        warmup_steps=warmup_steps,
        codec=codec,
        context_window=context_window,
        text_encoders=text_encoders,  # type: ignore[arg-type]
        balance=balance,
        topology="ring-x" if panorama else "torus" if tile else "plane",
        shift=shift_choice(shift) if shift is not None else None,
        overlap=overlap,
        remember=remember,
        cuda_graphs=cuda_graphs,
        max_memory=max_memory,
    )
    from . import commands

    order = commands.Order(
        prompt=prompt,
        model=model,
        config=config,
        nproc=nproc,
        height=height,
        width=width,
        steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        seed=seed,
        dtype=dtype,
        device=device,
        output=output,
        view="panorama" if panorama else "tile" if tile else None,
        true_cfg_scale=true_cfg_scale,
        frames=frames,
        fps=fps,
    )
    result = commands.generate_joined(order) if "RANK" in os.environ else commands.generate(order)
    if result is not None:
        print(json.dumps(result.facts) if as_json else "\n".join(result.lines))


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of a table.")] = False,
) -> None:
    """List the models that can be spread, and how each was checked."""
    from .models import supported

    rows: list[dict[str, Any]] = supported()
    if as_json:
        print(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("class", "what is known of it", show_lines=True)
    table.columns[0].no_wrap = True
    for row in rows:
        facts = {name: ", ".join(cell) if isinstance(cell, (list, tuple)) else cell for name, cell in row.items()}
        table.add_row(facts.pop("class"), "\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    Console().print(table)


app.command()(bench)
app.command()(compare)


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; an error is one line on stderr."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of the libraries below, about each other
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = typer.main.get_command(app).main(arguments or ["--help"], "distrifusion", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if os.environ.get("DISTRIFUSION_TRACEBACK") == "1":
            raise
        return _refuse(error)
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _refuse(error: Exception) -> int:
    format_message = getattr(error, "format_message", None)  # click's errors, whichever click typer carries
    text = format_message() if format_message is not None else str(error)
    known = format_message is not None or type(error).__module__ == "distrifusion.errors"
    line = " ".join(text.split()) or type(error).__name__
    print(f"error: {line}" if known else f"error: {type(error).__name__}: {line}", file=sys.stderr)
    if format_message is not None or isinstance(error, (ConfigError, UnsupportedModel, RanksDisagree)):
        return BAD_INPUT
    return FAILED


def main() -> None:
    """The ``distrifusion`` command."""
    sys.exit(run())
