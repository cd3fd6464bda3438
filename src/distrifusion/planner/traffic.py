"""Bytes and messages that a rank sends in a step, predicted from shapes.

Written from the definitions, and not with the code that sends: which rows the taps of a convolution touch, how long a
frame of a codec is, where chunks are cut. So that counted equals predicted says something (tests/test_traffic.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, prod

from ..config import ParallelConfig
from ..errors import ConfigError
from ..geometry import Levels, borders, near
from .anatomy import Anatomy, Conv, Crossing, Joint, Total
from .words import Rank, Said, frame, in_whole_words, payload

PROBES = 64  # latents that travel with the prediction, to tell ranks whose noise differs
MESSAGES, CHUNKS = 8, 4  # of a displaced step at most; the prediction is one of the messages


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
    is_late = config.strategy == "displaced" and step > config.warmup_steps
    is_coded = num_patches > 1 and (is_late or (config.strategy == "sync" and step > 0))
    if config.strategy == "tensor":
        _summed(said, anatomy, share, rank % num_patches, num_patches)
    stands_alone = config.strategy == "naive" or (config.strategy == "shifted" and step >= config.warmup_steps)
    if num_patches > 1 and not stands_alone and config.strategy != "tensor":
        is_noted = config.strategy == "shifted" and config.remember and step == config.warmup_steps - 1
        ranks = [Rank(anatomy, levels, config, share, patch, not is_noted) for patch in range(num_patches)]
        own = ranks[rank % num_patches]
        if is_late:
            _displaced(said, own, ranks)
        else:
            _synchronous(said, own, ranks, coded=is_coded)
            if is_noted:
                _noted(said, anatomy, levels, config, share)
    groups = config.cfg if share < batch else 1
    rows = max(levels.splits[0].sizes) if config.strategy != "tensor" else ceil(levels.splits[0].size / num_patches)
    sides = (rows, levels.across[0]) if config.split == "rows" else (levels.across[0], rows)
    shape = (share, anatomy.channels, *sides)
    codec = config.codecs.get("output") if is_coded else None
    probes = min(PROBES, batch * anatomy.channels * levels.splits[0].size * levels.across[0])
    largest = frame(shape, codec) if codec is not None else prod(shape) * anatomy.item
    said.add("output", (largest + probes * anatomy.item) * (groups * num_patches - 1))
    return said


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
        sizes = [in_whole_words(share * count * each.item) for count, each in numbers if each.link == stage]
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


def _synchronous(said: Traffic, own: Rank, ranks: Sequence[Rank], *, coded: bool) -> None:
    for i, words in enumerate(own.words):
        for receiver in words.shapes:
            if receiver is not None:
                said.add(words.kind, words.num_bytes(receiver, coded))
            else:  # a collective: all parts are as long as the longest
                longest = max(rank.words[i].num_bytes(None, coded) for rank in ranks)
                said.add(words.kind, longest * (len(ranks) - 1))


def _noted(said: Traffic, anatomy: Anatomy, levels: Levels, config: ParallelConfig, batch: int) -> None:
    """What patches may come to stand beside, before they stand alone: collectives, all parts as long as the longest."""
    grains = levels.grains(levels.grain(by_patch=config.moving == "patch", overlap=config.overlap))
    for seam in anatomy.seams:
        if not isinstance(seam, Conv) or not any(margins := seam.windows[config.split == "cols"].padding):
            continue
        split = levels.splits[seam.level]
        kept = borders(split.size, grains[seam.level], margins)
        rows = max(len(near(kept, split.span(i).start, split.sizes[i], split.size)) for i in range(split.num_patches))
        numbers = batch * seam.channels * rows * levels.across[seam.level]
        said.add("halo", numbers * anatomy.item * (split.num_patches - 1))


def _displaced(said: Traffic, own: Rank, ranks: Sequence[Rank]) -> None:
    if own.config.group_norm == "sync":
        for words in own.words:
            if words.kind == "moments":
                said.add("moments", words.num_bytes(None, False) * (len(ranks) - 1))
    for chunk in _chunks(ranks):
        for receiver in [peer for peer in range(len(ranks)) if peer != own.patch]:
            said.add("chunk", _length(own, chunk, receiver, len(ranks) == 2))
        if len(ranks) > 2:
            said.add("chunk", max(_length(rank, chunk, None, False) for rank in ranks) * (len(ranks) - 1))


def _length(rank: Rank, chunk: Sequence[int], receiver: int | None, hears_all: bool) -> int:
    """Bytes of a rank's message in a chunk; with two ranks, one message carries what is said to all, too."""
    lanes = (receiver, None) if hears_all else (receiver,)
    found = ((rank.words[i], lane) for i in chunk for lane in lanes)
    return sum(in_whole_words(words.num_bytes(lane, True)) for words, lane in found if lane in words.shapes)


def _chunks(ranks: Sequence[Rank]) -> Iterator[list[int]]:
    """Indices of the seams whose words travel together: about equal parts of what all ranks send to each other."""
    own = ranks[0].config.group_norm
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


def _weight(words: Sequence[Said], num_ranks: int) -> int:
    """Bytes that travel between all ranks, about: with a codec, its part of what float32 would be."""
    numbers = [
        prod(shape) * (num_ranks - 1 if receiver is None else 1)
        for said in words
        for receiver, shape in said.shapes.items()
    ]
    whole, codec = sum(numbers) * words[0].item, words[0].codec
    return whole if codec is None else whole * payload((1024, 1024), codec) >> 22
