"""Bytes and messages that a rank sends in a step, predicted from shapes.

Written from the definitions, and not with the code that sends: which rows the taps of a convolution touch, how long a
frame of a codec is, where chunks are cut. So that counted equals predicted says something (tests/test_traffic.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, prod

from ..config import ParallelConfig
from ..errors import ConfigError
from ..geometry import Levels, Window

PROBES = 64  # latents that travel with the prediction, to tell ranks whose noise differs
MESSAGES, CHUNKS = 8, 4  # of a displaced step at most; the prediction is one of the messages
WORD = 16  # bytes: what lies in a chunk, and what a frame is made of, is whole words


@dataclass(frozen=True)
class Conv:
    """A convolution, or a pooling, of ``[B, channels, H, W]`` at ``level``."""

    channels: int
    level: int
    level_out: int
    windows: tuple[Window, Window]  # along rows, along columns


@dataclass(frozen=True)
class Upsampling:
    """Nearest-neighbour interpolation of ``[B, channels, H, W]`` from ``level`` to ``level_out``."""

    channels: int
    level: int
    level_out: int


@dataclass(frozen=True)
class Norm:
    """A group norm."""

    groups: int


@dataclass(frozen=True)
class Context:
    """Keys and values ``[B, *before, tokens, width]`` of the tokens at ``level``, or ``[B, tokens, *after, width]``.

    ``width`` is that of both, side by side.
    """

    level: int
    width: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    frames: int = 1  # of a video
    others: tuple[int, ...] = ()  # tokens of text and of guests, which the ranks share out


@dataclass(frozen=True)
class Sums:
    """Linear attention's sums over tokens ``[B, *shape]``, as large on every rank."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Total:
    """Under ``tensor``: ``numbers`` of each picture, of which every rank has a part of the sum.

    ``item``: bytes of one.
    """

    numbers: int
    item: int = 4


@dataclass(frozen=True)
class Joint:
    """Under ``tensor``: ``channels`` of ``numbers`` of each picture, of which every rank makes some."""

    channels: int
    numbers: int


@dataclass(frozen=True)
class Crossing:
    """Under ``pipelined`` with patches: a tensor that goes from stage ``link`` to the next one in every pass.

    ``patches``: its numbers for each picture, by patch; ``whole``: the same where the picture goes in one.
    """

    link: int
    patches: tuple[int, ...]
    whole: int
    item: int = 4


Seam = Conv | Upsampling | Norm | Context | Sums | Total | Joint | Crossing


