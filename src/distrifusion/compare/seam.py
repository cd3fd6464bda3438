"""How visible the borders of the patches are in a picture."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

# Squared difference of 1e-4, far below one of 255 levels: it decides nothing but pictures without any gradient.
_FLOOR = 1e-8


def borders_of(patches: tuple[int, ...], side: int) -> list[int]:
    """The first pixel row (or column) of each patch but the first, in a picture of ``side`` pixels.

    ``patches`` are rows of latent of each rank; patches without a row make no border.
    """
    total = sum(patches)
    if not total:
        return []
    bounds = sorted({bound * side // total for bound in accumulate(patches)})
    return [bound for bound in bounds if 0 < bound < side]


def seam_score(picture: np.ndarray, borders: list[int], split: str = "rows") -> float | None:
    """Gradient energy across the borders over that across all other rows: 1.0 is no seam, more is one.

    Args:
        picture: float ``[H, W, 3]`` in 0..1.
        borders: rows (columns) whose step from the one before crosses a border.
        split: ``"rows"`` or ``"cols"``: what the picture was cut into.

    The energy of a row is the mean squared difference to the row before, over columns and colours. None where there is
    no border, or no other row.
    """
    along = picture if split == "rows" else picture.swapaxes(0, 1)
    energy = (np.diff(along.astype(np.float64), axis=0) ** 2).mean(axis=(1, 2))  # [H - 1]; row i + 1 against row i
    is_border = np.zeros(len(energy), bool)
    is_border[[border - 1 for border in borders]] = True
    if not is_border.any() or is_border.all():
        return None
    return float((energy[is_border].mean() + _FLOOR) / (energy[~is_border].mean() + _FLOOR))
