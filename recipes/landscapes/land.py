"""The land: eight terrains, each a few layers from far to near, and the water that mirrors what stands above it."""

import numpy as np

from .canvas import Canvas
from .noise import Array, smoothstep
from .palettes import LAND, mix, rgb

SNOW = rgb(246, 248, 255)
SKYLINES = {
    "mountains": 0.50,
    "lake": 0.46,
    "hills": 0.52,
    "forest": 0.46,
    "desert": 0.54,
    "canyon": 0.55,
    "sea": 0.56,
    "islands": 0.56,
}
WATERLINES = {"lake": 0.64, "sea": 0.56, "islands": 0.58}
# Where things stand: a row, or the crest of the near layer.
STAGES = {"mountains": 0.80, "lake": 0.66, "hills": 0.70, "forest": 0.80, "desert": 0.74, "canyon": 0.80}


def colours(canvas: Canvas, depth: float) -> Array:
    """The bare colour of the terrain at a depth; whitened when it snows."""
    far, near = (rgb(*colour) for colour in LAND[canvas.scene.terrain])
    colour = mix(near, far, depth)
    return mix(colour, SNOW, 0.55) if canvas.scene.weather == "snowing" else colour


def paint_land(canvas: Canvas) -> Array:
    """Paint the terrain over the sky; returns the line [W] on which things stand."""
    painters = {
        "mountains": _mountains,
        "lake": _lake,
        "hills": _hills,
        "forest": _forest,
        "desert": _desert,
        "canyon": _canyon,
        "sea": _sea,
        "islands": _islands,
    }
    return painters[canvas.scene.terrain](canvas)


def _range(canvas: Canvas, name: str, frequency: float) -> tuple[Array, Array]:
    """A mountain range as a jagged line [W] in about [0, 1], and its bare folds (peaks and saddles only)."""
    rng = canvas.rng(f"{name} range")
    peaks = max(2, round(frequency * canvas.aspect))
    places = (np.arange(2 * peaks) + rng.uniform(-0.3, 0.3, 2 * peaks)) / (2 * peaks) * canvas.aspect
    heights = np.where(np.arange(2 * peaks) % 2, rng.uniform(0.05, 0.45, 2 * peaks), rng.uniform(0.62, 1.0, 2 * peaks))
    folds = np.interp(canvas.u, places, heights, period=canvas.aspect).astype(np.float32)
    jagged = canvas.profile(f"{name} jagged", 7 * frequency, 4, 0.55, linear=True)
    return folds + 0.055 * jagged, folds


def _peaks(canvas: Canvas, name: str, base: float, rise: float, frequency: float, depth: float, snow: float) -> None:
    """A snowy range: crest, faces in light and shadow, snow above a ragged line (`snow` of the rise)."""
    line, folds = _range(canvas, name, frequency)
    crest = base - rise * line
    ragged = canvas.field(f"{name} ragged", 9, 9, 3, 0.6)
    below = np.clip(canvas.v - crest, 0, None)
    zigzag = 0.16 * below * np.sign(np.sin(below * 55)) * 0.35 + 0.022 * ragged * smoothstep(0, 0.06, below)
    spurs = canvas.profile(f"{name} spurs", 10, 2, linear=True)
    face = canvas.sheared(canvas.facing(base - rise * folds) + 0.3 * np.tanh(spurs), zigzag)
    lit = smoothstep(-0.22, 0.22, face + 0.04 * ragged)
    snowline = base - rise * (1 - snow) + 0.016 * canvas.profile(f"{name} snowline", 3)
    white = smoothstep(0.014, -0.014, canvas.v - snowline + 0.028 * ragged - 0.04 * (lit - 0.5))
    rock = colours(canvas, depth)
    surface = mix(np.broadcast_to(rock, (*white.shape, 3)), SNOW, white[..., None])
    canvas.land(crest, canvas.lit(surface, 0.9 * lit), depth, fade=rise * 1.3)


