"""What a picture holds: the attributes of a scene, which of them go together, and how scenes are drawn at random."""

from dataclasses import dataclass

import numpy as np

TERRAINS = ("mountains", "lake", "hills", "forest", "desert", "canyon", "sea", "islands")
TIMES = ("dawn", "day", "golden", "sunset", "dusk", "night")
WEATHERS = ("clear", "cloudy", "misty", "stormy", "snowing")
PALETTES = ("natural", "pastel", "violet", "autumn", "teal")
THINGS = (
    "sun",
    "full moon",
    "crescent moon",
    "stars",
    "aurora",
    "rainbow",
    "birds",
    "balloon",
    "boat",
    "lighthouse",
    "tree",
    "cabin",
    "castle",
)

SKY_LIGHTS = ("sun", "full moon", "crescent moon")
SKY_EXTRAS = ("stars", "aurora", "rainbow", "birds", "balloon")
GROUND_THINGS = ("boat", "lighthouse", "tree", "cabin", "castle")
WATERY = ("lake", "sea", "islands")

# Never trained on: (terrain, time, weather). The evaluation asks for them.
HELD_OUT = frozenset(
    {
        ("mountains", "night", "misty"),
        ("mountains", "golden", "cloudy"),
        ("mountains", "dawn", "snowing"),
        ("lake", "sunset", "misty"),
        ("lake", "night", "cloudy"),
        ("lake", "day", "stormy"),
        ("hills", "dusk", "clear"),
        ("hills", "dawn", "cloudy"),
        ("hills", "sunset", "snowing"),
        ("forest", "golden", "clear"),
        ("forest", "night", "snowing"),
        ("forest", "sunset", "cloudy"),
        ("desert", "dawn", "clear"),
        ("desert", "dusk", "misty"),
        ("desert", "day", "stormy"),
        ("canyon", "sunset", "clear"),
        ("canyon", "night", "clear"),
        ("canyon", "dawn", "misty"),
        ("sea", "dusk", "clear"),
        ("sea", "golden", "misty"),
        ("sea", "night", "stormy"),
        ("islands", "day", "misty"),
        ("islands", "sunset", "clear"),
        ("islands", "dusk", "cloudy"),
    }
)


@dataclass(frozen=True)
class Scene:
    """One picture's content. The seed fixes every shape; the size and shape of the render do not."""

    terrain: str
    time: str
    weather: str
    things: tuple[str, ...] = ()
    palette: str = "natural"
    seed: int = 0

    @property
    def combination(self) -> tuple[str, str, str]:
        """The part of the scene that the held-out set speaks of."""
        return self.terrain, self.time, self.weather


def fitting_things(terrain: str, time: str, weather: str) -> tuple[str, ...]:
    """The things that may stand in such a scene."""
    dark, open_sky = time in ("dusk", "night"), weather in ("clear", "cloudy", "misty")
    fits: list[str] = []
    if open_sky:
        fits += ["full moon", "crescent moon"] if dark else ["sun"]
        fits += ["balloon"] if not dark else []
    if weather == "clear" and dark:
        fits += ["stars", "aurora"] if time == "night" else ["stars"]
    if time in ("day", "golden") and weather in ("cloudy", "stormy"):
        fits.append("rainbow")
    if time != "night":
        fits.append("birds")
    fits += ["boat", "lighthouse"] if terrain in WATERY else ["tree", "cabin", "castle"]
    if terrain in ("desert", "canyon"):
        fits.remove("cabin")
    if terrain == "lake":
        fits.append("cabin")
    if terrain in ("islands", "lake"):
        fits.append("castle")
    return tuple(fits)


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw a scene; only held-out combinations when `held_out`, else only the others."""
    while True:
        terrain, time, weather = (str(rng.choice(options)) for options in (TERRAINS, TIMES, WEATHERS))
        if weather != "clear" and rng.random() < 0.3:
            weather = "clear"
        if ((terrain, time, weather) in HELD_OUT) == held_out:
            break
    fits = fitting_things(terrain, time, weather)
    things: list[str] = []
    for group, chance in ((SKY_LIGHTS, 0.6), (SKY_EXTRAS, 0.45), (GROUND_THINGS, 0.7)):
        options = [name for name in group if name in fits]
        if options and rng.random() < chance:
            things.append(str(rng.choice(options)))
    palette = "natural" if rng.random() < 0.6 else str(rng.choice(PALETTES[1:]))
    return Scene(terrain, time, weather, tuple(things), palette, int(rng.integers(2**31)))
