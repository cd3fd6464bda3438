"""What a benchmark measures: cases, each at every size. Plain values, which travel to the ranks as JSON. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..choices import stagings
from ..config import RECORDED, UNCODED, Blocks, ParallelConfig, StrategyName
from ..errors import ConfigError
from ..forms import MEASURED
from ..geometry import Split
from ..mesh import Mesh

LATENT = 8  # pixels per row of latent
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    ``strategy`` None is the bare model, with ``threads`` threads; or on each of ``world`` ranks at the same time; or
    with the matrix products that ranks of a parallel model take (``products``).
    """

    strategy: StrategyName | None
    world: int = 1
    cfg: int = 1
    threads: int = 1
    codec: str | None = None
    context_window: float | None = None
    balance: str | None = None
    patches: int | None = None
    blocks: Blocks | None = None
    patch: int | None = None  # ranks of a stage; of other strategies, all that there are
    stride: int = 1
    cuda_graphs: bool = False
    compiled: bool = False  # the blocks of the model, each by itself
    products: bool = False  # of the bare model: what a strategy has by itself

    @property
    def name(self) -> str:
        """What the table calls it."""
        if self.strategy is None:
            parts = ["bare model", f"{self.threads} threads" if self.threads > 1 else "", "at once" * self.is_at_once]
            parts += ["ranks' products" * self.products, "compiled" * self.compiled]
            return ", ".join(filter(None, parts))
        parts = [self.strategy, "cfg 2" if self.cfg == 2 else "", self.codec or ""]
        parts += [f"window {self.context_window:g}"] if self.context_window is not None else []
        parts += [f"balance {self.balance}"] if self.balance is not None else []
        parts += [f"patch {self.patch}"] if self.patch is not None else []
        parts += [f"stride {self.stride}"] if self.stride > 1 else []
        parts += [f"{self.patches} patches"] if self.patches is not None else []
        parts += [f"blocks {self.blocks}"] if self.blocks is not None else []
        parts += ["graphs"] if self.cuda_graphs else []
        parts += ["compiled"] if self.compiled else []
        return " ".join(filter(None, parts))

    @property
    def is_at_once(self) -> bool:
        """Whether ranks do not share a step, but each has one of its own: what the machine gives when all are busy."""
        return self.strategy is None and self.world > 1

    @property
    def config(self) -> ParallelConfig:
        """How a step is spread."""
        assert self.strategy is not None, "the bare model spreads nothing"
        return ParallelConfig(
            strategy=self.strategy,
            cfg=self.cfg,
            warmup_steps=self._warmup_steps,
            codec=self.codec,
            context_window=self.context_window,
            balance=self.balance,
            patches=self.patches,
            blocks=self.blocks,
            patch=self.patch,
            stride=self.stride,
            cuda_graphs=self.cuda_graphs,
        )

    @property
    def _warmup_steps(self) -> int:
        """No synchronous steps beyond the first, which fills the slots, but for one that is measured and one after."""
        return 2 if self.balance == MEASURED else 0

    @property
    def num_untimed(self) -> int:
        """Steps before the timed ones: the synchronous ones, and the first displaced one, which allocates.

        Where patches stream, it is the one in which ranks learn their shapes; with a stride, the first two that are
        computed at once. A step that is recorded comes after one that runs as it is.
        """
        return self._warmup_steps + 1 + self.stride + self.cuda_graphs

    @property
    def streams(self) -> bool:
        """Whether a step begins before the one before has ended."""
        return self.patches is not None


@dataclass(frozen=True)
class Plan:
    """One benchmark run. ``model`` is the name of a shape (see shapes.py) or the folder of a pipeline.

    ``sizes`` are heights and widths in pixels.

    Raises:
        ConfigError: what cannot be measured; names the value and what would be right.
    """

    model: str
    sizes: tuple[tuple[int, int], ...]
    batch: int
    cases: tuple[Case, ...]
    rounds: int = 5
    steps: int = (
        3  # timed steps per round, case and size; with a stride, so many pairs of them; all as one where patches stream
    )
    dtype: str = "float32"
    device: str = "cpu"
    traces: bool = False  # one round more, untimed, in which sends and waits are noted

    def __post_init__(self) -> None:
        smallest = min(case.world for case in self.cases)
        for name, value in (("world", smallest), ("rounds", self.rounds), ("steps", self.steps), ("batch", self.batch)):
            if value < 1:
                raise ConfigError(f"--{name} {value} must be at least 1")
        for size in self.sizes:
            for name, value in zip(("height", "width"), size, strict=True):
                if value < LATENT or value % LATENT:
                    raise ConfigError(f"--{name} {value} must be a multiple of {LATENT}, at least {LATENT}")
            Split.even(size[0] // LATENT, max(case.world // case.cfg for case in self.cases))
        for case in self.cases:
            if case.strategy is not None:
                Mesh.fit(case.config, case.world)
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype!r} must be one of {', '.join(DTYPES)}")

    @property
    def world(self) -> int:
        """Ranks that the largest case needs."""
        return max(case.world for case in self.cases)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Plan:
        """The plan that `as_dict` came from, through JSON too."""
        cases = tuple(Case(**case) for case in raw["cases"])
        sizes = tuple((height, width) for height, width in raw["sizes"])
        return cls(**{**raw, "cases": cases, "sizes": sizes})


