"""What ``distrifusion generate`` does: with workers of its own, or as one of torchrun's ranks. The words are cli's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import checkpoint
from .choices import check_device, check_size, dtype_name, make_request, num_workers
from .config import ParallelConfig
from .engine import Engine
from .errors import ConfigError
from .files import beside, write_whole
from .mesh import Mesh
from .metrics import Report
from .painter import OnStep, Request, Setup
from .viewer import View, page

GUIDANCE = 5.0  # of U-Nets, where none is asked for; pipelines of transformers each have their own

_MOVING = (".gif", ".png", ".webp")


@dataclass(frozen=True)
class Order:
    """The command line, parsed."""

    prompt: str
    model: str | None
    config: ParallelConfig
    nproc: int | None
    height: int | None
    width: int | None
    steps: int
    guidance_scale: float | None
    negative_prompt: str | None
    seed: int
    dtype: str | None
    device: str
    output: Path
    true_cfg_scale: float | None = None
    frames: int | None = None
    fps: int = 16
    view: View | None = None  # of a picture whose ends meet

    @property
    def page(self) -> Path:
        """The file of the view."""
        return self.output.with_suffix(".html")

    def arguments(self, found: checkpoint.Checkpoint) -> dict[str, Any]:
        """The keywords of the pipeline in ``found``; where they are None, it has its own."""
        guidance = self.guidance_scale
        if guidance is None and found.denoiser == "unet":
            guidance = GUIDANCE
        return {
            "prompt": self.prompt,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            "num_inference_steps": self.steps,
            "guidance_scale": guidance,
            "true_cfg_scale": self.true_cfg_scale,
            "negative_prompt": self.negative_prompt,
            "output_type": "pil" if found.sizes.is_video else None,
        }


@dataclass(frozen=True)
class Written:
    """What to say at the end: as ``lines`` for a person, as ``facts`` for a machine."""

    lines: list[str]
    facts: dict[str, Any]


def generate(order: Order) -> Written:
    """Paint with workers of our own and write the file.

    Raises:
        DistrifusionError: see `Engine`; nothing was written.
    """
    _check_outputs(order)
    check_device(order.device, cuda_graphs=order.config.cuda_graphs)
    world = num_workers(order.config, order.nproc, order.device)
    found = _check(order, world)  # before the engine starts processes
    _plan_memory(order, found, world)
    with _progress() as (say, on_step):
        say("starting workers")
        with Engine(found.path, order.config, nproc=world, device=order.device, dtype=order.dtype) as engine:
            say("painting")
            arguments = order.arguments(found)
            steps = arguments.pop("num_inference_steps")
            result = engine.generate(**arguments, steps=steps, seed=order.seed, progress=on_step)
    return _write(order, result.images, result.report, result.seconds, world)


def generate_joined(order: Order) -> Written | None:
    """Paint as one of torchrun's ranks; rank 0 writes the file, the others return None.

    Raises:
        DistrifusionError: the same on all ranks, where rank 0 alone should speak: on the others it is SystemExit.
    """
    from . import joined

    check_device(order.device, cuda_graphs=order.config.cuda_graphs)
    comm = joined.connect(order.device)
    with joined.one_voice(comm):
        said = {name: value for name, value in vars(order).items() if name not in ("config", "nproc", "output")}
        settings = {**said, **asdict(order.config)}
        setup, request = joined.agree(comm, settings, lambda: _setup(order, comm.rank, comm.world))
        with _progress(comm.rank == 0) as (say, on_step):
            say("loading")
            painter = joined.load(comm, setup)
            say("painting")
            painted = joined.paint(comm, painter, request, on_step)
        written = None
        if comm.rank == 0:
            written = _write(order, painted.images, painted.report, painted.seconds, comm.world)
        joined.leave(comm)
        return written


def _check(order: Order, world: int) -> checkpoint.Checkpoint:
    make_request(order.seed, {"num_inference_steps": order.steps})
    mesh = Mesh.fit(order.config, world)
    found = checkpoint.find(order.model)
    if found.sizes.is_video and order.output.suffix.lower() not in _MOVING:
        raise ConfigError(
            f"output {str(order.output)!r}: {found.pipeline} makes videos, which are written as {', '.join(_MOVING)}"
        )
    if order.frames is not None and not found.sizes.is_video:
        raise ConfigError(f"frames={order.frames} is for models of videos, and {found.pipeline} makes pictures")
    for name in ("frames", "fps"):
        if (value := getattr(order, name)) is not None and value < 1:
            raise ConfigError(f"{name}={value} must be a whole number of at least 1")
    dtype_name(order.dtype, order.device, found)
    check_size(found, order.config, mesh, order.height, order.width)
    return found


def _plan_memory(order: Order, found: checkpoint.Checkpoint, world: int, shown: bool = True) -> None:
    """Say on stderr how the picture fits into the memory that is given, if any is.

    Raises:
        ConfigError: it does not.
    """
    if order.config.max_memory is None:
        return
    from .forecast import forecast

    guidance = order.arguments(found)["guidance_scale"]
    size = found.latent_size(order.height, order.width)
    budget = forecast(
        found,
        order.config,
        Mesh.fit(order.config, world),
        size,
        dtype=dtype_name(order.dtype, order.device, found),
        device=order.device,
        is_guided=guidance is None or guidance > 1,
    )
    lines = budget.lines
    if size is None:
        lines.append("the rest is planned by the ranks, since only the pipeline knows the size of its latent")
    if shown:
        print("\n".join(lines), file=sys.stderr)


def _setup(order: Order, rank: int, world: int) -> tuple[Setup, Request]:
    if rank == 0:
        _check_outputs(order)
    if order.nproc is not None and order.nproc != world:
        raise ConfigError(f"nproc={order.nproc} where torchrun has started {world} ranks: leave it out")
    found = _check(order, world)
    _plan_memory(order, found, world, shown=rank == 0)
    dtype = dtype_name(order.dtype, order.device, found)
    setup = Setup(path=str(found.path.absolute()), config=order.config, device=order.device, dtype=dtype)
    return setup, make_request(order.seed, order.arguments(found), found.default_size)


def _check_outputs(order: Order) -> None:
    check_output(order.output)
    if order.view is not None and (order.page.is_dir() or (order.page.exists() and not os.access(order.page, os.W_OK))):
        raise ConfigError(f"the page {str(order.page)!r} beside the picture is there and cannot be written to")


def check_output(path: Path) -> None:
    """Whether a picture can be written to ``path``: asked before any work is done.

    Raises:
        ConfigError: a suffix that is no format, no such folder, or one that cannot be written to.
    """
    from PIL import Image

    formats = Image.registered_extensions()
    if formats.get(path.suffix.lower()) not in Image.SAVE:
        raise ConfigError(f"output {str(path)!r}: {path.suffix!r} is no format of pictures: use .png, .jpg or .webp")
    if path.is_dir():
        raise ConfigError(f"output {str(path)!r} is a folder: name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"output {str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"output {str(path)!r} is there and cannot be written to")
    trial = beside(path)
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise ConfigError(
            f"output {str(path)!r}: the folder {str(path.parent)!r} cannot be written to ({error.strerror})"
        ) from error


def _write(order: Order, images: Any, report: Report, seconds: float, world: int) -> Written:
    frames = images[0] if isinstance(images[0], list) else [images[0]]
    image = frames[0]
    if not hasattr(image, "save"):
        raise ConfigError(f"the model makes {type(image).__name__}, and this command writes pictures: use df.Engine")
    moving = {"save_all": True, "append_images": frames[1:], "duration": 1000 / order.fps, "loop": 0}
    write_whole(order.output, lambda path: image.save(path, **(moving if len(frames) > 1 else {})))
    if order.view is not None:
        text = page(order.output, order.view, order.prompt)
        write_whole(order.page, lambda path: path.write_text(text, encoding="utf-8"))
    width, height = image.size
    facts = {
        "file": str(order.output),
        "prompt": order.prompt,
        "model": order.model or "bundled",
        "seed": order.seed,
        "height": height,
        "width": width,
        "frames": len(frames),
        "world": world,
        "device": order.device,
        "seconds": round(seconds, 3),
        **report.as_dict(),
    }
    size = f"{width} x {height}" + (f", {len(frames)} frames" if len(frames) > 1 else "")
    lines = [report.line(), f"wrote {order.output} ({size}, seed {order.seed}) in {seconds:.1f} s"]
    if order.view is not None:
        facts["page"] = str(order.page)
        lines.append(f"wrote {order.page}: open it in a browser")
    return Written(lines, facts)


@contextmanager
def _progress(shown: bool = True) -> Iterator[tuple[Any, OnStep]]:
    """A line on stderr while at work: what is done now, and the steps with the seconds of the last one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=None, pace="")

        def on_step(step: int, total: int, seconds: float) -> None:
            progress.update(task, completed=step, total=total, pace=f"{seconds:.2f} s/step")

        yield lambda text: progress.update(task, description=text), on_step
