"""Numbers of one picture against another: perfect if equal, right for noise of known size, honest when missing."""

import importlib.util

import numpy as np
import pytest

from distrifusion.compare import measures
from distrifusion.compare.measures import FLIP, HIGHEST_PSNR, PSNR, PSNR_8BIT, SSIM, metrics
from distrifusion.compare.summary import describe

skimage = pytest.importorskip("skimage", reason="PSNR and SSIM are scikit-image's")


def picture(seed: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth, within 0.2..0.8 so that noise is not clipped."""
    y, x = np.mgrid[0:height, 0:width] / 20.0 + seed
    colours = np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], axis=2)
    return (0.5 + 0.3 * colours).astype(np.float32)


def test_equal_pictures_are_perfect() -> None:
    one = picture()
    assert PSNR.load()(one, one.copy()) == PSNR_8BIT.load()(one, one.copy()) == HIGHEST_PSNR
    assert SSIM.load()(one, one.copy()) == pytest.approx(1.0)


@pytest.mark.parametrize("deviation", [0.1, 0.01, 0.001])
def test_noise_of_known_size_gives_the_known_psnr(deviation: float) -> None:
    one = picture()
    noise = np.random.default_rng(0).standard_normal(one.shape)
    noise *= deviation / np.sqrt((noise**2).mean())  # its mean square exactly
    found = PSNR.load()((one + noise).astype(np.float32), one)
    assert found == pytest.approx(-20 * np.log10(deviation), abs=0.01)


def test_floats_tell_what_8_bits_cannot() -> None:
    one = picture()
    other = (one + 1e-6).astype(np.float32)
    found = PSNR.load()(other, one)
    assert found is not None
    assert 115 < found < HIGHEST_PSNR
    assert PSNR_8BIT.load()(one, np.round(one * 255).astype(np.float32) / 255) == HIGHEST_PSNR


def test_ssim_falls_with_noise_and_needs_a_window() -> None:
    one, rng, compute = picture(), np.random.default_rng(0), SSIM.load()
    found = [compute((one + rng.normal(0, size, one.shape)).astype(np.float32), one) for size in (0.02, 0.2)]
    assert found[0] is not None
    assert found[1] is not None
    assert 1 > found[0] > found[1]
    assert compute(one[:10], one[:10]) is None


def test_flip_is_zero_for_equal_pictures_and_grows(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flip_evaluator", reason="FLIP is flip-evaluator's")
    one, compute = picture(), FLIP.load()
    found = [compute(np.clip(one + shift, 0, 1).astype(np.float32), one) for shift in (0.0, 0.05, 0.2)]
    assert found[0] == 0.0
    assert found[1] is not None
    assert found[2] is not None
    assert 0 < found[1] < found[2] < 1
    assert capfd.readouterr().out == ""  # the library likes to talk


def test_what_is_missing_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "find_spec", lambda name: None if name == "flip_evaluator" else object())
    able, left_out = describe([PSNR, SSIM, FLIP])
    assert [metric.name for metric in able] == ["psnr", "ssim"]
    assert left_out == {"flip": "flip_evaluator is not installed: pip install 'distrifusion[quality]'"}


def test_names_are_unique_and_every_absence_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from distrifusion.compare import frechet, perceptual

    for module in (measures, frechet, perceptual):
        monkeypatch.setattr(module, "find_spec", lambda _: None)
    found = [metric.missing() for metric in metrics()]
    assert len({metric.name for metric in metrics()}) == len(found) == 6
    assert all("pip install" in (text or "") for text in [*found, frechet.missing()])
    monkeypatch.undo()
    assert importlib.util.find_spec("skimage") is not None
