"""The command line of the comparison: asks for a plan, shows a table, says what was written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..options import Patches, StageRanks, Strides

if TYPE_CHECKING:
    from .output import Output
    from .plan import Plan


def compare(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write, whole or not at all.")],
    model: Annotated[
        str | None, typer.Option(help="A diffusers folder or a hub id; without it, the bundled model.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file of prompts, one a line; without it, 60 for the bundled model.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given again.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts.")] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="May be given again. Default: sync, displaced, naive.")
    ] = None,
    world: Annotated[list[int] | None, typer.Option(help="Ranks; may be given again. Default: 2 and 4.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="May be given again. Default: 25.")] = None,
    warmup_steps: Annotated[
        list[int] | None, typer.Option(help="Of displaced; may be given again. Default: 4.")
    ] = None,
    group_norm: Annotated[
        list[str] | None,
        typer.Option(
            help="Of displaced: corrected, carried, stale, separate, sync; may be given again. Default: corrected."
        ),
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(help="Of sync and displaced, see generate; none is one too; may be given again. Default: none."),
    ] = None,
    context_window: Annotated[
        list[float] | None, typer.Option(help="Of sync and displaced, see generate; may be given again.")
    ] = None,
    shift: Annotated[list[str] | None, typer.Option(help="Of shifted, see generate; may be given again.")] = None,
    overlap: Annotated[list[int] | None, typer.Option(help="Of shifted; may be given again. Default: 0.")] = None,
    no_remember: Annotated[
        bool, typer.Option("--no-remember", help="Of shifted: with what its patches remember and without it.")
    ] = False,
    patches: Patches = None,
    patch: StageRanks = None,
    stride: Strides = None,
    time_shift: Annotated[
        bool, typer.Option("--time-shift", help="Of pipelined: without it and with it, see generate.")
    ] = False,
    split: Annotated[str, typer.Option(help="rows or cols of the picture.")] = "rows",
    cfg: Annotated[int, typer.Option(help="2: the branches of guidance on separate ranks.")] = 1,
    height: Annotated[int | None, typer.Option(help="Pixels; without it, the model's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; without it, the model's own.")] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Strength of the guidance; without it 2.5 for the bundled model, 5, or a transformer's own."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next has the next.")] = 0,
    batch: Annotated[int, typer.Option(help="Prompts that are painted together.")] = 2,
    jobs: Annotated[int | None, typer.Option(help="Worker processes of one thread; without it, one a core.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; without it fp32 on the CPU, else the checkpoint's own.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or xpu: all ranks of a case share one.")] = "cpu",
    folders: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Paint nothing: measure the PNGs of the second folder against those of the first."),
    ] = None,
    show: Annotated[int, typer.Option(help="Prompts whose pictures the report shows.")] = 6,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder, and start anew.")] = False,
    add: Annotated[bool, typer.Option("--add", help="Add cases to a finished output folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Paint prompts on one device and under every strategy and setting, measure the pictures, and write a report.

    Options that may be given again make a product. A run that was cut off goes on where it was when the same command is
    given again.
    """
    from ..checkpoint import find
    from ..choices import check_device, check_staged, dtype_name
    from ..forms import codec_choices, patch_choices, patches_choices, shift_choice
    from .output import Output
    from .plan import Plan, cases_for, default_guidance, read_prompts
    from .summary import table

    given = [name for name in context.params if _is_given(context, name)]
    if show < 0:
        _refuse(f"show={show} must be 0 or more")
    if folders is not None:
        found = _compare_folders(folders, output, world, split, show, force, given)
    else:
        strategies = strategy or ["sync", "displaced", "naive"]
        options = {"--patches": patches, "--patch": patch, "--stride": stride, "--time-shift": time_shift}
        check_staged(strategies, options)
        cases = cases_for(
            strategies,
            world or [2, 4],
            steps or [25],
            warmup_steps or [4],
            group_norm or ["corrected"],
            split,
            cfg,
            codec_choices(codec or ["none"]),
            context_window or [None],
            [shift_choice(text) for text in shift or []] or [None],
            overlap or [None],
            patches_choices(patches or ["none"]),
            patch_choices(patch or []),
            stride or [1],
            [False, True] if time_shift else [False],
            [True, False] if no_remember else [True],
        )
        texts = read_prompts(prompts, prompt, model is None, limit)
        if jobs is not None and jobs < 1:
            _refuse(f"jobs={jobs} must be a whole number of at least 1")
        check_device(device)
        checkpoint = find(model)
        plan = Plan(
            model=model or "bundled",
            checkpoint=checkpoint,
            prompts=texts,
            cases=cases,
            height=height,
            width=width,
            guidance_scale=guidance_scale if guidance_scale is not None else default_guidance(model, checkpoint),
            seed=seed,
            batch=batch,
            dtype=dtype_name(dtype, device, checkpoint) or "float32",
            device=device,
        )
        plan.check()
        found = _paint(plan, Output(output, force=force, add=add), jobs, show)
    if as_json:
        typer.echo(json.dumps({"output": str(output), **found}))
        return
    from rich.console import Console

    has_width = Console().is_terminal  # a file or a pipe has none of its own
    Console(width=None if has_width else 200).print(table(found))
    written = ["report.html", "metrics.json"] + ([] if folders else ["pictures/"])
    for line in [*found["notes"], *(f"wrote {output / name}" for name in written)]:
        typer.echo(line)


def _paint(plan: Plan, target: Output, jobs: int | None, show: int) -> dict[str, Any]:
    from .pool import num_cores
    from .run import run  # torch: seconds that a refused argument need not cost

    try:
        with _progress() as on_progress:
            return run(plan, target, jobs or (num_cores() if plan.device == "cpu" else 1), show, on_progress)
    except BaseException as error:
        if target.has_results() and not isinstance(error, ConfigError):
            typer.echo(f"what is done is kept in {target.part}: the same command goes on from there", err=True)
        raise


def _compare_folders(
    folders: tuple[Path, Path],
    output: Path,
    world: list[int] | None,
    split: str,
    show: int,
    force: bool,
    given: Iterable[str],
) -> dict[str, Any]:
    for name in given:
        if name not in ("folders", "output", "world", "split", "show", "force", "as_json"):
            _refuse(f"--folders compares pictures that are there: leave --{name.replace('_', '-')} out")
    if split not in ("rows", "cols"):
        _refuse(f"split={split!r} must be one of 'rows', 'cols'")
    if world is not None and (len(world) > 1 or world[0] < 1):
        _refuse("--folders takes one --world of at least 1: into how many patches its pictures were cut")
    for folder in folders:
        if output.resolve() in (folder.resolve(), *folder.resolve().parents):
            _refuse(f"output {str(output)!r} would take the place of {str(folder)!r}: name another")
    from .folders import compare_folders, pairs
    from .output import Output

    pairs(*folders)  # before the output is asked for anything
    target = Output(output, force=force)
    with _progress() as on_progress:
        return compare_folders(
            *folders, target, world=world[0] if world else None, split=split, show=show, on_progress=on_progress
        )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse(text: str) -> None:
    raise ConfigError(text)


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading", total=None)

        def on_progress(text: str, done: int, total: int) -> None:
            progress.update(task, description=text, completed=done, total=total)

        yield on_progress
