"""Two folders of PNGs, whoever made them: the second is measured against the first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import ConfigError
from ..geometry import Split
from . import frechet
from .measures import metrics
from .output import Output
from .summary import case_summary, describe, notes_of

_UNIT = 8  # pixels per row of latent of the common VAEs


def read_picture(path: Path) -> np.ndarray:
    """A picture file as float32 ``[H, W, 3]`` in 0..1.

    Raises:
        ConfigError: no picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"), np.float32) / 255
    except (OSError, ValueError, SyntaxError) as error:  # the last is what Pillow raises on some broken PNGs
        raise ConfigError(f"{str(path)!r} cannot be read as a picture: {error}") from error


def pairs(reference: Path, other: Path) -> list[str]:
    """The names of the PNGs that both folders hold, all of equal size by pairs.

    Raises:
        ConfigError: no folder, no PNG, a name that only one of them holds, or a pair of unequal sizes.
    """
    from PIL import Image

    names: list[set[str]] = []
    for folder in (reference, other):
        if not folder.is_dir():
            raise ConfigError(f"folder {str(folder)!r} is not there")
        names.append({path.name for path in folder.glob("*.png")})
        if not names[-1]:
            raise ConfigError(f"folder {str(folder)!r} holds no PNG")
    for folder, own, others in ((reference, names[0], names[1]), (other, names[1], names[0])):
        if own - others:
            name = min(own - others)
            raise ConfigError(f"{name!r} is in {str(folder)!r} only: both folders must hold the same names")
    for name in sorted(names[0]):
        sizes = []
        for folder in (reference, other):
            try:
                with Image.open(folder / name) as image:
                    sizes.append(image.size)
            except (OSError, SyntaxError) as error:
                raise ConfigError(f"{str(folder / name)!r} cannot be read as a picture: {error}") from error
        if sizes[0] != sizes[1]:
            (width, height), (other_width, other_height) = sizes
            raise ConfigError(
                f"{name!r} is {width} x {height} in {str(reference)!r} and {other_width} x {other_height} in "
                f"{str(other)!r}: pictures of one name must have one size"
            )
    return sorted(names[0])


def compare_folders(
    reference: Path,
    other: Path,
    output: Output,
    *,
    world: int | None = None,
    split: str = "rows",
    show: int = 6,
    on_progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Measure the PNGs of ``other`` against those of ``reference``, write the report, return what is in metrics.json.

    ``world`` says into how many patches the pictures were cut, if they were: even ones of whole latent rows, 8 pixels
    each. Without it there is no seam score.

    Raises:
        ConfigError: the folders do not match, see `pairs`.
    """
    from .run import measure, write_folder

    names = pairs(reference, other)
    settings = {"folders": [str(reference), str(other)], "world": world, "split": split}
    able, left_out = describe(metric for metric in metrics() if metric.name != "psnr_8bit")  # all is 8 bits here
    try:
        output.open(settings)
        computes = {metric.name: metric.load() for metric in able}
        features = frechet.Features() if frechet.missing() is None and len(names) > 1 else None
        if features is None:
            left_out["frechet"] = frechet.missing() or "it takes two pictures or more"
        rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        results = []
        for index, name in enumerate(names):
            on_progress("measuring", index, len(names))
            one, picture = read_picture(reference / name), read_picture(other / name)
            side = picture.shape[0 if split == "rows" else 1]
            patches = Split.even(side // _UNIT, world).sizes if world is not None else ()
            results.append({"index": index, "name": name, **measure(computes, picture, one, patches, split)})
            results[-1]["patches"] = list(patches)
            if features is not None:
                rows[0].append(features([picture])[0])
                rows[1].append(features([one])[0])
        row = {
            "name": other.name,
            "title": other.name,
            "steps": None,
            "split": split,
            "patches": results[0]["patches"],
            "pictures": str(other),
            "reference": str(reference),
            **case_summary(results, [metric.name for metric in able]),
            "results": results,
        }
        if features is not None:
            row["frechet"] = frechet.frechet_distance(np.stack(rows[0]), np.stack(rows[1]))
        found: dict[str, Any] = {
            "distrifusion": __version__,
            "settings": settings,
            "metrics": {metric.name: {"title": metric.title, "better": metric.better} for metric in able},
            "left_out": left_out,
            "cases": [row],
        }
        found["notes"] = notes_of(found)
        write_folder(found, output.part, show)
        output.finish([])
    except BaseException:
        output.discard()
        raise
    return found
