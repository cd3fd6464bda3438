"""One comparison from plan to folder: references first, then the cases, spread over worker processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..errors import DistrifusionError
from . import frechet
from .measures import Compute, metrics
from .output import Output
from .paint import Studio
from .plan import Case, Plan, as_facts
from .pool import Pool
from .report import write_report
from .seam import borders_of, seam_score
from .store import Store
from .summary import case_summary, describe, notes_of

OnProgress = Callable[[str, int, int], None]
"""Called with (what is done now, units done, units in all); a unit is one denoising step of one picture."""


@dataclass(frozen=True)
class Task:
    """Pictures that one worker paints in one call."""

    case: Case
    indices: tuple[int, ...]

    @property
    def cost(self) -> int:
        """Denoising steps, over all pictures."""
        return self.case.steps * len(self.indices)


class Desk:
    """One worker: paints a task, measures its pictures, keeps the results, and answers with the task."""

    def __init__(self, plan: Plan, folder: Path, names: Sequence[str]) -> None:
        self._studio = Studio(plan)
        self._store = Store(folder)
        self._names = names
        self._computes: dict[str, Compute] = {}

    def __call__(self, task: Task) -> Task:
        """Do ``task``."""
        if task.case.strategy is None:
            painting = self._studio.alone(task.case, task.indices)
            _check_finite(task, painting.pictures)
            for place, index in enumerate(task.indices):
                self._store.put_reference(task.case, index, painting.pictures[place], painting.latents[:, place])
            return task
        if not self._computes:
            self._computes = {metric.name: metric.load() for metric in metrics() if metric.name in self._names}
        painting = self._studio.spread(task.case, task.indices)
        _check_finite(task, painting.pictures)
        for place, index in enumerate(task.indices):
            picture, latents = painting.pictures[place], painting.latents[:, place]
            reference, reference_latents = self._store.reference(task.case.reference, index)
            numbers = {
                "index": index,
                "name": f"{index:03d}.png",
                **measure(self._computes, picture, reference, painting.patches, task.case.split),
                "drift": drift(latents, reference_latents),
                "patches": list(painting.patches),
            }
            self._store.put_result(task.case, index, picture, numbers)
        return task


def _check_finite(task: Task, pictures: np.ndarray) -> None:
    for index, picture in zip(task.indices, pictures, strict=True):
        if not np.isfinite(picture).all():
            raise DistrifusionError(
                f"{task.case.title} paints values that are no numbers (prompt {index}): another --dtype may help"
            )


def measure(
    computes: Mapping[str, Compute], picture: np.ndarray, reference: np.ndarray, patches: tuple[int, ...], split: str
) -> dict[str, Any]:
    """All numbers of one picture against its reference, both float32 ``[H, W, 3]`` in 0..1."""
    borders = borders_of(patches, picture.shape[0 if split == "rows" else 1])
    return {
        "is_identical": bool(np.array_equal(picture, reference)),
        **{name: compute(picture, reference) for name, compute in computes.items()},
        "seam": seam_score(picture, borders, split),
        "seam_reference": seam_score(reference, borders, split),
    }


def drift(latents: np.ndarray, reference: np.ndarray) -> list[float]:
    """``|x - y| / |y|`` after each step, of latents x and the reference's y, ``[steps, C, h, w]``."""
    steps = len(reference)
    apart = np.linalg.norm((latents - reference).reshape(steps, -1).astype(np.float64), axis=1)
    whole = np.linalg.norm(reference.reshape(steps, -1).astype(np.float64), axis=1)
    return [float(value) for value in apart / whole]


