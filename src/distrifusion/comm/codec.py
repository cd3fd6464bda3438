"""Codecs for the wire: a residual as fewer bytes. Pure tensor arithmetic: no ranks, no state.

A residual is taken as a matrix ``[rows, cols]``, cut where rows + cols is least: tokens x channels for keys and values,
channels x width for rows of a picture. Its scale is of rank 1: a factor per row times a factor per column. Codes of
less than a byte lie in planes: byte i holds codes i, i + n, i + 2n ..., so that packing is a few operations on whole
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

TINY = 1e-30  # scales below are zero, so that no quotient overflows float32
FLOAT8_ROOM = 2.0**15  # where the largest factor lies in float8_e5m2, whose largest number is 57344


class Codec(Protocol):
    """A way to write a residual down. All ranks know the size before the values."""

    @property
    def name(self) -> str:
        """As the user writes it."""
        ...

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a residual of this shape."""
        ...

    def encode(self, residual: Tensor) -> Tensor:
        """``[num_bytes]`` of uint8 from float32 of any shape."""
        ...

    def decode(self, payload: Tensor, shape: Sequence[int]) -> Tensor:
        """The residual, about: float32, or the half precision that travelled. The same bits on every rank."""
        ...


@dataclass(frozen=True)
class Half:
    """Two bytes a number. What float16 cannot hold is cut to its largest, and the rest follows a step later."""

    name: str
    dtype: torch.dtype

    def num_bytes(self, shape: Sequence[int]) -> int:
        """See Codec."""
        return prod(shape) * self.dtype.itemsize

    def encode(self, residual: Tensor) -> Tensor:
        """See Codec."""
        limit = torch.finfo(self.dtype).max
        return residual.clamp(-limit, limit).to(self.dtype).reshape(-1).view(torch.uint8)

    def decode(self, payload: Tensor, shape: Sequence[int]) -> Tensor:
        """See Codec."""
        return payload.view(self.dtype).view(*shape)


