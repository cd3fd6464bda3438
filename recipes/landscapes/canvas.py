"""The canvas a scene is painted on: a picture in progress, its coordinates, its light and its seeded randomness."""

import zlib

import numpy as np

from . import noise
from .noise import Array, smoothstep
from .palettes import Light, light_of, mix
from .scene import Scene


class Canvas:
    """A picture [H, W, 3] in 0..1; lengths are in picture heights, so u runs over [0, aspect) and v over [0, 1)."""

    def __init__(self, scene: Scene, height: int, width: int) -> None:
        self.scene, self.height, self.width = scene, height, width
        self.aspect = width / height
        self.u = ((np.arange(width, dtype=np.float32) + 0.5) / height).astype(np.float32)
        self.v = ((np.arange(height, dtype=np.float32) + 0.5) / height).astype(np.float32)[:, None]
        self.light: Light = light_of(scene.time, scene.weather)
        self.picture = np.zeros((height, width, 3), np.float32)
        self.marked = np.zeros((height, width), np.float32)  # 1 where a thing stands
        self.light_u = float(self.rng("light place").random() * self.aspect)
        self.skyline = 0.5  # the row where the sky meets the land, about

    def rng(self, name: str) -> np.random.Generator:
        """A generator of its own for every part of the picture."""
        return np.random.default_rng([self.scene.seed, zlib.crc32(name.encode())])

    def away(self, u: float) -> Array:
        """Signed distance of every column from u, the short way round: [W]."""
        return ((self.u - u + self.aspect / 2) % self.aspect - self.aspect / 2).astype(np.float32)

    def profile(self, name: str, frequency: float, octaves: int = 1, gain: float = 0.5, linear: bool = False) -> Array:
        """Periodic noise along x: [W]."""
        return noise.profile(self.rng(name), self.width, self.aspect, frequency, octaves, gain, linear)

    def ridged(self, name: str, frequency: float, octaves: int, gain: float) -> Array:
        """Sharp-crested periodic noise along x in about [0, 1]: [W]."""
        return noise.ridged(self.rng(name), self.width, self.aspect, frequency, octaves, gain)

    def field(self, name: str, fx: float, fy: float, octaves: int = 1, gain: float = 0.5) -> Array:
        """Noise over the picture, periodic along x: [H, W]."""
        return noise.field(self.rng(name), self.height, self.width, self.aspect, (fx, fy), octaves, gain)

    def blend(self, colour: Array, alpha: Array | float, top: int = 0, bottom: int | None = None) -> None:
        """Lay a colour ([3] or [h, W, 3]) over rows top..bottom with alpha ([h, W], [h, 1] or a number)."""
        rows = self.picture[top:bottom]
        weight = alpha if isinstance(alpha, float) else np.asarray(alpha, np.float32)[..., None]
        rows += (colour - rows) * weight

    def land(
        self,
        crest: Array,
        colour: Array,
        depth: float,
        *,
        texture: Array | None = None,
        fade: float = 0.25,
        fade_strength: float = 1.0,
    ) -> None:
        """Fill below a crest line [W] with a lit colour ([3] or [H, W, 3]), paled by haze at `depth` (0 near, 1 far).

        The foot of the layer fades into the haze too, over `fade` heights, as mist does between ridges.
        """
        top = max(0, int((crest.min() - 0.01) * self.height))
        if top >= self.height:
            return
        slope = (np.roll(crest, -1) - np.roll(crest, 1)) * (self.height / 2)
        steep = 1 / np.sqrt(1 + slope**2)
        below = self.v[top:] - crest
        alpha = np.clip(below * self.height * steep + 0.5, 0, 1)
        local = colour[top:] if colour.ndim == 3 else np.broadcast_to(colour, (*below.shape, 3))
        if texture is not None:
            local = local * (1 + texture[top:, :, None])
        light = self.light
        misty = self.scene.weather == "misty"
        amount = min(0.97, depth * light.haze * 1.25 + (0.12 if misty else 0.0))
        foot = smoothstep(0, fade, below) * (fade_strength * min(1.0, (0.25 + depth) * (light.haze + 0.1)))
        local = mix(local, light.horizon, np.clip(amount + (1 - amount) * foot, 0, 1)[..., None])
        self.blend(local, alpha, top)

    def lit(self, colour: Array, towards_light: Array | float = 0.6) -> Array:
        """A surface colour under the scene's light; `towards_light` in 0..1 ([H, W] or a number)."""
        amount = towards_light if isinstance(towards_light, float) else np.asarray(towards_light)[..., None]
        return mix(colour * self.light.shade, colour * self.light.key, amount)

    def facing(self, crest: Array) -> Array:
        """How much each column of a ridge faces the light, about -1..1: [W]."""
        slope = (np.roll(crest, -2) - np.roll(crest, 2)) * (self.height / 4)
        side = np.tanh(np.sin(2 * np.pi * self.away(self.light_u) / self.aspect) * 3)  # >0: the light is to the left
        return (-np.tanh(slope * 2.5) * side).astype(np.float32)

    def sheared(self, values: Array, shift: Array) -> Array:
        """values [W] looked up at columns moved by shift [H, W] (in heights): [H, W]."""
        columns = (np.arange(self.width) + np.rint(shift * self.height).astype(np.int64)) % self.width
        return values[columns]
