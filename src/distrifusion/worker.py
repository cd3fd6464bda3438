"""One rank of an engine: a pipeline, loaded and spread over the ranks, that paints what it is asked to.

`Painter` is that rank; `main` is the worker process around it, which talks to the `workers` of the parent:

    worker -> ("hello", rank, pid)                 parent -> Setup
    worker -> ("done", None)     it has loaded     parent -> ("join", None)
    worker -> ("done", None)     it has joined     parent -> ("paint", Request on rank 0 | None)
    worker -> ("step", step, total, seconds)*  ("done", Painted on rank 0 | None)

and ("failed", Failure) in place of any "done". Idle workers wait on this channel, not in a collective, so that idle
time is not silence. When the parent is gone, so is the worker: at the end of the channel it exits, in mid-picture too.
"""

from __future__ import annotations

import builtins
import faulthandler
import inspect
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Any

from . import errors
from .config import ParallelConfig
from .errors import ConfigError, DistrifusionError
from .metrics import Report

if TYPE_CHECKING:
    from .comm import Comm

OnStep = Callable[[int, int, float], None]
"""Called after each step with (steps done, steps in all, seconds of this one)."""


@dataclass(frozen=True)
class Setup:
    """What every worker loads.

    ``dtype`` is a name of torch's, None for what diffusers takes by itself; ``load`` goes to from_pretrained.
    """

    path: str
    config: ParallelConfig
    device: str = "cpu"
    dtype: str | None = "float32"
    timeout: float | None = None
    load: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One call of the pipeline; ``arguments`` are the pipeline's own keywords, without those left at their defaults."""

    seed: int
    arguments: Mapping[str, Any]


@dataclass
class Painted:
    """What the call gave: ``images`` as the pipeline made them (PIL unless asked otherwise), how it ran, seconds."""

    images: Any
    report: Report
    seconds: float


@dataclass
class Failure:
    """An exception on its way to the parent. ``clean``: it came before any message of the picture left the rank."""

    kind: str
    text: str
    trace: str
    clean: bool = False

    @classmethod
    def of(cls, error: BaseException, *, clean: bool = False) -> Failure:
        """The failure that ``error`` is."""
        text = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error)
        return cls(type(error).__name__, text, "".join(traceback.format_exception(error)), clean)

    def exception(self) -> Exception:
        """The exception again, of the same class where it is ours or a builtin; its cause is the worker's traceback."""
        cls = getattr(errors, self.kind, None) or getattr(builtins, self.kind, None)
        error: Exception
        if isinstance(cls, type) and issubclass(cls, Exception) and not issubclass(cls, UnicodeError):
            error = cls(self.text)
        else:
            error = DistrifusionError(f"{self.kind}: {self.text}")
        error.__cause__ = WorkerTrace(self.trace)
        return error


