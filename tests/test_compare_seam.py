"""The seam score: 1 where there is none, and it finds one that was planted."""

import numpy as np
import pytest

from distrifusion.compare.seam import borders_of, seam_score


def noise(height: int = 96, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).random((height, width, 3)).astype(np.float32)


def test_borders_are_between_the_patches_in_pixels() -> None:
    assert borders_of((4, 4), 64) == [32]
    assert borders_of((3, 2, 3), 64) == [24, 40]
    assert borders_of((4, 0, 4), 64) == [32]  # a patch without a row makes none
    assert borders_of((8,), 64) == borders_of((), 64) == []


@pytest.mark.parametrize("split", ["rows", "cols"])
def test_a_picture_without_a_seam_scores_1_and_a_planted_one_is_found(split: str) -> None:
    picture = 0.5 + 0.05 * noise()
    planted = picture.copy()
    if split == "rows":
        planted[48:] += 0.2
    else:
        planted[:, 32:] += 0.2
    border = [48] if split == "rows" else [32]
    assert seam_score(picture, border, split) == pytest.approx(1.0, abs=0.1)
    found = seam_score(planted, border, split)
    # A step of 0.2 on noise whose rows differ by 0.05^2 / 6 in the mean square.
    assert found == pytest.approx((0.05**2 / 6 + 0.2**2) / (0.05**2 / 6), rel=0.1)
    elsewhere = seam_score(planted, [20], split)
    assert elsewhere is not None
    assert elsewhere < 1


def test_a_seam_counts_at_its_own_row_and_at_no_other() -> None:
    picture = np.zeros((64, 8, 3), np.float32)
    picture[32:] = 1.0
    scores = {row: seam_score(picture, [row]) for row in (31, 32, 33)}
    assert scores[32] is not None
    assert scores[32] > 1e6
    assert scores[31] == pytest.approx(0, abs=1e-3)
    assert scores[33] == pytest.approx(0, abs=1e-3)


def test_a_flat_picture_has_no_seam_and_without_borders_there_is_no_score() -> None:
    flat = np.full((32, 32, 3), 0.5, np.float32)
    assert seam_score(flat, [16]) == pytest.approx(1.0)
    assert seam_score(flat, []) is None
    assert seam_score(flat[:2], [1]) is None  # no other row to compare with
