"""What is compared: prompts, settings, and the cases as the product of what was asked for. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..choices import check_size, stagings
from ..config import BUILT, UNCODED, GroupNormMode, ParallelConfig, SplitDim, StrategyName
from ..errors import ConfigError
from ..forms import CODECS
from ..mesh import Mesh

BUNDLED_PROMPTS = Path(__file__).parent / "prompts.txt"
BUNDLED_GUIDANCE, GUIDANCE = 2.5, 5.0  # of the bundled model, of other U-Nets
_SAMPLE = 1 << 20  # bytes at each end of a file that its fingerprint reads


@dataclass(frozen=True)
class Case:
    """One way to paint all prompts. ``strategy`` None is one device, which the others are measured against.

    ``warmup_steps`` and ``group_norm`` are None where the strategy has no such setting; ``codec``, ``context_window``,
    ``shift``, ``overlap``, ``streamed``, the ``patches`` of the configuration, and ``patch``, also where they were not
    asked for.
    """

    strategy: StrategyName | None
    steps: int
    world: int = 1
    warmup_steps: int | None = None
    group_norm: GroupNormMode | None = None
    split: SplitDim = "rows"
    cfg: int = 1
    codec: str | None = None
    context_window: float | None = None
    shift: str | int | None = None
    overlap: int | None = None
    remember: bool = True
    streamed: int | None = None
    patch: int | None = None  # ranks of a stage of ``pipelined``
    stride: int = 1
    time_shift: bool = False

    @property
    def name(self) -> str:
        """Its folder of pictures and its key among the results: all of it, in short."""
        if self.strategy is None:
            return f"one-device-{self.steps}-steps"
        parts = [self.strategy, f"{self.world}-ranks", f"{self.steps}-steps"]
        parts += [f"warmup-{self.warmup_steps}"] if self.warmup_steps is not None else []
        parts += [self.group_norm] if self.group_norm is not None else []
        parts += [self.codec.replace("=", "-").replace(",", "-")] if self.codec is not None else []
        parts += [f"window-{self.context_window:g}"] if self.context_window is not None else []
        parts += [f"shift-{self.shift}"] if self.shift is not None else []
        parts += [f"overlap-{self.overlap}"] if self.overlap is not None else []
        parts += ["forgetful"] if not self.remember else []
        parts += [f"patches-{self.streamed}"] if self.streamed is not None else []
        parts += [f"patch-{self.patch}"] if self.patch is not None else []
        parts += [f"stride-{self.stride}"] if self.stride > 1 else []
        parts += ["time-shift"] if self.time_shift else []
        parts += ["cols"] if self.split == "cols" else []
        return "-".join(parts + (["cfg-2"] if self.cfg == 2 else []))

    @property
    def title(self) -> str:
        """What a person reads."""
        if self.strategy is None:
            return "one device"
        parts = [f"{self.strategy} on {self.world}"]
        parts += [f"warm-up {self.warmup_steps}"] if self.warmup_steps is not None else []
        parts += [f"{self.group_norm} norm"] if self.group_norm is not None else []
        parts += [self.codec.replace(",", " ")] if self.codec is not None else []
        parts += [f"window {self.context_window:g}"] if self.context_window is not None else []
        parts += [f"shift {self.shift}"] if self.shift is not None else []
        parts += [f"overlap {self.overlap}"] if self.overlap is not None else []
        parts += ["nothing remembered"] if not self.remember else []
        parts += [f"{self.streamed} patches"] if self.streamed is not None else []
        parts += [f"patch {self.patch}"] if self.patch is not None else []
        parts += [f"stride {self.stride}"] if self.stride > 1 else []
        parts += ["time shift"] if self.time_shift else []
        parts += ["cols"] if self.split == "cols" else []
        return ", ".join(parts + (["cfg 2"] if self.cfg == 2 else []))

    @property
    def config(self) -> ParallelConfig:
        """How a step is spread.

        Raises:
            ConfigError: a value that cannot be.
        """
        assert self.strategy is not None, "one device spreads nothing"
        names = ("warmup_steps", "group_norm", "codec", "context_window", "shift", "overlap", "patch", "stride")
        given = {"patches": self.streamed, "time_shift": self.time_shift} | {
            name: getattr(self, name) for name in names
        }
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.strategy == "shifted":
            chosen["remember"] = self.remember
            chosen["latents"] = "whole"  # the same pictures, and one rank alone may look at them after each step
        return ParallelConfig(strategy=self.strategy, cfg=self.cfg, split=self.split, **chosen)

    @property
    def reference(self) -> Case:
        """The case that this one is measured against."""
        return Case(None, self.steps)

    @property
    def order(self) -> tuple[Any, ...]:
        """Place in tables: like beside like."""
        place = BUILT.index(self.strategy) if self.strategy in BUILT else -1
        codec = sorted(map(CODECS.index, self.config.codecs.values())) if self.strategy is not None else []
        window = 2.0 if self.context_window is None else self.context_window
        first = (self.steps, place, self.world, self.warmup_steps or 0, self.group_norm or "")
        moved = str(self.shift or ""), self.overlap or 0, not self.remember
        staged = self.streamed or 0, self.patch or 1, self.stride, self.time_shift
        return *first, codec, self.codec or "", -window, *moved, *staged, self.split, self.cfg


def cases_for(
    strategies: Iterable[str],
    worlds: Iterable[int],
    steps: Iterable[int],
    warmup_steps: Iterable[int],
    group_norms: Iterable[str],
    split: str = "rows",
    cfg: int = 1,
    codecs: Iterable[str | None] = (None,),
    context_windows: Iterable[float | None] = (None,),
    shifts: Iterable[str | int | None] = (None,),
    overlaps: Iterable[int | None] = (None,),
    patches: Iterable[int | None] = (None,),
    stage_ranks: Iterable[int | None] = (None,),
    strides: Iterable[int] = (1,),
    time_shifts: Iterable[bool] = (False,),
    remembers: Iterable[bool] = (True,),
) -> tuple[Case, ...]:
    """The product of all settings, each case once; what a strategy has no setting for does not multiply its cases.

    Of ``patches``, ``stage_ranks``, ``strides`` and ``time_shifts`` it is what goes together, see `stagings`.

    Raises:
        ConfigError: a value that is not one of those that are, or goes with none of the others.
    """
    found: dict[Case, None] = {}
    staged = stagings(patches=patches, patch=stage_ranks, stride=strides, time_shift=time_shifts)
    moves = list(product(shifts, overlaps, remembers))
    choices = steps, strategies, worlds, warmup_steps, group_norms, codecs, context_windows, moves, staged
    for count, strategy, world, warmup, norm, codec, window, (shift, overlap, remember), staging in product(*choices):
        for name, value in (("steps", count), ("world", world)):
            if value < 1:
                raise ConfigError(f"{name}={value} must be a whole number of at least 1")
        # Also what this strategy will not use: a typing error is one whatever it stands beside.
        ParallelConfig(strategy=strategy, cfg=cfg, split=split, warmup_steps=warmup, group_norm=norm)  # type: ignore[arg-type]
        ParallelConfig(codec=codec, context_window=window)
        named = ("shift", shift), ("overlap", overlap), ("remember", remember)
        moved: dict[str, Any] = {name: value for name, value in named if value is not None}
        ParallelConfig(strategy="shifted", **moved)
        extra: dict[str, Any] = {"warmup_steps": warmup} if strategy in ("displaced", "shifted", "pipelined") else {}
        extra |= {"group_norm": norm} if strategy == "displaced" else {}
        extra |= {"codec": codec, "context_window": window} if strategy not in UNCODED else {}
        extra |= moved if strategy == "shifted" else {}
        if strategy == "pipelined":
            extra |= {"streamed" if name == "patches" else name: value for name, value in staging.items()}
        found[Case(strategy, count, world, split=split, cfg=cfg, **extra)] = None  # type: ignore[arg-type]
    return tuple(sorted(found, key=lambda case: case.order))


@dataclass(frozen=True)
class Plan:
    """One run. Picture ``i`` is of ``prompts[i]`` and the seed ``seed + i``."""

    model: str  # "bundled", or as it was given
    checkpoint: Checkpoint
    prompts: tuple[str, ...]
    cases: tuple[Case, ...]
    height: int | None = None  # pixels; None: the model's own
    width: int | None = None
    guidance_scale: float | None = GUIDANCE  # None: the pipeline's own
    seed: int = 0
    batch: int = 1  # prompts that are painted together
    dtype: str = "float32"
    device: str = "cpu"

    def check(self) -> None:
        """Whether every case can be painted.

        Raises:
            ConfigError: it cannot, with what would be right.
        """
        if self.checkpoint.sizes.is_video:
            raise ConfigError(f"{self.checkpoint.pipeline} makes videos, and a comparison measures pictures")
        for case in self.cases:
            check_size(self.checkpoint, case.config, Mesh.fit(case.config, case.world), self.height, self.width)
        if self.guidance_scale is not None and not isfinite(self.guidance_scale):
            raise ConfigError(f"guidance_scale={self.guidance_scale} must be a number")
        if self.batch < 1:
            raise ConfigError(f"batch={self.batch} must be a whole number of at least 1")
        if not 0 <= self.seed < 2**63 - len(self.prompts):
            raise ConfigError(f"seed={self.seed} must be a whole number from 0 to 2**63 - 1")

    def settings(self) -> dict[str, Any]:
        """What all results of one folder have in common, as plain values for JSON."""
        size = self.checkpoint.default_size or (None, None)
        return {
            "model": self.model,
            "weights": fingerprint(self.checkpoint.path),
            "height": self.height or size[0],
            "width": self.width or size[1],
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "dtype": self.dtype,
            "device": self.device,
            "prompts": list(self.prompts),
        }


def as_facts(case: Case) -> dict[str, Any]:
    """The case as plain values for JSON; `case_of` reads them back."""
    return asdict(case)


def case_of(facts: dict[str, Any]) -> Case:
    """The case that `as_facts` wrote (other entries of ``facts`` are left alone)."""
    return Case(**{name: facts[name] for name in Case.__dataclass_fields__ if name in facts})


def read_prompts(
    file: Path | None, texts: Sequence[str] | None, is_bundled: bool, limit: int | None
) -> tuple[str, ...]:
    """The prompts: of a file (one a line; ``#`` starts a comment line), as given, or those that come along.

    Raises:
        ConfigError: there is none, or both a file and texts are given.
    """
    if file is not None and texts:
        raise ConfigError("--prompts and --prompt are two ways to say the same: give one of them")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be a whole number of at least 1")
    if texts:
        prompts = [text.strip() for text in texts]
        if not all(prompts):
            raise ConfigError("--prompt '' holds no word: name what to paint")
    else:
        if file is None and not is_bundled:
            raise ConfigError("the prompts that come along are for the bundled model: give --prompts or --prompt")
        path = file or BUNDLED_PROMPTS
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompts {str(path)!r} cannot be read as text: {error}") from error
        prompts = [line for line in lines if line and not line.startswith("#")]
        if not prompts:
            raise ConfigError(f"prompts {str(path)!r} holds no prompt: write one a line")
    return tuple(prompts[:limit])


def default_guidance(model: str | None, checkpoint: Checkpoint) -> float | None:
    """The strength of guidance for a model that none was named for.

    ``model`` None is the bundled one. Pipelines of transformers have strengths of their own, which is None.
    """
    if model is None:
        return BUNDLED_GUIDANCE
    return GUIDANCE if checkpoint.denoiser == "unet" else None


def fingerprint(folder: Path) -> str:
    """Tells one model's files from another's: names, sizes, and both ends of each file.

    A model that is trained further in place is another one; reading all of several gigabytes would take longer than
    loading them.
    """
    digest = blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(size - _SAMPLE, 0))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
