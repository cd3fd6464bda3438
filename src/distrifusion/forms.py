"""The normal form of each value of a configuration, however it was given, and what is said of one that has none.

All of it raises `ConfigError`, which prints the value and what would be right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from .errors import ConfigError

SHIFTS = ("patch", "golden", "random")
"""Ways to move the borders of ``shifted``, beside a number of rows."""

CODECS = ("fp16", "bf16", "int8", "int4", "int2", "1bit")
"""Codecs for what travels between ranks, see docs/codecs.md."""

MEASURED = "measured"
"""The balance that follows the speed of the ranks."""

CODED_SEAMS = ("context", "halo", "output")
"""Seams whose values may be coded. Moments never are: few bytes, and statistics of float32."""

LEAST_OUTPUT = "int8"
"""What a codec of fewer bits means for the prediction, which the picture is made of."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)(KiB|MiB|GiB|TiB)", re.ASCII)


def shift_choice(text: str) -> str | int:
    """What the command line calls a shift: a name, or a number of rows."""
    return int(text) if text.isascii() and text.isdigit() else text


def codec_choices(names: Sequence[str]) -> list[str | None]:
    """What the command line calls ``none`` and the codecs, in their normal form, each once.

    Raises:
        ConfigError: a name that is neither.
    """
    return list(dict.fromkeys(None if name == "none" else codec_text(name) for name in names))


def patches_choices(names: Sequence[str]) -> list[int | None]:
    """What the command line calls ``none`` and numbers of patches that stream, each once.

    Raises:
        ConfigError: what is neither.
    """
    found: list[Any] = [int(name) if name.isascii() and name.isdigit() else name for name in names if name != "none"]
    for patches in found:
        whole("patches", patches, 1)
    return list(dict.fromkeys(None if name == "none" else int(name) for name in names))


def patch_choices(numbers: Sequence[int]) -> list[int | None]:
    """What the command line calls ranks of a stage, as ``patch``, each once: 1 is None, as no number is."""
    return [None if number == 1 else number for number in dict.fromkeys(numbers)] or [None]


def codec_text(codec: Any) -> str | None:
    """``codec`` in its one normal form: the name that means what is given, else ``seam=name,...``."""
    if codec is None:
        return None
    if isinstance(codec, str):
        named: Any = codecs_of(codec)
        if "=" in codec and len(named) != codec.count(",") + 1:
            raise ConfigError(f"codec={codec!r} names a seam twice: give each one codec")
    elif isinstance(codec, Mapping):
        named = codec
    else:
        raise ConfigError(f"codec={codec!r} must be one of {quoted(CODECS)}, or a mapping of seams to them")
    for seam, name in named.items():
        if seam not in CODED_SEAMS or name not in CODECS:
            raise ConfigError(
                f"codec={codec!r} must be one of {quoted(CODECS)}, or a mapping of {quoted(CODED_SEAMS)} to them"
            )
    name = named.get("context", "")
    if name and dict(named) == codecs_of(name):
        return str(name)
    return ",".join(f"{seam}={named[seam]}" for seam in CODED_SEAMS if seam in named) or None


def codecs_of(text: str) -> dict[str, str]:
    """Seam -> name from either form of the text, unchecked."""
    if "=" not in text:
        is_shorter = text in CODECS and CODECS.index(text) > CODECS.index(LEAST_OUTPUT)
        return {**dict.fromkeys(CODED_SEAMS, text), "output": LEAST_OUTPUT if is_shorter else text}
    parts = [part.partition("=") for part in text.split(",")]
    return {seam.strip(): name.strip() for seam, _, name in parts}


def balance_text(balance: Any) -> str | None:
    """``balance`` in its one normal form: ``"measured"``, or the weights as numbers with commas between them."""
    if balance is None or (isinstance(balance, str) and balance == MEASURED):
        return balance
    values: Any = balance.split(",") if isinstance(balance, str) else balance
    weights: list[float] = []
    if isinstance(values, list | tuple):
        with suppress(TypeError, ValueError, OverflowError):  # no number, or one too large
            weights = [math.nan if isinstance(value, bool) else float(value) for value in values]
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(
            f"balance={balance!r} must be None, {MEASURED!r}, or a positive number for each rank along the picture, "
            "such as (2, 1, 1) or '2,1,1'"
        )
    return ",".join(repr(weight).removesuffix(".0") for weight in weights)


def size_of(name: str, value: Any) -> int | None:
    """``value`` in bytes."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    num_bytes = int(float(found[1]) * 1024 ** ("KiB", "MiB", "GiB", "TiB").index(found[2]) * 1024) if found else 0
    if num_bytes < 1:
        raise ConfigError(
            f"{name}={value!r} must be a positive number of bytes, or a size in KiB, MiB, GiB or TiB such as '4GiB'"
        )
    return num_bytes


def quoted(names: tuple[str, ...]) -> str:
    """Names as a line says them."""
    return ", ".join(map(repr, names))


def share(name: str, value: Any) -> None:
    """Refuse what is neither None nor from 0 to 1."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1 or math.isnan(value):
        raise ConfigError(f"{name}={value!r} must be None or a number from 0 to 1")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse what is not allowed."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} must be one of {quoted(allowed)}")


def whole(name: str, value: Any, least: int) -> None:
    """Refuse what is no integer, or too small a one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