def _trees_line(
    canvas: Canvas,
    name: str,
    ground: Array,
    size: float,
    spacing: float,
    depth: float,
    colour: Array,
    fade: float = 0.2,
) -> None:
    """A row of pines on a ground line [W] and the ground below them, in one dark layer."""
    rng = canvas.rng(name)
    count = max(3, round(canvas.aspect / spacing))
    step = canvas.aspect / count
    places = (np.arange(count) + rng.uniform(0.1, 0.9, count)) * step
    tall = size * rng.uniform(0.6, 1.1, count)
    columns = np.minimum((places * canvas.height).astype(int), canvas.width - 1)
    foot = ground[columns] + 0.01
    alpha = np.clip((canvas.v - ground) * canvas.height + 0.5, 0, 1)
    cell = np.floor(canvas.u / step).astype(int)
    reach = int(np.ceil(size * 0.24 / step)) + 1
    for offset in range(-reach, reach + 1):
        tree = (cell + offset) % count
        across = np.abs((canvas.u - places[tree] + canvas.aspect / 2) % canvas.aspect - canvas.aspect / 2)
        t = (canvas.v - foot[tree] + tall[tree]) / tall[tree]  # 0 at the tip, 1 at the foot
        tiers = t * 6
        half = tall[tree] * (0.012 + 0.19 * t * (0.55 + 0.45 * (tiers - np.floor(tiers))))
        inside = np.clip((half - across) * canvas.height + 0.5, 0, 1) * np.clip(t * tall[tree] * canvas.height, 0, 1)
        np.maximum(alpha, np.where(t < 1, inside, 0), out=alpha)
    amount = min(0.97, depth * canvas.light.haze * 1.25 + (0.1 if canvas.scene.weather == "misty" else 0))
    strength = min(1.0, (0.2 + depth) * (canvas.light.haze + 0.1))
    foot_haze = smoothstep(-size * 0.5, fade, canvas.v - ground) * strength
    local = mix(colour, canvas.light.horizon, np.clip(amount + (1 - amount) * foot_haze, 0, 1)[..., None])
    if canvas.scene.weather == "snowing":
        ground_snow = smoothstep(0, 0.03, canvas.v - ground)[..., None] * 0.6
        local = mix(local, canvas.lit(SNOW, 0.5), ground_snow * (1 - amount))
    canvas.blend(local, alpha)


def _mountains(canvas: Canvas) -> Array:
    _peaks(canvas, "far", 0.60, 0.30, 2.4, 0.55, 0.72)
    _peaks(canvas, "mid", 0.74, 0.46, 1.6, 0.2, 0.66)
    wood = canvas.lit(colours(canvas, 0.0) * rgb(150, 200, 190), 0.5)
    _trees_line(canvas, "wood", 0.74 + 0.025 * canvas.profile("wood", 1.6, 2), 0.07, 0.022, 0.22, wood)
    ground = 0.86 + 0.03 * canvas.profile("near", 1.2, 2)
    _trees_line(canvas, "near wood", ground, 0.17, 0.075, 0.0, wood * 0.5, 0.5)
    return ground


def _lake(canvas: Canvas) -> Array:
    waterline = WATERLINES["lake"]
    _peaks(canvas, "far", 0.63, 0.32, 2.2, 0.5, 0.68)
    _peaks(canvas, "mid", 0.68, 0.32, 1.6, 0.2, 0.55)
    wood = canvas.lit(colours(canvas, 0.0) * rgb(190, 220, 200), 0.5)
    shore = waterline - 0.022 + 0.012 * canvas.profile("shore", 1.8, 2)
    _trees_line(canvas, "wood", shore, 0.062, 0.02, 0.08, wood * 0.7, 0.5)
    return np.full(canvas.width, waterline, np.float32)


