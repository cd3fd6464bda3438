"""Things that stand in a scene: drawn as polygons on a finer patch, then laid on the canvas around the seam."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from .canvas import Canvas
from .noise import Array, smoothstep
from .palettes import mix, rgb

FINER = 4
Point = tuple[float, float]


class Patch:
    """A square of side `size` (picture heights) whose foot is centred at (u, v); colours are 0..1, points 0..1."""

    def __init__(self, canvas: Canvas, u: float, v: float, size: float) -> None:
        self.canvas, self.size = canvas, size
        self.left, self.top = u - size / 2, v - size
        self.pixels = int(np.ceil(size * canvas.height)) + 2
        self.column, self.row = int(np.floor(self.left * canvas.height)), int(np.floor(self.top * canvas.height))
        self.image = Image.new("RGBA", (self.pixels * FINER, self.pixels * FINER))
        self.draw = ImageDraw.Draw(self.image)

    def _points(self, points: list[Point]) -> list[Point]:
        height = self.canvas.height
        shift_x, shift_y = self.left * height - self.column, self.top * height - self.row
        scale = self.size * height
        return [((x * scale + shift_x) * FINER, (y * scale + shift_y) * FINER) for x, y in points]

    def polygon(self, colour: Array, *points: Point) -> None:
        """A filled polygon."""
        self.draw.polygon(self._points(list(points)), fill=_bytes(colour))

    def ellipse(self, colour: Array, x: float, y: float, rx: float, ry: float) -> None:
        """A filled ellipse."""
        (x0, y0), (x1, y1) = self._points([(x - rx, y - ry), (x + rx, y + ry)])
        self.draw.ellipse((x0, y0, x1, y1), fill=_bytes(colour))

    def paste(self, haze: float = 0.0) -> None:
        """Lay the patch on the canvas, averaged down and paled by `haze`."""
        canvas = self.canvas
        fine = np.asarray(self.image, np.float32) / 255
        fine[..., :3] *= fine[..., 3:]
        coarse = fine.reshape(self.pixels, FINER, self.pixels, FINER, 4).mean(axis=(1, 3))
        alpha = coarse[..., 3:]
        colour = mix(coarse[..., :3], canvas.light.horizon * alpha, haze)
        first, last = max(0, self.row), min(canvas.height, self.row + self.pixels)
        if first >= last:
            return
        inside = slice(first - self.row, last - self.row)
        columns = np.arange(self.column, self.column + self.pixels) % canvas.width
        rows = canvas.picture[first:last, columns]
        canvas.picture[first:last, columns] = rows * (1 - alpha[inside]) + colour[inside]
        canvas.marked[first:last, columns] = np.maximum(canvas.marked[first:last, columns], alpha[inside, :, 0])


def _bytes(colour: Array) -> tuple[int, int, int, int]:
    red, green, blue = (int(value * 255) for value in np.clip(colour, 0, 1))
    return red, green, blue, 255


def _haze(canvas: Canvas) -> float:
    return 0.3 if canvas.scene.weather == "misty" else 0.1 if canvas.scene.weather in ("stormy", "snowing") else 0.02


def _place(canvas: Canvas, name: str) -> float:
    """A column for a thing, apart from the other things on the ground."""
    return float(canvas.rng(f"place {name}").random() * canvas.aspect)


def _glow(canvas: Canvas, u: float, v: float, radius: float, strength: float) -> None:
    """The warm light of a lamp or window after sunset."""
    distance = np.sqrt(canvas.away(u) ** 2 + (canvas.v - v) ** 2)
    canvas.blend(rgb(255, 214, 130), strength * canvas.light.darkness * np.exp(-((distance / radius) ** 2)))


def _boat(canvas: Canvas, stage: Array) -> None:
    u, size = _place(canvas, "boat"), 0.27
    v = float(stage[0]) + 0.12
    lit = canvas.lit
    white, cream, hull = lit(rgb(255, 252, 244), 0.95), lit(rgb(226, 208, 186), 0.8), lit(rgb(150, 52, 40), 0.6)
    for flip in (True, False):
        patch = Patch(canvas, u, v + (size if flip else 0.0), size)
        at: Callable[[float], float] = (lambda y: 1 - y) if flip else (lambda y: y)
        patch.polygon(lit(rgb(90, 60, 40), 0.5), (0.49, at(0.04)), (0.51, at(0.04)), (0.51, at(0.9)), (0.49, at(0.9)))
        patch.polygon(white, (0.53, at(0.06)), (0.84, at(0.78)), (0.53, at(0.80)))
        patch.polygon(cream, (0.47, at(0.14)), (0.47, at(0.80)), (0.22, at(0.77)))
        patch.polygon(hull, (0.14, at(0.84)), (0.90, at(0.84)), (0.76, at(0.985)), (0.26, at(0.985)))
        if flip:
            fade = np.linspace(0.5, 0.1, patch.image.height)[:, None] * np.ones(patch.image.width)
            alpha = np.asarray(patch.image)[..., 3] * fade
            patch.image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
        patch.paste(_haze(canvas))


def _lighthouse(canvas: Canvas, stage: Array) -> None:
    """A striped tower on a rock in the water; its lamp shines after sunset."""
    u, size = _place(canvas, "lighthouse"), 0.4
    v = float(stage[0]) + 0.06
    patch = Patch(canvas, u, v, size)
    lit = canvas.lit
    rock, white, red = lit(rgb(84, 80, 82), 0.45), lit(rgb(250, 246, 240), 0.85), lit(rgb(206, 58, 50), 0.8)
    patch.polygon(
        rock, (0.14, 1), (0.2, 0.93), (0.3, 0.9), (0.36, 0.85), (0.6, 0.84), (0.68, 0.89), (0.8, 0.92), (0.88, 1)
    )
    edges = np.linspace(0.86, 0.26, 6)
    for index, (low, high) in enumerate(pairwise(edges)):
        half_low, half_high = 0.05 + 0.055 * (low - 0.26), 0.05 + 0.055 * (high - 0.26)
        for side, tone in ((0.0, 1.0), (0.4, 0.78)):
            colour = (red if index % 2 else white) * tone
            patch.polygon(
                colour,
                (0.5 - half_low + 2 * half_low * side, low),
                (0.5 + half_low, low),
                (0.5 + half_high, high),
                (0.5 - half_high + 2 * half_high * side, high),
            )
    lamp = mix(lit(rgb(255, 240, 190), 0.9), rgb(255, 236, 160), max(0.3, canvas.light.darkness))
    patch.polygon(rock * 0.8, (0.43, 0.27), (0.57, 0.27), (0.57, 0.25), (0.43, 0.25))
    patch.polygon(lamp, (0.46, 0.25), (0.54, 0.25), (0.54, 0.18), (0.46, 0.18))
    patch.polygon(red * 0.9, (0.445, 0.18), (0.5, 0.12), (0.555, 0.18))
    patch.paste(_haze(canvas))
    lamp_v = v - size * 0.785
    _glow(canvas, u, lamp_v, 0.06, 1.0)
    beam = np.exp(-(((canvas.v - lamp_v) / (0.006 + 0.12 * np.abs(canvas.away(u)))) ** 2))
    reach = np.exp(-np.abs(canvas.away(u)) / 0.22)
    canvas.blend(rgb(255, 232, 170), 0.5 * canvas.light.darkness * beam * reach)


def _tree(canvas: Canvas, stage: Array) -> None:
    """A lone broad tree: a trunk and a crown of leaf clumps, lit from above."""
    rng, u, size = canvas.rng("tree shape"), _place(canvas, "tree"), 0.4
    v = float(stage[int(u * canvas.height) % canvas.width]) + 0.03
    patch = Patch(canvas, u, v, size)
    lit, snowy = canvas.lit, canvas.scene.weather == "snowing"
    trunk = lit(rgb(70, 48, 36), 0.4)
    leaf = {"autumn": rgb(226, 120, 40), "pastel": rgb(240, 170, 190)}.get(canvas.scene.palette, rgb(72, 116, 50))
    patch.polygon(
        trunk,
        (0.45, 1),
        (0.475, 0.6),
        (0.40, 0.42),
        (0.43, 0.41),
        (0.5, 0.55),
        (0.57, 0.40),
        (0.60, 0.41),
        (0.53, 0.62),
        (0.56, 1),
    )
    clumps = [
        (0.5 + 0.29 * np.cos(a) * r, 0.36 + 0.2 * np.sin(a) * r)
        for a, r in zip(rng.uniform(0, 2 * np.pi, 16), np.sqrt(rng.random(16)), strict=True)
    ]
    for layer, (tone, rise) in enumerate(((0.2, 0.0), (0.6, 0.03), (1.0, 0.055))):
        colour = lit(leaf, tone) * (0.7 + 0.15 * layer)
        if snowy and layer == 2:
            colour = lit(rgb(244, 248, 255), 0.8)
        for x, y in clumps:
            radius = 0.115 - 0.026 * layer
            patch.ellipse(colour, 0.02 * layer * -1 + x, y - rise, radius * 1.1, radius * 0.8)
    patch.paste(_haze(canvas))


def _cabin(canvas: Canvas, stage: Array) -> None:
    """A log cabin with a lit window."""
    u, size = _place(canvas, "cabin"), 0.26
    v = float(stage[int(u * canvas.height) % canvas.width]) + (0.012 if canvas.scene.terrain == "lake" else 0.03)
    patch = Patch(canvas, u, v, size)
    lit, snowy = canvas.lit, canvas.scene.weather == "snowing"
    wall, side = lit(rgb(150, 92, 56), 0.75), lit(rgb(104, 62, 42), 0.35)
    roof = lit(rgb(244, 248, 255) if snowy else rgb(120, 50, 44), 0.7)
    patch.polygon(lit(rgb(96, 84, 80), 0.4), (0.68, 0.22), (0.76, 0.22), (0.76, 0.5), (0.68, 0.5))
    patch.polygon(wall, (0.14, 1), (0.14, 0.58), (0.30, 0.34), (0.46, 0.58), (0.46, 1))
    patch.polygon(side, (0.46, 1), (0.46, 0.58), (0.90, 0.58), (0.90, 1))
    patch.polygon(roof, (0.30, 0.28), (0.80, 0.28), (0.95, 0.60), (0.48, 0.60))
    patch.polygon(roof * 0.8, (0.30, 0.28), (0.07, 0.60), (0.13, 0.62), (0.30, 0.38), (0.47, 0.62), (0.50, 0.60))
    window = mix(lit(rgb(190, 210, 220), 0.8), rgb(255, 206, 104), min(1.0, 0.35 + canvas.light.darkness))
    patch.polygon(window, (0.24, 0.68), (0.37, 0.68), (0.37, 0.82), (0.24, 0.82))
    patch.polygon(window, (0.60, 0.70), (0.76, 0.70), (0.76, 0.84), (0.60, 0.84))
    patch.paste(_haze(canvas))
    _glow(canvas, u - size * 0.19, v - size * 0.25, 0.05, 0.6)
    _glow(canvas, u + size * 0.18, v - size * 0.23, 0.05, 0.6)


def _castle(canvas: Canvas, stage: Array) -> None:
    """A castle with pointed towers on a knoll, or on a rock in the water."""
    u, size = _place(canvas, "castle"), 0.38
    watery = canvas.scene.terrain in ("lake", "islands")
    v = float(stage[int(u * canvas.height) % canvas.width]) + (0.012 if watery else 0.03)
    patch = Patch(canvas, u, v, size)
    lit = canvas.lit
    stone, dark, roof = lit(rgb(206, 196, 184), 0.7), lit(rgb(166, 154, 148), 0.4), lit(rgb(74, 82, 128), 0.6)
    patch.polygon(lit(rgb(78, 84, 70), 0.4), (0.04, 1), (0.18, 0.9), (0.32, 0.83), (0.68, 0.83), (0.84, 0.9), (0.97, 1))
    window = mix(lit(rgb(70, 70, 90), 0.5), rgb(255, 206, 104), smoothstep(0.2, 0.6, np.float32(canvas.light.darkness)))
    for x, half, top, tip, colour in (
        (0.5, 0.085, 0.34, 0.10, stone),
        (0.36, 0.05, 0.46, 0.27, stone),
        (0.64, 0.05, 0.42, 0.22, dark),
        (0.24, 0.045, 0.60, 0.44, stone),
        (0.76, 0.045, 0.60, 0.44, dark),
    ):
        patch.polygon(colour, (x - half, 0.9), (x + half, 0.9), (x + half, top), (x - half, top))
        patch.polygon(colour * 0.84, (x + half * 0.2, 0.9), (x + half, 0.9), (x + half, top), (x + half * 0.2, top))
        patch.polygon(roof, (x - half * 1.25, top), (x + half * 1.25, top), (x, tip))
    patch.polygon(stone * 0.95, (0.24, 0.9), (0.76, 0.9), (0.76, 0.70), (0.24, 0.70))
    for x, y in ((0.5, 0.44), (0.5, 0.58), (0.36, 0.55), (0.64, 0.52), (0.34, 0.78), (0.66, 0.78)):
        patch.polygon(window, (x - 0.014, y), (x + 0.014, y), (x + 0.014, y + 0.05), (x - 0.014, y + 0.05))
    patch.polygon(dark * 0.5, (0.46, 0.9), (0.46, 0.8), (0.5, 0.76), (0.54, 0.8), (0.54, 0.9))
    patch.paste(_haze(canvas))


def _balloon(canvas: Canvas) -> None:
    """A striped hot-air balloon."""
    rng, u, size = canvas.rng("balloon"), _place(canvas, "balloon"), 0.24
    v = float(rng.uniform(0.32, 0.38))
    patch = Patch(canvas, u, v, size)
    lit = canvas.lit
    red, cream = lit(rgb(226, 66, 56), 0.9), lit(rgb(255, 238, 206), 0.95)
    patch.polygon(red, (0.24, 0.55), (0.76, 0.55), (0.56, 0.80), (0.44, 0.80))
    for index, half in enumerate((0.33, 0.245, 0.15, 0.05)):
        colour = cream if index % 2 else red
        patch.ellipse(colour, 0.5, 0.37, half, 0.33)
        patch.polygon(
            colour,
            (0.5 - half * 0.83, 0.55),
            (0.5 + half * 0.83, 0.55),
            (0.5 + half * 0.18, 0.80),
            (0.5 - half * 0.18, 0.80),
        )
    rope = lit(rgb(80, 60, 50), 0.5)
    patch.polygon(rope, (0.44, 0.80), (0.455, 0.80), (0.465, 0.89), (0.455, 0.89))
    patch.polygon(rope, (0.56, 0.80), (0.545, 0.80), (0.535, 0.89), (0.545, 0.89))
    patch.polygon(lit(rgb(140, 92, 54), 0.6), (0.44, 0.88), (0.56, 0.88), (0.545, 0.98), (0.455, 0.98))
    patch.paste(_haze(canvas))


def _birds(canvas: Canvas) -> None:
    """Four gulls, the first the nearest: broad wings, so that their shape outlives the autoencoder."""
    rng, u = canvas.rng("birds"), _place(canvas, "birds")
    v = float(rng.uniform(0.2, 0.28))
    dark = canvas.light.shade * 0.35
    for dx, dy, span in ((0.0, 0.0, 0.18), (0.2, 0.03, 0.15), (-0.18, 0.06, 0.14), (0.08, 0.13, 0.13)):
        patch = Patch(canvas, u + dx, v + dy, span * float(rng.uniform(0.9, 1.1)))
        patch.polygon(
            dark,
            (0.5, 0.60),
            (0.38, 0.38),
            (0.20, 0.30),
            (0.0, 0.42),
            (0.20, 0.45),
            (0.36, 0.58),
            (0.44, 0.74),
            (0.5, 0.86),
            (0.56, 0.74),
            (0.64, 0.58),
            (0.80, 0.45),
            (1.0, 0.42),
            (0.80, 0.30),
            (0.62, 0.38),
        )
        patch.paste(0.0)


def paint_sky_things(canvas: Canvas) -> None:
    """What flies."""
    if "balloon" in canvas.scene.things:
        _balloon(canvas)
    if "birds" in canvas.scene.things:
        _birds(canvas)


def paint_ground_things(canvas: Canvas, stage: Array, *, mirrored: bool) -> None:
    """What stands on the line `stage` [W]; `mirrored` selects what the water reflects and what swims on it."""
    painters = {"boat": _boat, "lighthouse": _lighthouse, "tree": _tree, "cabin": _cabin, "castle": _castle}
    for name, painter in painters.items():
        if name in canvas.scene.things and (name in ("castle", "cabin")) == mirrored:
            painter(canvas, stage)
