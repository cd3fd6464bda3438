"""Files of a benchmark: refused before anything is measured."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ConfigError


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
