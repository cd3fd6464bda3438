"""How seams are called."""

from __future__ import annotations

from collections import Counter

from .protocol import Recall


class Named:
    """Names that stay unique when a module is called several times in one step."""

    recall: Recall | None = None

    def __init__(self) -> None:
        self._uses: Counter[str] = Counter()

    def begin(self) -> None:
        """Start a step."""
        self._uses.clear()

    def _name(self, key: str) -> str:
        self._uses[key] += 1
        return key if self._uses[key] == 1 else f"{key}#{self._uses[key]}"
