"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import DistrifusionError


def beside(path: Path) -> Path:
    """Another name in the same folder, with the same suffix, that nothing has yet."""
    return path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` make the file under another name, and give it its own once it is whole.

    Raises:
        DistrifusionError: the system refused; nothing is left behind.
    """
    part = beside(path)
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise DistrifusionError(f"output {str(path)!r} could not be written: {error}") from error
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
