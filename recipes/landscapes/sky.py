"""The sky: gradient, stars, sun and moon with their glow, clouds, aurora, rainbow, rain and snow."""

import numpy as np

from .canvas import Canvas
from .noise import Array, smoothstep
from .palettes import mix, rgb

LOW_SUN = ("dawn", "golden", "sunset")


def paint_sky(canvas: Canvas) -> None:
    """Everything behind the land."""
    light, things = canvas.light, canvas.scene.things
    t = canvas.v / canvas.skyline
    upper = mix(light.top, light.middle, smoothstep(0.0, 0.62, t))
    canvas.picture[:] = mix(upper, light.horizon, smoothstep(0.45, 1.02, t))[:, None, :].reshape(canvas.height, 1, 3)
    if "stars" in things:
        _stars(canvas, 1.0)
    if "aurora" in things:
        _aurora(canvas)
    if "sun" in things:
        _sun(canvas)
    if "full moon" in things or "crescent moon" in things:
        _moon(canvas, "crescent moon" in things)
    if canvas.scene.weather in ("cloudy", "stormy"):
        _clouds(canvas, heavy=canvas.scene.weather == "stormy")
    elif canvas.scene.weather == "clear" and canvas.scene.time != "night":
        _wisps(canvas)
    elif canvas.scene.weather == "snowing":
        _overcast(canvas)
    if "rainbow" in things:
        _rainbow(canvas)


def _distance(canvas: Canvas, u: float, v: float) -> Array:
    return np.sqrt(canvas.away(u) ** 2 + (canvas.v - v) ** 2)


def _disc(canvas: Canvas, distance: Array, radius: float) -> Array:
    return np.clip((radius - distance) * canvas.height + 0.5, 0, 1)


def _sun(canvas: Canvas) -> None:
    """A disc in its glow; low at dawn, in the golden hour and at sunset."""
    rng, time = canvas.rng("sun"), canvas.scene.time
    low = time in LOW_SUN
    v = canvas.skyline - rng.uniform(0.04, 0.13) if low else rng.uniform(0.12, 0.2)
    radius = rng.uniform(0.058, 0.07) if low else 0.045
    distance = _distance(canvas, canvas.light_u, v)
    veil = 0.75 if canvas.scene.weather == "misty" else 1.0
    canvas.blend(canvas.light.glow, (0.75 if low else 0.5) * veil * np.exp(-distance / (0.22 if low else 0.13)))
    canvas.blend(mix(canvas.light.glow, rgb(255, 255, 255), 0.25), 0.8 * veil * np.exp(-((distance / 0.1) ** 2)))
    disc = _disc(canvas, distance, radius)
    canvas.blend(mix(canvas.light.glow, rgb(255, 252, 238), 0.75), disc * veil)
    canvas.marked = np.maximum(canvas.marked, disc)


def _moon(canvas: Canvas, crescent: bool) -> None:
    """A full moon with faint seas, or a crescent."""
    rng = canvas.rng("moon")
    v, radius = rng.uniform(0.13, 0.22), 0.07
    distance = _distance(canvas, canvas.light_u, v)
    halo = 0.35 if crescent else 0.55
    canvas.blend(canvas.light.glow, halo * np.exp(-distance / 0.12))
    disc = _disc(canvas, distance, radius)
    if crescent:
        disc = disc * (1 - _disc(canvas, _distance(canvas, canvas.light_u + 0.042, v - 0.022), radius * 0.95))
    seas = smoothstep(0.2, 1.0, canvas.field("seas", 14, 14)) * 0.14
    canvas.blend(rgb(250, 246, 226) * (1 - seas[..., None]), disc)
    canvas.marked = np.maximum(canvas.marked, disc)


def _stars(canvas: Canvas, strength: float) -> None:
    """Small soft stars on a jittered grid, a few of them bright; fewer near the horizon."""
    rng = canvas.rng("stars")
    columns, rows = max(4, round(17 * canvas.aspect)), 10
    u = (np.arange(columns)[None, :] + rng.random((rows, columns))) / columns * canvas.aspect
    v = (np.arange(rows)[:, None] + rng.random((rows, columns))) / rows * canvas.skyline
    bright = rng.random((rows, columns)) ** 3
    size = 0.0030 + 0.0034 * bright
    for star_u, star_v, level, radius in zip(u.flat, v.flat, bright.flat, size.flat, strict=True):
        reach = int(radius * 3 * canvas.height) + 2
        column, row = int(star_u * canvas.height), int(star_v * canvas.height)
        rows_at = slice(max(0, row - reach), min(canvas.height, row + reach + 1))
        columns_at = np.arange(column - reach, column + reach + 1) % canvas.width
        near = canvas.away(float(star_u))[columns_at] ** 2 + (canvas.v[rows_at] - star_v) ** 2
        fade = 1 - 0.75 * (star_v / canvas.skyline) ** 2
        alpha = strength * fade * (0.5 + 0.5 * level) * np.exp(-near / radius**2)
        patch = canvas.picture[rows_at, columns_at]
        canvas.picture[rows_at, columns_at] = patch + (rgb(248, 248, 255) - patch) * alpha[..., None]


