"""Paint a scene: sky, land, things, water, weather, palette."""

import numpy as np
from numpy.typing import NDArray

from .canvas import Canvas
from .land import SKYLINES, WATERLINES, paint_land, paint_water
from .palettes import grade
from .scene import Scene
from .sky import paint_sky, paint_weather
from .things import paint_ground_things, paint_sky_things


def paint(scene: Scene, height: int, width: int) -> NDArray[np.uint8]:
    """Render a scene as [height, width, 3]; it wraps around along x, and twice the size is the same composition."""
    return paint_marked(scene, height, width)[0]


def paint_marked(scene: Scene, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The render, and how much of each pixel [height, width] a thing covers: sun, moon, and all that is drawn alone."""
    canvas = Canvas(scene, height, width)
    canvas.skyline = SKYLINES[scene.terrain]
    paint_sky(canvas)
    watery = scene.terrain in WATERLINES
    stage = paint_land(canvas)
    if watery:
        paint_ground_things(canvas, stage, mirrored=True)
        paint_water(canvas)
        paint_sky_things(canvas)
        paint_ground_things(canvas, stage, mirrored=False)
    else:
        paint_sky_things(canvas)
        paint_ground_things(canvas, stage, mirrored=True)
        paint_ground_things(canvas, stage, mirrored=False)
    paint_weather(canvas)
    picture = (np.clip(grade(canvas.picture, scene.palette), 0, 1) * 255 + 0.5).astype(np.uint8)
    return picture, canvas.marked
