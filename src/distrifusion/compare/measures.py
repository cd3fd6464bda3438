"""Numbers for one picture against another. Each comes from a library that may be missing, which is then said."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from typing import Literal, Protocol

import numpy as np

HIGHEST_PSNR = 150.0
"""dB; what equal pictures get, whose PSNR is infinite: a difference of one float32 rounding error is about as much."""

Compute = Callable[[np.ndarray, np.ndarray], "float | None"]
"""``(picture, reference) -> value``, both float32 ``[H, W, 3]`` in 0..1; None: the pictures are too small for it."""


class Metric(Protocol):
    """A number for one picture against another."""

    @property
    def name(self) -> str:
        """Its key in JSON."""
        ...

    @property
    def title(self) -> str:
        """What tables call it."""
        ...

    @property
    def better(self) -> Literal["higher", "lower"]:
        """Which way is better."""
        ...

    def missing(self) -> str | None:
        """Why it cannot be computed here, and what would help; None: it can."""
        ...

    def load(self) -> Compute:
        """What computes it; takes its time where there are weights."""
        ...


@dataclass(frozen=True)
class LibraryMetric:
    """A `Metric` that needs ``module`` and nothing else."""

    name: str
    title: str
    better: Literal["higher", "lower"]
    module: str
    load: Callable[[], Compute]

    def missing(self) -> str | None:
        """See Metric."""
        if find_spec(self.module) is not None:
            return None
        return f"{self.module} is not installed: pip install 'distrifusion[quality]'"


def _psnr() -> Compute:
    from skimage.metrics import peak_signal_noise_ratio

    def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
        if np.array_equal(picture, reference):
            return HIGHEST_PSNR
        found = peak_signal_noise_ratio(reference.astype(np.float64), picture.astype(np.float64), data_range=1.0)
        return min(float(found), HIGHEST_PSNR)

    return psnr


def _psnr_8bit() -> Compute:
    compute = _psnr()

    def psnr_8bit(picture: np.ndarray, reference: np.ndarray) -> float | None:
        return compute(*(np.round(image * 255) / 255 for image in (picture, reference)))

    return psnr_8bit


def _ssim() -> Compute:
    from skimage.metrics import structural_similarity

    def ssim(picture: np.ndarray, reference: np.ndarray) -> float | None:
        if min(picture.shape[:2]) < 11:  # the window
            return None
        found = structural_similarity(
            reference,
            picture,
            data_range=1.0,
            channel_axis=2,
            gaussian_weights=True,  # this and the next two: as Wang et al. 2004
            sigma=1.5,
            use_sample_covariance=False,
        )
        return float(found)

    return ssim


def _flip() -> Compute:
    import flip_evaluator

    def flip(picture: np.ndarray, reference: np.ndarray) -> float:
        with redirect_stdout(StringIO()):
            _, mean, _ = flip_evaluator.evaluate(
                np.ascontiguousarray(reference), np.ascontiguousarray(picture), "LDR", applyMagma=False
            )
        return float(mean)

    return flip


PSNR = LibraryMetric("psnr", "PSNR dB", "higher", "skimage", _psnr)
PSNR_8BIT = LibraryMetric("psnr_8bit", "PSNR dB, 8 bits", "higher", "skimage", _psnr_8bit)
SSIM = LibraryMetric("ssim", "SSIM", "higher", "skimage", _ssim)
FLIP = LibraryMetric("flip", "FLIP", "lower", "flip_evaluator", _flip)


def metrics() -> list[Metric]:
    """All that there are, in the order of tables."""
    from .perceptual import LPIPS_ALEX, LPIPS_VGG

    return [PSNR, PSNR_8BIT, SSIM, LPIPS_ALEX, LPIPS_VGG, FLIP]