def run(plan: Plan, output: Output, jobs: int, show: int, on_progress: OnProgress) -> dict[str, Any]:
    """Paint what is not there yet, measure, write the folder, and return what is in its metrics.json.

    Args:
        plan: what to compare.
        output: where to.
        jobs: worker processes; 1: this process.
        show: prompts whose pictures the report shows.
        on_progress: told of what is done.

    Raises:
        DistrifusionError: a model that does not load or cannot be spread, or a worker that is gone. What is done is
            kept for another run.
    """
    settings = plan.settings()
    try:
        output.open(settings)
        cases = sorted({*plan.cases, *output.cases()}, key=lambda case: case.order)
        able, left_out = describe(metrics())
        _paint(plan, output.store, cases, jobs, [metric.name for metric in able], on_progress)
        rows = []
        for case in cases:
            results = [output.store.result(case, index) for index in range(len(plan.prompts))]
            known = [result for result in results if result is not None]
            rows.append(
                {
                    "name": case.name,
                    "title": case.title,
                    **as_facts(case),
                    "patches": known[0]["patches"],
                    "pictures": f"pictures/{case.name}",
                    "reference": f"pictures/{case.reference.name}",
                    **case_summary(known, [metric.name for metric in able]),
                    "results": known,
                }
            )
        found: dict[str, Any] = {
            "distrifusion": __version__,
            "torch": torch.__version__,
            "settings": settings,
            "metrics": {metric.name: {"title": metric.title, "better": metric.better} for metric in able},
            "left_out": left_out,
            "cases": rows,
        }
        _add_frechet(found, output.part, on_progress)
        found["notes"] = notes_of(found)
        write_folder(found, output.part, show)
        output.finish([*cases, *(case.reference for case in cases)])
    except BaseException:
        output.discard()
        raise
    return found


def write_folder(found: Mapping[str, Any], folder: Path, show: int) -> None:
    """Write ``metrics.json`` and ``report.html`` into ``folder``, whose pictures are there."""
    (folder / "metrics.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_report(found, folder, show)


def _paint(
    plan: Plan, store: Store, cases: Iterable[Case], jobs: int, names: Sequence[str], on_progress: OnProgress
) -> None:
    indices = range(len(plan.prompts))
    wanted = {case: [index for index in indices if store.result(case, index) is None] for case in cases}
    needed: dict[Case, set[int]] = {}
    for case, missing in wanted.items():
        needed.setdefault(case.reference, set()).update(missing)
    before = {
        case: [index for index in sorted(found) if not store.has_reference(case, index)]
        for case, found in needed.items()
    }
    phases = [("one device", _tasks(before, plan.batch)), ("strategies", _tasks(wanted, plan.batch))]
    total, done = sum(task.cost for _, tasks in phases for task in tasks), 0
    if not total:
        return
    if jobs > 1:  # of the workers' libraries, some of which count cores by themselves
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    jobs = min(jobs, max(len(tasks) for _, tasks in phases))
    with Pool(jobs, partial(Desk, plan, store.folder, names)) as pool:
        for text, tasks in phases:
            on_progress(text, done, total)
            for task in pool.run(tasks):
                done += task.cost
                on_progress(text, done, total)


def _tasks(wanted: Mapping[Case, Sequence[int]], batch: int) -> list[Task]:
    """Batch by batch, all cases of one after another, so that workers meet the same prompts again."""
    tasks = [
        Task(case, tuple(indices[start : start + batch]))
        for case, indices in wanted.items()
        for start in range(0, len(indices), batch)
    ]
    return sorted(tasks, key=lambda task: (task.indices[0], -task.cost * task.case.world))


def _add_frechet(found: dict[str, Any], folder: Path, on_progress: OnProgress) -> None:
    """Add the Frechet distance of each case whose pictures, and whose reference's, are in ``folder``."""
    reason = frechet.missing()
    if reason is not None:
        found["left_out"]["frechet"] = reason
        return
    if all(row["num_pictures"] < 2 for row in found["cases"]):
        found["left_out"]["frechet"] = "it takes two pictures or more"
        return
    features, known = frechet.Features(), {}
    names = {name: row["num_pictures"] for row in found["cases"] for name in (row["reference"], row["pictures"])}
    for place, name in enumerate(names):
        on_progress("Frechet features", place, len(names))
        known[name] = features(_pictures(folder / name))
    for row in found["cases"]:
        row["frechet"] = frechet.frechet_distance(known[row["pictures"]], known[row["reference"]])


def _pictures(folder: Path) -> Iterable[np.ndarray]:
    from .folders import read_picture

    for path in sorted(folder.glob("*.png")):
        yield read_picture(path)