@dataclass(frozen=True)
class _Quantised:
    """``bits`` a number, times a scale of rank 1."""

    name: str
    bits: int

    def num_bytes(self, shape: Sequence[int]) -> int:
        """See Codec."""
        return self._scale_bytes(*_matrix(shape)) + -(-prod(shape) * self.bits // 8) if prod(shape) else 0

    def encode(self, residual: Tensor) -> Tensor:
        """See Codec."""
        if not residual.numel():
            return residual.new_empty(0, dtype=torch.uint8)
        # Halos of channels-last activations come in their layout, which the codes would keep.
        scales, codes = self._quantise(residual.reshape(_matrix(residual.shape)).contiguous())
        return torch.cat([scales, pack(codes.view(-1), self.bits)])

    def decode(self, payload: Tensor, shape: Sequence[int]) -> Tensor:
        """See Codec."""
        num_rows, num_cols = _matrix(shape)
        if not num_rows * num_cols:
            return torch.zeros(*shape, device=payload.device)
        end = self._scale_bytes(num_rows, num_cols)
        rows, cols = self._scales(payload[:end], num_rows)
        values = unpack(payload[end:], self.bits, num_rows * num_cols).float().sub_(self._zero)
        # Two multiplications, not a fused one: devices of different makes then agree to the bit.
        return values.view(num_rows, num_cols).mul_(rows[:, None]).mul_(cols).view(*shape)

    @property
    def _zero(self) -> float:
        """The code, if there were one, of 0."""
        raise NotImplementedError

    def _scale_bytes(self, num_rows: int, num_cols: int) -> int:
        raise NotImplementedError

    def _scales(self, packed: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Factors of rows and of columns, float32, in what `_quantise` made."""
        raise NotImplementedError

    def _quantise(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Factors as ``[_scale_bytes]`` of uint8, and codes ``[rows, cols]`` as uint8."""
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(_Quantised):
    """Levels at equal distances up to the largest value of row and column: an error of half a level at most.

    Factors are bfloat16, which has float32's range.
    """

    @property
    def _zero(self) -> float:
        return float(1 << (self.bits - 1))

    def _scale_bytes(self, num_rows: int, num_cols: int) -> int:
        return 2 * (num_rows + num_cols)

    def _scales(self, packed: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        factors = packed.view(torch.bfloat16).float()
        return factors[:num_rows], factors[num_rows:]

    def _quantise(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        top = (1 << (self.bits - 1)) - 1
        cols = _roomy(matrix.abs().amax(0))
        levels = matrix * _inverse(cols)
        rows = _roomy(levels.abs().amax(1)) / top
        rows = rows.bfloat16().float()
        codes = levels.mul_(_inverse(rows)[:, None]).round_().clamp_(-top, top).add_(self._zero)
        return torch.cat([rows, cols]).bfloat16().view(torch.uint8), codes.to(torch.uint8)


@dataclass(frozen=True)
class Signs(_Quantised):
    """Levels on both sides of zero, spread by the mean magnitude of row and column (CompactFusion, arXiv 2507.17511).

    With so few levels the largest value says little. Each row's factor is then fitted to the row by least squares, so
    that what is left is always smaller than what was there, whatever the values: error feedback converges. Factors
    are float8 times one bfloat16 for all: with so few levels an eighth off costs nothing, and bytes of scale count.
    """

    @property
    def _zero(self) -> float:
        return (1 << (self.bits - 1)) - 0.5

    def _scale_bytes(self, num_rows: int, num_cols: int) -> int:
        return 2 + num_rows + num_cols

    def _scales(self, packed: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        factors = packed[2:].view(torch.float8_e5m2).float()
        return factors[:num_rows] * packed[:2].view(torch.bfloat16).float(), factors[num_rows:]

    def _quantise(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        size = matrix.abs()
        rows = _tidy(size.mean(1))
        mean = size.mean(0) / rows.mean().clamp(min=TINY)  # of each column, relative
        packed_cols = mean.clamp_(max=FLOAT8_ROOM).to(torch.float8_e5m2)
        cols = packed_cols.float()
        half = 1 << (self.bits - 1)
        if self.bits == 1:
            codes = (matrix >= 0).float()
        else:  # 1.25 means apart: the best four levels for normal values
            codes = matrix * (_inverse(rows) / 1.25)[:, None]
            codes = codes.mul_(_inverse(cols)).floor_().clamp_(-half, half - 1).add_(half)
        pattern = (codes - self._zero).mul_(cols)
        fitted = torch.linalg.vecdot(matrix, pattern) / torch.linalg.vecdot(pattern, pattern).clamp(min=TINY)
        unit = _tidy(fitted.amax() / FLOAT8_ROOM)
        packed_rows = (fitted * _inverse(unit)).to(torch.float8_e5m2)
        factors = torch.cat([packed_rows.view(torch.uint8), packed_cols.view(torch.uint8)])
        return torch.cat([unit.bfloat16().view(1).view(torch.uint8), factors]), codes.to(torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[n]`` below 2^bits, uint8, as ``[ceil(n * bits / 8)]`` bytes; ``bits`` is 1, 2, 4 or 8."""
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    num_bytes = -(-codes.numel() // per_byte)
    planes = torch.nn.functional.pad(codes, (0, num_bytes * per_byte - codes.numel())).view(per_byte, num_bytes)
    packed = planes[0].clone()
    for i in range(1, per_byte):
        packed |= planes[i] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, num: int) -> Tensor:
    """The ``num`` codes in what `pack` made."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)]).view(-1)[:num]


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    return min(((prod(shape[:i]), prod(shape[i:])) for i in range(len(shape) + 1)), key=sum)


def _roomy(largest: Tensor) -> Tensor:
    """A bfloat16 number no smaller, so that the largest value keeps its code when the scale is rounded."""
    return _tidy(largest * (1 + 2**-7))


def _tidy(scale: Tensor) -> Tensor:
    """As it will arrive: rounded to bfloat16, and zero where it is next to nothing."""
    rounded = scale.bfloat16().float()
    return rounded.masked_fill_(rounded < TINY, 0)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0)


_CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Half("fp16", torch.float16),
        Half("bf16", torch.bfloat16),
        Uniform("int8", 8),
        Uniform("int4", 4),
        Signs("int2", 2),
        Signs("1bit", 1),
    )
}


def codecs_for(names: Mapping[str, str]) -> dict[str, Codec]:
    """The codec of each kind of seam, from their names (see `ParallelConfig.codecs`)."""
    return {kind: _CODECS[name] for kind, name in names.items()}
