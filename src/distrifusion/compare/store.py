"""Results of single pictures in a folder, by case and index. What is there is whole: files are renamed into place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .plan import Case


class Store:
    """Pictures and numbers of cases; index ``i`` is prompt ``i``. The layout is in output.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def picture_path(self, case: Case, index: int) -> Path:
        """Where the picture of ``prompts[index]`` lies, 8 bits."""
        return self.folder / "pictures" / case.name / f"{index:03d}.png"

    def result(self, case: Case, index: int) -> dict[str, Any] | None:
        """The numbers of a picture; None where it is not done."""
        try:
            found: dict[str, Any] = json.loads(self._result_path(case, index).read_text())
        except FileNotFoundError:
            return None
        return found

    def put_result(self, case: Case, index: int, picture: np.ndarray, numbers: dict[str, Any]) -> None:
        """Keep a picture (float32 ``[H, W, 3]`` in 0..1, which is rounded to 8 bits) and its numbers."""
        self._put_picture(self.picture_path(case, index), picture)
        self.put_numbers(case, index, numbers)

    def put_numbers(self, case: Case, index: int, numbers: dict[str, Any]) -> None:
        """Keep the numbers of a picture that is there."""
        path = self._result_path(case, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(numbers, allow_nan=False))
        part.replace(path)

    def has_reference(self, case: Case, index: int) -> bool:
        """Whether one device's picture and latents are there."""
        return self._reference_path(case, index).is_file()

    def reference(self, case: Case, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One device's picture, float32 ``[H, W, 3]`` in 0..1, and its latents after each step ``[steps, C, h, w]``."""
        with np.load(self._reference_path(case, index)) as found:
            return found["picture"], found["latents"]

    def put_reference(self, case: Case, index: int, picture: np.ndarray, latents: np.ndarray) -> None:
        """Keep one device's picture and latents."""
        self._put_picture(self.picture_path(case, index), picture)
        path = self._reference_path(case, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, picture=picture, latents=latents)
        part.replace(path)

    def _result_path(self, case: Case, index: int) -> Path:
        return self.folder / "results" / case.name / f"{index:03d}.json"

    def _reference_path(self, case: Case, index: int) -> Path:
        return self.folder / "references" / str(case.steps) / f"{index:03d}.npz"

    def _put_picture(self, path: Path, picture: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8)).save(part, format="PNG")
        part.replace(path)
