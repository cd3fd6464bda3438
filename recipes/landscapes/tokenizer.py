"""A CLIP tokenizer whose byte-pair merges make one token of every caption word; other words fall into pieces.

All pieces share one embedding ("some word that means nothing here"), so unseen words are ignored gracefully.
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .captions import vocabulary
from .networks import TEXT_LENGTH

START, END = "<|startoftext|>", "<|endoftext|>"


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the commonest pair first, until every word is a single token."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for pieces in spelled for pair in pairwise(pieces))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for pieces in spelled:
            index = 0
            while index < len(pieces) - 1:
                if (pieces[index], pieces[index + 1]) == best:
                    pieces[index : index + 2] = ["".join(best)]
                index += 1


def write_tokenizer(folder: Path) -> None:
    """Write vocab.json, merges.txt and the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = _merges([word for word in vocabulary() if len(word) > 1])
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [token for pair in merges if (token := "".join(pair)) not in set(tokens)]
    tokens = [*dict.fromkeys(tokens), START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": TEXT_LENGTH,
                "do_lower_case": True,
                "bos_token": START,
                "eos_token": END,
                "pad_token": END,
                "unk_token": END,
            },
            indent=2,
        )
        + "\n"
    )


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load the tokenizer, writing it first when the folder has none."""
    if not (folder / "vocab.json").exists():
        write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def piece_table(tokenizer: CLIPTokenizer) -> Tensor:
    """For every token number the row of its embedding: itself for caption words, one shared row for all pieces."""
    vocab = tokenizer.get_vocab()
    known = {word + "</w>" for word in vocabulary()} | {START, END}
    shared = vocab["q"]
    table = torch.arange(len(vocab))
    for token, index in vocab.items():
        if token not in known:
            table[index] = shared
    return table


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token numbers of captions, padded: [B, TEXT_LENGTH]."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids
