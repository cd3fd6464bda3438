"""What of ``displaced`` costs the picture: the figures of docs/quality.md on which values, levels and steps matter.

``OMP_NUM_THREADS=1 python benchmarks/staleness.py``: paints the first prompts of the bundled list with the bundled
model, displaced, but with some of what is one step old of this step instead, and prints the mean PSNR against one
device. A seam that the synchronous steps leave out of the slots is exchanged at once in every later step, so that is
all it takes to make a kind of value, or a level of the model, exact while everything else is stale.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from torch import Tensor

from distrifusion import strategies
from distrifusion.checkpoint import find
from distrifusion.comm.slots import Slots
from distrifusion.compare.measures import PSNR
from distrifusion.compare.paint import Studio
from distrifusion.compare.plan import Plan, cases_for, read_prompts
from distrifusion.config import ParallelConfig
from distrifusion.exchange import Exchange, Fresh
from distrifusion.strategies.base import State
from distrifusion.strategies.patch import Displaced

IsFresh = Callable[[str, str], bool]
"""(name of the seam, kind) -> whether it is exchanged at once."""

KINDS = {"halo": "halos", "context": "keys and values", "moments": "moments of group norm"}
NUM_LEVELS = 3  # of the bundled model


def level_of(name: str) -> int:
    """The level of a U-Net's module, 0 at full size; what leads down or up counts to where it begins."""
    part, _, rest = name.partition(".")
    if part == "mid_block":
        return NUM_LEVELS - 1
    if part == "down_blocks":
        return int(rest[0])
    return NUM_LEVELS - 1 - int(rest[0]) if part == "up_blocks" else 0


class SomeSlots(Slots):
    """Slots that leave some seams out."""

    def __init__(self, comm: Any, is_fresh: IsFresh) -> None:
        super().__init__(comm)
        self._is_fresh = is_fresh

    def keep(self, key: str, outgoing: Any, received: Mapping[int, Tensor], **more: Any) -> None:
        """See Slots."""
        if not self._is_fresh(key, more.get("kind", "")):
            super().keep(key, outgoing, received, **more)


@dataclass(frozen=True)
class Variant:
    """What is exact in a picture: seams, or all in some steps."""

    title: str
    is_fresh: IsFresh = lambda name, kind: False
    first: int | None = None  # the first displaced step; None: after the warm-up
    stop: int | None = None  # synchronous again from this one on

    def strategy(self, config: ParallelConfig, comm: Any) -> Displaced:
        """In the place of `Displaced`."""
        variant = self

        class Varied(Displaced):
            def start(self) -> State:
                return State(slots=SomeSlots(comm, variant.is_fresh))

            def policy(self, state: State) -> Exchange:
                if variant.stop is not None and state.step >= variant.stop:
                    return Fresh(comm)
                if variant.first is not None and state.step < variant.first:
                    return Fresh(comm, state.slots)
                return super().policy(state)

        return Varied(config, comm)


def variants(steps: int, warmup_steps: int) -> list[Variant]:
    """All that are painted."""
    found = [Variant("all stale")]
    found += [Variant(f"{title} fresh", lambda _, kind, only=kind: kind == only) for kind, title in KINDS.items()]
    found += [Variant(f"{title} alone stale", lambda _, kind, only=kind: kind != only) for kind, title in KINDS.items()]
    for level in range(NUM_LEVELS):
        found.append(Variant(f"level {level} fresh", lambda name, _, only=level: level_of(name) == only))
    for level in range(NUM_LEVELS):
        found.append(Variant(f"level {level} alone stale", lambda name, _, only=level: level_of(name) != only))
    first = warmup_steps + 1
    ends = [first + (steps - first) * part // 3 for part in range(4)]
    for begin, end in pairwise(ends):
        found.append(Variant(f"steps {begin + 1} to {end} alone stale", first=begin, stop=end))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=8, help="prompts")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument("--warmup-steps", type=int, default=2)
    given = parser.parse_args()
    cases = cases_for(["displaced"], [given.world], [given.steps], [given.warmup_steps], ["corrected"], "rows", 1)
    plan = Plan(
        model="bundled",
        checkpoint=find(None),
        prompts=read_prompts(None, None, True, given.limit),
        cases=cases,
        height=given.size,
        width=given.size,
        guidance_scale=2.5,
        seed=0,
        batch=given.limit,
        dtype="float32",
        device="cpu",
    )
    studio, psnr, everyone = Studio(plan), PSNR.load(), range(given.limit)
    truth = studio.alone(cases[0].reference, everyone).pictures
    print(f"{'exact beside':42} {'PSNR dB':>8} {'least':>6}")
    for variant in variants(given.steps, given.warmup_steps):
        strategies._STRATEGIES["displaced"] = variant.strategy  # type: ignore[assignment]
        found = [psnr(*pair) for pair in zip(studio.spread(cases[0], everyone).pictures, truth, strict=True)]
        values = [value for value in found if value is not None]
        print(f"{variant.title:42} {mean(values):8.2f} {min(values):6.2f}", flush=True)


if __name__ == "__main__":
    main()
