"""Colours: the light of each time of day, what the weather does to it, and the palettes laid over everything."""

from dataclasses import dataclass

import numpy as np

from .noise import Array

RGB = tuple[float, float, float]


def rgb(*values: float) -> Array:
    """A colour [3] from 0..255 values."""
    return np.asarray(values, np.float32) / 255


def mix(first: Array, second: Array, amount: float | Array) -> Array:
    """Blend two colours (or pictures); broadcasting."""
    return np.asarray(first + (second - first) * amount, np.float32)


@dataclass(frozen=True)
class Light:
    """The light of a scene; every colour is [3] in 0..1."""

    top: Array
    middle: Array
    horizon: Array
    glow: Array
    key: Array  # multiplies what the sun or moon shines on
    shade: Array  # multiplies what lies in shadow
    haze: float  # how much the far layers fade into the horizon
    darkness: float  # 0 by day, 1 at night


_TIMES: dict[str, tuple[RGB, RGB, RGB, RGB, RGB, RGB, float]] = {
    # top, middle, horizon, glow, key light, shade light, darkness
    "dawn": ((92, 118, 178), (206, 168, 196), (255, 214, 186), (255, 236, 206), (238, 196, 188), (128, 118, 160), 0.1),
    "day": ((46, 118, 204), (118, 180, 232), (218, 238, 248), (255, 255, 240), (255, 252, 240), (140, 164, 200), 0.0),
    "golden": (
        (104, 150, 188),
        (236, 200, 140),
        (255, 226, 152),
        (255, 240, 180),
        (255, 214, 138),
        (150, 116, 104),
        0.05,
    ),
    "sunset": ((58, 42, 108), (196, 74, 104), (255, 150, 72), (255, 206, 110), (240, 140, 96), (92, 58, 92), 0.35),
    "dusk": ((22, 32, 84), (76, 72, 140), (206, 134, 150), (236, 170, 160), (116, 108, 156), (50, 52, 98), 0.65),
    "night": ((6, 10, 32), (14, 30, 68), (44, 78, 122), (150, 180, 220), (66, 88, 138), (24, 34, 70), 1.0),
}


def light_of(time: str, weather: str) -> Light:
    """The light at a time of day under a weather."""
    top, middle, horizon, glow, key, shade = (rgb(*colour) for colour in _TIMES[time][:6])
    darkness = _TIMES[time][6]
    haze = 0.55
    if weather == "misty":
        top, middle = mix(top, horizon, 0.5), mix(middle, horizon, 0.6)
        key, shade, haze = mix(key, horizon, 0.2), mix(shade, horizon, 0.2), 0.95
    elif weather == "stormy":
        grey = rgb(74, 82, 98) * (1 - 0.72 * darkness)
        top, middle, horizon = mix(top, grey * 0.6, 0.8), mix(middle, grey, 0.75), mix(horizon, grey * 1.35, 0.5)
        key, shade, glow, haze = mix(key, grey, 0.5) * 0.85, mix(shade, grey, 0.4) * 0.8, mix(glow, grey, 0.5), 0.65
    elif weather == "snowing":
        pale = mix(rgb(206, 214, 226), rgb(70, 84, 116), darkness)
        top, middle, horizon = mix(top, pale * 0.85, 0.65), mix(middle, pale, 0.6), mix(horizon, pale * 1.06, 0.45)
        key, shade, haze = mix(key, pale, 0.35), mix(shade, pale, 0.25), 0.8
    elif weather == "cloudy":
        top, middle = mix(top, horizon, 0.12), mix(middle, horizon, 0.12)
    return Light(top, middle, horizon, glow, key, shade, haze, darkness)


_GRADES: dict[str, tuple[float, RGB, RGB]] = {
    # saturation, multiplied with the picture, then blended towards
    "natural": (1.0, (1, 1, 1), (0, 0, 0)),
    "pastel": (0.72, (1.0, 0.98, 1.0), (1.0, 0.9, 0.92)),
    "violet": (0.85, (0.98, 0.82, 1.08), (0.62, 0.3, 0.85)),
    "autumn": (1.0, (1.08, 0.95, 0.80), (0.80, 0.40, 0.14)),
    "teal": (0.85, (0.88, 1.02, 1.0), (0.05, 0.55, 0.6)),
}


def grade(picture: Array, palette: str) -> Array:
    """Lay a palette over a picture [H, W, 3]."""
    if palette == "natural":
        return picture
    saturation, factor, towards = _GRADES[palette]
    luma = picture @ np.asarray([0.3, 0.59, 0.11], np.float32)
    graded = (luma[..., None] + (picture - luma[..., None]) * np.float32(saturation)) * np.asarray(factor, np.float32)
    return mix(graded, np.asarray(towards, np.float32), 0.28 if palette == "pastel" else 0.13)


LAND: dict[str, tuple[RGB, RGB]] = {
    # far, near
    "mountains": ((120, 128, 148), (52, 62, 74)),
    "lake": ((112, 126, 146), (44, 66, 66)),
    "hills": ((142, 190, 110), (84, 146, 52)),
    "forest": ((96, 150, 122), (22, 62, 46)),
    "desert": ((232, 186, 132), (222, 158, 92)),
    "canyon": ((206, 130, 96), (168, 78, 48)),
    "sea": ((130, 150, 160), (230, 206, 160)),
    "islands": ((126, 138, 146), (72, 82, 76)),
}
