"""``report.html``: one file with everything in it, for a desk and for a phone."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .curve import curves
from .seam import borders_of
from .summary import columns, text_of, title_of, value_of

SIDE = 384  # pixels of the longer side of an inline picture
GAIN = 4.0  # of difference maps: a difference of a quarter of the scale is as bright as it gets

# matplotlib's inferno, at eighths.
_INFERNO = np.array(
    [
        *([0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85]),
        *([227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164]),
    ],
    np.float64,
)


def write_report(found: Mapping[str, Any], folder: Path, show: int) -> None:
    """Write ``folder/report.html`` from the object of metrics.json, with the pictures of the first ``show`` prompts."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    loader = PackageLoader("distrifusion", "compare")
    # Everything is escaped: prompts and names of folders are other people's text.
    environment = Environment(loader=loader, autoescape=select_autoescape(), undefined=StrictUndefined)
    template = environment.get_template("report.html")
    (folder / "report.html").write_text(template.render(page(found, folder, show)), encoding="utf-8")


def page(found: Mapping[str, Any], folder: Path, show: int) -> dict[str, Any]:
    """What the template is given."""
    shown = columns(found)
    groups = [{"steps": steps, "rows": list(rows)} for steps, rows in groupby(found["cases"], lambda row: row["steps"])]
    num_pictures = max(row["num_pictures"] for row in found["cases"])
    return {
        "title": title_of(found["settings"]),
        "settings": _settings(found),
        "notes": found["notes"],
        "headings": [heading for _, heading in shown],
        "tables": [
            {
                "steps": group["steps"],
                "rows": [
                    {
                        "title": row["title"],
                        "cells": [text_of(key, value_of(row, key)) for key, _ in shown],
                        "best": [_is_best(found, group, row, key) for key, _ in shown],
                    }
                    for row in group["rows"]
                ],
                "curves": curves([(row["title"], row["drift"]) for row in group["rows"]]),
            }
            for group in groups
        ],
        "scenes": [
            _scene(found, folder, group["rows"], index) for index in range(min(show, num_pictures)) for group in groups
        ],
        "num_shown": min(show, num_pictures),
        "num_pictures": num_pictures,
        "gain": f"{GAIN:g}",
        "has_borders": any(len(row["patches"]) > 1 for row in found["cases"]),
    }


def _settings(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    hidden = ("prompts", "folders")
    listed = [(name, str(value)) for name, value in found["settings"].items() if name not in hidden]
    listed += (
        [("reference, pictures", " , ".join(found["settings"]["folders"]))] if "folders" in found["settings"] else []
    )
    listed += [(name, str(found[name])) for name in ("distrifusion", "torch") if name in found]
    return [(name.replace("_", " "), value) for name, value in listed if value != "None"]


def _is_best(found: Mapping[str, Any], group: Mapping[str, Any], row: Mapping[str, Any], key: str) -> bool:
    """Whether a number is the best of its column, ties included; a column of one row has no best."""
    mine = value_of(row, key)
    values = [value for other in group["rows"] if (value := value_of(other, key)) is not None]
    if mine is None or len(values) < 2 or key == "seam":  # which says as much of the picture as of the case
        return False
    if key == "seam_relative":
        best = min(values, key=lambda value: abs(value - 1))
    else:
        about = found["metrics"].get(key, {"better": "higher" if key == "psnr_least" else "lower"})
        best = max(values) if about["better"] == "higher" else min(values)
    return text_of(key, mine) == text_of(key, best)


def _scene(found: Mapping[str, Any], folder: Path, rows: list[Any], index: int) -> dict[str, Any]:
    from .folders import read_picture

    settings, result = found["settings"], rows[0]["results"][index]
    base = Path() if "folders" in settings else folder
    reference = read_picture(base / rows[0]["reference"] / result["name"])
    figures = []
    for row in rows:
        numbers = row["results"][index]
        picture = read_picture(base / row["pictures"] / numbers["name"])
        side = picture.shape[0 if row["split"] == "rows" else 1]
        figures.append(
            {
                "title": row["title"],
                "facts": _facts(found, numbers),
                "picture": _inline(picture),
                "heat": _inline(heat_map(picture, reference)),
                "split": row["split"],
                "borders": [f"{100 * border / side:.3f}" for border in borders_of(tuple(row["patches"]), side)],
            }
        )
    return {
        "title": settings["prompts"][index] if "prompts" in settings else result["name"],
        "seed": settings["seed"] + index if "seed" in settings else None,
        "steps": rows[0]["steps"],
        "reference": _inline(reference),
        "reference_title": "one device" if "prompts" in settings else Path(rows[0]["reference"]).name,
        "figures": figures,
        "height": reference.shape[0],
        "width": reference.shape[1],
    }


def _facts(found: Mapping[str, Any], numbers: Mapping[str, Any]) -> str:
    if numbers["is_identical"]:
        return "identical"
    chosen = [("psnr", "dB"), ("lpips_alex" if "lpips_alex" in found["metrics"] else "ssim", "")]
    parts = []
    for name, unit in chosen:
        if numbers.get(name) is not None:
            label = found["metrics"][name]["title"].split(" dB")[0]
            parts.append(f"{label} {text_of(name, numbers[name])}{' ' + unit if unit else ''}")
    return " · ".join(parts)


def heat_map(picture: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Where two pictures ``[H, W, 3]`` differ: the largest difference of the three colours, times `GAIN`, in colour."""
    share = np.clip(np.abs(picture - reference).max(axis=2) * GAIN, 0, 1) * (len(_INFERNO) - 1)
    below = np.minimum(share.astype(int), len(_INFERNO) - 2)
    part = (share - below)[..., None]
    mapped: np.ndarray = (_INFERNO[below] * (1 - part) + _INFERNO[below + 1] * part) / 255
    return mapped


def _inline(picture: np.ndarray) -> str:
    """The picture as a data URI, small enough that a page of many loads on a phone."""
    from PIL import Image

    image = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, format="WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