def _hills(canvas: Canvas) -> Array:
    crest = np.full(canvas.width, 0.5, np.float32)
    for index, (base, rise, depth) in enumerate(
        ((0.50, 0.04, 0.7), (0.56, 0.05, 0.4), (0.65, 0.055, 0.18), (0.78, 0.05, 0.0))
    ):
        crest = base - rise * canvas.profile(f"hill {index}", 1.3, 2, 0.35)
        surface = colours(canvas, depth)
        below = canvas.v - crest
        face = canvas.sheared(canvas.facing(crest), below * 0.9)
        lit = np.clip(0.62 + 0.4 * face - 1.6 * below * (1 - 0.5 * depth), 0.05, 1)
        stripes = 0.05 * np.sin((below / (0.012 + 0.25 * np.clip(below, 0, 1))) * 3) * (1 - depth) * (index == 3)
        canvas.land(crest, canvas.lit(surface, lit), depth, texture=stripes, fade=0.22, fade_strength=0.7)
        if index < 3:
            _bushes(canvas, f"bushes {index}", crest, 0.012 + 0.018 * (1 - depth), depth)
    return crest


def _bushes(canvas: Canvas, name: str, crest: Array, size: float, depth: float) -> None:
    """Groups of small round trees along a crest."""
    groups = smoothstep(0.3, 0.8, canvas.profile(f"{name} groups", 2.4))
    bumps = np.abs(canvas.profile(f"{name} bumps", 0.55 / size, 2, 0.5))
    line = crest - size * groups * (0.45 + 0.6 * bumps) + 0.002
    colour = canvas.lit(colours(canvas, 0.0) * 0.62, 0.45)
    amount = min(0.95, depth * canvas.light.haze * 1.25)
    thick = np.clip((canvas.v - line) * canvas.height + 0.5, 0, 1)
    thick = thick * np.clip((crest + size * 0.3 - canvas.v) * canvas.height, 0, 1) * (groups > 0.02)
    canvas.blend(mix(colour, canvas.light.horizon, amount), thick)


def _forest(canvas: Canvas) -> Array:
    dark = canvas.lit(colours(canvas, 0.0), 0.45)
    ground = np.full(canvas.width, 0.5, np.float32)
    for index, (base, size, spacing, depth) in enumerate(
        ((0.47, 0.09, 0.026, 0.8), (0.57, 0.15, 0.042, 0.55), (0.69, 0.22, 0.064, 0.3), (0.88, 0.34, 0.15, 0.0))
    ):
        ground = base + 0.03 * canvas.profile(f"floor {index}", 1.3, 2)
        _trees_line(canvas, f"pines {index}", ground, size, spacing, depth, dark * (0.55 + 0.6 * depth), 0.24)
    return ground


def _desert(canvas: Canvas) -> Array:
    crest = np.full(canvas.width, 0.5, np.float32)
    for index, (base, rise, frequency, depth) in enumerate(
        ((0.53, 0.03, 2.2, 0.8), (0.58, 0.055, 1.7, 0.5), (0.67, 0.075, 1.3, 0.22), (0.83, 0.085, 1.0, 0.0))
    ):
        crest = base - rise * (2.2 * canvas.ridged(f"dune {index}", frequency, 2, 0.18) - 1.1)
        below = np.clip(canvas.v - crest, 0, None)
        curve = below * 1.1 + 0.05 * np.sin(below * 16)
        face = canvas.sheared(canvas.facing(crest), curve)
        lit = smoothstep(-0.2, 0.25, face) * 0.85 + 0.12
        ripples = 0.035 * np.sin(below * (70 + 50 * depth) + 1.6 * canvas.profile(f"ripple {index}", 2.5)) * (lit > 0.5)
        surface = np.broadcast_to(colours(canvas, depth), (*below.shape, 3))
        canvas.land(crest, canvas.lit(surface, lit), depth, texture=ripples * (1 - depth), fade=0.3, fade_strength=0.6)
    return crest


def _spread(values: Array) -> Array:
    """values [W] with mean 0 and deviation 1 over this very picture, so that every picture has its mesas or islands."""
    return ((values - values.mean()) / max(1e-3, float(values.std()))).astype(np.float32)


