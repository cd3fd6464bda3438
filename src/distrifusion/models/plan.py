"""What a plan says of one class of transformers: where its tokens are cut and exchanged.

Between its embedding and its last projection a transformer works on each token alone, but for attention. So a plan
names the modules after which tokens stand in a sequence (``entries``), the one after which they do not (``exit``), the
attentions over image tokens (``seams``, ``sums``), and how to read the size of the picture off a call. Plans are in
`plans`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..layers.tokens import Cut, Place, Tokens, Words
from .grid import Grid
from .table import Call


@dataclass(frozen=True)
class Frames:
    """Frames of a video's latents: ``patch`` of them behind a frame of tokens; along ``dim`` of latents of five."""

    patch: Callable[[Any], int]
    dim: int = 2


@dataclass(frozen=True)
class Plan:
    """What one class of transformers is made of. Module names are patterns, as of a shell; none reaches over a dot.

    Args:
        model: the class, exactly.
        names: models that have it, for people.
        seams: attentions over image tokens, in the order in which they run, and where these stand among the keys.
        grid: of a call's picture.
        entries: modules whose output holds the tokens of the whole picture, and how, or what cuts it.
        exit: the last module over tokens.
        leaving: how the output of ``exit`` holds them.
        methods: methods of the model, as ``entries``.
        inputs: modules that are given something about all tokens, or the text's, among their arguments by name.
        words: the argument ``[B, tokens, C]`` with the text whose tokens the ranks share out, where each is computed by
            itself but for the seams, so that `cuts`, `inputs` and `entries` can cut them; None: all ranks compute all.
        sample: the argument that holds the latents.
        time: the argument that holds the time of the step.
        lists: arguments that are lists with an item for each picture of the batch.
        several: arguments that hold several rows for each picture of the batch, one picture's after the other's.
        shared: arguments that are not of single pictures, and might be taken for it where there are as many of them.
        patch: rows of a latent behind a row of tokens; 1 where the latents come as tokens.
        frames: of a model of videos, how its latents hold them; None: it makes pictures.
        sums: linear attentions over image tokens, and the processors that may be theirs: see PatchLinearAttention.
        convs: convolutions over tokens in rows.
        sides: blocks that are told sizes of the picture in tokens: see PatchSides.
        cuts: arguments that hold the tokens of the whole picture, or are lists or tuples of such, and how. One without
            that dim, or of 1 there, is for all tokens and stays, such as a timestep. Or those of the text alone.
        texts: attentions that see no image token among their keys, or belong to the text alone.
        prompts: modules that read the text and nothing else, the same in every step: they run once per picture.
        conditions: arguments that stay the same in a picture and guidance branch.
        unknown: arguments that are refused when given.
    """

    model: type[nn.Module]
    names: tuple[str, ...]
    seams: Mapping[str, Place]
    grid: Callable[[Any, Call], Grid]
    entries: Mapping[str, Tokens | Cut] = field(default_factory=dict)
    exit: str = "proj_out"
    leaving: Tokens = field(default_factory=Tokens)
    methods: Mapping[str, Cut] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, Tokens | Words]] = field(default_factory=dict)
    words: str | None = None
    sample: str = "hidden_states"
    time: str = "timestep"
    lists: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    patch: Callable[[Any], int] = field(default=lambda model: int(model.config.patch_size))
    frames: Frames | None = None
    sums: Mapping[str, tuple[type, ...]] = field(default_factory=dict)
    convs: tuple[str, ...] = ()
    sides: tuple[str, ...] = ()
    cuts: Mapping[str, Tokens | Words] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ("encoder_hidden_states",)
    unknown: tuple[str, ...] = ()


def matching(name: str, patterns: Iterable[str]) -> str | None:
    """The pattern of as many parts as the name has: a ``*`` stands for one of them."""
    depth = name.count(".")
    return next((each for each in patterns if each.count(".") == depth and fnmatchcase(name, each)), None)
