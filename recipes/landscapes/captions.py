"""Captions: several wordings for everything a scene holds, nothing for what it does not."""

import re

import numpy as np

from .scene import Scene

TERRAIN_WORDS: dict[str, tuple[str, ...]] = {
    "mountains": ("snowy mountains", "mountain peaks", "a mountain range", "high mountains", "snowy peaks"),
    "lake": (
        "a mountain lake",
        "a lake",
        "mountains over a lake",
        "snowy mountains over a lake",
        "an alpine lake",
        "a lake below mountains",
    ),
    "hills": ("green hills", "rolling hills", "grassy hills", "meadows", "a green valley", "hills"),
    "forest": ("a pine forest", "a forest", "pine trees", "dense woods", "a forest of pines", "a fir forest"),
    "desert": ("desert dunes", "sand dunes", "a sandy desert", "a desert", "dunes"),
    "canyon": ("a canyon", "red rock mesas", "a rocky canyon", "sandstone mesas", "a red canyon"),
    "sea": ("the sea", "the ocean", "a beach by the sea", "a sandy beach", "a beach", "waves of the sea"),
    "islands": ("rocky islands", "islands in the sea", "sea cliffs", "an archipelago", "islands", "cliffs in the sea"),
}
TIME_WORDS: dict[str, tuple[str, ...]] = {
    "dawn": ("at dawn", "at dawn", "at sunrise", "in the early morning", "at daybreak"),
    "day": ("at noon", "by day", "in daylight", "at midday", "during the day"),
    "golden": ("at golden hour", "in the golden hour", "in the late afternoon", "in golden light"),
    "sunset": ("at sunset", "at sunset", "at sundown", "in the evening"),
    "dusk": ("at dusk", "at dusk", "at twilight", "in the blue hour"),
    "night": ("at night", "at night", "by night", "at midnight"),
}
WEATHER_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "clear": ("clear", "serene"),
    "cloudy": ("cloudy",),
    "misty": ("misty", "foggy", "hazy"),
    "stormy": ("stormy", "rainy"),
    "snowing": ("wintry", "snowing"),
}
WEATHER_WORDS: dict[str, tuple[str, ...]] = {
    "clear": ("clear sky", "a clear sky", "fine weather"),
    "cloudy": ("clouds", "cloudy sky", "a sky full of clouds", "cumulus clouds"),
    "misty": ("mist", "fog", "in the mist", "haze"),
    "stormy": ("storm clouds", "a storm", "dark clouds and rain", "rain", "thunderstorm"),
    "snowing": ("falling snow", "snowfall", "snowflakes", "in the snow"),
}
THING_WORDS: dict[str, tuple[str, ...]] = {
    "sun": ("sun", "the sun", "a bright sun"),
    "full moon": ("full moon", "a full moon", "a round moon"),
    "crescent moon": ("crescent moon", "a crescent moon", "a thin moon"),
    "stars": ("stars", "starry sky", "many stars"),
    "aurora": ("aurora", "northern lights", "green aurora"),
    "rainbow": ("rainbow", "a rainbow"),
    "birds": ("birds", "a flock of birds", "flying birds"),
    "balloon": ("hot air balloon", "a hot-air balloon", "a balloon"),
    "boat": ("a sailing boat", "a sailboat", "a boat", "a small boat"),
    "lighthouse": ("a lighthouse", "lighthouse", "a striped lighthouse"),
    "tree": ("a lone tree", "a tree", "a single tree", "a lonely tree"),
    "cabin": ("a cabin", "a log cabin", "a hut", "a small house", "a cottage"),
    "castle": ("a castle", "castle", "an old castle"),
}
PALETTE_WORDS: dict[str, tuple[str, ...]] = {
    "pastel": ("pastel colours", "pastel colors", "in soft pastel"),
    "violet": ("violet colours", "purple colors", "in violet"),
    "autumn": ("autumn colours", "autumn colors", "in autumn"),
    "teal": ("teal colours", "turquoise colors", "in teal"),
}
OPENINGS = (
    "",
    "",
    "",
    "",
    "",
    "a painting of ",
    "a landscape with ",
    "a beautiful view of ",
    "an illustration of ",
    "a picture of ",
    "a photo of ",
)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _unseen_word(rng: np.random.Generator) -> str:
    letters = rng.integers(0, 26, int(rng.integers(3, 9)))
    return "".join(chr(97 + int(letter)) for letter in letters)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many captions of a scene; now and then it leaves something out or holds a word that means nothing."""
    adjective, extras = "", []
    if scene.weather != "clear" or rng.random() < 0.35:
        if rng.random() < 0.5:
            adjective = _pick(rng, WEATHER_ADJECTIVES[scene.weather]) + " "
        else:
            extras.append(_pick(rng, WEATHER_WORDS[scene.weather]))
    extras += [_pick(rng, THING_WORDS[thing]) for thing in scene.things]
    if scene.palette != "natural":
        extras.append(_pick(rng, PALETTE_WORDS[scene.palette]))
    rng.shuffle(extras)
    if extras and rng.random() < 0.06:
        extras.pop()
    terrain, time = _pick(rng, TERRAIN_WORDS[scene.terrain]), _pick(rng, TIME_WORDS[scene.time])
    article = re.match(r"(a|an|the) ", terrain)
    bare = terrain[article.end() :] if article else terrain
    start = f"{article.group(1)} {adjective}{bare}" if article and adjective else f"{adjective}{terrain}"
    start = re.sub(r"\ban (?=[^aeiou])", "a ", start)
    opening = _pick(rng, OPENINGS)
    style = rng.random()
    if style < 0.70 or not extras:
        text = ", ".join([f"{opening}{start} {time}", *extras])
    elif style < 0.85:
        text = ", ".join([f"{opening}{start}", time.split(" ", 1)[1] if rng.random() < 0.5 else time, *extras])
    else:
        text = ", ".join([f"{opening}{start} {time} with {' and '.join(extras)}"])
    if rng.random() < 0.06:
        words = text.split(" ")
        words.insert(int(rng.integers(len(words) + 1)), _unseen_word(rng))
        text = " ".join(words)
    return text


def vocabulary() -> list[str]:
    """Every word (and punctuation mark) that captions are made of."""
    phrases = [
        phrase
        for table in (TERRAIN_WORDS, TIME_WORDS, WEATHER_ADJECTIVES, WEATHER_WORDS, THING_WORDS, PALETTE_WORDS)
        for options in table.values()
        for phrase in options
    ]
    text = " ".join([*phrases, *OPENINGS, "with and , . -"])
    return sorted(set(re.findall(r"[a-z]+|[^\sa-z]", text)))