def _canyon(canvas: Canvas) -> Array:
    """Flat-topped mesas of layered rock over a plain."""
    crest = np.full(canvas.width, 0.5, np.float32)
    for index, (base, rise, frequency, depth) in enumerate(((0.60, 0.15, 3.4, 0.6), (0.69, 0.30, 2.4, 0.16))):
        wall = _spread(canvas.profile(f"mesa {index}", frequency, 2, 0.35)) * 4.0 - 1.0
        steps = smoothstep(-2.6, -0.4, wall) * 0.22 + smoothstep(-0.25, 0.25, wall) * 0.45
        steps = steps + smoothstep(1.3, 1.6, wall) * 0.33
        crest = base - rise * steps - 0.006 * canvas.profile(f"rim {index}", 12, 2)
        grooves = canvas.sheared(canvas.profile(f"grooves {index}", 22, 2), 0.004 * canvas.field("groove", 6, 6))
        lit = np.clip(0.55 + 0.4 * canvas.facing(base - rise * steps) + 0.16 * grooves, 0, 1)
        strata = np.sin((canvas.v + 0.004 * canvas.profile("strata", 2)) * 150 + index) * 0.5
        strata = strata + np.sin(canvas.v * 61 + index * 2)
        surface = colours(canvas, depth) * (1 + 0.10 * strata[..., None])
        canvas.land(crest, canvas.lit(surface, lit * np.ones_like(canvas.v)), depth, fade=rise * 1.2)
    ground = 0.68 + 0.012 * canvas.profile("plain", 1.5, 2)
    for index, (drop, depth) in enumerate(((0.0, 0.25), (0.15, 0.0))):
        ground = 0.68 + drop + 0.014 * canvas.profile(f"plain {index}", 1.4, 3)
        texture = 0.07 * canvas.field(f"scrub {index}", 5, 22, 2)
        canvas.land(
            ground,
            canvas.lit(colours(canvas, 0.15) * (1 - 0.25 * index), 0.55),
            depth,
            texture=texture,
            fade=0.4,
            fade_strength=0.4,
        )
    return ground


def _sea(canvas: Canvas) -> Array:
    headland = WATERLINES["sea"] + 0.004 - 0.05 * np.clip(canvas.profile("headland", 1.3, 2) - 0.55, 0, 1)
    canvas.land(headland, canvas.lit(colours(canvas, 1.0) * 0.7, 0.5), 0.5, fade=0.3)
    return np.full(canvas.width, WATERLINES["sea"], np.float32)


def _islands(canvas: Canvas) -> Array:
    waterline = WATERLINES["islands"]
    for index, (rise, frequency, depth) in enumerate(((0.12, 3.0, 0.55), (0.25, 2.2, 0.12))):
        wall = _spread(canvas.profile(f"island {index}", frequency, 2, 0.3)) * 2.6 - 1.7
        body = smoothstep(-1.0, 0.5, wall) * 0.75 + smoothstep(0.6, 1.6, wall) * 0.25
        crest = waterline + 0.012 - rise * body - 0.016 * body * canvas.profile(f"island rim {index}", 9, 3)
        below = np.clip(canvas.v - crest, 0, None)
        grooves = canvas.sheared(canvas.profile(f"cracks {index}", 18, 2), 0.012 * canvas.field("crack", 7, 7))
        lit = np.clip(0.5 + 0.4 * canvas.facing(waterline - rise * body) + 0.2 * grooves, 0, 1)
        turf = smoothstep(0.035, 0.012, below + 0.012 * canvas.field(f"turf {index}", 16, 16)) * 0.85
        green = mix(rgb(86, 128, 66), SNOW, 0.7 if canvas.scene.weather == "snowing" else 0.0)
        surface = mix(np.broadcast_to(colours(canvas, depth), (*below.shape, 3)), green, turf[..., None])
        canvas.land(crest, canvas.lit(surface, lit), depth, fade=rise * 1.6, fade_strength=0.6)
    return np.full(canvas.width, waterline, np.float32)