def _aurora(canvas: Canvas) -> None:
    """Green curtains that fade upwards into violet."""
    for index in range(2):
        lower = 0.36 - 0.1 * index + 0.05 * canvas.profile(f"aurora edge {index}", 1.6, 2)
        above = lower - canvas.v
        curtain = smoothstep(-0.015, 0.02, above) * np.exp(-np.clip(above, 0, None) / 0.13)
        rays = 0.65 + 0.35 * np.tanh(canvas.profile(f"aurora rays {index}", 9, 2))
        stretch = smoothstep(-0.8, 0.4, canvas.profile(f"aurora stretch {index}", 1.2))
        colour = mix(rgb(84, 250, 164), rgb(150, 84, 230), smoothstep(0.03, 0.24, above)[..., None])
        canvas.blend(colour, 0.85 * curtain * rays * (0.35 + 0.65 * stretch))


def _rainbow(canvas: Canvas) -> None:
    """An arc in six soft bands, away from the light."""
    centre = (canvas.light_u + canvas.aspect / 2) % canvas.aspect
    distance = _distance(canvas, centre, canvas.skyline + 0.08)
    bands = (
        rgb(236, 84, 84),
        rgb(250, 160, 80),
        rgb(252, 226, 110),
        rgb(110, 200, 120),
        rgb(92, 140, 226),
        rgb(150, 100, 200),
    )
    for index, colour in enumerate(bands):
        ring = np.exp(-(((distance - 0.40 + 0.016 * index) / 0.010) ** 2))
        canvas.blend(colour, 0.62 * ring * smoothstep(0.6, 0.35, canvas.v))


def _clouds(canvas: Canvas, heavy: bool) -> None:
    """Banks of cumulus with bright tops; low, dark and dense before a storm."""
    shape = canvas.field("clouds", 2.4, 5.5, 4, 0.5)
    envelope = np.interp(canvas.v / canvas.skyline, [0, 0.3, 0.75, 1], [0.15, 0.05, -0.15, -1.1]).astype(np.float32)
    density = shape + envelope + (0.75 if heavy else -0.05)
    alpha = smoothstep(0.0, 0.38, density)
    reach = max(1, canvas.height // 24)
    top_lit = smoothstep(-0.55, 0.75, density - np.roll(density, reach, axis=0))  # against a little higher up
    top_lit[:reach] = top_lit[reach]
    light = canvas.light
    if heavy:
        dark, bright = mix(light.middle, light.top, 0.7) * 0.72, mix(light.middle, light.horizon, 0.35)
        canvas.blend(mix(dark, bright, top_lit[..., None]), 0.92 * alpha)
        return
    bright = mix(light.horizon, rgb(255, 255, 255) * np.clip(light.key * 1.15, 0, 1), 0.55)
    dark = mix(light.middle, light.shade, 0.35)
    canvas.blend(mix(dark, bright, top_lit[..., None]), 0.9 * alpha)


def _wisps(canvas: Canvas) -> None:
    """A few thin long clouds in the colours of the horizon."""
    shape = canvas.field("wisps", 1.3, 13, 3, 0.5)
    band = np.exp(-(((canvas.v / canvas.skyline - 0.55) / 0.28) ** 2))
    colour = mix(canvas.light.horizon, canvas.light.glow, 0.5)
    canvas.blend(colour, 0.6 * smoothstep(0.5, 1.8, shape) * band)


def _overcast(canvas: Canvas) -> None:
    """A soft pale cover."""
    shape = canvas.field("cover", 1.8, 5, 3, 0.5)
    canvas.blend(mix(canvas.light.middle, canvas.light.horizon, 0.6), 0.5 * smoothstep(-0.6, 1.4, shape))


def paint_weather(canvas: Canvas) -> None:
    """What falls in front of everything: rain under a storm, snowflakes when it snows, a veil of mist."""
    weather = canvas.scene.weather
    if weather == "misty":
        banks = smoothstep(-0.4, 1.5, canvas.field("mist", 1.4, 7, 2, 0.5))
        height = np.exp(-(((canvas.v - canvas.skyline - 0.12) / 0.14) ** 2))
        canvas.blend(canvas.light.horizon, 0.5 * banks * height)
    elif weather == "stormy":
        slant = canvas.sheared(canvas.profile("rain", 26), canvas.v * 0.3 + np.zeros_like(canvas.u))
        gusts = smoothstep(-0.5, 1.2, canvas.field("gusts", 2, 2))
        canvas.blend(canvas.light.horizon, 0.16 * smoothstep(0.2, 1.6, slant) * gusts)
    elif weather == "snowing":
        _snowflakes(canvas)


def _snowflakes(canvas: Canvas) -> None:
    rng = canvas.rng("flakes")
    columns, rows = max(4, round(12 * canvas.aspect)), 12
    u = (np.arange(columns)[None, :] + rng.random((rows, columns))) / columns * canvas.aspect
    v = (np.arange(rows)[:, None] + rng.random((rows, columns))) / rows
    radius = 0.0042 + 0.0042 * rng.random((rows, columns)) ** 2
    for flake_u, flake_v, size in zip(u.flat, v.flat, radius.flat, strict=True):
        reach = int(size * 2.5 * canvas.height) + 2
        column, row = int(flake_u * canvas.height), int(flake_v * canvas.height)
        rows_at = slice(max(0, row - reach), min(canvas.height, row + reach + 1))
        columns_at = np.arange(column - reach, column + reach + 1) % canvas.width
        near = canvas.away(float(flake_u))[columns_at] ** 2 + (canvas.v[rows_at] - flake_v) ** 2
        alpha = 0.85 * np.exp(-near / size**2)
        patch = canvas.picture[rows_at, columns_at]
        flake = mix(rgb(255, 255, 255), rgb(190, 204, 232), canvas.light.darkness)
        canvas.picture[rows_at, columns_at] = patch + (flake - patch) * alpha[..., None]
