"""The command line of the benchmark: asks for a plan, shows a table, ends in one JSON line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import Patches, StageRanks, Strides

if TYPE_CHECKING:
    from .plan import Plan
    from .start import Found, Tell


def bench(
    model: Annotated[
        str,
        typer.Option(
            help="A shape with random weights (sdxl, sdxl-mini, sd15, flux-mini, pixart-mini; vae-sd, vae-mini: its "
            "decode) or a folder."
        ),
    ] = "sdxl-mini",
    world: Annotated[
        list[int] | None, typer.Option(help="Ranks; may be given again. Default: 1 and 2, under torchrun 1 and all.")
    ] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="May be given again. Default: sync, displaced, naive; sync for a VAE.")
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(help="Fewer bytes, see generate; none is one too; may be given again. Default: none."),
    ] = None,
    context_window: Annotated[float | None, typer.Option(help="See generate.")] = None,
    balance: Annotated[str | None, typer.Option(help="See generate.")] = None,
    patches: Patches = None,
    blocks: Annotated[
        str | None, typer.Option(help="Of pipelined with --patches: every or freed. Default: every.")
    ] = None,
    patch: StageRanks = None,
    stride: Strides = None,
    cuda_graphs: Annotated[
        bool,
        typer.Option("--cuda-graphs", help="Of sync, displaced and naive, see generate: without it and with it."),
    ] = False,
    at_once: Annotated[
        bool,
        typer.Option("--at-once", help="Also the bare model on every rank at the same time: what the machine gives."),
    ] = False,
    products: Annotated[
        bool,
        typer.Option(
            "--products", help="Also the bare model with the ranks' matrix products: what is not the strategies' doing."
        ),
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Also with the denoiser's blocks compiled by torch.compile, and the bare model."
        ),
    ] = False,
    size: Annotated[
        list[str] | None, typer.Option(help="Pixels as HEIGHTxWIDTH, or one number for both; may be given again.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, for one size. Default: 1024.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, for one size. Default: 1024.")] = None,
    batch: Annotated[int, typer.Option(help="Latents per step; 2 is one picture with guidance.")] = 1,
    rounds: Annotated[int, typer.Option(help="How often each case has its turn.")] = 5,
    steps: Annotated[int, typer.Option(help="Timed steps in each turn.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or xpu.")] = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Draw the speed-ups into this .png; needs matplotlib.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Run every case once more, untimed, and write a Chrome trace of all ranks to this .json."),
    ] = None,
    only_json: Annotated[bool, typer.Option("--json", help="No table, only the JSON line.")] = False,
) -> None:
    """Time strategies, worlds and sizes side by side: the bare model on one rank and on all threads, then the rest.

    Alone, the command starts its ranks itself; under torchrun it joins the given ones, and rank 0 prints and writes.
    """
    order = Order(
        model,
        world or [],
        strategy or [],
        codec or [],
        context_window,
        balance,
        patches or [],
        blocks,
        patch or [],
        stride or [],
        cuda_graphs,
        at_once,
        products,
        compiled,
        size or [],
        height,
        width,
        batch,
        rounds,
        steps,
        dtype,
        device,
        plot,
        trace,
    )
    found = _joined(order, only_json) if "RANK" in os.environ else _alone(order, only_json)
    if found is not None:
        _show(order, found, only_json)


@dataclass(frozen=True)
class Order:
    """The command line, parsed; empty lists where the defaults are meant."""

    model: str
    worlds: list[int]
    strategies: list[str]
    codecs: list[str]
    context_window: float | None
    balance: str | None
    patches: list[str]
    blocks: str | None
    stage_ranks: list[int]
    strides: list[int]
    cuda_graphs: bool
    at_once: bool
    products: bool
    compiled: bool
    sizes: list[str]
    height: int | None
    width: int | None
    batch: int
    rounds: int
    steps: int
    dtype: str
    device: str
    plot: Path | None
    trace: Path | None

    def plan(self, default_worlds: list[int]) -> Plan:
        """What to measure.

        Raises:
            ConfigError: a value that cannot be measured; names it and what would be right.
        """
        from ..choices import check_device, check_staged
        from ..config import ParallelConfig
        from ..errors import ConfigError
        from ..forms import codec_choices, patch_choices, patches_choices
        from .plan import Plan, cases_for, num_threads, parse_sizes
        from .shapes import VAES, check_name, check_stages, check_streams

        # A VAE is exact under every strategy.
        names = self.strategies or (["sync"] if self.model in VAES else ["sync", "displaced", "naive"])
        strategies = [ParallelConfig(strategy=name).strategy for name in names]  # type: ignore[arg-type]
        codecs = codec_choices(self.codecs or ["none"])
        asked = ParallelConfig(context_window=self.context_window, balance=self.balance)
        assert asked.balance is None or isinstance(asked.balance, str)
        patches = patches_choices(self.patches or ["none"])
        most = max((count for count in patches if count is not None), default=None)
        if self.blocks is not None:
            ParallelConfig(strategy="pipelined", patches=most, blocks=self.blocks)  # type: ignore[arg-type]
        check_name(self.model)
        if most is not None:
            check_streams(self.model, most)
        given = {"--patches": self.patches, "--patch": self.stage_ranks, "--stride": self.strides}
        check_stages(self.model, given)
        if self.compiled and self.model in VAES:
            raise ConfigError(f"--compile is about denoisers, and {self.model!r} is a VAE's decode: leave it out")
        check_staged(strategies, given)
        check_device(self.device, cuda_graphs=self.cuda_graphs)
        worlds = sorted(set(self.worlds or default_worlds))
        return Plan(
            model=self.model,
            sizes=parse_sizes(self.sizes, self.height, self.width),
            batch=self.batch,
            cases=cases_for(
                strategies,
                worlds,
                num_threads(self.device),
                codecs,
                self.context_window,
                asked.balance,
                patches,
                self.blocks,  # type: ignore[arg-type]
                patch_choices(self.stage_ranks),
                self.strides or [1],
                self.cuda_graphs,
                self.at_once,
                self.compiled,
                self.products,
            ),
            rounds=self.rounds,
            steps=self.steps,
            dtype=self.dtype,
            device=self.device,
            traces=self.trace is not None,
        )

    def check_files(self) -> None:
        """Whether what was asked for can be written.

        Raises:
            ConfigError: a file that cannot be, or a library that is not installed.
        """
        from .output import check_file
        from .plot import check_library

        if self.plot is not None:
            check_file("--plot", self.plot, ".png")
            check_library()
        if self.trace is not None:
            check_file("--trace", self.trace, ".json")


def _alone(order: Order, quiet: bool) -> Found:
    from .start import run

    plan = order.plan([1, 2])
    order.check_files()
    with _progress(not quiet) as tell:
        return run(plan, tell)


def _joined(order: Order, quiet: bool) -> Found | None:
    """As one of torchrun's ranks; None but on rank 0, which alone speaks of errors too."""
    from .. import joined
    from ..choices import check_device
    from ..errors import ConfigError
    from .start import WAIT, measure

    check_device(order.device)
    comm = joined.connect(order.device, WAIT)

    def agreed() -> Plan:
        plan = order.plan(sorted({1, comm.world}))
        if plan.world > comm.world:
            raise ConfigError(f"--world {plan.world} where torchrun has started {comm.world} ranks: start more")
        if comm.rank == 0:
            order.check_files()
        return plan

    with joined.one_voice(comm):
        said = {name: str(value) for name, value in vars(order).items() if name not in ("plot", "trace")}
        plan = joined.agree(comm, {**said, "trace": order.trace is not None}, agreed)
        with _progress(comm.rank == 0 and not quiet) as tell:
            found = measure(plan, comm, tell)
        joined.leave(comm)
        return found


def _show(order: Order, found: Found, only_json: bool) -> None:
    from rich.console import Console

    from ..files import write_whole
    from .plot import draw
    from .summary import table

    plot, trace = order.plot, order.trace
    if not only_json:
        Console(width=max(Console().width, 170)).print(table(found.summary))
    typer.echo(json.dumps(found.summary))  # first: a file that fails must not cost what was measured
    if plot is not None:
        write_whole(plot, lambda part: draw(found.summary, part))
    if trace is not None:
        write_whole(trace, lambda part: _write_json(part, found.trace))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


@contextmanager
def _progress(shown: bool) -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not shown, refresh_per_second=1) as progress:
        task = progress.add_task("measuring", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