def paint_water(canvas: Canvas) -> None:
    """Mirror what stands above the waterline into rippled water, with a glittering path under the sun or moon."""
    terrain, scene, light = canvas.scene.terrain, canvas.scene, canvas.light
    waterline = WATERLINES[terrain]
    first = int(np.ceil(waterline * canvas.height))
    depth = canvas.v[first:] - waterline
    rough = {"lake": 0.6, "sea": 1.6, "islands": 1.1}[terrain] * (1.5 if scene.weather == "stormy" else 1.0)
    waves = _waves(canvas, first)
    rows = (waterline - depth * 0.98 + waves * rough * (0.006 + 0.09 * depth)) * canvas.height - 0.5
    rows = np.clip(rows, 0, first - 1)
    low = np.floor(rows).astype(np.int64)
    part = (rows - low)[..., None].astype(np.float32)
    columns = np.arange(canvas.width)
    upper, lower = canvas.picture[low, columns], canvas.picture[np.minimum(low + 1, first - 1), columns]
    mirrored = upper * (1 - part) + lower * part
    day_water = rgb(36, 96, 132) if terrain != "lake" else rgb(34, 84, 108)
    water = mix(day_water * light.key, light.top, 0.45) * (0.9 - 0.25 * light.darkness)
    amount = np.clip(0.2 + 0.9 * depth + 0.10 * waves * rough, 0, 0.85)[..., None]
    canvas.picture[first:] = mix(mirrored, water, amount)
    crests = smoothstep(0.9, 2.0, waves) * np.clip(0.25 + 0.8 * depth, 0, 1) * 0.3
    canvas.blend(mix(light.horizon, light.glow, 0.4), crests, first)
    if {"sun", "full moon", "crescent moon"} & set(scene.things):
        spread = 0.035 + 0.22 * depth
        path = np.exp(-((canvas.away(canvas.light_u) / spread) ** 2))
        sparkle = smoothstep(-0.5, 0.9, waves)
        canvas.blend(mix(light.glow, rgb(255, 255, 245), 0.4), 0.75 * path * sparkle, first)
    edge = np.exp(-((depth / 0.006) ** 2)) * 0.5
    canvas.blend(light.horizon, edge, first)
    if terrain == "sea":
        _beach(canvas)
    elif terrain == "lake":
        _bank(canvas)


def _waves(canvas: Canvas, first: int) -> Array:
    """Ripples that grow towards the viewer, of about unit deviation: [H - first, W]."""
    height = canvas.height
    far, mid, near = (
        canvas.field(f"waves {name}", fx, fy, 2) for name, fx, fy in (("far", 9, 90), ("mid", 5, 44), ("near", 3, 24))
    )
    depth = canvas.v[first:] - first / height
    return (
        far[first:] * smoothstep(0.12, 0.0, depth)
        + mid[first:] * smoothstep(0, 0.1, depth) * smoothstep(0.35, 0.12, depth)
        + near[first:] * smoothstep(0.12, 0.35, depth)
    )


def _beach(canvas: Canvas) -> None:
    """Sand in the foreground, and the foam of the last wave."""
    line = 0.9 + 0.022 * canvas.profile("beach", 1.1, 2)
    below = canvas.v - line
    canvas.blend(canvas.lit(rgb(250, 252, 255), 0.8), 0.75 * np.exp(-(((below + 0.012) / 0.010) ** 2)))
    foam = np.exp(-(((canvas.v - line + 0.06 + 0.012 * canvas.profile("foam", 2.2, 2)) / 0.007) ** 2))
    canvas.blend(canvas.lit(rgb(240, 248, 255), 0.8), 0.45 * foam)
    sand = canvas.lit(colours(canvas, 0.0), 0.7)
    wet = (1 - 0.3 * smoothstep(0.05, 0.0, below))[..., None]
    canvas.blend(sand * wet, np.clip(below * canvas.height + 0.5, 0, 1))


def _bank(canvas: Canvas) -> None:
    """A dark near bank with reeds."""
    line = 0.95 + 0.03 * canvas.profile("bank", 1.0, 2)
    reeds = np.abs(canvas.profile("reeds", 34, 2)) * smoothstep(0.0, 1.0, canvas.profile("reed beds", 1.6))
    colour = canvas.lit(mix(rgb(52, 70, 46), SNOW, 0.5 if canvas.scene.weather == "snowing" else 0.0), 0.4) * 0.6
    canvas.blend(colour, np.clip((canvas.v - line + 0.05 * reeds) * canvas.height * 0.7 + 0.5, 0, 1))
