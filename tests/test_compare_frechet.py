"""The Frechet distance: its formula against the textbook's, and features that come from a package."""

import numpy as np
import pytest

from distrifusion.compare import frechet
from distrifusion.compare.frechet import NUM_FEATURES, Features, frechet_distance


def test_equal_sets_are_at_zero_and_a_shift_is_its_square() -> None:
    features = np.random.default_rng(0).standard_normal((20, 50))
    assert frechet_distance(features, features.copy()) == 0.0
    assert frechet_distance(features + 0.3, features) == pytest.approx(50 * 0.3**2)


def test_is_the_textbooks_formula() -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="the textbook's matrix root is scipy's")
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((200, 6)), rng.standard_normal((150, 6)) @ rng.standard_normal((6, 6)) + 1
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = linalg.sqrtm(first @ second).real
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected)
    assert frechet_distance(other, one) == pytest.approx(expected)


def test_features_tell_pictures_apart() -> None:
    if (reason := frechet.missing()) is not None:
        pytest.skip(reason)
    rng, features = np.random.default_rng(0), Features()
    pictures = [rng.random((40, 56, 3)).astype(np.float32) for _ in range(2)]
    found = features([*pictures, pictures[0]])
    assert found.shape == (3, NUM_FEATURES)
    assert np.array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() > 1e-3
