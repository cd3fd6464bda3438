"""One rank: a pipeline, loaded, spread over the ranks, and called with what rank 0 was asked for."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .config import ParallelConfig
from .errors import ConfigError
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
    """What the call gave: ``images`` as the pipeline made them (videos: their frames), how it ran, seconds."""

    images: Any
    report: Report
    seconds: float


class Painter:
    """A pipeline on one rank.

    Constructing it loads what rank ``rank`` of ``world`` needs, without a word to the other ranks; `join` spreads it
    over them.

    Raises:
        DistrifusionError: the folder does not load.
    """

    def __init__(self, setup: Setup, rank: int = 0, world: int = 1) -> None:
        import diffusers
        import torch
        import transformers

        from .loading import read, settled

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._setup = setup = replace(setup, config=settled(setup.config))
        given = {**setup.load, "dtype": getattr(torch, setup.dtype) if setup.dtype else None}
        self.pipeline = read(setup.path, setup.config, rank, world, device=setup.device, **given)
        if setup.config.blocks != "freed":
            self._move()
        self._comm: Comm | None = None
        parameters = inspect.signature(self.pipeline.__call__).parameters.values()
        # Not its **kwargs, where pipelines take names of the past and drop all others without a word.
        self._arguments = sorted(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))

    def _move(self) -> None:
        import torch

        if self._setup.device != "cpu":
            self.pipeline.to(torch.device(self._setup.device, int(os.environ.get("LOCAL_RANK", "0"))))

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
        if self._setup.config.blocks == "freed":  # until then all of it lies in the file: a device need never hold it
            self._move()

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
        check_guidance(self.pipeline, request.arguments)
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


def check_guidance(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse words on guidance that ``pipeline`` would pass over in silence.

    Pipelines of FLUX and Qwen-Image know two: ``guidance_scale``, an input of models that were distilled from guided
    ones, and ``true_cfg_scale``, which guides by a second prediction where there is a negative prompt.

    Raises:
        ConfigError: says which would be right.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    config = getattr(getattr(pipeline, "transformer", None), "config", {})
    if "true_cfg_scale" not in parameters or "guidance_embeds" not in config:
        return
    name, scale = type(pipeline).__name__, arguments.get("guidance_scale")
    if scale is not None and scale > 1 and not config["guidance_embeds"]:
        raise ConfigError(
            f"guidance_scale={scale} does nothing in this {name}, whose transformer takes no guidance: leave it out, "
            "or give true_cfg_scale and negative_prompt"
        )
    true_scale = arguments.get("true_cfg_scale", parameters["true_cfg_scale"].default)
    has_negative = any(arguments.get(f"negative_prompt{end}") is not None for end in ("", "_embeds"))
    if has_negative and true_scale <= 1:
        raise ConfigError(
            f"a negative prompt does nothing in {name} with true_cfg_scale={true_scale}: give one above 1, or neither"
        )
    if "true_cfg_scale" in arguments and true_scale > 1 and not has_negative:
        raise ConfigError(
            f"true_cfg_scale={true_scale} does nothing in {name} without a negative_prompt, which may be ' '"
        )


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
