"""Files of a benchmark: refused before anything is measured, written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError, DistrifusionError


def check_file(option: str, path: Path, suffix: str) -> None:
    """Whether ``path``, given as ``option``, is a file name with ``suffix`` in a folder that can be written to.

    Raises:
        ConfigError: it is not.
    """
    if path.suffix.lower() != suffix:
        raise ConfigError(f"{option} {str(path)!r} must end in {suffix}")
    if path.is_dir():
        raise ConfigError(f"{option} {str(path)!r} is a folder: name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {str(path)!r}: there is no folder {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {str(path)!r} cannot be written to")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` make the file under another name, and give it its own once it is whole.

    Raises:
        DistrifusionError: the system refused; nothing is left behind.
    """
    part = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise DistrifusionError(f"{str(path)!r} could not be written: {error}") from error
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
