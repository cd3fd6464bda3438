"""The configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import get_args

from ..errors import ConfigError
from ..forms import MEASURED, balance_text, codec_text, codecs_of, one_of, share, size_of, whole
from . import checks
from .names import BUILT, EXTRAS, Blocks, GroupNormMode, Latents, SplitDim, StrategyName, TextEncoders, Topology


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one denoising step is spread over the ranks. All arguments are keywords.

    Args:
        strategy: ``"sync"`` is exact, ``"displaced"`` reuses the previous step's features of the peers
            (DistriFusion, arXiv 2402.19481), ``"naive"`` exchanges nothing inside the denoiser (the baseline),
            ``"shifted"`` neither, but moves the borders at every step (SpotDiffusion, arXiv 2407.15507),
            ``"pipelined"`` cuts the model over its depth: each rank computes one stage of it, from what the other
            stages made in the step before (AsyncDiff, arXiv 2406.06911), and ``"tensor"`` cuts the weights: each rank
            computes some heads and channels of every layer (Megatron-LM, arXiv 1909.08053). It is exact, and takes
            all ranks that ``cfg`` leaves.
        cfg: 2 runs the conditional and the unconditional branch of classifier-free guidance on separate ranks.
        patch: ranks along the picture; None takes all that ``cfg`` leaves. Under ``pipelined``: ranks along the picture
            within each stage, which are exact among themselves; None is 1.
        pipe: ranks of ``pipelined`` over the depth of the model, each with a stage; None takes all that ``cfg`` and
            ``patch`` leave.
        split: ``"rows"`` or ``"cols"`` of the latent, or ``"frames"`` of a video's.
        warmup_steps: synchronous steps after the first one under ``displaced`` and ``pipelined`` (0: only the first is
            synchronous); synchronous steps at all under ``shifted``, whose first step needs no other.
        group_norm: statistics under ``displaced``: ``"corrected"`` (the paper's: all old, moved by the own change),
            ``"carried"`` (the peers' taken to go on as they went, and half as the own now does; nearer to one device),
            ``"stale"`` (peers' old, own fresh), ``"separate"`` (own only) or ``"sync"`` (exact, waits).
        codec: fewer bytes for what travels between patches, at some cost in quality, ``sync`` included: one of
            ``"fp16"``, ``"bf16"``, ``"int8"``, ``"int4"``, ``"int2"``, ``"1bit"`` for all seams (the prediction with
            8 bits at least), or a mapping such as ``{"context": "int8", "halo": "fp16"}`` (as text:
            ``"context=int8,halo=fp16"``, which is how it is kept); of ``"context"``, ``"halo"`` and ``"output"``, those
            that it leaves out stay as they are. None: none. See docs/codecs.md.
        context_window: None lets every patch attend to the whole picture. A number from 0 to 1 is the share of each
            neighbouring patch, its nearer rows, that a patch attends to beside itself (PCPP, arXiv 2412.02962);
            keys and values then go to neighbours only. Approximate, under ``sync`` too.
        text_encoders: ``"once"``: each runs on one rank, which tells the others; several are spread over the ranks.
            ``"freed"``: and the other ranks give up its memory until ``df.restore``, which is collective then.
            ``"every"``: each runs on every rank.
        balance: rows for unequal devices; as exact as equal ones. None: equal patches. One positive number for each
            rank along the picture, such as ``(2, 1, 1)`` or ``"2,1,1"`` (which is how it is kept): rows in proportion.
            ``"measured"``: after ``warmup_steps`` steps of each picture, rows in proportion to the speed measured in
            them (STADI, arXiv 2509.04719). See docs/unequal-devices.md. Under ``pipelined``: None gives all stages the
            same amount of arithmetic; ``"measured"`` the same seconds, as each picture's first step takes them, by
            which one and the same seed may give slightly different pictures.
        topology: ``"plane"``; ``"ring-x"``: the left edge of the picture meets the right one, as in a panorama of 360
            degrees; ``"torus"``: top and bottom meet too, as in a tile. On one device too. Models without positions.
        shift: how far ``shifted`` moves its patches: ``"patch"`` (each to the place of the next one at every step, so
            that it has seen the whole picture as soon as can be), ``"golden"`` (by the golden ratio), ``"random"``, or
            a number of rows of latent per step; 0 is ``"naive"``. None: ``"patch"`` where patches remember, else
            ``"golden"``. With ``remember``, ``"golden"`` and ``"random"`` reach all of the picture, and moves are
            rounded to rows of the model's deepest level where patches begin on such; without, they stay within a patch.
        shift_seed: of ``shift="random"``.
        overlap: rows of latent that each patch of ``shifted`` computes beyond its own on both sides; there the
            predictions are blended (MultiDiffusion, arXiv 2302.08113).
        latents: what a rank of ``shifted`` knows between steps: ``"rows"`` of its own, so that only those that enter
            its patch travel; a callback that looks at the latents must then look on every rank. ``"whole"`` sends all
            predictions to all ranks, as the other strategies do. The same picture.
        remember: whether a patch of ``shifted`` knows the rest of the picture as it was when the patch was there:
            keys, values, group norm's statistics and rows beside its borders, of some steps ago. Nothing travels for
            it, but for one fuller synchronous step; it takes the memory of keys and values of the whole picture in all
            layers. False: it knows nothing of the rest. See docs/shifted.md.
        patches: of ``pipelined``, transformers only: the picture in so many patches, cut along ``split``, which stream
            through the stages within a step (PipeFusion, arXiv 2405.14430). 1: one after the other, exact. None: all
            stages at the same time, each one step behind the one before. See docs/pipelined.md.
        blocks: where ``patches`` are given: ``"every"``: each rank keeps all blocks of the model. ``"freed"``: it gives
            up the memory of other stages' until ``df.restore``, which is collective then; what ``df.load`` and the
            engine load, a rank never has. None: ``"freed"`` for these, ``"every"`` for ``df.parallelize``.
        max_memory: bytes that each rank may hold, or a size such as ``"4GiB"`` (kept as bytes): a decode then runs in
            bands of rows, and a step in pieces within its layers, as far as needed; the same result. What cannot fit is
            refused. None: no matter how much. On one device too. Under ``pipelined`` and ``tensor``, steps are not
            planned: a check of the weights of each rank, and of decodes. See docs/memory.md.
        stride: of ``pipelined`` without ``patch`` and ``patches``: 2 runs each stage once for two steps, for which two
            ranks have the last stage, one for each of these steps (AsyncDiff). See docs/pipelined.md.
        time_shift: of ``pipelined`` without ``patches``: after ``warmup_steps``, stages are told the time of the step
            before the one that they compute for (as AsyncDiff's published code does it). For pictures that come out
            noisy; else leave it. See docs/pipelined.md.
        cuda_graphs: of patches on CUDA devices: record a step once and play it from then on, message by message as
            ever, which spares the host's part of small steps. See docs/compile.md.

    Raises:
        ConfigError: a value that is not one of these, printed with what would be right.
    """

    strategy: StrategyName = "displaced"
    cfg: int = 1
    patch: int | None = None
    split: SplitDim = "rows"
    warmup_steps: int = 4
    group_norm: GroupNormMode = "corrected"
    codec: str | Mapping[str, str] | None = None
    context_window: float | None = None
    text_encoders: TextEncoders = "once"
    balance: str | Sequence[float] | None = None
    topology: Topology = "plane"
    shift: str | int | None = None
    shift_seed: int = 0
    overlap: int = 0
    latents: Latents = "rows"
    remember: bool = True
    pipe: int | None = None
    patches: int | None = None
    blocks: Blocks | None = None
    max_memory: int | str | None = None
    stride: int = 1
    time_shift: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        one_of("strategy", self.strategy, BUILT)
        one_of("split", self.split, get_args(SplitDim))
        one_of("group_norm", self.group_norm, get_args(GroupNormMode))
        one_of("text_encoders", self.text_encoders, get_args(TextEncoders))
        whole("cfg", self.cfg, 1)
        if self.cfg > 2:
            raise ConfigError(f"cfg={self.cfg} must be 1 or 2: guidance has two branches")
        for name in ("patch", "pipe", "patches"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)
        if self.strategy == "tensor":
            checks.check_slices(self)
        checks.check_stages(self)
        checks.check_graphs(self)
        checks.check_streams(self)
        whole("warmup_steps", self.warmup_steps, 0)
        # As text it is hashable, and the same however it was given.
        object.__setattr__(self, "codec", codec_text(self.codec))
        share("context_window", self.context_window)
        object.__setattr__(self, "balance", balance_text(self.balance))
        checks.check_balance(self)
        checks.check_coded(self)
        object.__setattr__(self, "max_memory", size_of("max_memory", self.max_memory))
        one_of("topology", self.topology, get_args(Topology))
        one_of("latents", self.latents, get_args(Latents))
        checks.check_topology(self)
        checks.check_shifted(self)

    @property
    def keeps_words(self) -> bool:
        """Whether ranks keep what layers say from step to step."""
        return self.strategy == "displaced" or (self.strategy == "shifted" and self.remember)

    @property
    def codecs(self) -> dict[str, str]:
        """The codec of each seam that has one."""
        assert self.codec is None or isinstance(self.codec, str)
        return codecs_of(self.codec) if self.codec is not None else {}

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weight of each rank along the picture, where they are given."""
        if self.balance is None or self.balance == MEASURED:
            return None
        assert isinstance(self.balance, str)
        return tuple(map(float, self.balance.split(",")))

    @property
    def moving(self) -> str | int:
        """The ``shift`` that ``shifted`` has."""
        if self.shift is not None:
            return self.shift
        return "patch" if self.remember else "golden"

    @property
    def rings(self) -> tuple[bool, bool]:
        """Whether rows, and whether columns, go around the picture."""
        return self.topology == "torus", self.topology != "plane"

    @property
    def extras(self) -> list[str]:
        """What was asked of the patches beyond the strategy, as ``name=value``."""
        extras = [field for field in fields(self) if field.name in EXTRAS]
        given = [f"{field.name}={value}" for field in extras if (value := getattr(self, field.name)) != field.default]
        return [f"shift={self.moving}", *given] if self.strategy == "shifted" else given

    def __str__(self) -> str:
        facts = [
            f"strategy={self.strategy} cfg={self.cfg} patch={self.patch or 'all'} split={self.split} "
            f"warmup_steps={self.warmup_steps} group_norm={self.group_norm}"
        ]
        if self.strategy == "pipelined":
            patch = f" patch={self.patch} split={self.split}" if self.patch not in (None, 1) else ""
            pipe = self.pipe or "all"
            facts = [f"strategy=pipelined cfg={self.cfg} pipe={pipe}{patch} warmup_steps={self.warmup_steps}"]
        if self.strategy == "tensor":
            facts = [f"strategy=tensor cfg={self.cfg}"]
        shared = [f"text_encoders={self.text_encoders}"] if self.text_encoders != "once" else []
        shared += [f"max_memory={self.max_memory}"] if self.max_memory is not None else []
        return " ".join(facts + self.extras + shared)