@dataclass(frozen=True)
class Anatomy:
    """Where the tokens of one call of a model look beyond their patch: its seams in the order of the call.

    Of one size or of all, whatever is the split: sizes are those of the `Levels`. `strategies.anatomy` learns it from a
    model. For ``tensor``, and ``pipelined`` with patches, there are others, of the size that they were learned with.

    Args:
        seams: as they are passed.
        channels: of the prediction ``[B, channels, H, W]``; of a video, times its frames.
        item: bytes of a number of the latents, keys, values and rows. Moments are float32.
    """

    seams: tuple[Seam, ...]
    channels: int
    item: int = 4


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in one step, by kind, as its `Meter` counts it."""

    messages: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, num_bytes: int, num_messages: int = 1) -> None:
        """Some messages more, unless they are empty."""
        if num_bytes:
            self.messages[kind] += num_messages
            self.bytes[kind] += num_bytes


def traffic(
    anatomy: Anatomy, levels: Levels, config: ParallelConfig, rank: int, *, batch: int = 1, step: int = 0
) -> Traffic:
    """What ``rank`` of ``cfg`` x patches ranks sends in ``step`` of a picture, which is counted from 0.

    Args:
        anatomy: of the model.
        levels: the split over the patches. Their number times ``config.cfg`` is the world. Under ``tensor`` their
            number is that of the ranks that share the weights, under ``pipelined`` that of the patches that stream.
        config: ``warmup_steps`` says which steps are displaced; all that are send alike, the first one included. Of
            ``shifted``, what it sends with ``latents="whole"``; rows that move are fewer. ``pipelined`` is with
            ``patches``, and with ``pipe``; of a denoiser by itself, whose caller gets whole predictions.
        rank: in the world.
        batch: of one call, both branches of guidance included. Where ``cfg=2`` halves it, it is even; a batch of one
            with ``cfg=2`` is computed by both halves, as long as one call per step is made.
        step: of the picture.

    Raises:
        ConfigError: a split by frames, or stages without patches, which are not known here.
    """
    if config.strategy == "pipelined":
        return _streamed(anatomy, levels, config, rank, batch, step)
    if config.split == "frames":
        raise ConfigError("split='frames' is not counted here: use 'rows' or 'cols'")
    num_patches = levels.splits[0].num_patches
    share = batch // config.cfg if batch >= config.cfg else batch
    said = Traffic()
    if config.strategy == "tensor":
        _summed(said, anatomy, share, rank % num_patches, num_patches)
    stands_alone = config.strategy == "naive" or (config.strategy == "shifted" and step >= config.warmup_steps)
    if num_patches > 1 and not stands_alone and config.strategy != "tensor":
        ranks = [_Rank(anatomy, levels, config, share, patch) for patch in range(num_patches)]
        own = ranks[rank % num_patches]
        if config.strategy == "displaced" and step > config.warmup_steps:
            _displaced(said, own, ranks)
        else:
            _synchronous(said, own, ranks, coded=config.strategy == "sync" and step > 0)
    groups = config.cfg if share < batch else 1
    rows = max(levels.splits[0].sizes) if config.strategy != "tensor" else ceil(levels.splits[0].size / num_patches)
    largest = rows * levels.across[0] * anatomy.channels * share
    probes = min(PROBES, batch * anatomy.channels * levels.splits[0].size * levels.across[0])
    said.add("output", (largest + probes) * anatomy.item * (groups * num_patches - 1))
    return said


@dataclass(frozen=True)
class _Said:
    """What one rank says at one seam: numbers of a shape, to some peers or to all."""

    kind: str
    shapes: dict[int | None, tuple[int, ...]]  # by receiver; None: everyone
    item: int
    codec: str | None

    def num_bytes(self, receiver: int | None, coded: bool) -> int:
        """As they travel."""
        shape = self.shapes[receiver]
        return frame(shape, self.codec) if coded and self.codec is not None else prod(shape) * self.item


class _Rank:
    """One rank's words of a step, seam by seam."""

    def __init__(self, anatomy: Anatomy, levels: Levels, config: ParallelConfig, batch: int, patch: int) -> None:
        self._anatomy, self._levels, self._config = anatomy, levels, config
        self._batch, self.patch = batch, patch
        self.num_patches = levels.splits[0].num_patches

    @cached_property
    def words(self) -> list[_Said]:
        """At each seam; without shapes where it has nothing to say."""
        return [self._at(seam) for seam in self._anatomy.seams]

    def _at(self, seam: Seam) -> _Said:
        assert not isinstance(seam, Total | Joint | Crossing), "an anatomy of slices, or of stages"
        batch, item, codecs = self._batch, self._anatomy.item, self._config.codecs
        if isinstance(seam, Norm):
            return _Said("moments", {None: (1 + 2 * batch * seam.groups,)}, 4, None)
        if isinstance(seam, Sums):
            return _Said("context", {None: (batch, *seam.shape)}, item, codecs.get("context"))
        across = self._levels.across[seam.level]
        if isinstance(seam, Context) and self._config.context_window is None:
            tokens = seam.frames * self._levels.splits[seam.level].sizes[self.patch] * across
            tokens += sum(self._share(count) for count in seam.others)
            shape = (batch, *seam.before, tokens, *seam.after, seam.width)
            return _Said("context", {None: shape}, item, codecs.get("context"))
        shapes: dict[int | None, tuple[int, ...]] = {}
        for peer in range(self.num_patches):
            rows = self._rows_for(seam, peer) if peer != self.patch else 0
            if rows:
                sides = (rows, across) if self._config.split == "rows" else (across, rows)
                shapes[peer] = (
                    (batch, *sides, seam.width) if isinstance(seam, Context) else (batch, seam.channels, *sides)
                )
        kind = "context" if isinstance(seam, Context) else "halo"
        return _Said(kind, shapes, item, codecs.get(kind))

    def _share(self, count: int) -> int:
        """Tokens of ``count`` that this rank computes for all, in proportion to its rows; 0 where all compute all."""
        shares = self._levels.splits[-1].shares(count)
        return 0 if shares is None else shares.sizes[self.patch]

    def _rows_for(self, seam: Conv | Upsampling | Context, peer: int) -> int:
        """How many of the own rows ``peer`` reads."""
        split = self._levels.splits[seam.level]
        mine, theirs = split.span(self.patch), split.span(peer)
        if isinstance(seam, Context):
            filled = [patch for patch, size in enumerate(split.sizes) if size]
            both = {self.patch, peer} <= set(filled)
            is_next = both and abs(filled.index(self.patch) - filled.index(peer)) == 1
            share = self._config.context_window or 0.0
            return ceil(round(share * len(mine), 6)) if is_next else 0
        outputs = self._levels.splits[seam.level_out]
        theirs = outputs.span(peer)
        if not len(theirs):
            return 0
        first, last = (self._reads(seam, row) for row in (theirs.start, theirs.stop - 1))
        start, stop = max(first[0], mine.start), min(last[1] + 1, mine.stop)
        return max(stop - start, 0)

    def _reads(self, seam: Conv | Upsampling, row: int) -> tuple[int, int]:
        """The first and the last row of input that output ``row`` is made of."""
        if isinstance(seam, Upsampling):
            size, out_size = (self._levels.splits[level].size for level in (seam.level, seam.level_out))
            source = min(row * size // out_size, size - 1)
            return source, source
        window = seam.windows[self._config.split == "cols"]
        taps = [row * window.stride - window.padding[0] + window.dilation * tap for tap in range(window.kernel)]
        return taps[0], taps[-1]


def _streamed(anatomy: Anatomy, levels: Levels, config: ParallelConfig, rank: int, batch: int, step: int) -> Traffic:
    """Of patches: what crosses the link to the next stage, once for each. And the prediction, whole, as all are told.

    In the first step, and in the first one in patches, all ranks are told what all blocks make: not the picture's.
    """
    if config.patches is None or config.pipe is None:
        raise ConfigError("strategy='pipelined' is counted here with patches= and pipe= only")
    said, share = Traffic(), batch // config.cfg if batch >= config.cfg else batch
    stage, crossings = rank % config.pipe, [seam for seam in anatomy.seams if isinstance(seam, Crossing)]
    passes = [] if step in (0, config.warmup_steps + 1) else list(range(config.patches))
    for patch in [None] if passes and step <= config.warmup_steps else passes:
        numbers = [(each.whole if patch is None else each.patches[patch], each) for each in crossings]
        sizes = [_whole(share * count * each.item) for count, each in numbers if each.link == stage]
        said.add("boundary", sum(sizes))
    cells = levels.splits[0].size * levels.across[0] * anatomy.channels
    groups = config.cfg if share < batch else 1
    said.add("output", (cells * share + min(PROBES, batch * cells)) * anatomy.item * (groups * config.pipe - 1))
    return said


def _summed(said: Traffic, anatomy: Anatomy, batch: int, rank: int, num_ranks: int) -> None:
    """Of a sum: to each peer the piece that it adds up, and the own piece of the total to all; two ranks send all."""
    for seam in anatomy.seams:
        if isinstance(seam, Joint):
            widest = ceil(seam.channels / num_ranks) * (seam.numbers // seam.channels)
            said.add("sum", batch * widest * anatomy.item * (num_ranks - 1))
            continue
        assert isinstance(seam, Total), "an anatomy for patches"
        count = batch * seam.numbers
        if num_ranks == 2:
            said.add("sum", count * seam.item)
            continue
        ends = [count * (place + 1) // num_ranks for place in range(num_ranks)]
        pieces = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        for peer, piece in enumerate(pieces):
            said.add("sum", piece * seam.item if peer != rank else 0)
        said.add("sum", max(pieces) * seam.item * (num_ranks - 1))


def _synchronous(said: Traffic, own: _Rank, ranks: Sequence[_Rank], *, coded: bool) -> None:
    for i, words in enumerate(own.words):
        for receiver in words.shapes:
            if receiver is not None:
                said.add(words.kind, words.num_bytes(receiver, coded))
            else:  # a collective: all parts are as long as the longest
                longest = max(rank.words[i].num_bytes(None, coded) for rank in ranks)
                said.add(words.kind, longest * (len(ranks) - 1))


def _displaced(said: Traffic, own: _Rank, ranks: Sequence[_Rank]) -> None:
    if own._config.group_norm == "sync":
        for words in own.words:
            if words.kind == "moments":
                said.add("moments", words.num_bytes(None, False) * (len(ranks) - 1))
    for chunk in _chunks(ranks):
        for receiver in [peer for peer in range(len(ranks)) if peer != own.patch]:
            said.add("chunk", _length(own, chunk, receiver, len(ranks) == 2))
        if len(ranks) > 2:
            said.add("chunk", max(_length(rank, chunk, None, False) for rank in ranks) * (len(ranks) - 1))


def _length(rank: _Rank, chunk: Sequence[int], receiver: int | None, hears_all: bool) -> int:
    """Bytes of a rank's message in a chunk; with two ranks, one message carries what is said to all, too."""
    lanes = (receiver, None) if hears_all else (receiver,)
    found = ((rank.words[i], lane) for i in chunk for lane in lanes)
    return sum(_whole(words.num_bytes(lane, True)) for words, lane in found if lane in words.shapes)


def _chunks(ranks: Sequence[_Rank]) -> Iterator[list[int]]:
    """Indices of the seams whose words travel together: about equal parts of what all ranks send to each other."""
    own = ranks[0]._config.group_norm
    late = [
        i
        for i in range(len(ranks[0].words))
        if any(rank.words[i].shapes for rank in ranks)
        and not (ranks[0].words[i].kind == "moments" and own in ("separate", "sync"))
    ]
    weights = [_weight([rank.words[i] for rank in ranks], len(ranks)) for i in late]
    is_shared = {i: None in ranks[0].words[i].shapes for i in late}
    if len(ranks) == 2:
        per_chunk = 1
    else:
        peers = [{peer for i in late for peer in rank.words[i].shapes if peer is not None} for rank in ranks]
        per_chunk = max(max(map(len, peers)) + any(is_shared.values()), 1)
    num_chunks = max(min(CHUNKS, (MESSAGES - 1) // per_chunk), 1)
    total, before = sum(weights), 0
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    for i, weight in zip(late, weights, strict=True):
        middle = before + weight - weight // 2
        chunks[min(middle * num_chunks // max(total, 1), num_chunks - 1)].append(i)
        before += weight
    yield from chunks


def _weight(words: Sequence[_Said], num_ranks: int) -> int:
    """Bytes that travel between all ranks, about: with a codec, its part of what float32 would be."""
    numbers = [
        prod(shape) * (num_ranks - 1 if receiver is None else 1)
        for said in words
        for receiver, shape in said.shapes.items()
    ]
    whole, codec = sum(numbers) * words[0].item, words[0].codec
    return whole if codec is None else whole * _payload((1024, 1024), codec) >> 22


def frame(shape: Sequence[int], codec: str) -> int:
    """Bytes of a residual of ``shape`` as a codec writes it: a header of a word, then its payload in whole words."""
    return WORD + _whole(_payload(shape, codec)) if prod(shape) else 0


def _payload(shape: Sequence[int], codec: str) -> int:
    """Codes of a few bits; beside them the factors of rows and columns of the nearest matrix to a square."""
    count = prod(shape)
    factors = min(prod(shape[:i]) + prod(shape[i:]) for i in range(len(shape) + 1))
    return {
        "fp16": 2 * count,
        "bf16": 2 * count,
        "int8": count + 2 * factors,
        "int4": ceil(count / 2) + 2 * factors,
        "int2": ceil(count / 4) + 2 + factors,
        "1bit": ceil(count / 8) + 2 + factors,
    }[codec]


def _whole(num_bytes: int) -> int:
    return -(-num_bytes // WORD) * WORD
