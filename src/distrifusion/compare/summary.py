"""From the numbers of single pictures to those of a case, and what is printed of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .frechet import NUM_FEATURES
from .measures import HIGHEST_PSNR, Metric

SEAM_COLUMNS = {"seam": "seam", "seam_relative": "seam ratio"}


def describe(metrics: Iterable[Metric]) -> tuple[list[Metric], dict[str, str]]:
    """The metrics that can be computed here, and why the others cannot, by name."""
    missing = {metric: metric.missing() for metric in metrics}
    left_out = {metric.name: reason for metric, reason in missing.items() if reason is not None}
    return [metric for metric, reason in missing.items() if reason is None], left_out


def case_summary(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The means of one case over its pictures, in plain values for JSON.

    A mean is None where a picture has no such value. ``seam_relative`` is the ratio of the means and no mean of ratios,
    which one picture with a smooth sky at the border would rule.
    """
    means = {name: _mean([result.get(name) for result in results]) for name in (*names, "seam", "seam_reference")}
    seam, before = means["seam"], means["seam_reference"]
    means["seam_relative"] = seam / before if seam is not None and before is not None else None
    psnr = [result["psnr"] for result in results if result.get("psnr") is not None]
    drifts = [result["drift"] for result in results if result.get("drift")]
    return {
        "num_pictures": len(results),
        "num_identical": sum(bool(result["is_identical"]) for result in results),
        "means": means,
        "psnr_least": min(psnr, default=None),
        "drift": np.mean(drifts, axis=0).tolist() if drifts else [],
    }


def notes_of(found: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers must know beside them."""
    notes = [
        f"{' and '.join(name for name, _ in group)} left out: {reason}"
        for reason, group in groupby(found["left_out"].items(), lambda item: item[1])
    ]
    for name in found["metrics"]:
        if any(name not in result for row in found["cases"] for result in row["results"]):
            notes.append(f"{name} is not known of pictures that were measured before it was installed")
    counts = [row["num_pictures"] for row in found["cases"]]
    if any(row.get("frechet") is not None for row in found["cases"]) and min(counts) < NUM_FEATURES:
        notes.append(
            f"Frechet distances from {min(counts)} pictures on {NUM_FEATURES} features are biased: they rank the rows "
            "of this table, and no other"
        )
    if any(row["num_identical"] for row in found["cases"]):
        notes.append(f"identical pictures count as {HIGHEST_PSNR:g} dB")
    return notes


def columns(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, heading) of the numbers that tables show, the empty ones left out."""
    named = [(name, about["title"]) for name, about in found["metrics"].items() if name != "psnr_8bit"]
    at = next((i for i, (name, _) in enumerate(named) if name == "psnr"), -1)
    if at >= 0:
        named.insert(at + 1, ("psnr_least", "least"))
    named += [*SEAM_COLUMNS.items(), ("frechet", "Frechet"), ("drift_last", "drift")]
    return [(key, title) for key, title in named if any(value_of(row, key) is not None for row in found["cases"])]


def value_of(row: Mapping[str, Any], key: str) -> float | None:
    """A number of a case by the key that `columns` gave."""
    if key == "drift_last":
        return float(row["drift"][-1]) if row["drift"] else None
    value = row["means"].get(key, row.get(key))
    return None if value is None else float(value)


def text_of(key: str, value: float | None) -> str:
    """A number as tables write it."""
    if value is None:
        return "-"
    if key.startswith("psnr"):
        return f"{value:.2f}"
    if key == "drift_last":
        return f"{value:.2g}"
    if key.startswith("seam"):
        return f"{value:.2f}"
    return f"{value:.4f}" if key != "frechet" else f"{round(value, 3):.3g}"


def table(found: Mapping[str, Any]) -> Any:
    """The cases as a rich table, without the notes."""
    from rich.table import Table

    settings = found["settings"]
    grid = Table(title=title_of(settings))
    shown = columns(found)
    has_steps = any(row.get("steps") for row in found["cases"])
    grid.add_column("case")
    for heading in [*(["steps"] if has_steps else []), "pictures", *(title for _, title in shown)]:
        grid.add_column(heading, justify="right")
    for row in found["cases"]:
        cells = [str(row["steps"])] if has_steps else []
        cells += [str(row["num_pictures"]), *(text_of(key, value_of(row, key)) for key, _ in shown)]
        grid.add_row(row["title"], *cells)
    return grid


def title_of(settings: Mapping[str, Any]) -> str:
    """One line of what was compared."""
    if "folders" in settings:
        reference, other = (Path(folder).name for folder in settings["folders"])
        return f"{other} against {reference}"
    size = f"{settings['width']} x {settings['height']}" if settings["height"] else "the model's own size"
    guidance = "the model's own guidance"
    if settings["guidance_scale"] is not None:
        guidance = f"guidance {settings['guidance_scale']:g}"
    return f"{settings['model']}, {size}, {guidance}, seeds from {settings['seed']}, {settings['dtype']}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
