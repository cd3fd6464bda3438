"""The result of a run: one JSON object, and the table that shows it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from ..metrics import human_bytes
from .plan import Case, Plan
from .timing import Timing


def summary(plan: Plan, timings: Sequence[Timing], wire: str, products: str) -> dict[str, Any]:
    """The one JSON object: medians, and ratios to the bare model of the same run and size.

    ``wire`` is what the ranks talk over, ``products`` whose matrix products they take. ``speedup_over_threads`` is over
    one process with all threads, None where that was no case of its own. Where ranks have a step each, all of these
    count.
    """
    settings = plan.as_dict()
    settings.pop("cases")
    rows = []
    for timing in timings:
        bare = [other for other in timings if other.size == timing.size and other.case.strategy is None]
        single = next(other for other in bare if other.case == Case(None))
        threaded = next((other for other in bare if other.case.threads > 1), None)
        pace = timing.pace / (timing.case.world if timing.case.is_at_once else 1)
        rows.append(
            {
                "case": timing.case.name,
                **asdict(timing.case),
                "height": timing.size[0],
                "width": timing.size[1],
                "seconds_per_step": round(timing.pace, 5),
                "spread": round(timing.spread, 4),
                "speedup": round(single.pace / pace, 3),
                "speedup_over_threads": round(threaded.pace / pace, 3) if threaded else None,
                "share_of_linear": round(single.pace / pace / max(timing.case.world, timing.case.threads), 3),
                "cpu_seconds_per_step": round(median(timing.cpu_seconds), 5),
                "waited_per_step": round(median(timing.waited), 5),
                "messages_per_step": timing.messages,
                "bytes_per_step": timing.num_bytes,
                "slot_bytes": timing.slot_bytes,
                "peak_memory_per_rank": timing.peaks,
            }
        )
    machine = {"torch": torch.__version__, "cpus": os.cpu_count(), "wire": wire, "products": products}
    return {"bench": settings, **machine, "cases": rows}


def table(found: dict[str, Any]) -> Any:
    """The rows of `summary` as a rich table."""
    from rich.table import Table

    settings = found["bench"]
    sizes = ", ".join(f"{height} x {width}" for height, width in settings["sizes"])
    where = f"{settings['device']} over {found['wire']}, products of {found['products']}"
    title = f"{settings['model']}, {sizes} px, batch {settings['batch']}, {settings['dtype']}, {where}"
    grid = Table(title=title)
    several = len(settings["sizes"]) > 1
    columns = ["case", *(["size"] if several else []), "ranks", "s/step", "spread", "x one rank", "x all threads"]
    columns += ["of linear", "CPU s", "waits s", "messages", "bytes", "slots", "memory"]
    for name in columns:
        grid.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    size = None
    for row in found["cases"]:
        if size not in (None, (row["height"], row["width"])):
            grid.add_section()
        size = row["height"], row["width"]
        threaded, peaks = row["speedup_over_threads"], row["peak_memory_per_rank"]
        grid.add_row(
            row["case"],
            *([f"{size[0]} x {size[1]}"] if several else []),
            str(row["world"]),
            f"{row['seconds_per_step']:.3f}",
            f"{row['spread']:.1%}",
            f"{row['speedup']:.2f}",
            f"{threaded:.2f}" if threaded is not None else "-",
            f"{row['share_of_linear']:.0%}",
            f"{row['cpu_seconds_per_step']:.3f}",
            f"{row['waited_per_step']:.3f}",
            f"{row['messages_per_step']:g}",
            human_bytes(row["bytes_per_step"]),
            human_bytes(row["slot_bytes"]),
            human_bytes(max(peaks)) if None not in peaks else "-",
        )
    return grid