class WorkerTrace(Exception):  # noqa: N818 - never raised: the cause of an exception that came from a worker
    """What the worker itself said, as the ``__cause__`` of what the parent raises."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Painter:
    """A pipeline on one rank.

    Constructing it loads, without a word to the other ranks; `join` spreads it over them.

    Raises:
        DistrifusionError: the folder does not load.
    """

    def __init__(self, setup: Setup) -> None:
        import diffusers
        import torch
        import transformers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._setup = setup
        dtype = getattr(torch, setup.dtype) if setup.dtype else None
        try:
            # diffusers maps safetensors and assigns the mapped tensors where the dtype is the file's own: ranks of one
            # machine then share the pages, and nothing is copied.
            self.pipeline = diffusers.DiffusionPipeline.from_pretrained(setup.path, dtype=dtype, **setup.load)
        except Exception as error:  # OSError, ValueError, SafetensorError ...: whatever part of it did not load
            reason = " ".join(str(error).split())
            raise DistrifusionError(f"{setup.path} does not load: {type(error).__name__}: {reason}") from error
        if setup.device != "cpu":
            self.pipeline.to(torch.device(setup.device, int(os.environ.get("LOCAL_RANK", "0"))))
        self._comm: Comm | None = None
        parameters = inspect.signature(self.pipeline.__call__).parameters.values()
        # Not its **kwargs, where pipelines take names of the past and drop all others without a word.
        self._arguments = sorted(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))

    def join(self, comm: Comm | None) -> None:
        """Spread the pipeline over the ranks of ``comm`` (None: alone).

        Raises:
            DistrifusionError: the model or the world does not fit; see `parallelize`.
        """
        from .pipeline import parallelize

        self._comm = comm if comm is not None and comm.world > 1 else None
        if self._comm is not None and hasattr(self.pipeline, "prepare_latents"):
            original = self.pipeline.prepare_latents
            self.pipeline.prepare_latents = lambda *args, **kwargs: self._of_rank_0(original(*args, **kwargs))
        parallelize(self.pipeline, self._setup.config, comm)

    def paint(self, request: Request | None, on_step: OnStep | None = None) -> Painted:
        """Call the pipeline with rank 0's ``request`` on every rank; the other ranks pass None.

        Raises:
            ConfigError: an argument that the pipeline does not take, or a size that the world does not fit.
            PeerLost: another rank is gone.
        """
        import torch

        from .pipeline import report

        if self._comm is not None:
            request = self._comm.broadcast_object(request)
        assert request is not None, "rank 0 has the request"
        for name in request.arguments:
            if name not in self._arguments:
                known = ", ".join(self._arguments)
                raise ConfigError(f"{type(self.pipeline).__name__} takes no argument {name!r}; it takes {known}")
        # Every rank draws the same noise, also that of schedulers which draw at each step, from a generator or without.
        torch.manual_seed(request.seed)
        arguments = dict(request.arguments)
        if "generator" in self._arguments:
            arguments["generator"] = torch.Generator("cpu").manual_seed(request.seed)
        steps: list[float] = []  # seconds of each

        def record(step: int, total: int, seconds: float) -> None:
            steps.append(seconds)
            if on_step is not None:
                on_step(step, total, seconds)

        self.pipeline.progress_bar = lambda iterable=None, total=None: _Steps(iterable, total, record)
        start = perf_counter()
        output = self.pipeline(**arguments)
        seconds = perf_counter() - start
        ran = report(self.pipeline)
        if not ran.seconds:  # a world of one carries no wrapper that would have measured its steps
            for step_seconds in steps:
                ran.step("alone", step_seconds, 0, 0)
        images = getattr(output, "images", None) if isinstance(output, dict) else None
        return Painted(output[0] if images is None else images, ran, seconds)

    def sent(self) -> int:
        """Messages of pictures that have left this rank so far."""
        return self._comm.meter.totals()[0] if self._comm is not None else 0

    def _of_rank_0(self, made: Any) -> Any:
        """``made`` with each tensor in it as rank 0 has it: equal seeds do not make equal noise on unlike devices."""
        import torch

        assert self._comm is not None
        if isinstance(made, torch.Tensor):
            made = made.contiguous()
            self._comm.broadcast(made)
        elif isinstance(made, (tuple, list)):
            made = type(made)([self._of_rank_0(part) for part in made])
        return made


class _Steps:
    """Stands in for the pipeline's tqdm bar: every pipeline of diffusers counts its steps on one."""

    def __init__(self, iterable: Iterable[Any] | None, total: int | None, on_step: OnStep) -> None:
        self._items = list(iterable) if iterable is not None else []
        self._total = total if total is not None else len(self._items)
        self._on_step = on_step
        self._done = 0
        self._last = perf_counter()

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        """``n`` more steps are done."""
        now = perf_counter()
        seconds, self._last = now - self._last, now
        self._done += n
        self._on_step(self._done, self._total, seconds)

    def __getattr__(self, name: str) -> Callable[..., None]:
        # set_description, set_postfix, close ...: words for a bar that nobody sees
        return lambda *args, **kwargs: None


def main() -> None:
    """The worker process. Its environment is the agent's (torchrun's names) and the channel's."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    rank = int(os.environ["RANK"])
    host, port = os.environ["DISTRIFUSION_CHANNEL"].rsplit(":", 1)
    key = bytes.fromhex(os.environ.pop("DISTRIFUSION_KEY"))
    try:
        channel = Client((host, int(port)), authkey=key)
    except OSError:  # the parent went before we came
        return
    channel.send(("hello", rank, os.getpid()))
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(channel, inbox), daemon=True).start()
    serve(rank, channel, inbox)


def serve(rank: int, channel: Connection, inbox: SimpleQueue[Any]) -> None:
    """Load, join and paint as the parent says, until it says close."""
    comm = None
    try:
        setup: Setup = inbox.get()
        painter = Painter(setup)
        channel.send(("done", None))
        if inbox.get()[0] == "join":
            from .comm.torch_dist import TorchComm

            comm = TorchComm.from_environment(setup.device, setup.timeout)
            painter.join(comm)
            channel.send(("done", None))
            on_step: OnStep | None = (lambda *step: channel.send(("step", *step))) if rank == 0 else None
            while (message := inbox.get())[0] == "paint":
                _paint(painter, message[1], on_step, rank, channel)
    except Exception as error:
        if comm is not None:
            comm.abort()  # who waits for this rank need not wait for the timeout
        channel.send(("failed", Failure.of(error)))
        inbox.get()  # the parent has the last word: what it hears from the others decides what it raises
    finally:
        if comm is not None:
            comm.close()


def _paint(painter: Painter, request: Request | None, on_step: OnStep | None, rank: int, channel: Connection) -> None:
    before = painter.sent()
    try:
        painted = painter.paint(request, on_step)
    except errors.PeerLost:
        raise
    except Exception as error:
        if painter.sent() != before:
            raise  # messages are under way: the ranks are no longer at the same place
        channel.send(("failed", Failure.of(error, clean=True)))
    else:
        channel.send(("done", painted if rank == 0 else None))


def _listen(channel: Connection, inbox: SimpleQueue[Any]) -> None:
    while True:
        try:
            inbox.put(channel.recv())
        except (EOFError, OSError):
            # The parent is gone, and cannot clear up. The main thread may be anywhere, in a collective too.
            shutil.rmtree(os.environ["DISTRIFUSION_LOGS"], ignore_errors=True)
            os._exit(1)
