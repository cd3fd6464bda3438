"""Periodic smooth noise as products of small cached spline matrices: fast, and the same picture at any resolution."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

_SPLINE_STD = 0.69  # standard deviation of a cubic B-spline through unit normal control points


@lru_cache(maxsize=512)
def spline_matrix(samples: int, controls: int, periodic: bool, linear: bool = False) -> Array:
    """Matrix [samples, controls (+3 when not periodic)] that evaluates a spline at the pixel centres of [0, 1]."""
    position = (np.arange(samples) + 0.5) / samples * controls
    cell = np.floor(position).astype(int)
    t = position - cell
    if linear:
        weights = [1 - t, t]
    else:
        weights = [(1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6]
    columns = controls if periodic else controls + 3
    matrix = np.zeros((samples, columns), np.float32)
    rows = np.arange(samples)
    for offset, weight in enumerate(weights):
        index = (cell + offset) % controls if periodic else cell + offset
        np.add.at(matrix, (rows, index), weight)
    return matrix


def cells(frequency: float, aspect: float) -> int:
    """Number of noise cells around a picture that is `aspect` heights wide."""
    return max(2, round(frequency * aspect))


def profile(
    rng: np.random.Generator,
    width: int,
    aspect: float,
    frequency: float,
    octaves: int = 1,
    gain: float = 0.5,
    linear: bool = False,
) -> Array:
    """One-dimensional periodic noise of about unit deviation: [width]. `frequency` is in cells per picture height."""
    total = np.zeros(width, np.float32)
    amplitude, norm = 1.0, 0.0
    for _ in range(octaves):
        count = cells(frequency, aspect)
        control = rng.standard_normal(count).astype(np.float32)
        total += amplitude / _SPLINE_STD * (spline_matrix(width, count, True, linear) @ control)
        norm += amplitude**2
        amplitude, frequency = amplitude * gain, frequency * 2
    return total / np.float32(norm**0.5)


def ridged(rng: np.random.Generator, width: int, aspect: float, frequency: float, octaves: int, gain: float) -> Array:
    """Sharp-crested periodic noise in about [0, 1] (1 on the crests): [width]."""
    total = np.zeros(width, np.float32)
    amplitude, norm = 1.0, 0.0
    for _ in range(octaves):
        crest = 1 - np.abs(np.tanh(profile(rng, width, aspect, frequency) * 0.9))
        total += amplitude * crest
        norm += amplitude
        amplitude, frequency = amplitude * gain, frequency * 2.1
    return total / np.float32(norm)


def field(
    rng: np.random.Generator,
    height: int,
    width: int,
    aspect: float,
    frequency: tuple[float, float],
    octaves: int = 1,
    gain: float = 0.5,
) -> Array:
    """Two-dimensional noise of about unit deviation, periodic along x: [height, width]. Frequencies are (x, y)."""
    total = np.zeros((height, width), np.float32)
    amplitude, norm = 1.0, 0.0
    fx, fy = frequency
    for _ in range(octaves):
        nx, ny = cells(fx, aspect), max(1, round(fy))
        control = rng.standard_normal((ny + 3, nx)).astype(np.float32)
        columns = spline_matrix(width, nx, True)
        total += amplitude / _SPLINE_STD**2 * (spline_matrix(height, ny, False) @ (control @ columns.T))
        norm += amplitude**2
        amplitude, fx, fy = amplitude * gain, fx * 2, fy * 2
    return total / np.float32(norm**0.5)


def smoothstep(low: float, high: float, value: Array) -> Array:
    """0 below `low`, 1 above `high`, smooth between; any shape."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)
