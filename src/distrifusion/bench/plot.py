"""Speed-up over the number of ranks as a picture, one panel per size. Needs matplotlib, which is an extra."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def check_library() -> None:
    """Whether pictures can be drawn here.

    Raises:
        ConfigError: matplotlib is missing; says how it comes in.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'distrifusion[plot]'")


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the rows of `summary` to ``path`` as PNG.

    The bars of error are `Timing.spread` of the speed-up to each side.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = found["bench"]
    sizes = [tuple(size) for size in settings["sizes"]]
    figure = Figure(figsize=(0.8 + 4.4 * len(sizes), 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which would look for a display
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0], sizes, strict=True):
        rows = [row for row in found["cases"] if (row["height"], row["width"]) == size]
        worlds = sorted({row["world"] for row in rows})
        axes.plot([1, worlds[-1]], [1, worlds[-1]], color="0.7", linestyle="--", label="linear")
        for row in rows:
            if row["strategy"] is None and row["threads"] > 1:
                axes.axhline(row["speedup"], color="0.3", linestyle=":", label=f"one process, {row['threads']} threads")
        at_once = [row for row in rows if row["strategy"] is None and row["world"] > 1]
        if at_once:
            worlds_of, heights = ([row[name] for row in at_once] for name in ("world", "speedup"))
            axes.plot([1, *worlds_of], [1, *heights], color="0.5", linestyle="-.", label="a step on each rank")
        for row in rows:
            if row["strategy"] is None and (row["compiled"] or row["products"]):
                axes.plot([1], [row["speedup"]], color="0.3", marker="x", linestyle="", label=row["case"])
        for name in dict.fromkeys(row["case"] for row in rows if row["strategy"] is not None):
            # One rank is the bare model for every strategy, and is measured for the first alone.
            alone = [row for row in rows if row["strategy"] is not None and row["world"] == 1]
            own = [row for row in rows if row["case"] == name and row["world"] > 1]
            line = own if own and own[0]["compiled"] else alone[:1] + own
            heights = [row["speedup"] for row in line]
            errors = [row["speedup"] * row["spread"] for row in line]
            axes.errorbar([row["world"] for row in line], heights, errors, marker="o", capsize=3, label=name)
        axes.set_title(f"{size[0]} x {size[1]} px")
        axes.set_xlabel("ranks")
        axes.set_xticks(worlds)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("speed-up over the bare model on one rank")
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(f"{settings['model']}, batch {settings['batch']}, {settings['dtype']}, {settings['device']}")
    figure.savefig(path, format="png", dpi=150)
