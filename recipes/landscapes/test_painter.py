"""Fast checks of the painter and the captions."""

import numpy as np
import pytest

from .captions import TERRAIN_WORDS, THING_WORDS, TIME_WORDS, caption, vocabulary
from .painter import paint, paint_marked
from .scene import HELD_OUT, TERRAINS, THINGS, TIMES, WEATHERS, Scene, sample_scene

SCENE = Scene("lake", "sunset", "clear", ("sun", "birds", "boat"), seed=5)


def test_seeded_renders_are_equal() -> None:
    assert np.array_equal(paint(SCENE, 64, 64), paint(SCENE, 64, 64))
    other = Scene("lake", "sunset", "clear", ("sun", "birds", "boat"), seed=6)
    assert not np.array_equal(paint(SCENE, 64, 64), paint(other, 64, 64))


@pytest.mark.parametrize("terrain", TERRAINS)
def test_scene_wraps(terrain: str) -> None:
    """The step across the seam is no larger than the steps inside."""
    picture = paint(Scene(terrain, "day", "cloudy", ("sun",), seed=3), 96, 192).astype(int)
    inside = np.abs(np.diff(picture, axis=1)).mean(axis=(0, 2))
    seam = np.abs(picture[:, 0] - picture[:, -1]).mean()
    assert seam <= inside.max() * 1.05 + 0.5


def test_twice_the_size_is_the_same_composition() -> None:
    small, large = paint(SCENE, 96, 96).astype(float), paint(SCENE, 192, 192).astype(float)
    shrunken = large.reshape(96, 2, 96, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunken - small).mean() < 4


def test_every_attribute_paints() -> None:
    for index, thing in enumerate(THINGS):
        terrain = "lake" if thing in ("boat", "lighthouse") else TERRAINS[index % 5]
        scene = Scene(terrain, TIMES[index % 6], WEATHERS[index % 5], (thing,), seed=index)
        picture = paint(scene, 48, 80)
        assert picture.shape == (48, 80, 3)
        assert picture.dtype == np.uint8
        assert picture.std() > 3


def test_captions_name_what_is_painted() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(rng)
        text = caption(scene, rng)
        nouns = {word for phrase in TERRAIN_WORDS[scene.terrain] for word in phrase.split()}
        assert nouns & set(text.replace(",", "").split()), text
        for thing in THINGS:
            if thing not in scene.things and thing not in ("sun", "tree"):
                assert not any(f", {wording}," in f"{text}," for wording in THING_WORDS[thing]), text
    assert all(TIME_WORDS[time] for time in TIMES)


def test_held_out_scenes_are_kept_apart() -> None:
    rng = np.random.default_rng(1)
    assert all(sample_scene(rng).combination not in HELD_OUT for _ in range(300))
    assert all(sample_scene(rng, held_out=True).combination in HELD_OUT for _ in range(20))


def test_vocabulary_is_small() -> None:
    words = vocabulary()
    assert "moon" in words
    assert len(words) < 400


def test_marks_are_where_a_thing_changes_the_picture() -> None:
    bare, (whole, marks) = (
        paint(Scene("hills", "day", "clear", seed=4), 96, 96),
        paint_marked(Scene("hills", "day", "clear", ("balloon", "tree"), seed=4), 96, 96),
    )
    changed = np.abs(whole.astype(int) - bare).max(axis=-1) > 24
    assert 0.01 < marks.mean() < 0.3
    assert marks[changed].mean() > 0.7
    assert marks[~changed].mean() < 0.05
