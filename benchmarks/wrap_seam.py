"""How visible the place is where the ends of a picture meet: the figures of docs/choosing-a-strategy.md.

``python benchmarks/wrap_seam.py forest.png islands.png``: for each picture, the seam score of the column at which its
ends meet (gradient energy there over that at all others; 1.0 is no seam), the middle 90 % of the scores of all columns,
and how many columns score less. A picture that does not wrap shows what the score would be with a seam.
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

from distrifusion.compare.seam import seam_score


def column_scores(picture: np.ndarray) -> np.ndarray:
    """The seam score of each column of float ``[H, W, 3]``: ``[W]``, that of the ends first."""
    middle = picture.shape[1] // 2
    rolled = (np.roll(picture, middle - column, axis=1) for column in range(picture.shape[1]))
    return np.array([seam_score(turned, [middle], "cols") for turned in rolled])


def main(names: list[str]) -> None:
    for name in names:
        scores = column_scores(np.asarray(Image.open(name).convert("RGB"), np.float32) / 255)
        low, high = np.quantile(scores, (0.05, 0.95))
        less = (scores[1:] < scores[0]).mean()
        print(f"{name}: ends {scores[0]:.2f}; columns {low:.2f} to {high:.2f}; {less:.0%} of the columns score less")


if __name__ == "__main__":
    main(sys.argv[1:])
