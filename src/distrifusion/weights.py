"""Weights that lie in safetensors files, read by name: whole, or the part of one that a rank needs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import ConfigError
from .geometry import Span

Spans = tuple[Span, ...]

_NAME = "diffusion_pytorch_model"
_PART = "_distrifusion_part"  # the attribute of a parameter that is not whole
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Of the files, by safetensors' names: those with which a model computes as they are."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the files."""

    file: Path
    name: str  # in the file
    shape: torch.Size
    dtype: str  # as safetensors calls it

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return self.shape.numel() * DTYPES[self.dtype].itemsize


class WeightFiles:
    """The tensors of one model's files by the name that the model has for them. Nothing is read before it is asked for.

    ``num_bytes`` counts what was read: handed out from the files, in their own dtypes.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)
        self.num_bytes = 0
        self._mapped: dict[Path, Any] = {}
        self._stamps = {file: _stamp(file) for file in {entry.file for entry in entries.values()}}

    @classmethod
    def of(cls, folder: Path, variant: str | None = None) -> WeightFiles | None:
        """Those of a model's ``folder`` as diffusers writes it, in one file or several; None: there are none.

        Raises:
            ConfigError: the index names a file that is not there.
        """
        index = folder / ".".join(filter(None, (_NAME, "safetensors.index", variant, "json")))
        single = folder / ".".join(filter(None, (_NAME, variant, "safetensors")))
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / name for name in names]
        elif single.is_file():
            files = [single]
        else:
            return None
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ConfigError(f"{index} names {missing[0]}, and there is no such file")
        entries: dict[str, Entry] = {}
        for file in files:
            with safe_open(file, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - no mapping
                    found = handle.get_slice(name)
                    entries[name] = Entry(file, name, torch.Size(found.get_shape()), str(found.get_dtype()))
        return cls(entries)

    def renamed(self, names: Mapping[str, str]) -> WeightFiles:
        """The same with other names: new name -> the one so far."""
        return WeightFiles({new: self.entries[old] for new, old in names.items()})

    def read(self, name: str, dtype: torch.dtype, spans: Spans | None = None, dim: int = 0) -> Tensor:
        """A tensor in ``dtype``, or its ``spans`` along ``dim`` side by side.

        What needs no copy is a view of the mapped file: pages are read when they are used, and ranks of one machine
        share them. For a copy the file is mapped for as long as that takes, so that its pages do not add up.
        """
        entry = self.entries[name]
        in_one = spans is None or (dim == 0 and len(spans) == 1)
        is_view = in_one and DTYPES.get(entry.dtype) == dtype
        handle = self._handle(entry.file) if is_view else safe_open(entry.file, "pt")
        if spans is None:
            found: Tensor = handle.get_tensor(entry.name)
        else:
            cut, before = handle.get_slice(entry.name), (slice(None),) * dim
            parts = [cut[(*before, slice(span.start, span.stop))] for span in spans]
            found = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        self.num_bytes += found.nbytes
        return found if is_view else found.to(dtype).contiguous()

    def close(self) -> None:
        """Let go of the files. What was read stays."""
        self._mapped.clear()

    def check(self) -> None:
        """Whether the files are what they were.

        Raises:
            ConfigError: one has changed or is gone.
        """
        for file, stamp in self._stamps.items():
            if _stamp(file) != stamp:
                raise ConfigError(
                    f"{file} was changed or taken away since this rank read its part of it, so that the model cannot "
                    "be made whole again"
                )

    def _handle(self, file: Path) -> Any:
        if file not in self._mapped:
            self._mapped[file] = safe_open(file, "pt")
        return self._mapped[file]


@dataclass(frozen=True)
class Part:
    """What a parameter holds of a weight whose whole lies in a file: ``spans`` along ``dim``; none: nothing."""

    files: WeightFiles
    name: str
    spans: Spans
    dim: int = 0

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return self.files.entries[self.name].shape

    def read(self, dtype: torch.dtype) -> Tensor:
        """The part itself; of nothing, a tensor without numbers."""
        if not self.spans:
            return torch.empty(0, dtype=dtype)
        return self.files.read(self.name, dtype, self.spans, self.dim)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """All of the weight."""
        found = self.files.read(self.name, dtype)
        self.files.close()
        return found


def part_of(weight: Tensor) -> Part | None:
    """What ``weight`` holds, where that is not all of it."""
    return getattr(weight, _PART, None)


def set_part(weight: Tensor, part: Part | None) -> None:
    """Note what ``weight`` holds; None: it is whole."""
    if part is not None:
        setattr(weight, _PART, part)
    elif hasattr(weight, _PART):
        delattr(weight, _PART)


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of ``weight``, or of what it is a part of."""
    part = part_of(weight)
    return weight.shape if part is None else part.shape


def whole_bytes(weights: Iterable[Tensor]) -> int:
    """Bytes of all of ``weights``, with what is not here of them."""
    return sum(whole_shape(weight).numel() * weight.element_size() for weight in weights)


def _stamp(file: Path) -> tuple[int, int] | None:
    if not file.is_file():
        return None
    found = file.stat()
    return found.st_size, found.st_mtime_ns
