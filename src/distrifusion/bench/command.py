"""The command line of the benchmark: asks for a plan, shows a table, ends in one JSON line."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer


def bench(
    model: Annotated[
        str, typer.Option(help="A shape with random weights (sdxl, sdxl-mini, sd15) or a folder.")
    ] = "sdxl-mini",
    world: Annotated[list[int] | None, typer.Option(help="Ranks; may be given again. Default: 1 and 2.")] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="May be given again. Default: sync, displaced, naive.")
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(help="Fewer bytes, see generate; none is one too; may be given again. Default: none."),
    ] = None,
    context_window: Annotated[float | None, typer.Option(help="See generate.")] = None,
    height: Annotated[int, typer.Option(help="Pixels.")] = 1024,
    width: Annotated[int, typer.Option(help="Pixels.")] = 1024,
    batch: Annotated[int, typer.Option(help="Latents per step; 2 is one picture with guidance.")] = 1,
    rounds: Annotated[int, typer.Option(help="How often each case has its turn.")] = 5,
    steps: Annotated[int, typer.Option(help="Timed steps in each turn.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or xpu.")] = "cpu",
    only_json: Annotated[bool, typer.Option("--json", help="No table, only the JSON line.")] = False,
) -> None:
    """Time strategies and worlds side by side: the bare model on one rank and on all threads, then every strategy."""
    from rich.console import Console
    from rich.progress import Progress

    from ..choices import check_device
    from ..config import ParallelConfig, codec_choices
    from .measure import Plan, cases_for, run
    from .workload import check_name

    worlds, strategies = world or [1, 2], strategy or ["sync", "displaced", "naive"]
    codecs = codec_choices(codec or ["none"])
    for name in strategies:
        ParallelConfig(strategy=name)  # type: ignore[arg-type]
    ParallelConfig(context_window=context_window)
    check_name(model)
    check_device(device)
    check(worlds, rounds, steps, batch, height, width, dtype)
    threads = os.cpu_count() or 1 if device == "cpu" else 1
    cases = cases_for(strategies, sorted(set(worlds)), threads, codecs, context_window)  # type: ignore[arg-type]
    plan = Plan(model, height // 8, width // 8, batch, cases, rounds, steps, dtype, device)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=only_json, refresh_per_second=1) as progress:
        task = progress.add_task("measuring", total=None)
        found = run(plan, lambda done, total: progress.update(task, completed=done, total=total))
    if not only_json:
        Console(width=max(Console().width, 120)).print(table(found))
    typer.echo(json.dumps(found))


def check(worlds: list[int], rounds: int, steps: int, batch: int, height: int, width: int, dtype: str) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: names the value and what would be right.
    """
    from ..errors import ConfigError

    for name, value in (("world", min(worlds)), ("rounds", rounds), ("steps", steps), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    for name, value in (("height", height), ("width", width)):
        if value < 8 or value % 8:
            raise ConfigError(f"--{name} {value} must be a multiple of 8, at least 8")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype!r} must be one of float32, bfloat16, float16")


def table(found: dict[str, Any]) -> Any:
    """The cases as a rich table."""
    from rich.table import Table

    from ..metrics import human_bytes

    settings = found["bench"]
    size = f"{settings['batch']} x 4 x {settings['height']} x {settings['width']}"
    title = f"{settings['model']}, latents {size}, {settings['dtype']}, {settings['device']}"
    grid = Table(title=title)
    for name in (
        "case",
        "ranks",
        "s/step",
        "spread",
        "x one rank",
        "of linear",
        "CPU s",
        "waits s",
        "messages",
        "bytes",
    ):
        grid.add_column(name, justify="left" if name == "case" else "right")
    for row in found["cases"]:
        grid.add_row(
            row["case"],
            str(row["world"]),
            f"{row['seconds_per_step']:.3f}",
            f"{row['spread']:.1%}",
            f"{row['speedup']:.2f}",
            f"{row['share_of_linear']:.0%}",
            f"{row['cpu_seconds_per_step']:.3f}",
            f"{row['waited_per_step']:.3f}",
            str(row["messages_per_step"]),
            human_bytes(row["bytes_per_step"]),
        )
    return grid