def cases_for(
    strategies: Sequence[StrategyName],
    worlds: Sequence[int],
    threads: int,
    codecs: Sequence[str | None] = (None,),
    context_window: float | None = None,
    balance: str | None = None,
    patches: Sequence[int | None] = (None,),
    blocks: Blocks | None = None,
    stage_ranks: Sequence[int | None] = (None,),
    strides: Sequence[int] = (1,),
    cuda_graphs: bool = False,
    at_once: bool = False,
    compiled: bool = False,
    products: bool = False,
) -> tuple[Case, ...]:
    """The bare model on one thread and on ``threads``, then every strategy on every world with every codec.

    With ``at_once``, before the strategies of a world, the bare model on each of its ranks; with ``products``, see
    `Case`, also that.

    One rank is one case, and so are strategies that send nothing that a codec could shorten. ``pipelined`` runs with
    all of ``patches``, ``stage_ranks`` and ``strides`` that go together (see `stagings`); where patches stream,
    ``blocks`` goes with it, and ``balance`` does not. With ``cuda_graphs``, cases of several ranks that can be recorded
    run without and with; with ``compiled``, so do the bare model and all that compiles under several ranks.

    Raises:
        ConfigError: one of these that goes with none of the others.
    """
    if at_once and max(worlds) == 1:
        raise ConfigError("--at-once is about several ranks, and the only --world is 1: name another one")
    staged = stagings(patches=patches, patch=stage_ranks, stride=strides)
    cases = [Case(None)] + ([Case(None, threads=threads)] if threads > 1 else [])
    cases += [Case(None, products=True)] if products else []
    for world in worlds:
        if world == 1:
            cases.append(Case(strategies[0]))
            continue
        cases += [Case(None, world)] if at_once else []
        for strategy in strategies:
            if strategy == "pipelined":
                for settings in staged:
                    is_streamed = settings["patches"] is not None
                    extra: dict[str, Any] = {"blocks": blocks} if is_streamed else {"balance": balance}
                    cases.append(Case(strategy, world, **settings, **extra))
                continue
            if strategy in UNCODED:
                cases.append(Case(strategy, world, balance=balance))
                continue
            cases += [
                Case(strategy, world, codec=codec, context_window=context_window, balance=balance) for codec in codecs
            ]
    if cuda_graphs:
        able = [case for case in cases if case.world > 1 and case.strategy in RECORDED and case.codec is None]
        cases += [replace(case, cuda_graphs=True) for case in able]
    if compiled:
        spread = [case for case in cases if case.world > 1 and case.strategy not in (None, "pipelined")]
        able = [cases[0], *(case for case in spread if not case.cuda_graphs)]
        cases += [replace(case, compiled=True) for case in able]
    return tuple(cases)


def parse_sizes(sizes: Sequence[str], height: int | None, width: int | None) -> tuple[tuple[int, int], ...]:
    """Heights and widths in pixels, each pair once: ``sizes`` such as ``"768x1024"`` or ``"1024"``, or the one given.

    Raises:
        ConfigError: a text that is no size, or both forms at once.
    """
    if not sizes:
        return ((height if height is not None else 1024, width if width is not None else 1024),)
    if height is not None or width is not None:
        raise ConfigError("--size names height and width: leave out --height and --width")
    found = []
    for text in sizes:
        parts = text.lower().split("x")
        if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
            raise ConfigError(
                f"--size {text!r} must be pixels as HEIGHTxWIDTH, such as 768x1024, or one number for both"
            )
        found.append((int(parts[0]), int(parts[-1])))
    return tuple(dict.fromkeys(found))


def num_threads(device: str) -> int:
    """Threads of the bare model's second case: all that this process may use, where the CPU computes."""
    if device != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
